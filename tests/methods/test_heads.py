"""Heads in a run: views are made once, choices are made on held-out images, runs resume, new classes are scored."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kit import TINY
from tests.kit.marks import sweep
from tests.kit.pictures import make_pictures
from tests.kit.runs import StopsAfter, configured, log, prompts
from tests.methods.test_heads_golden import Given
from vlprompt.api import build_method, fit
from vlprompt.artefact.artefact import load_artefact
from vlprompt.backbones.backbone import Backbone, unit
from vlprompt.config.schema import OptimConfig, build_config
from vlprompt.data.batches import TrainingViews, epoch_order, fold_of
from vlprompt.data.datasets import load_dataset
from vlprompt.data.reading import ImageReader
from vlprompt.errors import BackboneError, ConfigError, DataError, Interrupted
from vlprompt.methods import find_method
from vlprompt.methods.base import Support
from vlprompt.methods.heads.common import folds
from vlprompt.training.evaluate import EvaluationImages
from vlprompt.training.frozen import FrozenViews
from vlprompt.training.prepare import Sources, prepare
from vlprompt.training.run import train
from vlprompt.training.schedule import learning_rate

STEPPING = ("clap", "task_res", "clip_adapter", "prolip", "tip_adapter_f", "clip_lora")
FITTED = ("gda", "tip_adapter", "ss_text", "ss_text_plus", "lp_plus_plus")
HEADS = ("zs_lp", *STEPPING, *FITTED)
NAMES = ("cat", "dog", "sea horse")


@pytest.fixture
def no_val(tmp_path: Path) -> Path:
    return make_pictures(tmp_path / "no val", train=4, held_out="test")


def frozen(folder: Path, method, views: int, **data) -> tuple[FrozenViews, EvaluationImages]:
    split = load_dataset(str(folder)).split
    images = EvaluationImages(split.paths("train"), split.labels("train"), ImageReader(0))
    config = build_config(method.name, overrides={"data.views": views, "data.batch_size": 4, **data})
    return FrozenViews(images, method, config.data, 1), images


# --- views ----------------------------------------------------------------------------------------


def test_a_fixed_view_is_what_random_views_would_be_in_that_epoch(pictures: Path, tiny: Backbone) -> None:
    method = build_method("task_res", tiny, NAMES)
    views, images = frozen(pictures, method, 2, **{"data.min_scale": 0.3})
    random = TrainingViews(
        images.images, images.labels.tolist(), tiny.preprocess, 4, 1, reader=ImageReader(0), min_scale=0.3
    )
    for epoch in (0, 1):
        for ours, theirs in zip(views.epoch(epoch), random.epoch(epoch), strict=True):
            assert torch.equal(ours.labels, theirs.labels)
            torch.testing.assert_close(ours.frozen_image_features, tiny.encode_images(theirs.images), rtol=0, atol=2e-6)
    first, again = (next(iter(views.epoch(e))) for e in (0, 2))  # views take turns, the order is new
    assert not torch.equal(first.labels, again.labels) or not torch.equal(
        first.frozen_image_features, again.frozen_image_features
    )
    assert {tuple(v) for v in views._features(0).tolist()} == {tuple(v) for v in views._features(2).tolist()}


def test_views_are_flipped_as_asked(pictures: Path, tiny: Backbone) -> None:
    method = build_method("task_res", tiny, NAMES)
    always, never = (frozen(pictures, method, 2, **{"data.flip": flip})[0] for flip in (1.0, 0.0))
    assert not torch.equal(always.pooled(0), never.pooled(0))
    assert not torch.equal(never.pooled(0), never.pooled(1))


def test_mixed_views_are_drawn_from_all(pictures: Path, tiny: Backbone) -> None:
    views, images = frozen(pictures, build_method("clap", tiny, NAMES), 3)
    every = views._features(0)
    assert len(every) == 3 * len(images.labels)
    seen = torch.cat([batch.frozen_image_features for e in range(40) for batch in views.epoch(e)])
    rows = {int((every - v).abs().sum(-1).argmin()) for v in seen}
    assert len(rows) == len(every)
    assert len([*views.epoch(0)]) == len(views) == len(images.labels) // 4


def test_few_images_make_one_batch_of_all_views(tmp_path: Path, tiny: Backbone) -> None:
    """As CLAP's code: where N is below the batch size, an epoch is one batch drawn from the V·N views."""
    folder = make_pictures(tmp_path / "few", train=1, val=1)
    views, _ = frozen(folder, build_method("clap", tiny, NAMES), 3, **{"data.batch_size": 256})
    (batch,) = views.epoch(0)
    assert len(batch.labels) == views.images_per_batch == 9


