"""Training on evaluation crops, whose frozen features are computed once, and on an epoch's last incomplete batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kit import TINY
from tests.kit.marks import sweep
from tests.kit.pictures import CLASSES, make_pictures
from tests.kit.runs import configured, log
from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.load import load_backbone
from vlprompt.config.schema import OptimConfig, RunConfig, TrainConfig, build_config
from vlprompt.data.batches import Batch, TrainingViews
from vlprompt.data.folders import from_folder
from vlprompt.data.images import load_image
from vlprompt.data.reading import ImageReader
from vlprompt.errors import ConfigError
from vlprompt.methods import Method, find_method
from vlprompt.training.distributed import Processes
from vlprompt.training.loop import Training
from vlprompt.training.prepare import build, find_sources, prepare
from vlprompt.training.run import train


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven training pictures: batches of 4, 4 and 3."""
    folder = make_pictures(tmp_path_factory.mktemp("pictures"), train=4, size=40)
    (folder / "train" / CLASSES[2] / "3.png").unlink()
    return folder


def job(pictures: Path, backbone: Backbone, config: RunConfig) -> tuple[Method, Training]:
    """A run's method and training, without its folder."""
    split = from_folder(pictures)
    sources = find_sources(config, split.class_names, "a photo of a {}.", backbone)
    method = build(config, sources, backbone, "a photo of a {}.", split.class_names).to(backbone.dtype)
    given = split.paths("train"), split.labels("train"), config.seed, ImageReader(0)
    training = prepare(config, sources, method, *given)
    assert training
    return method, training


