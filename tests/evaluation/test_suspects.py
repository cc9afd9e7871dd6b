"""Near-duplicates and doubtful labels: planted ones are found, others are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from vlprompt.data.known.table import PHOTOGRAPHS
from vlprompt.data.reading import ImageReader
from vlprompt.evaluation.suspects import cross_validated, doubtful_labels, label_issues, near_duplicates

CHANGES = {
    "smaller": lambda image: image.resize((image.width // 2, image.height // 2)),
    "mirrored": ImageOps.mirror,
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "same": lambda image: image,
}


@pytest.fixture(scope="module")
def photographs() -> list[Path]:
    return sorted((PHOTOGRAPHS / "train").rglob("*.jpg"))


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_are_found(change: str, photographs: list[Path], tmp_path: Path) -> None:
    copied = photographs[::40]
    for i, path in enumerate(copied):
        CHANGES[change](Image.open(path).convert("RGB")).save(tmp_path / f"{i}.jpg", quality=60)
    copies = [tmp_path / f"{i}.jpg" for i in range(len(copied))]
    others = sorted((PHOTOGRAPHS / "test").rglob("*.jpg"))[::6]
    with ImageReader() as reader:
        pairs = near_duplicates([*others, *copies], photographs, reader)
    assert {(pair.image, pair.trained_on) for pair in pairs} == set(zip(copies, copied, strict=True))
    values = [pair.correlation for pair in pairs]
    assert values == sorted(values, reverse=True)
    assert all(0.97 < value <= 1 for value in values)


def test_what_is_like_nothing(photographs: list[Path], tmp_path: Path) -> None:
    """The image itself, one colour, and what is no image."""
    for name, colour in (("a.png", (250, 250, 250)), ("b.png", (255, 255, 255))):
        Image.new("RGB", (32, 32), colour).save(tmp_path / name)
    (tmp_path / "c.png").write_bytes(b"no image")
    files = [*photographs[:3], *(tmp_path / name for name in ("a.png", "b.png", "c.png"))]
    with ImageReader() as reader:
        assert near_duplicates(files, files, reader) == []
        assert near_duplicates([], files, reader) == near_duplicates(files, [], reader) == []


def case(n: int, c: int) -> tuple[Tensor, Tensor]:
    i, k = torch.arange(n, dtype=torch.double)[:, None], torch.arange(c, dtype=torch.double)
    labels = torch.arange(n) % c
    p = (3 * torch.sin(12.9898 * i + 78.233 * k)).exp() + 6 * (labels[:, None] == k)
    return p / p.sum(1, keepdim=True), labels


@pytest.mark.parametrize(
    ("n", "c", "found"),
    [
        (
            60,
            4,
            [19, 5, 12, 28, 35, 58, 56, 33, 14, 26, 3, 21, 44, 51, 47, 17, 40, 0, 30, 7, 10, 29, 11, 36, 18, 55, 2, 20],
        ),
        (45, 3, [12, 27, 42, 41, 26, 11, 21, 6, 36, 32, 17]),
        (30, 2, [12, 19, 26, 3]),
        (
            64,
            8,
            [
                44,
                35,
                14,
                21,
                58,
                51,
                30,
                28,
                5,
                49,
                60,
                7,
                19,
                37,
                42,
                46,
                0,
                33,
                1,
                12,
                17,
                62,
                3,
                23,
                8,
                56,
                53,
                26,
                2,
                4,
                24,
                16,
                39,
                55,
                40,
                6,
                63,
                9,
                13,
                18,
                20,
                61,
                11,
                15,
            ],
        ),
    ],
)
def test_label_issues_are_those_of_cleanlab(n: int, c: int, found: list[int]) -> None:
    """cleanlab 2.9.0: find_label_issues(filter_by="confident_learning", return_indices_ranked_by="self_confidence")."""
    assert label_issues(*case(n, c)) == found


def clusters(n: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    x = 8 * np.eye(8)[labels] + rng.normal(size=(n, 8))
    return torch.from_numpy(x), torch.from_numpy(labels)


def test_probabilities_are_of_the_other_folds() -> None:
    x, y = clusters(60, 3)
    p = cross_validated(x, y)
    assert p.sum(1) == pytest.approx(torch.ones(60), abs=1e-9)
    held = torch.arange(60) // 3 % 5 == 2  # of each class the j-th image, j mod 5 = 2
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(x[~held].numpy(), y[~held].numpy())
    np.testing.assert_allclose(p[held].numpy(), model.predict_proba(x[held].numpy()), rtol=0, atol=1e-12)


def test_planted_labels_are_found() -> None:
    x, y = clusters(200, 4)
    planted = [3, 50, 77, 120, 181]
    right = y[planted].clone()
    y[planted] = (y[planted] + 1) % 4
    found, n, agree = doubtful_labels(x.float(), y)
    assert n == 200
    assert dict(found[:5]) == dict(zip(planted, right.tolist(), strict=True))
    assert len(found) < 10
    assert 0.9 < agree <= 0.975


def test_small_classes_are_left_out() -> None:
    x, y = clusters(40, 2)
    y[[0, 2]] = 7  # two images of a class
    found, n, _ = doubtful_labels(x, y)
    assert n == 38
    assert not {0, 2} & {i for i, _ in found}
    assert doubtful_labels(x[:4], torch.tensor([0, 0, 1, 1])) == ([], 0, 0)
    assert doubtful_labels(x[:4], torch.zeros(4, dtype=torch.long)) == ([], 0, 0)
    assert doubtful_labels(x[:6], torch.tensor([0, 1, 0, 1, 0, 1])).looked_at == 6