def test_the_tower_sees_each_view_once(pictures: Path, tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    method, seen = build_method("prolip", tiny, NAMES), []
    views, images = frozen(pictures, method, 2)
    pool = tiny.pool_images
    monkeypatch.setattr(tiny, "pool_images", lambda x: (seen.append(len(x)), pool(x))[1])
    for epoch in range(4):
        list(views.epoch(epoch))
    other = FrozenViews(images, build_method("gda", tiny, NAMES), build_config("gda", overrides={"views": 2}).data, 1)
    other.all(lambda done, of: None)  # another head shares them
    assert sum(seen) == 2 * len(images.labels)


def test_progress_is_told(pictures: Path, tmp_path: Path) -> None:
    from vlprompt.training.watchers import Watcher

    class Counts(Watcher):
        def __init__(self) -> None:
            self.seen: list[tuple[int, int]] = []

        def view(self, done: int, of: int) -> None:
            self.seen.append((done, of))

    counts = Counts()
    train(configured(pictures, "gda", **{"data.views": 3}), tmp_path / "run", [counts])
    assert counts.seen == [(1, 3), (2, 3), (3, 3)]


def test_what_the_tower_pools_is_what_it_projects(tiny: Backbone) -> None:
    x = torch.randn(3, 3, tiny.image_size, tiny.image_size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(unit(tiny.project(tiny.pool_images(x))), tiny.encode_images(x), rtol=0, atol=1e-6)
    method = build_method("prolip", tiny, NAMES)
    torch.testing.assert_close(method.encode_images(x), tiny.encode_images(x), rtol=0, atol=1e-6)
    pooled = method.predict(tiny.pool_images(x)[:, None], NAMES)
    torch.testing.assert_close(pooled, method.predict(x, NAMES), rtol=0, atol=1e-4)
    with pytest.raises(ConfigError, match=r"^method 'clap' reads images, and was given what the tower makes of them$"):
        build_method("clap", tiny, NAMES).predict(tiny.pool_images(x)[:, None], NAMES)


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sweep(HEADS, "clap", "clip_lora", "prolip", "tip_adapter_f"))
def test_a_run_trains_saves_and_resumes_to_the_same_bits(method: str, pictures: Path, tmp_path: Path) -> None:
    given = {} if method in ("clip_lora", "ss_text", "ss_text_plus") else {"data.views": 2}
    config = configured(pictures, method, **given)
    train(config, tmp_path / "whole")
    if method not in FITTED:
        with pytest.raises(Interrupted):
            train(config, tmp_path / "run", [StopsAfter(2)])
        train(config, tmp_path / "run", resume=True)
    else:
        train(config, tmp_path / "run")
    ours, theirs = prompts(tmp_path / "run"), prompts(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert log(tmp_path / "run") == log(tmp_path / "whole")
    tuned = load_artefact(tmp_path / "run", str(TINY))
    images = EvaluationImages(load_dataset(str(pictures)).split.paths("val"), [], ImageReader(0))
    logits = torch.cat([tuned.predict(x, tuned.class_names) for x in images.read_by(tuned)])
    assert logits.isfinite().all()
    if not tuned.takes_new_classes:
        with pytest.raises(DataError, match=f"^{method} was fitted on its own classes, one row each"):
            tuned.class_features(("otter", "cat"))


@pytest.mark.parametrize("method", ["gda", "tip_adapter", "lp_plus_plus", "tip_adapter_f"])
def test_what_is_chosen_is_chosen_on_val_images_or_by_cross_validation(method, pictures, no_val, tmp_path) -> None:
    one = make_pictures(tmp_path / "single", train=1, held_out="test")
    said: dict[str, list[str]] = {"val": [], "none": [], "one": []}
    for name, folder in (("val", pictures), ("none", no_val), ("one", one)):
        train(configured(folder, method, **{"data.views": 1}), tmp_path / name, say=said[name].append)
    # Calibration may have a line of its own behind.
    assert any(line.endswith(": chosen on 6 val images") for line in said["val"])
    if method == "tip_adapter_f":
        assert any(line.endswith("kept, as there are no val images to choose on") for line in said["none"])
    else:
        how = ": chosen by 4-fold cross-validation on the training images"
        assert any(line.endswith(how) for line in said["none"])
        assert any("a class has one image and there are no val images" in line for line in said["one"])


def test_tip_adapter_f_keeps_the_best_epoch_on_val_images(pictures, no_val, tmp_path) -> None:
    for folder, best in ((pictures, True), (no_val, False)):
        train(
            configured(folder, "tip_adapter_f", **{"data.views": 2, "optim.lr": 0.1}), out := tmp_path / f"run {best}"
        )
        rows = log(out)
        card = json.loads((out / "config.json").read_text())["about"]["epochs"]
        if best:
            accuracies = [row["val_accuracy"] for row in rows]
            assert card == f"3 (kept: {accuracies.index(max(accuracies)) + 1}, chosen on the val images)"
        else:
            assert card == "3"


def test_checkpoints_of_many_short_epochs(pictures, tmp_path, monkeypatch) -> None:
    from vlprompt.training import checkpoints

    written = []
    save = checkpoints.save_checkpoint
    monkeypatch.setattr(checkpoints, "save_checkpoint", lambda *a: (written.append(a[1].epoch), save(*a)))
    train(configured(pictures, "task_res", **{"data.views": 1, "train.epochs": 151}), tmp_path / "run")
    assert written == [*range(3, 151, 3), 151]
    assert len(log(tmp_path / "run")) == 151


# --- choices --------------------------------------------------------------------------------------


def test_folds_hold_every_image_out_once() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 1, 1])
    parts = list(folds(labels))
    assert len(parts) == 3
    assert torch.stack([held for _, held in parts]).sum(0).tolist() == [1] * 10
    for fit_on, held in parts:
        assert not (fit_on & held).any()
        assert set(labels[fit_on].tolist()) == {0, 1}
    assert not list(folds(torch.tensor([0, 0, 1])))
    assert len(list(folds(torch.arange(3).repeat(9)))) == 5


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([1, 0, 1, 1, 0, 0, 1], [0, 0, 1, 2, 1, 2, 0]),  # every class begins at the first fold
        ([0, 1, 2, 2], [0, 1, 2, 0]),  # but of small ones where the last ended: no fold is empty
        ([2, 0, 1, 1, 1, 1, 2], [1, 0, 1, 2, 0, 1, 2]),
    ],
)
def test_images_of_a_class_are_spread_over_the_folds(labels: list[int], expected: list[int]) -> None:
    assert fold_of(torch.tensor(labels), 3).tolist() == expected


