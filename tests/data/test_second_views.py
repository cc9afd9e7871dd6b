"""Second views: the same crops, each patch changed on its own; and the learning rates and long tails of DroPLe."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.kit.pictures import CLASSES, make_pictures
from tests.kit.runs import configured, log
from vlprompt.config.schema import OptimConfig, TrainConfig
from vlprompt.data.augment import OPERATIONS, augment_patches
from vlprompt.data.batches import TrainingViews
from vlprompt.data.folders import from_folder
from vlprompt.data.images import Preprocess
from vlprompt.data.reading import ImageReader
from vlprompt.data.splits import Item, Split, long_tail
from vlprompt.errors import ConfigError, DataError
from vlprompt.methods import Batch, Method
from vlprompt.methods.base import Can, MethodConfig
from vlprompt.training.loop import Training
from vlprompt.training.run import train
from vlprompt.training.schedule import learning_rate
from vlprompt.training.watchers import EachEpoch

PREPROCESS = Preprocess(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"), train=8)


def noise(size: int = 32, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def patches(image: Image.Image, side: int) -> np.ndarray:
    """[rows, columns, side, side, 3]"""
    pixels = np.asarray(image)
    n = len(pixels) // side
    return pixels[: n * side, : n * side].reshape(n, side, n, side, 3).swapaxes(1, 2)


# --- patch-wise RandAugment -------------------------------------------------------------------------


def test_each_patch_is_changed_on_its_own() -> None:
    image, other = noise(), noise(seed=1)
    mixed = image.copy()
    mixed.paste(other.crop((8, 8, 16, 16)), (8, 8))
    a, b = (patches(augment_patches(x, 8, np.random.default_rng(3)), 8) for x in (image, mixed))
    same = (a == b).all((2, 3, 4))
    assert not same[1, 1]
    assert same.sum() == 15, "no operation looks beyond its patch"


def test_operations_and_strengths_are_those_of_the_draws() -> None:
    """Over many draws every patch is one of the 13 × 13 results of two operations, and all single ones occur."""
    image = noise(8)
    variants = [(op, factor) for op in OPERATIONS for factor in (0.79, 1.21)]
    possible = {np.asarray(g(f(image, x), y)).tobytes() for f, x in variants for g, y in variants}
    seen = {np.asarray(augment_patches(image, 8, np.random.default_rng(i))).tobytes() for i in range(1500)}
    assert seen <= possible
    assert len(seen) > 0.9 * len(possible)
    assert np.asarray(image).tobytes() in seen


def test_patches_need_not_divide_the_image() -> None:
    image = noise(30)
    changed = augment_patches(image, 8, np.random.default_rng(0))
    assert changed.size == image.size
    assert np.asarray(changed)[:, 24:].tobytes() != np.asarray(image)[:, 24:].tobytes()
    assert augment_patches(image, 8, np.random.default_rng(0), n=0).tobytes() == image.tobytes()


# --- in training views ------------------------------------------------------------------------------


def views(folder: Path, patch_size: int | None, seed: int = 1, workers: int = 0) -> TrainingViews:
    split = from_folder(folder)
    return TrainingViews(
        split.paths("train"),
        split.labels("train"),
        PREPROCESS,
        4,
        seed,
        reader=ImageReader(workers),
        patch_size=patch_size,
    )


def test_plain_views_are_the_same_with_a_second_one_beside_them(pictures: Path) -> None:
    for plain, both in zip(views(pictures, None).epoch(2), views(pictures, 8).epoch(2), strict=True):
        images, second = both.images, both.second_view
        assert torch.equal(plain.images, images)
        assert torch.equal(plain.labels, both.labels)
        assert second.shape == images.shape
        changed = (second != images).any(1).unflatten(2, (4, 8)).unflatten(1, (4, 8)).any(-1).any(2)
        assert 0.8 < changed.float().mean() < 1, "most patches of the same crop are changed"


def test_second_views_depend_on_seed_epoch_and_image_alone(pictures: Path) -> None:
    def seconds(epoch: int, start: int = 0, **more: int) -> list[Tensor]:
        return [batch.second_view for batch in views(pictures, 8, **more).epoch(epoch, start)]

    first = seconds(1)
    assert all(torch.equal(a, b) for a, b in zip(first, seconds(1, workers=3), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first[2:], seconds(1, start=2), strict=True))
    for other in (seconds(2), seconds(1, seed=2)):
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


class SplitsBatches(MethodConfig):
    @property
    def can(self) -> Can:
        return Can.SPLIT_BATCHES


class Watcher(Method):
    """Keeps what it is given."""

    Config = SplitsBatches

    name, needs = "watcher", frozenset({"second_view"})

    def build(self) -> None:
        self.w = torch.nn.Parameter(torch.zeros(1))
        self.slow = torch.nn.Parameter(torch.zeros(1))
        self.batches: list[Batch] = []
        self.lr: list[list[float]] = []
        self.training_: Training | None = None

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        assert self.training_
        self.batches.append(batch)
        self.lr.append([g["lr"] for g in self.training_.optimizer.param_groups])
        return {"w": self.w.sum() + self.slow.sum()}


def watched(backbone, pictures: Path, optim: OptimConfig, epochs: int, accumulate: int = 1, rates=None) -> Watcher:
    method = Watcher(backbone, CLASSES)
    method.rates = rates or {}  # type: ignore[misc]
    training = Training(
        method, views(pictures, method.patch_size), optim, TrainConfig(epochs=epochs, accumulate=accumulate)
    )
    method.training_ = training
    method.logs = []
    assert training.run([EachEpoch(method.logs.append)])
    return method


def test_a_method_that_needs_it_is_given_the_second_view(tiny, pictures: Path) -> None:
    method = watched(tiny, pictures, OptimConfig(), epochs=1, accumulate=2)
    assert method.patch_size == tiny.image_tower.config.patch_size
    expected = list(views(pictures, 8).epoch(0))
    given = [torch.cat([b.second_view for b in method.batches[i : i + 2]]) for i in range(0, len(method.batches), 2)]
    assert len(method.batches) == 2 * len(expected)
    assert all(torch.equal(a, b.second_view) for a, b in zip(given, expected, strict=True))
    assert all(b.frozen_image_features is None for b in method.batches)


# --- learning rate ----------------------------------------------------------------------------------


def test_a_warm_up_of_part_of_an_epoch(tiny, pictures: Path) -> None:
    optim = OptimConfig(lr=0.1, warmup_epochs=0.4, warmup_lr=0.003, min_lr=0.01)
    method = watched(tiny, pictures, optim, epochs=2, rates={"slow": 0.5})
    steps = 6
    second = 0.01 + 0.5 * 0.09 * (1 + math.cos(math.pi / 2))
    assert [lr for lr, _ in method.lr] == pytest.approx([0.003] * 3 + [0.1] * 3 + [second] * steps)
    assert [slow for _, slow in method.lr] == pytest.approx([lr / 2 for lr, _ in method.lr])
    assert [log.lr for log in method.logs] == pytest.approx([0.1, second])


def test_the_cosine_falls_to_its_floor_over_at_least_so_many_epochs() -> None:
    config = OptimConfig(lr=2e-4, warmup_epochs=0.1, warmup_lr=1e-5, min_lr=1e-5, cosine_epochs=20)
    for epochs in (3, 20, 50):
        rates = [learning_rate(e + 0.5, epochs, config) for e in range(epochs)]
        span = max(epochs, 20)
        expected = [1e-5 + 0.5 * 1.9e-4 * (1 + math.cos(math.pi * e / span)) for e in range(epochs)]
        assert rates == pytest.approx(expected, rel=1e-12)
        assert rates[0] == 2e-4
        assert min(rates) > 1e-5
    assert learning_rate(0, 20, config) == learning_rate(0.0999, 20, config) == 1e-5
    assert learning_rate(0.1, 20, config) == learning_rate(0.99, 20, config) == 2e-4


# --- the long tail ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_max", "classes", "ratio", "counts"),
    [
        (100, 2, 10, [100, 10]),  # 100 · 10⁻¹ is a little more than 10 in floating point
        (16, 5, 10, [16, 9, 6, 3, 2]),
        (16, 4, 1, [16, 16, 16, 16]),
        (8, 3, 64, [8, 1, 1]),
        (5, 1, 10, [5]),
        (1000, 4, 1000, [1000, 100, 10, 1]),
    ],
)
def test_long_tail(n_max: int, classes: int, ratio: float, counts: list[int]) -> None:
    assert long_tail(n_max, classes, ratio) == counts


@pytest.mark.parametrize("ratio", [0.5, 0, -1, math.nan])
def test_a_ratio_below_one_is_refused(ratio: float) -> None:
    with pytest.raises(DataError, match=r"imbalance = .* \(allowed: at least 1"):
        long_tail(16, 3, ratio)


def test_a_long_tailed_draw_is_a_part_of_the_balanced_one() -> None:
    names = tuple("abcde")
    items = tuple(Item(f"{name}/{i}.png", label) for label, name in enumerate(names) for i in range(20))
    split = Split(Path("root"), names, items, val=items[::3])
    even, tail, other = split.few_shot(16, 1), split.few_shot(16, 1, imbalance=10), split.few_shot(16, 2, imbalance=10)
    assert [tail.labels("train").count(c) for c in range(5)] == [16, 9, 6, 3, 2]
    assert set(tail.train) < set(even.train)
    assert tail.val == even.val
    assert set(other.train) != set(tail.train)
    assert split.few_shot(16, 1, imbalance=1) == even
    few = Split(Path("root"), names, tuple(i for i in items if i.label < 3 or i.path[2:4] in ("0.", "1.", "2.")))
    assert [few.few_shot(16, 1, imbalance=10).labels("train").count(c) for c in range(5)] == [16, 9, 6, 3, 2]
    with pytest.raises(DataError, match=r"class 'd' has 3 training images, too few for 12 shots \(and 1 more class\)"):
        few.few_shot(16, 1, imbalance=1.6)
    assert few.few_shot(16, 1, True, imbalance=1.6).labels("train").count(3) == 3


def test_a_run_with_a_long_tail(pictures: Path, tmp_path: Path) -> None:
    more = {"data.shots": 8, "data.imbalance": 4, "train.epochs": 1}
    train(configured(pictures, **more), tmp_path / "run")
    rows = json.loads((tmp_path / "run" / "split.json").read_text())["train"]
    assert [sum(name == row[2] for row in rows) for name in CLASSES] == [8, 4, 2]
    assert log(tmp_path / "run")
    train(configured(pictures, **more, seed=2), tmp_path / "other")
    assert json.loads((tmp_path / "other" / "split.json").read_text())["train"] != rows


def test_an_imbalance_needs_shots(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data.imbalance = 4: it needs data.shots, those of the first class$"):
        train(configured(pictures, **{"data.imbalance": 4}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"data.imbalance = 0.5 \(allowed: greater than or equal to 1\)"):
        configured(pictures, **{"data.imbalance": 0.5})
