"""Second views: the same crops, each patch changed on its own; and the learning rates and long tails of DroPLe."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from tests.kit.pictures import CLASSES, make_pictures
from tests.kit.runs import configured, log
from vlprompt.config.schema import OptimConfig, TrainConfig, build_config
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


@pytest.mark.parametrize(("size", "side"), [(64, 8), (70, 16), (96, 32), (33, 7)])
def test_all_patches_at_once_are_what_a_loop_over_them_makes(size: int, side: int) -> None:
    image = np.asarray(noise(size)).copy()
    image[: size // 2] //= 3  # patches of few levels too, and of one
    image[-side:] = 9
    for seed, n in ((0, 2), (1, 2), (2, 5), (3, 0)):
        right = image.copy()
        rows = columns = size // side
        chosen = np.random.default_rng(seed).integers(len(OPERATIONS), size=(rows * columns, n))
        for i in range(rows):
            for j in range(columns):
                where = slice(i * side, (i + 1) * side), slice(j * side, (j + 1) * side)
                for k in chosen[i * columns + j]:
                    right[where] = OPERATIONS[k](right[where][None].copy(), FACTOR)[0]
        changed = augment_patches(Image.fromarray(image), side, np.random.default_rng(seed), n=n)
        np.testing.assert_array_equal(np.asarray(changed), right)


def test_two_operations_are_drawn_and_always_applied() -> None:
    """Over many draws all ordered pairs come, with replacement, and nothing else."""
    image = noise(16)
    pairs = [b(a(np.asarray(image)[None], FACTOR), FACTOR).tobytes() for a in OPERATIONS for b in OPERATIONS]
    seen = {np.asarray(augment_patches(image, 16, np.random.default_rng(i))).tobytes() for i in range(600)}
    assert seen == set(pairs)
    assert len(seen) > 25


FACTOR = 0.1 + 1.8 * 0.7
SAME, AUTOCONTRAST, EQUALIZE, BRIGHTNESS, CONTRAST, COLOR, SHARPNESS = OPERATIONS


def grey(levels: list[list[int]]) -> np.ndarray:
    """A patch of equal channels, [1, side, side, 3]."""
    return np.repeat(np.array(levels, np.uint8)[None, ..., None], 3, -1)


def one(*rgb: int) -> np.ndarray:
    """A patch of one pixel, [1, 1, 1, 3]."""
    return np.array(rgb, np.uint8).reshape(1, 1, 1, 3)


def square(levels: dict[int, int], side: int = 16) -> np.ndarray:
    """A grey patch with so many pixels of each level."""
    return grey(np.repeat(list(levels), list(levels.values())).reshape(side, side).tolist())


BY_HAND = [
    (SAME, one(3, 200, 255), one(3, 200, 255)),
    (BRIGHTNESS, one(10, 100, 200), one(13, 136, 255)),  # 13.6, 136, 272
    (CONTRAST, grey([[10, 20], [30, 40]]), grey([[4, 18], [31, 45]])),  # around 25: 4.6, 18.2, 31.8, 45.4
    (CONTRAST, one(100, 0, 0), one(131, 0, 0)),  # around 11.4, not 29.9: 131.9, −4.1
    (COLOR, one(100, 50, 0), one(121, 53, 0)),  # 1.36 x − 0.36 · 40.75 (not 59.25): 121.33, 53.33, −14.67
    (COLOR, one(0, 0, 200), one(0, 0, 250)),  # grey 59.8 (not 22.8): 272 − 21.5
    (AUTOCONTRAST, np.array([[[[10, 7, 0], [20, 7, 128], [110, 7, 255]]] * 3], np.uint8),
     np.array([[[[0, 7, 0], [25, 7, 128], [255, 7, 255]]] * 3], np.uint8)),  # 25.5; one level, and all, stay
    (EQUALIZE, square({10: 200, 20: 55, 30: 1}), square({0: 200, 200: 55, 255: 1})),  # step 1: pixels that are darker
    (EQUALIZE, square({10: 200, 20: 54, 30: 2}), square({10: 200, 20: 54, 30: 2})),  # step ⌊254 / 255⌋ = 0
    (EQUALIZE, square({9: 256}), square({9: 256})),
    (EQUALIZE, square({10: 64}, 8), square({10: 64}, 8)),
    (EQUALIZE, square({10: 400, 20: 112, 30: 512}, 32), square({0: 400, 200: 112, 255: 512}, 32)),  # (1 + n) // 2
    (SHARPNESS, grey([[0, 0, 0], [0, 26, 0], [0, 0, 0]]), grey([[0, 0, 0], [0, 31, 0], [0, 0, 0]])),  # 10 + 1.36 · 16
    (SHARPNESS, grey([[0, 0, 0], [0, 20, 0], [0, 0, 0]]), grey([[0, 0, 0], [0, 24, 0], [0, 0, 0]])),  # 7.7 is 8
    (SHARPNESS, grey([[9, 9, 9], [9, 9, 9], [9, 9, 9]]), grey([[9, 9, 9], [9, 9, 9], [9, 9, 9]])),
    # What leaves the bytes comes in at the other end: 98 + 1.36 · 157 = 311.5, and 157 − 1.36 · 157 = −56.5.
    (SHARPNESS, grey([[0, 0, 0], [0, 255, 0], [0, 0, 0]]), grey([[0, 0, 0], [0, 55, 0], [0, 0, 0]])),
    (SHARPNESS, grey([[255, 255, 255], [255, 0, 255], [255, 255, 255]]),
     grey([[255, 255, 255], [255, 200, 255], [255, 255, 255]])),
    (SHARPNESS, grey([[1, 200], [7, 30]]), grey([[1, 200], [7, 30]])),  # all of it is border
]  # fmt: skip


@pytest.mark.parametrize(("operation", "patch", "changed"), BY_HAND)
def test_operations_by_hand(operation, patch: np.ndarray, changed: np.ndarray) -> None:
    other = np.random.default_rng(0).integers(0, 256, patch.shape, dtype=np.uint8)
    together = operation(np.concatenate([other, patch, other]), FACTOR)
    np.testing.assert_array_equal(operation(patch, FACTOR), changed)
    np.testing.assert_array_equal(together[1:2], changed)
    np.testing.assert_array_equal(together[2:], operation(other, FACTOR))


@pytest.mark.parametrize("side", [8, 16, 32])
def test_equalize_and_autocontrast_are_pillows(side: int) -> None:
    rng = np.random.default_rng(side)
    for k in range(40):
        patch = rng.integers(k, k + 5 * k + 2, (side, side, 3), dtype=np.uint8)
        for ours, theirs in ((EQUALIZE, ImageOps.equalize), (AUTOCONTRAST, ImageOps.autocontrast)):
            np.testing.assert_array_equal(ours(patch[None], FACTOR)[0], np.asarray(theirs(Image.fromarray(patch))))


def test_what_is_less_than_a_patch_stays() -> None:
    image = noise(30)
    changed, before = (np.asarray(x) for x in (augment_patches(image, 8, np.random.default_rng(0)), image))
    assert changed.shape == before.shape
    assert (changed[:24, :24] != before[:24, :24]).any()
    assert np.array_equal(changed[:, 24:], before[:, 24:])
    assert np.array_equal(changed[24:], before[24:])
    for n, side in ((0, 8), (2, 31)):
        assert augment_patches(image, side, np.random.default_rng(0), n=n).tobytes() == image.tobytes()


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
        # All but where neither operation changes anything: two of the seven never do on 64 pixels, that is 4 in 49.
        assert 0.8 < changed.float().mean() < 1


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
    second = 0.5 * 0.1 * (1 + math.cos(math.pi / 2))
    # 0.4 of 6 steps is 2.4: two whole ones, as the public code takes a tenth of its batches
    assert [lr for lr, _ in method.lr] == pytest.approx([0.003] * 2 + [0.1] * 4 + [second] * steps)
    assert [slow for _, slow in method.lr] == pytest.approx([lr / 2 for lr, _ in method.lr])
    assert [log.lr for log in method.logs] == pytest.approx([0.1, second])


def test_the_cosine_falls_to_its_floor_over_at_least_so_many_epochs() -> None:
    config = OptimConfig(lr=2e-4, warmup_epochs=0.1, warmup_lr=1e-5, min_lr=1e-5, cosine_epochs=20)
    for epochs in (3, 20, 50):
        rates = [learning_rate(e + 0.5, epochs, config) for e in range(epochs)]
        span = max(epochs, 20)
        expected = [max(1e-5, 1e-4 * (1 + math.cos(math.pi * e / span))) for e in range(epochs)]
        assert rates == pytest.approx(expected, rel=1e-12)
        assert rates[0] == 2e-4
        assert (min(rates) == 1e-5) == (epochs >= 20), "a floor, not what is added"
    assert learning_rate(0, 20, config) == learning_rate(0.0999, 20, config) == 1e-5
    assert learning_rate(0.1, 20, config) == learning_rate(0.99, 20, config) == 2e-4


@pytest.mark.parametrize(("steps", "warm"), [(9, 0), (10, 1), (29, 2), (200, 20), (100, 10)])
def test_a_tenth_of_an_epoch_is_whole_steps(steps: int, warm: int) -> None:
    config = build_config("drople").optim
    rates = [learning_rate(step / steps, 20, config, steps) for step in range(steps)]
    assert rates == [1e-5] * warm + [2e-4] * (steps - warm)


def test_adapters_have_a_floor_of_their_own(tiny, pictures: Path) -> None:
    optim = OptimConfig(lr=2e-4, warmup_epochs=0.5, warmup_lr=1e-5, min_lr=1e-5, cosine_epochs=20)
    method = Watcher(tiny, CLASSES)
    method.rates, method.floors = {"slow": 0.1}, {"slow": 0.5}  # type: ignore[misc]
    method.training_ = Training(method, views(pictures, 8), optim, TrainConfig(epochs=20))
    assert method.training_.run()
    by_epoch = method.lr[::6]
    assert by_epoch[0] == pytest.approx([1e-5, 5e-6])
    assert method.lr[3] == pytest.approx([2e-4, 2e-5])
    cosine = [1e-4 * (1 + math.cos(math.pi * e / 20)) for e in range(20)]
    assert by_epoch[1:] == [pytest.approx([max(1e-5, c), max(5e-6, 0.1 * c)]) for c in cosine[1:]]
    assert by_epoch[-1] == pytest.approx([1e-5, 5e-6])


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
        (2, 3, 1e12, [2, 1, 1]),
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


def test_without_shots_classes_are_ranked_by_their_own_frequency() -> None:
    """All images of the most frequent class, a tenth of that of the rarest rank; none is given what it has not."""
    has = {"a": 5, "b": 40, "c": 12, "d": 40, "e": 2}
    items = tuple(Item(f"{name}/{i}.png", label) for label, (name, n) in enumerate(has.items()) for i in range(n))
    split = Split(Path("root"), tuple(has), items, val=items[::7], test=items[::5])
    tail = split.long_tailed(1, 10)
    # ranks b, d, c, a, e; 40 · 10^(−k / 4) is 40, 22.5, 12.6, 7.1, 4
    assert [tail.labels("train").count(c) for c in range(5)] == [5, 40, 12, 23, 2]
    assert (tail.val, tail.test) == (split.val, split.test)
    assert split.long_tailed(1, 10) == tail != split.long_tailed(2, 10)
    assert replace(split, train=items[::-1]).long_tailed(1, 10).train == tail.train
    assert [split.long_tailed(1, 100).labels("train").count(c) for c in range(5)] == [2, 40, 4, 13, 1]


def test_a_run_with_a_long_tail_of_all_images(pictures: Path, tmp_path: Path) -> None:
    config = configured(pictures, "drople", **{"data.imbalance": 4, "train.epochs": 1})
    assert (build_config("drople", "long-tail").data.shots, build_config("drople", "long-tail").data.imbalance) == (
        None,
        10,
    )
    train(config, tmp_path / "run")
    rows = json.loads((tmp_path / "run" / "split.json").read_text())["train"]
    assert [sum(name == row[2] for row in rows) for name in CLASSES] == [8, 4, 2]
    with pytest.raises(ConfigError, match=r"data.imbalance = 0.5 \(allowed: greater than or equal to 1\)"):
        configured(pictures, **{"data.imbalance": 0.5})