def blobs(n: int, e: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, e, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(n) % 3
    return unit(centres[labels] + 0.3 * torch.randn(n, e, generator=g)), labels


@pytest.mark.parametrize("name", ["gda", "tip_adapter", "lp_plus_plus", "ss_text", "ss_text_plus"])
@pytest.mark.parametrize("val", [True, False])
def test_closed_forms_learn(name: str, val: bool, tiny: Backbone) -> None:
    method = build_method(name, tiny, NAMES, **({"most_alpha": 300.0} if name == "tip_adapter" else {}))
    x, y = blobs(24, tiny.embed_dim, 0)
    method.fit_features(x, y)
    method.finish(Support(x[None], y, x, blobs(12, tiny.embed_dim, 1) if val else None))
    test, right = blobs(60, tiny.embed_dim, 2)
    assert (method.predict(test, NAMES).argmax(-1) == right).float().mean() > 0.95


def test_gda_knows_its_own_classes_among_new_ones(tiny: Backbone) -> None:
    method = build_method("gda", tiny, NAMES, k=5)
    x, y = blobs(24, tiny.embed_dim, 0)
    method.fit_features(x, y)
    own = method.class_features(NAMES)
    rows = method.class_features(("otter", "dog", "heron"))
    assert torch.equal(rows[1], own[1])
    # In other letters it is the same class, whose row belongs to it; its text is read as it is written.
    assert torch.equal(method.class_features(("otter", "Sea_horse", "Dog"))[1:, -1], own[[2, 1], -1])
    w, b = method.new_classifier(method.text_features(("otter", "heron")))
    t = method.text_features(("otter", "heron"))
    expected = torch.cat([100 * t + method.alpha * w, method.alpha * b[:, None]], 1).float()
    torch.testing.assert_close(rows[[0, 2]], expected)
    with pytest.raises(DataError, match=r"^gda was not fitted"):
        build_method("gda", tiny, NAMES).class_features(("otter",))


def test_lora_beside_the_weights_is_lora_in_them(double: Backbone) -> None:
    settings = {"matrices": "qvo", "position": "mid", "dropout": 0.0, "r": 3}
    method = build_method("clip_lora", double, NAMES, **settings).double()
    with torch.no_grad():
        for p in method.parameters():
            p.normal_(std=0.1)
    x = torch.randn(2, 3, double.image_size, double.image_size, dtype=torch.double)
    method.train()
    beside = method.encode_images(x), method.class_features(NAMES)
    method.eval()
    folded = method.encode_images(x), method.class_features(NAMES)
    for a, b in zip(beside, folded, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    assert (folded[0] - double.encode_images(x)).abs().max() > 1e-3
    assert not double.image_tower.blocks[4].qkv._forward_hooks
    method.lora_dropout = method.visual.p = 0.5
    method.train()
    assert not torch.equal(method.encode_images(x), method.encode_images(x))


# --- imbalance ------------------------------------------------------------------------------------


def test_logit_adjustment_adds_the_logarithm_of_the_images(pictures: Path, tiny: Backbone) -> None:
    split = load_dataset(str(pictures)).split
    names, paths = split.class_names, split.paths("train")[:7]
    labels = split.labels("train")[:7]
    for given, counts in ((names, [4, 3]), ((*names, "otter"), [4, 3])):
        config = build_config("coop", overrides={"train.logit_adjustment": 2.0, "data.batch_size": 4})
        method = build_method("coop", tiny, given)
        prepare(config, Sources(None, None, given), method, paths, labels, 1, ImageReader(0))
        n = torch.tensor([*counts, *[0] * (len(given) - 2)]) + 1.0  # some have none
        torch.testing.assert_close(method.log_prior, 2 * (n / n.sum()).log())
    method = build_method("coop", tiny, names[:2])
    prepare(config, Sources(None, None, names[:2]), method, paths, labels, 1, ImageReader(0))
    torch.testing.assert_close(method.log_prior, 2 * (torch.tensor([4.0, 3.0]) / 7).log())


def test_logit_adjustment_moves_training_and_not_the_logits(tiny: Backbone, pictures: Path) -> None:
    split = load_dataset(str(pictures)).split
    paths, labels = split.paths("train")[:6], split.labels("train")[:6]
    runs = [
        fit(build_method("clap", tiny, split.class_names), paths, labels, views=2, epochs=3, logit_adjustment=tau)
        for tau in (0.0, 1.0)
    ]
    assert not torch.equal(runs[0].w, runs[1].w)
    x = unit(torch.randn(4, tiny.embed_dim))
    torch.testing.assert_close(runs[1].predict(x, split.class_names), tiny.logit_scale * x @ unit(runs[1].w).T)


def test_balanced_draws_take_each_class_equally_often() -> None:
    labels = torch.tensor([0] * 9 + [1] * 2 + [2])
    order = epoch_order(labels, 1, 0, balanced=True)
    assert len(order) == 12
    assert np.bincount(labels.numpy()[order]).tolist() == [4, 4, 4]
    assert np.bincount(order, minlength=12)[9:].tolist() == [2, 2, 4]
    assert sorted(epoch_order(labels, 1, 0, balanced=False)) == list(range(12))
    assert (order != epoch_order(labels, 1, 1, balanced=True)).any()


@pytest.mark.parametrize(
    ("method", "asked", "says"),
    [
        ("gda", {"train.logit_adjustment": 1.0}, "train.logit_adjustment = 1: method 'gda' minimises no loss"),
        (
            "kdpl_coop",
            {"train.logit_adjustment": 1.0},
            "train.logit_adjustment = 1: method 'kdpl_coop' learns from a teach",
        ),
        ("gda", {"data.balanced": True}, "method 'gda' takes no training steps: it draws no images"),
        ("coop", {"data.views": 3}, "data.views = 3: there is no region bank"),
    ],
)
def test_what_has_no_effect_is_refused(method, asked, says, pictures, tmp_path) -> None:
    with pytest.raises(ConfigError, match=f"^{says}"):
        train(configured(pictures, method, **asked), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "asked", "says"),
    [
        ("clap", {"method.weights": "zero_shot"}, "method.weights = zero_shot .*did you mean 'zero-shot'"),
        ("clip_lora", {"method.matrices": "qx"}, "method.matrices = qx .*letters q, k, v and o"),
        ("clip_lora", {"method.matrices": ""}, "method.matrices = .*letters q, k, v and o"),
        ("clip_lora", {"method.dropout": 1.0}, "method.dropout = 1.0"),
        ("prolip", {"method.lam": "1/n"}, "method.lam = 1/n"),
        ("gda", {"method.k": -1}, "method.k = -1"),
        ("tip_adapter", {"method.beta": -1}, "method.beta = -1"),
        ("coop", {"train.logit_adjustment": -1}, "train.logit_adjustment = -1"),
    ],
)
def test_options_out_of_range(method: str, asked: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build_config(method, overrides=asked)


def test_prolip_needs_a_projection() -> None:
    given = Given(torch.eye(3), projection=torch.nn.Identity())
    with pytest.raises(BackboneError, match=r"has no projection behind its image tower"):
        find_method("prolip")(given, given.names)


def test_every_step_of_the_cosine() -> None:
    config = OptimConfig(lr=1.0, warmup_epochs=0, every_step=True)
    rates = [learning_rate(step / 4, 2, config) for step in range(8)]
    expected = [0.5 * (1 + np.cos(np.pi * step / 8)) for step in range(8)]
    np.testing.assert_allclose(rates, expected, atol=1e-12)


def test_without_images_a_class_is_named(tiny: Backbone) -> None:
    for name in ("gda", "lp_plus_plus"):
        with pytest.raises(DataError, match=f"^{name} cannot score class 'sea horse': it has no training images$"):
            find_method(name)(tiny, NAMES).fit_features(torch.randn(4, tiny.embed_dim), torch.tensor([0, 0, 1, 1]))