@pytest.fixture
def towers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(backbone, images) of every call of a frozen image tower by way of ``encode_images``."""
    calls: list[tuple[str, int]] = []
    encode = Backbone.encode_images
    monkeypatch.setattr(Backbone, "encode_images", lambda b, x: calls.append((b.name, len(x))) or encode(b, x))
    return calls


# --- views ------------------------------------------------------------------------------------------


def test_center_views_are_those_of_evaluation(pictures: Path, tiny: Backbone) -> None:
    paths = from_folder(pictures).paths("train")
    whole = torch.stack([tiny.preprocess(load_image(path)) for path in paths])

    def views(**more: Any) -> TrainingViews:
        given = {"reader": ImageReader(0), "center": True, "extra": {"row": torch.arange(11)}, **more}
        return TrainingViews(paths, range(11), tiny.preprocess, 4, 1, **given)

    for epoch in (0, 1):
        for batch in views(drop_last=False).epoch(epoch):
            assert torch.equal(batch.images, whole[batch.extra["row"]])
    for one, other in zip(views(patch_size=8).epoch(0), views(patch_size=8).epoch(1), strict=True):
        assert torch.equal(one.images, whole[one.extra["row"]])
        assert not torch.equal(one.second_view, whole[one.extra["row"]])
        assert sorted(one.extra["row"]) != sorted(other.extra["row"]), "another order"


def test_the_changed_view_alone_changes_from_epoch_to_epoch(pictures: Path, tiny: Backbone) -> None:
    _, training = job(pictures, tiny, configured(pictures, "drople"))
    seen: list[dict[int, Tensor]] = []
    for epoch in (0, 1):
        batches = list(training.views.epoch(epoch))
        assert [len(b.labels) for b in batches] == [4, 4, 3], "the last incomplete batch is kept"
        order = torch.cat([b.images for b in batches]).flatten(1).sum(1).argsort()
        seen.append({i: torch.cat([b.tensors()[name] for b in batches])[order] for i, name in enumerate(FIELDS)})
    plain, changed, v0 = zip(*(s.values() for s in seen), strict=True)
    assert torch.equal(*plain)
    assert torch.equal(*v0)
    assert not any(torch.equal(a, b) for a, b in zip(*changed, strict=True))


FIELDS = ("images", "second_view", "frozen_image_features")


@pytest.mark.parametrize(("method", "calls"), [("drople", 1), ("promptsrc", 1), ("coop", 1), ("ivlp", 0)])
def test_the_frozen_tower_runs_once(method: str, calls: int, pictures: Path, tiny: Backbone, towers: list) -> None:
    config = configured(pictures, method, **{"data.views": "center"})
    _, training = job(pictures, tiny, config)
    assert not towers
    assert training.run()
    assert towers == [(tiny.name, 11)] * calls


def test_text_methods_read_no_pixels_of_center_views(pictures: Path, tiny: Backbone) -> None:
    _, training = job(pictures, tiny, configured(pictures, "coop", **{"data.views": "center"}))
    batches = list(training.views.epoch(0))
    assert all(b.images is None and b.frozen_image_features.shape == (4, tiny.embed_dim) for b in batches)
    assert training.run()


def test_a_run_shares_features_with_its_evaluation(pictures: Path, tmp_path: Path, towers: list) -> None:
    method, _ = train(configured(pictures, "coop", **{"data.views": "center"}), tmp_path / "run")
    assert [n for _, n in towers] == [11, 6], "training images, for steps and accuracy, and val images"
    assert "| views | the evaluation crop of each image |" in (tmp_path / "run" / "README.md").read_text("utf-8")
    assert len(log(tmp_path / "run")) == 3
    assert not method.training


def test_the_teacher_speaks_once(pictures: Path, tiny: Backbone, towers: list) -> None:
    config = configured(pictures, "kdpl_vpt", **{"data.views": "center"})
    _, training = job(pictures, tiny, config)
    asked = towers.copy()
    assert training.run()
    assert towers[len(asked) :] == [("mini", 11)]


@pytest.mark.parametrize("method", sweep(["coop", "promptsrc", "prograd", "kdpl_coop", "drople"], "promptsrc"))
def test_what_is_remembered_is_what_would_be_computed(method: str, pictures: Path) -> None:
    backbone = load_backbone(str(TINY)).to(dtype=torch.float64)
    config = configured(pictures, method, **{"data.views": "center", "optim.lr": 0.003, "train.epochs": 2})
    tuned = []
    for remembers in (True, False):
        own, training = job(pictures, backbone, config)
        if not remembers:
            training.views.constant, training.views.pixels = {}, True
            training.views.teacher = training.teacher and training.teacher.preprocess
        assert training.run()
        tuned.append(own.state_dict())
    for name, value in tuned[0].items():
        torch.testing.assert_close(value, tuned[1][name], atol=1e-7, rtol=0)  # images in fp32


# --- configuration ----------------------------------------------------------------------------------


def test_center_is_the_default_of_drople_alone_and_random_stays(pictures: Path, tiny: Backbone) -> None:
    assert (build_config("drople").data.views, build_config("drople").data.drop_last) == ("center", False)
    for method in ("coop", "ivlp", "promptsrc", "maple"):
        assert (build_config(method).data.views, build_config(method).data.drop_last) == (None, True)
    _, training = job(pictures, tiny, configured(pictures, "drople", **{"data.views": "random"}))
    first, second = (torch.cat([b.images for b in training.views.epoch(e)]).flatten(1).sum(1) for e in (0, 1))
    assert not set(first.tolist()) & set(second.tolist())


def test_a_banks_regions_come_before_official_views() -> None:
    assert build_config("drople", overrides={"data.bank": "b"}).data.views is None
    assert build_config("drople", file={"data.bank": "b"}, overrides={"views": "center"}).data.views == "center"
    saved = build_config("drople", overrides={"bank": "b"})
    assert build_config("drople", file=saved.flat()) == saved


@pytest.mark.parametrize("wrong", ["centre", "middle", 0, -1, 1.5])
def test_other_views_are_refused(wrong: object) -> None:
    with pytest.raises(
        ConfigError, match=rf"^data.views = {wrong} \(allowed: random, center, or a number from 1 on\)$"
    ):
        build_config("drople", overrides={"data.views": wrong})


def test_a_size_of_crops_that_are_not_drawn_is_told(pictures: Path, tmp_path: Path) -> None:
    said: list[str] = []
    train(configured(pictures, "drople", **{"min_scale": 0.5, "train.epochs": 1}), tmp_path / "run", say=said.append)
    assert "data.min_scale = 0.5 has no effect: data.views = center" in said


# --- the last incomplete batch -----------------------------------------------------------------------


class Slope(Method):
    """Its gradient is the mean of the labels."""

    name = "slope"
    Config = find_method("ivlp").Config  # splits batches

    def build(self) -> None:
        self.w = torch.nn.Parameter(torch.zeros((), dtype=torch.double))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        return {"w": self.w * batch.labels.double().mean()}


class Together(Processes):
    """Adds nothing up: what one process of several gives."""

    def sum_(self, tensors: Any) -> None:
        pass


def slopes(backbone: Backbone, paths: list[Path], labels: list[int], rank=0, size=1, parts=1) -> list[float]:
    """The gradient of every step of an epoch in batches of 4."""
    method = Slope(backbone, CLASSES)
    views = TrainingViews(paths, labels, backbone.preprocess, 4, 1, reader=ImageReader(0), drop_last=False, center=True)
    config = TrainConfig(epochs=1, accumulate=parts)
    training = Training(method, views, OptimConfig(), config, Together(rank, size))
    seen: list[float] = []
    training._apply = lambda gradients: seen.append(gradients["total"][0].item())  # type: ignore[method-assign]
    assert training.run()
    return seen


def of_one_process(backbone: Backbone, paths: list[Path], labels: list[int]) -> Iterator[float]:
    views = TrainingViews(paths, labels, backbone.preprocess, 4, 1, reader=ImageReader(0), drop_last=False, center=True)
    for batch in views.epoch(0):
        yield batch.labels.double().mean().item()


@pytest.mark.parametrize("n", [9, 10, 11])
def test_an_incomplete_batch_is_a_mean_over_its_own_images(n: int, pictures: Path, tiny: Backbone) -> None:
    paths, labels = from_folder(pictures).paths("train")[:n], [3**i for i in range(n)]
    expected = list(of_one_process(tiny, paths, labels))
    assert len(expected) == 3
    assert slopes(tiny, paths, labels) == pytest.approx(expected, rel=1e-12)
    for parts in (2, 3, 4):
        assert slopes(tiny, paths, labels, parts=parts) == pytest.approx(expected, rel=1e-12)
    for size in (2, 3, 4):  # of 9 images some processes have none in the last batch
        of_each = [slopes(tiny, paths, labels, rank, size) for rank in range(size)]
        assert [sum(step) for step in zip(*of_each, strict=True)] == pytest.approx(expected, rel=1e-12)


def test_batches_of_an_epoch(pictures: Path, tiny: Backbone) -> None:
    paths = from_folder(pictures).paths("train")

    def sizes(n: int, size: int, drop_last: bool) -> list[int]:
        given = {"reader": ImageReader(0), "drop_last": drop_last}
        views = TrainingViews(paths[:n], range(n), tiny.preprocess, size, 1, **given)
        batches = list(views.epoch(0))
        assert len(views) == len(batches)
        labels = torch.cat([b.labels for b in batches])
        assert len(labels.unique()) == len(labels)
        return [len(b.labels) for b in batches]

    assert sizes(11, 4, True) == [4, 4]
    assert sizes(11, 4, False) == [4, 4, 3]
    assert sizes(8, 4, False) == sizes(8, 4, True) == [4, 4]
    assert sizes(3, 4, False) == sizes(3, 4, True) == [3]
