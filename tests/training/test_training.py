"""Configuration, schedule, views, loop, evaluation, run folder and artefact."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.kit import TINY, sealed
from tests.kit.checks import tree
from tests.kit.marks import sweep
from tests.kit.pictures import SHADES, make_photos, paint
from tests.kit.runs import RUN_FILES
from vlprompt.artefact.artefact import FORMAT_VERSION, load_artefact, save_artefact
from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.load import load_backbone
from vlprompt.config.presets import presets_of
from vlprompt.config.schema import OptimConfig, RunConfig, TrainConfig, build_config, parse_override, read_config
from vlprompt.data.batches import Batch, TrainingViews, evaluation_batches
from vlprompt.data.datasets import load_dataset
from vlprompt.data.images import Preprocess, load_image
from vlprompt.data.reading import ImageReader
from vlprompt.data.splits import read_split
from vlprompt.errors import ArtefactError, BackboneError, ConfigError, DataError, OutputError, VlpromptError
from vlprompt.methods import METHODS, Method, find_method
from vlprompt.training import run
from vlprompt.training.evaluate import EvaluationImages, evaluate, harmonic_mean, predict_logits, score
from vlprompt.training.loop import EpochLog, Training
from vlprompt.training.run import Result, train
from vlprompt.training.schedule import learning_rate
from vlprompt.training.watchers import EachEpoch, Watcher


def one_line(match: str) -> str:
    return rf"\A(?!.*\n).*{match}"


@pytest.fixture
def tiny_from_memory(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "load_backbone", lambda *arguments: tiny)


def configure(photos: Path, method: str = "coop", **changes: Any) -> RunConfig:
    """Three steps an epoch, two epochs, the second of them at the full rate."""
    given: dict[str, Any] = {
        "backbone": str(TINY), "data.name": str(photos), "data.batch_size": 4, "data.workers": 1, "train.epochs": 2,
    }  # fmt: skip
    return build_config(method, overrides=given | {k.replace("__", "."): v for k, v in changes.items()})


# --- learning rate --------------------------------------------------------------------------------


def official_rate(e: int, epochs: int, lr: float) -> float:
    """Epoch 0 at 1e-5; epoch e ≥ 1: ½·lr·(1 + cos(π(e − 1)/E))."""
    return 1e-5 if e == 0 else 0.5 * lr * (1 + math.cos(math.pi * (e - 1) / epochs))


@pytest.mark.parametrize("epochs", [1, 2, 5, 20, 50, 200])
@pytest.mark.parametrize("lr", [0.002, 0.0035])
def test_learning_rate_is_the_official_one(epochs: int, lr: float) -> None:
    config = OptimConfig(lr=lr)
    for e in range(epochs):
        assert learning_rate(e, epochs, config) == pytest.approx(official_rate(e, epochs, lr), rel=1e-12)
    assert learning_rate(epochs - 1, epochs, config) > 0


def test_learning_rate_written_out() -> None:
    """Five epochs of MaPLe (0.0035), by hand."""
    rates = [learning_rate(e, 5, OptimConfig(lr=0.0035)) for e in range(5)]
    assert rates == pytest.approx([1e-5, 0.0035, 0.0031657797, 0.0022907797, 0.0012092203], rel=1e-6)


@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_the_cosine_starts_behind_the_warm_up_and_spans_all_epochs(warmup: int) -> None:
    config = OptimConfig(lr=0.1, warmup_epochs=warmup, warmup_lr=0.003)
    rates = [learning_rate(e, 8, config) for e in range(8)]
    assert rates[:warmup] == [0.003] * warmup
    assert rates[warmup:] == pytest.approx([0.05 * (1 + math.cos(math.pi * e / 8)) for e in range(8 - warmup)])
    assert rates[warmup] == 0.1


# --- the loop -------------------------------------------------------------------------------------


class Slope(Method):
    """A loss whose gradient is one everywhere."""

    name, paper, year, learns = "slope", "nobody", 2026, "a number"

    def build(self) -> None:
        self.w = nn.Parameter(torch.zeros(1))
        self.seen: list[float] = []
        self.epochs: list[tuple[int, int]] = []

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        self.seen.append(self.w.item())
        return {"rise": 0.75 * self.w.sum(), "fall": 0.25 * self.w.sum()}

    def after_epoch(self, epoch: int, epochs: int) -> None:
        self.epochs.append((epoch, epochs))


class Steps:
    """Two batches an epoch."""

    seed, images_per_batch = 0, 1

    def __len__(self) -> int:
        return 2

    def epoch(self, epoch: int, start: int, shard: tuple[int, int]) -> Iterator[Batch]:
        yield from [Batch(torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.long))] * 2


def fit(
    method: Method,
    views: TrainingViews | Steps,
    optim: OptimConfig,
    epochs: int,
    after_epoch: Callable[[EpochLog], None] = lambda log: None,
) -> None:
    assert Training(method, views, optim, TrainConfig(epochs=epochs)).run([EachEpoch(after_epoch)])  # type: ignore[arg-type]


def fit_slope(tiny: Backbone, optim: OptimConfig, epochs: int) -> tuple[Slope, list[EpochLog]]:
    method, logs = Slope(tiny, ("a", "b")), []
    fit(method, Steps(), optim, epochs, after_epoch=logs.append)
    return method, logs


@pytest.mark.parametrize("warmup", [0, 1, 2])
def test_each_epoch_runs_at_its_learning_rate(tiny: Backbone, warmup: int) -> None:
    optim = OptimConfig(lr=0.1, momentum=0, weight_decay=0, warmup_epochs=warmup)
    method, logs = fit_slope(tiny, optim, 5)
    expected = [learning_rate(e, 5, optim) for e in range(5)]
    positions = torch.tensor([*method.seen, method.w.item()], dtype=torch.float64)
    moved = -positions.diff()  # the gradient is one: each step is as long as the rate
    torch.testing.assert_close(
        moved, torch.tensor(expected, dtype=torch.float64).repeat_interleave(2), atol=1e-6, rtol=0
    )
    assert [log.lr for log in logs] == expected
    assert [log.epoch for log in logs] == [0, 1, 2, 3, 4]
    assert method.epochs == [(e, 5) for e in range(5)]
    assert not method.training


def test_sgd_has_momentum_and_decays_the_prompts(tiny: Backbone) -> None:
    method, _ = fit_slope(tiny, OptimConfig(lr=0.1, weight_decay=0.5, warmup_epochs=0), 3)
    w = v = 0.0
    for step in range(6):
        assert method.seen[step] == pytest.approx(w, abs=1e-6)
        v = 0.9 * v + (1 + 0.5 * w)
        w -= learning_rate(step // 2, 3, OptimConfig(lr=0.1, warmup_epochs=0)) * v
    assert method.w.item() == pytest.approx(w, abs=1e-6)


def test_adamw_steps_are_as_long_as_the_rate(tiny: Backbone) -> None:
    method, _ = fit_slope(tiny, OptimConfig(name="adamw", lr=0.1, weight_decay=0, warmup_epochs=0), 1)
    assert [*method.seen, method.w.item()] == pytest.approx([0, -0.1, -0.2], abs=1e-5)


def test_an_epoch_logs_the_mean_of_each_loss_term(tiny: Backbone) -> None:
    method, logs = fit_slope(tiny, OptimConfig(lr=0.1, momentum=0, weight_decay=0, warmup_epochs=0), 2)
    for e, log in enumerate(logs):
        mean = sum(method.seen[2 * e : 2 * e + 2]) / 2
        assert log.losses == pytest.approx({"rise": 0.75 * mean, "fall": 0.25 * mean})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_training(tiny: Backbone, value: float) -> None:
    class Breaks(Slope):
        def losses(self, batch: Batch) -> dict[str, Tensor]:
            terms = super().losses(batch)
            return terms | {"kg": terms["fall"] * 0 + (value if len(self.seen) == 4 else 1.0)}

    method = Breaks(tiny, ("a", "b"))
    with pytest.raises(VlpromptError, match=one_line(rf"'kg' is {value} in epoch 2, step 2\Z")):
        fit(method, Steps(), OptimConfig(), 5)
    assert method.w.isfinite()


def test_training_reduces_the_loss(tiny: Backbone, photos: Path) -> None:
    dataset = load_dataset(str(photos))
    items = dataset.split.train
    for name in ("coop", "maple"):
        torch.manual_seed(0)
        method, logs = find_method(name)(tiny, dataset.split.class_names), []
        views = TrainingViews(
            dataset.split.paths("train"), [i.label for i in items], tiny.preprocess, 4, 1, reader=ImageReader(0)
        )
        fit(method, views, OptimConfig(warmup_epochs=0), 3, after_epoch=logs.append)
        assert logs[-1].losses["ce"] < 0.5 * logs[0].losses["ce"]


# --- configuration --------------------------------------------------------------------------------


def test_later_layers_win() -> None:
    assert OptimConfig().lr == 0.002
    assert build_config("maple").optim.lr == 0.0035  # the method's settings
    assert build_config("maple").train.epochs == 5
    assert build_config("maple", "cross-dataset").optim.lr == 0.0026  # its preset
    assert build_config("maple", "cross-dataset").options.depth == 3
    file = {"optim.lr": 0.01, "method.depth": 4}
    from_file = build_config("maple", "cross-dataset", file)
    assert (from_file.optim.lr, from_file.options.depth, from_file.train.epochs) == (0.01, 4, 2)
    last = build_config("maple", "cross-dataset", file, {"lr": 0.02})
    assert (last.optim.lr, last.options.depth, last.train.epochs) == (0.02, 4, 2)


def test_bare_keys_mean_the_one_key_that_ends_in_them() -> None:
    bare = {"n_ctx": 3, "lr": 0.5, "batch_size": 7, "epochs": 9, "shots": 2, "seed": 4, "lambda_": 0.5}
    built = build_config("prograd", overrides=bare)
    full = build_config(
        "prograd",
        overrides={
            "method.n_ctx": 3, "optim.lr": 0.5, "data.batch_size": 7, "train.epochs": 9, "data.shots": 2,
            "seed": 4, "method.lambda_": 0.5,
        },
    )  # fmt: skip
    assert built == full
    assert (built.options.n_ctx, built.optim.lr, built.data.batch_size, built.seed) == (3, 0.5, 7, 4)


def test_a_key_that_may_mean_several_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=one_line(r"key 'name' is not clear \(write one of method.name, data.name, optim.name\)")
    ):
        build_config("coop", overrides={"name": "adamw"})


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("method.n_ctz", "method.n_ctx"),
        ("n_ctxx", "method.n_ctx"),
        ("optim.learning_rat", None),
        ("batchsize", "data.batch_size"),
        ("data.batchsize", "data.batch_size"),
        ("optim.epochs", "train.epochs"),
        ("sed", "seed"),
        ("zzzzzz", None),
    ],
)
def test_an_unknown_key_gets_its_nearest_match(key: str, near: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config("coop", overrides={key: 1})
    message = str(caught.value)
    assert message.startswith(f"unknown key '{key}'" + (f": did you mean '{near}'?" if near else ""))
    assert "(allowed keys: backbone, seed, method.name, method.n_ctx" in message
    assert "\n" not in message


def test_all_problems_are_listed_at_once() -> None:
    wrong = {
        "n_ctx": 0, "lr": -1, "optim.name": "sgdd", "epochs": "many", "min_scale": 1.5, "position": "endd",
        "nonsense": 3, "seed": -1, "class_specific": "perhaps", "precision": "fp8", "shots": 2.5,
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        build_config("coop", file={"momentum": -0.5}, overrides=wrong)
    message = str(caught.value)
    for part in (
        "unknown key 'nonsense'",
        "method.n_ctx = 0 (allowed: greater than or equal to 1)",
        "method.position = endd (allowed: 'end', 'middle' or 'front'; did you mean 'end'?)",
        "method.class_specific = perhaps (allowed: boolean",
        "optim.lr = -1 (allowed: greater than 0)",
        "optim.momentum = -0.5 (allowed: greater than or equal to 0)",
        "optim.name = sgdd (allowed: 'sgd', 'adam' or 'adamw'; did you mean 'sgd'?)",
        "train.epochs = many (allowed: integer",
        "train.precision = fp8 (allowed: 'fp32', 'bf16' or 'fp16'",
        "data.min_scale = 1.5 (allowed: less than or equal to 1)",
        "data.shots = 2.5 (allowed: integer",
        "seed = -1 (allowed: greater than or equal to 0)",
    ):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        ("coop", "optim.lr", math.inf),
        ("coop", "optim.lr", math.nan),
        ("promptsrc", "method.average_mean", math.nan),
        ("kgcoop", "method.w", math.inf),
        ("coop", "seed", 2**64),
        ("coop", "data.workers", -1),
        ("coop", "data.min_scale", 0),
        ("linear_probe", "method.C", 0),
        ("coop", "method.init", 3),
        ("coop", "backbone", None),
    ],
)
def test_values_out_of_range_are_refused(method: str, key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=one_line(rf"\A{key} = {value} \(allowed: ")):
        build_config(method, overrides={key: value})


def test_unknown_methods_and_presets() -> None:
    with pytest.raises(
        ConfigError,
        match=one_line(r"unknown method 'cop': did you mean 'coop'\? \(allowed: apt, bayesian, clap, clip_adapter, "),
    ):
        build_config("cop")
    with pytest.raises(ConfigError, match=one_line(r"unknown preset of coop 'few-shots': did you mean 'few-shot'\?")):
        build_config("coop", "few-shots")
    with pytest.raises(ConfigError, match=one_line(r"method 'clap' has no presets \(asked for 'few-shot'\)")):
        build_config("clap", "few-shot")
    with pytest.raises(ConfigError, match=one_line(r"method.name = maple: the command asks for 'coop'")):
        build_config("coop", file={"method.name": "maple"})


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_saved_configuration_builds_the_same_run(method: str, tmp_path: Path) -> None:
    changes = {
        "data.name": "./photos: of 日本", "data.root": "~/data", "data.shots": 16, "optim.lr": 3e-5, "seed": 2**40,
        "data.classes": "base", "optim.weight_decay": 0, "backbone": "openai/clip-vit-base-patch16",
    }  # fmt: skip
    for preset in (None, *presets_of(METHODS[method])):
        for overrides in ({}, changes | {"data.classes": "all"} if method == "promptkd" else changes):
            built = build_config(method, preset, overrides=overrides)
            (tmp_path / "config.yaml").write_text(built.to_yaml(), encoding="utf-8")
            assert build_config(method, file=read_config(tmp_path / "config.yaml")) == built


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("lr=1e-3", "lr", "1e-3"),  # YAML takes it for text; the check reads it as a number
        ("lr=0.5", "lr", 0.5),
        ("epochs=3", "epochs", 3),
        ("init=a photo of a", "init", "a photo of a"),
        ("init=null", "init", None),
        ("init=", "init", None),
        ("init=a=b", "init", "a=b"),
        ("class_specific=true", "class_specific", True),
        ("pcd=off", "pcd", "off"),
        ("init=[a, b]", "init", "[a, b]"),
        ("init={x: 1}", "init", "{x: 1}"),
        ("template=a {}: {}", "template", "a {}: {}"),
        ("init=2026-01-01", "init", "2026-01-01"),
    ],
)
def test_overrides_are_read_as_yaml(text: str, key: str, value: object) -> None:
    assert parse_override(text) == (key, value)


def test_numbers_in_any_notation() -> None:
    assert build_config("coop", overrides=dict([parse_override("lr=1e-3")])).optim.lr == 0.001


@pytest.mark.parametrize("text", ["lr", "=3", "", "a photo"])
def test_what_is_no_key_and_value_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=one_line(rf"\A'{text}' is not key=value")):
        parse_override(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"a: [", "cannot read configuration"), (b"- a", "must hold keys and values"), (b"", "must hold keys and values"),
     (b"\xff\xfe\xff", "cannot read configuration")],
)  # fmt: skip
def test_bad_configuration_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=one_line(message)):
        read_config(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match=one_line("cannot read configuration")):
        read_config(tmp_path / "none.yaml")


# --- views ----------------------------------------------------------------------------------------

SMALL = Preprocess(16, (0, 0, 0), (1, 1, 1))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Eleven pictures of one brightness each, which every crop shows."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(11):
        Image.new("RGB", (30 + i, 40 - i), (20 * i, 20 * i, 20 * i)).save(folder / f"{i:02}.png")
    return sorted(folder.iterdir())


def which(images: Tensor) -> list[int]:
    """The pictures that views show."""
    return (images.mean((1, 2, 3)) * 255 / 20).round().int().tolist()


def views(paths: list[Path], batch_size: int = 4, seed: int = 1, workers: int = 0) -> TrainingViews:
    return TrainingViews(paths, range(len(paths)), SMALL, batch_size, seed, reader=ImageReader(workers))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six pictures of noise: no two crops look alike."""
    folder = tmp_path_factory.mktemp("noise")
    for i in range(6):
        paint(folder / f"{i}.png", (128, 128, 128), i, size=40)
    return sorted(folder.iterdir())


def batches(paths: list[Path], epoch: int = 0, **options: Any) -> list[Batch]:
    return list(views(paths, **options).epoch(epoch))


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.images, y.images) and torch.equal(x.labels, y.labels) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_views_do_not_depend_on_the_number_of_threads(photographs: list[Path], workers: int) -> None:
    many = photographs * 5  # more batches than are made ahead
    assert same(batches(many, workers=workers), batches(many, workers=0))


def test_views_depend_on_seed_epoch_and_image_alone(photographs: list[Path]) -> None:
    first = batches(photographs, batch_size=2)
    used = views(photographs, batch_size=2)
    for epoch in (2, 0):  # what ran before does not matter
        again = list(used.epoch(epoch))
    torch.rand(3)
    np.random.default_rng().random()
    assert same(again, first)
    for other in (batches(photographs, 1, batch_size=2), batches(photographs, batch_size=2, seed=2)):
        assert not same(other, first)
        pixels = {tuple(image.flatten().tolist()) for batch in first for image in batch.images}
        assert pixels.isdisjoint(tuple(image.flatten().tolist()) for batch in other for image in batch.images)
    epochs = (batches(photographs, epoch, batch_size=2) for epoch in range(5))
    orders = {tuple(torch.cat([batch.labels for batch in epoch]).tolist()) for epoch in epochs}
    assert len(orders) == 5


def test_every_image_is_used_at_most_once_and_the_rest_dropped(pictures: list[Path]) -> None:
    left_out = set()
    for epoch in range(8):
        found = batches(pictures, epoch)
        assert len(found) == len(views(pictures)) == 2
        assert all(batch.images.shape == (4, 3, 16, 16) for batch in found)
        shown = [i for batch in found for i in which(batch.images)]
        assert shown == [i for batch in found for i in batch.labels.tolist()]  # images keep their labels
        assert len(set(shown)) == 8
        left_out |= set(range(11)) - set(shown)
    assert len(left_out) > 3  # others every epoch


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("n", [1, 3, 4])
def test_a_single_short_batch_is_kept(pictures: list[Path], n: int, workers: int) -> None:
    found = batches(pictures[:n], batch_size=4, workers=workers)
    assert len(found) == len(views(pictures[:n])) == 1
    assert sorted(which(found[0].images)) == list(range(n))


def test_images_are_decoded_once_as_long_as_there_is_room(
    pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlprompt.data import reading as module

    decoded: list[Path] = []
    monkeypatch.setattr(module, "load_image", lambda path: decoded.append(path) or load_image(path))
    plenty, epochs = views(pictures, batch_size=11), range(3)
    fast = [list(plenty.epoch(e)) for e in epochs]
    assert sorted(decoded) == pictures
    decoded.clear()
    two = module.ImageReader(0, room=2 * 3 * 35 * 35)
    little = TrainingViews(pictures, range(11), SMALL, 11, 1, reader=two)
    slow = [list(little.epoch(e)) for e in epochs]
    assert len(decoded) == 11 + 2 * 9
    assert all(same(a, b) for a, b in zip(fast, slow, strict=True))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_evaluation_batches_are_whole_images_in_order(pictures: list[Path], workers: int) -> None:
    found = list(evaluation_batches(pictures, SMALL, ImageReader(workers), 4))
    assert [len(b) for b in found] == [4, 4, 3]
    assert torch.equal(torch.cat(found), torch.stack([SMALL(load_image(p)) for p in pictures]))


@pytest.mark.parametrize("workers", [0, 3])
def test_an_image_that_cannot_be_read_is_named(pictures: list[Path], workers: int, tmp_path: Path) -> None:
    paths = [*pictures[:5], tmp_path / "gone.png"]
    with pytest.raises(DataError, match=one_line(r"gone\.png")):
        batches(paths, batch_size=2, workers=workers)
    with pytest.raises(DataError, match=one_line(r"gone\.png")):
        list(evaluation_batches(paths, SMALL, ImageReader(workers), 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_views_may_be_left_before_their_end(pictures: list[Path], workers: int) -> None:
    epoch = views(pictures, batch_size=1, workers=workers).epoch(0)
    next(epoch)
    epoch.close()  # type: ignore[attr-defined]


# --- evaluation -----------------------------------------------------------------------------------


def naive_calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Guo et al., 2017: bins ((m − 1)/M, m/M], each weighted by its share of the images."""
    probabilities = logits.double().softmax(-1).tolist()
    total = 0.0
    for m in range(bins):
        inside = [
            (max(p), p.index(max(p)) == y)
            for p, y in zip(probabilities, labels.tolist(), strict=True)
            if m / bins < max(p) <= (m + 1) / bins
        ]
        if inside:
            confidence = sum(c for c, _ in inside) / len(inside)
            accuracy = sum(right for _, right in inside) / len(inside)
            total += len(inside) / len(labels) * abs(accuracy - confidence)
    return total


@pytest.mark.parametrize(
    ("n", "classes", "spread"), [(1, 2, 1), (50, 3, 2), (400, 10, 4), (200, 40, 0.1), (60, 5, 100)]
)
def test_calibration_error_equals_a_plain_one(n: int, classes: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(n)
    logits = spread * torch.randn(n, classes, generator=generator)
    labels = torch.randint(classes, (n,), generator=generator)
    result = score(logits, labels, [str(c) for c in range(classes)])
    assert result.calibration_error == pytest.approx(naive_calibration_error(logits, labels), abs=1e-9)
    assert 0 <= result.calibration_error <= 1


def test_score_written_out() -> None:
    """Four images: three right, of classes 0, 0 and 2; one of class 2 taken for 0. Class 1 has no images."""
    p = torch.tensor([[0.9, 0.05, 0.05], [0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.6, 0.2, 0.2]]).double()
    result = score(p.log(), torch.tensor([0, 0, 2, 2]), ("a", "b", "c"))
    assert result.accuracy == 75
    assert result.n == 4
    assert result.classes == ("a", "b", "c")
    assert result.per_class == {"a": 100, "c": 50}
    # Each image is alone in its bin: gaps 0.1, 0.5, 0.2 and 0.6.
    assert result.calibration_error == pytest.approx(1.4 / 4)
    json.dumps(result.to_dict())


def test_macro_average_and_confusion_written_out() -> None:
    """Three images of class 0, two of them taken for 1; one of class 2, right. Class 1 has no images."""
    p = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.3, 0.6, 0.1], [0.1, 0.1, 0.8]]).double()
    result = score(p.log(), torch.tensor([0, 0, 0, 2]), ("a", "b", "c"))
    assert result.accuracy == 50
    assert result.per_class == pytest.approx({"a": 100 / 3, "c": 100})
    assert result.macro_accuracy == pytest.approx(200 / 3)  # of the classes that have images
    assert result.confusion == ((0, 0, 1), (0, 1, 2), (2, 2, 1))


def test_calibration_error_at_the_ends() -> None:
    sure, labels = torch.tensor([[50.0, -50.0], [50.0, -50.0]]), torch.tensor([0, 1])
    assert score(sure, labels, ("a", "b")).calibration_error == pytest.approx(0.5)
    assert score(torch.zeros(2, 1), torch.zeros(2, dtype=torch.long), ("a",)).calibration_error == 0
    p = torch.full((2, 40), 0.02, dtype=torch.float64)
    p[0, 0], p[1, 0] = 0.06, 0.1  # the first bin ends between them, at 1/15
    p[:, 1:] = (1 - p[:, :1]) / 39
    low = score(p.log(), torch.tensor([0, 1]), [str(c) for c in range(40)])
    assert low.calibration_error == pytest.approx((0.94 + 0.1) / 2)


def test_harmonic_mean() -> None:
    assert harmonic_mean(82.69, 63.22) == pytest.approx(71.66, abs=0.005)  # CoOp's published figures
    assert harmonic_mean(50, 50) == 50
    assert harmonic_mean(80, 0) == 0
    assert harmonic_mean(0, 0) == 0


@pytest.mark.parametrize("name", ["zero_shot", "cocoop", "maple"])
def test_evaluate_equals_scoring_image_by_image(
    tiny: Backbone, photos: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = load_dataset(str(photos)).split
    method = find_method(name)(tiny, split.class_names).eval()
    paths, labels = split.paths("test"), [item.label for item in split.test]
    if name == "cocoop":  # a few images at a time, where each has texts of its own
        monkeypatch.setattr("vlprompt.methods.base.TEXTS_OF_IMAGES", 6)
    images = EvaluationImages(paths, labels, ImageReader(0))
    result = evaluate(method, images, split.class_names)
    assert result == evaluate(method, images, split.class_names)  # now from remembered features
    with torch.no_grad():
        single = []
        for path in paths:
            v = method.encode_images(tiny.preprocess(load_image(path))[None])
            single.append(method.logits(v, method.class_features(split.class_names, v)))
    expected = score(torch.cat(single), torch.tensor(labels), split.class_names)
    assert result.n == 9
    assert result.per_class == pytest.approx(expected.per_class)
    assert result.calibration_error == pytest.approx(expected.calibration_error, abs=1e-4)


def test_frozen_image_features_are_computed_once(tiny: Backbone, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = load_dataset(str(photos)).split
    calls: list[int] = []
    encode = Backbone.encode_images
    monkeypatch.setattr(Backbone, "encode_images", lambda self, x: calls.append(len(x)) or encode(self, x))
    images = EvaluationImages(split.paths("test"), [item.label for item in split.test], ImageReader(0))
    for name in ("zero_shot", "coop", "cocoop"):
        method = find_method(name)(tiny, split.class_names)
        predict_logits(method, images, ("other", "names"))
    assert calls == [9]


# --- a run ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunConfig, Method, Result]:
    out = tmp_path_factory.mktemp("runs") / "deep" / "kgcoop"
    config = configure(photos, "kgcoop", data__shots=3)
    return out, config, *train(config, out)


def test_the_run_folder_holds_exactly_its_files(finished: tuple[Path, RunConfig, Method, Result]) -> None:
    out, *_ = finished
    assert {p.name for p in out.iterdir()} == RUN_FILES | {"checkpoints"}


def test_the_saved_configuration_is_the_runs(finished: tuple[Path, RunConfig, Method, Result]) -> None:
    out, config, *_ = finished
    assert build_config("kgcoop", file=read_config(out / "config.yaml")) == config
    content = yaml.safe_load((out / "config.yaml").read_text("utf-8"))
    assert set(content) == {"method", "backbone", "seed", "data", "teacher", "optim", "train"}
    assert content["method"] == {"name": "kgcoop", "n_ctx": 4, "init": "a photo of a", "w": 8.0}


def test_the_split_names_the_exact_images(finished: tuple[Path, RunConfig, Method, Result], photos: Path) -> None:
    out, *_ = finished
    split = read_split(out / "split.json", photos)
    assert split == load_dataset(str(photos)).split.few_shot(3, seed=1)
    assert len(split.train) == 9


def test_the_log_has_named_terms_and_the_rate(finished: tuple[Path, RunConfig, Method, Result]) -> None:
    out, config, *_ = finished
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
    assert [set(row) for row in rows] == [{"epoch", "lr", "ce", "kg", "val_accuracy"}] * 2
    assert [row["epoch"] for row in rows] == [1, 2]
    assert [row["lr"] for row in rows] == [learning_rate(e, 2, config.optim) for e in range(2)]
    assert all(math.isfinite(row["ce"]) and math.isfinite(row["kg"]) for row in rows)


def test_the_metrics_are_those_of_the_saved_model(
    finished: tuple[Path, RunConfig, Method, Result], photos: Path, tiny: Backbone
) -> None:
    out, _, method, result = finished
    metrics = sealed.read(out / "metrics.json")
    assert metrics == vars(result)
    assert set(metrics) == {
        "run", "epochs", "train_accuracy", "val_accuracy", "trainable_parameters", "seconds", "skipped", "teacher",
        "kept_epoch",
    }  # fmt: skip
    assert metrics["run"] == str(out)
    assert metrics["epochs"] == 2
    assert metrics["trainable_parameters"] == 4 * tiny.text_tower.config.width
    loaded, split = load_artefact(out), read_split(out / "split.json", photos)
    for part in ("train", "val"):
        images = EvaluationImages(split.paths(part), [item.label for item in split.items(part)], ImageReader(0))
        assert evaluate(loaded, images, split.class_names).accuracy == metrics[f"{part}_accuracy"]
    assert torch.equal(loaded.context.vectors, method.context.vectors)
    assert not method.training
    last = json.loads((out / "log.jsonl").read_text("utf-8").splitlines()[-1])
    assert last["val_accuracy"] == metrics["val_accuracy"]


def test_the_environment_and_the_model_card(finished: tuple[Path, RunConfig, Method, Result], tiny: Backbone) -> None:
    out, *_ = finished
    environment = json.loads((out / "environment.json").read_text("utf-8"))
    assert environment["torch"] == torch.__version__
    assert environment["backbone_fingerprint"] == tiny.fingerprint
    card = (out / "README.md").read_text("utf-8")
    for part in ("# kgcoop on", "blue, green, red", "vlprompt predict", "| shots | 3 |", "| seed | 1 |", "w=8.0"):
        assert part in card


def test_the_environment_names_the_gpu_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device=None: f"name of {device}")
    backbone = SimpleNamespace(device=torch.device("cuda:1"), fingerprint="")
    assert run.environment(backbone)["device"] == "name of cuda:1"


@pytest.mark.parametrize(
    "method", sweep(["coop", "cocoop", "maple", "promptsrc", "linear_probe"], "coop", "linear_probe")
)
def test_the_seed_decides_the_run(tiny_from_memory: None, photos: Path, tmp_path: Path, method: str) -> None:
    for name, seed, workers in (("a", 3, 0), ("b", 3, 2), ("c", 4, 0)):
        torch.rand(5)  # whatever ran before
        train(configure(photos, method, seed=seed, data__workers=workers, train__epochs=2), tmp_path / name)
    a, b, c = ((tmp_path / name / "prompts.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert (a == c) == (method == "linear_probe")  # which draws nothing
    assert (tmp_path / "a" / "log.jsonl").read_bytes() == (tmp_path / "b" / "log.jsonl").read_bytes()


def test_a_run_reports_its_progress(tiny_from_memory: None, photos: Path, tmp_path: Path) -> None:
    events: list[object] = []

    class Watch(Watcher):
        def start(self, training: Training) -> None:
            events.append((len(training.views), training.config.epochs, training.epoch, training.step))

        def step(self) -> None:
            events.append("step")

        def epoch(self, log: EpochLog) -> None:
            assert (log.val_accuracy is None) == (log.epoch == 0), "measured after the last of two"
            events.append(log.epoch)

        def close(self) -> None:
            events.append("close")

    said: list[str] = []
    train(configure(photos), tmp_path / "run", [Watch()], said.append)
    assert events == [(3, 2, 0, 0), "step", "step", "step", 0, "step", "step", "step", 1, "close"]
    assert "3 classes of photos, 12 training images\n2,048 learned parameters: context.vectors [16, 128]" in said[0]


@pytest.mark.parametrize("method", ["zero_shot", "linear_probe"])
def test_methods_without_gradient_steps(tiny_from_memory: None, photos: Path, tmp_path: Path, method: str) -> None:
    _, result = train(configure(photos, method), tmp_path / "run")
    assert {p.name for p in (tmp_path / "run").iterdir()} == RUN_FILES
    assert (tmp_path / "run" / "log.jsonl").read_text("utf-8") == ""
    assert result.epochs == 0
    assert result.val_accuracy is not None
    if method == "linear_probe":
        assert result.train_accuracy == 100


def test_base_and_novel_classes(tiny_from_memory: None, photos: Path, tmp_path: Path) -> None:
    for half, names in (("base", ("blue", "green")), ("novel", ("red",))):
        for method in ("coop", "linear_probe"):  # one class is none to tell apart, but no fault
            tuned, result = train(configure(photos, method, data__classes=half), tmp_path / half / method)
            assert tuned.class_names == names
    assert result.train_accuracy == 100


def test_without_a_val_split_there_is_no_val_accuracy(tiny_from_memory: None, tmp_path: Path) -> None:
    _, result = train(configure(make_photos(tmp_path / "photos", val=0), train__epochs=1), tmp_path / "run")
    assert result.val_accuracy is None
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text("utf-8"))["val_accuracy"] is None
    assert "no val split" in (tmp_path / "run" / "README.md").read_text("utf-8")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_prompts_stay_fp32_at_low_precision(photos: Path, tmp_path: Path, precision: str) -> None:
    tuned, _ = train(configure(photos, "maple", train__precision=precision, train__epochs=1), tmp_path / "run")
    assert all(p.dtype == torch.float32 for p in tuned.parameters())
    state = load_file(tmp_path / "run" / "prompts.safetensors")
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in state.values())
    assert load_artefact(tmp_path / "run", precision=precision).backbone.dtype != torch.float32


# --- a run that fails -----------------------------------------------------------------------------


def test_a_used_output_folder_is_left_alone(tiny_from_memory: None, photos: Path, tmp_path: Path) -> None:
    used = tmp_path / "used"
    used.mkdir()
    (used / "thesis.txt").write_text("three years")
    before = tree(tmp_path)
    for out in (used, used / "thesis.txt"):
        with pytest.raises(ConfigError, match=one_line("is already in use: choose another with --out")):
            train(configure(photos), out)
    with pytest.raises(OutputError, match=one_line("cannot make output folder")):
        train(configure(photos), used / "thesis.txt" / "run")
    assert tree(tmp_path) == before
    for hidden in (".notes.2024", ".backup.20240101/thesis.txt"):
        place = tmp_path / hidden[:4]
        (place / hidden).parent.mkdir(parents=True)
        (place / hidden).write_text("three years")
        with pytest.raises(ConfigError, match="is already in use"):
            train(configure(photos, "zero_shot"), place)
        assert (place / hidden).read_text() == "three years"
    (tmp_path / "empty").mkdir()
    train(configure(photos, "zero_shot"), tmp_path / "empty")
    assert {p.name for p in (tmp_path / "empty").iterdir()} == RUN_FILES


def test_a_run_whose_loss_is_not_finite_stops(tiny_from_memory: None, photos: Path, tmp_path: Path) -> None:
    config = configure(photos, optim__lr=1e4, optim__weight_decay=1000, optim__warmup_epochs=0, train__epochs=20)
    with pytest.raises(VlpromptError, match=one_line(r"loss term 'ce' is (nan|inf) in epoch [1-9], step [0-9]+\Z")):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "prompts.safetensors").exists()
    with pytest.raises(ArtefactError, match=one_line("was the run finished")):
        load_artefact(tmp_path / "run")


def remove(photos: Path) -> str:
    (photos / "photos.csv").write_text(
        "path,label\n" + "\n".join(f"train/{c}/{i}.png,{c}" for c in SHADES for i in range(4))
    )
    (photos / "train" / "red" / "2.png").unlink()
    return str(photos / "photos.csv")


def damage(photos: Path) -> str:
    file = photos / "train" / "red" / "2.png"
    file.write_bytes(file.read_bytes()[:100])
    return str(photos)


@pytest.mark.parametrize("spoil", [remove, damage])
@pytest.mark.parametrize("method", ["coop", "zero_shot"])
def test_an_image_that_is_missing_or_damaged_is_named(
    tiny_from_memory: None, tmp_path: Path, spoil: Callable[[Path], str], method: str
) -> None:
    data = spoil(make_photos(tmp_path / "photos"))
    (tmp_path / "made").mkdir()
    before = tree(tmp_path)
    for out in ("made", "new"):
        with pytest.raises(DataError, match=one_line(r"red/2\.png")):
            train(configure(Path(data), method, data__batch_size=12), tmp_path / out)
    assert tree(tmp_path) == before


def test_a_class_name_that_is_too_long_is_named(tiny_from_memory: None, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos")
    for part in ("train", "val", "test"):
        (photos / part / "red").rename(photos / part / "_".join(80 * "r"))
    with pytest.raises(
        DataError, match=one_line(r"text of class 'r r .* has 99 tokens; the backbone reads at most 77")
    ):
        train(configure(photos), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data__name": "nowhere/at/all"}, DataError, "folder nowhere/at/all does not exist"),
        ({"data__name": "caltech"}, DataError, "unknown data set 'caltech': did you mean 'caltech101'"),
        ({"data__shots": 5}, DataError, "class 'blue' has 4 training images, too few for 5 shots"),
        ({"backbone": "nowhere"}, BackboneError, "no backbone 'nowhere'"),
        ({"train__device": "toaster"}, BackboneError, "cannot use device 'toaster'"),
    ],
)
def test_bad_input_leaves_no_folder(
    photos: Path, tmp_path: Path, changes: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=one_line(message)):
        train(configure(photos, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_prompts_deeper_than_the_tower_leave_no_folder(tiny_from_memory: None, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=one_line(r"prompt depth = 13 \(allowed: 1 to 12")):
        train(configure(photos, "maple", method__depth=13), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- the artefact ---------------------------------------------------------------------------------


@pytest.fixture
def artefact(tiny: Backbone, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_artefact(find_method("coop")(tiny, ("blue", "green")), tmp_path / "tuned")
    return tmp_path / "tuned"


def change(folder: Path, **changes: Any) -> None:
    sealed.change(folder / "config.json", **changes)


def refused(folder: Path, match: str, **options: Any) -> None:
    with pytest.raises(ArtefactError, match=one_line(match)):
        load_artefact(folder, **options)


def test_the_artefact_is_plain(artefact: Path, tiny: Backbone) -> None:
    assert {p.name for p in artefact.iterdir()} == {"config.json", "prompts.safetensors", "README.md"}
    config = json.loads((artefact / "config.json").read_text("utf-8"))
    assert config["format_version"] == FORMAT_VERSION
    assert config["method"] == "coop"
    assert config["settings"] == {"n_ctx": 16, "init": None, "class_specific": False, "position": "end"}
    assert config["class_names"] == ["blue", "green"]
    assert config["backbone"] == {"name": str(TINY), "fingerprint": tiny.fingerprint, "licence": tiny.licence}


def test_a_newer_format_is_refused(artefact: Path) -> None:
    change(artefact, format_version=FORMAT_VERSION + 1)
    refused(
        artefact, rf"has format_version {FORMAT_VERSION + 1}; this vlprompt reads up to {FORMAT_VERSION}: update it"
    )


def test_another_backbone_is_refused(artefact: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in TINY.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    assert load_artefact(artefact, backbone=str(other)).backbone.name == str(other)  # the same, elsewhere
    state = load_file(other / "model.safetensors")
    name = next(k for k in state if k.endswith("token_embedding.weight"))
    state[name] = state[name] + 0.1
    save_file(state, other / "model.safetensors")
    refused(artefact, r"was tuned on backbone .* but '.*other' has other weights", backbone=str(other))
    change(artefact, backbone={"name": str(tmp_path / "moved"), "fingerprint": "0"})
    refused(artefact, r"was tuned on backbone '.*moved': no backbone '.*moved'.*; say where it lies with --backbone")
    refused(artefact, r"was tuned on backbone .*moved' \(0…\), but", backbone=str(TINY))


def test_a_backbone_given_by_a_relative_path_is_found_from_any_folder(artefact: Path, tmp_path: Path, monkeypatch):
    """And is not taken for a repository of that name."""
    (tmp_path / "models" / "clip").mkdir(parents=True)
    for file in TINY.iterdir():
        (tmp_path / "models" / "clip" / file.name).write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path)
    save_artefact(find_method("coop")(load_backbone("models/clip"), ("blue", "green")), tmp_path / "run")
    monkeypatch.chdir(artefact)
    assert load_artefact(tmp_path / "run").backbone.name == str(tmp_path / "models" / "clip")


def test_a_backbone_with_fewer_layers_is_refused_as_another(tiny: Backbone, tmp_path: Path) -> None:
    save_artefact(find_method("maple")(tiny, ("blue", "green")), tmp_path)
    refused(tmp_path, "was tuned on backbone .* but 'mini' has other weights", backbone="mini")


@pytest.mark.parametrize("file", ["config.json", "prompts.safetensors"])
def test_a_missing_file_is_refused(artefact: Path, file: str) -> None:
    (artefact / file).unlink()
    refused(artefact, "no tuned model in .* config.json" if file == "config.json" else "cannot read the tuned model")


@pytest.mark.parametrize("file", ["config.json", "prompts.safetensors"])
@pytest.mark.parametrize("size", [0, 5, 60])
def test_a_truncated_file_is_refused(artefact: Path, file: str, size: int) -> None:
    (artefact / file).write_bytes((artefact / file).read_bytes()[:size])
    refused(artefact, "cannot read the tuned model in .*tuned")


def test_what_is_no_folder_is_refused(artefact: Path, tmp_path: Path) -> None:
    refused(artefact / "config.json", "no tuned model in .*config.json")
    refused(tmp_path / "nowhere", "no tuned model in .*nowhere")
    refused(tmp_path, "no tuned model")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"method": "cop"}, "unknown method 'cop': did you mean 'coop'"),
        ({"method": "maple"}, "unknown setting of maple 'class_specific'"),
        ({"settings": {"n_ctx": 0}}, "n_ctx"),
        ({"settings": {"n_ctx": 4}}, "prompts.safetensors .* does not fit coop: .*size mismatch"),
        ({"settings": None}, "cannot read the tuned model in .*: settings: input should be a valid dictionary"),
        ({"class_names": "blue"}, "class_names: input should be a valid list"),
        ({"class_names": ["blue", 5]}, "class_names.1: input should be a valid string"),
        ({"class_names": []}, r"class_names: 0 of them \(allowed: 1 to 50,000\)"),
        ({"class_names": [f"c{i}" for i in range(50_001)]}, r"class_names: 50001 of them \(allowed: 1 to 50,000\)"),
        ({"class_names": ["blue", "\ud800"]}, r"'\\ud800' has half a character in it"),
        ({"template": "a photo"}, "text with {} for the class name"),
        ({"template": "\udc80 {}"}, "has half a character in it"),
        ({"about": "a text"}, "about: input should be a valid dictionary"),
        ({"about": {"a": {"b": []}}}, "about.a: input should be a valid string"),
        ({"prompts": {"sha256": 5, "shapes": {}}}, "prompts.sha256: input should be a valid string"),
        ({"format_version": "one"}, "cannot read the tuned model"),
        ({"method": "kgcoop", "settings": {}}, "does not fit kgcoop"),
        ({"backbone": {"name": str(TINY)}}, "backbone.fingerprint: field required"),
        ({"backbone": None}, "cannot read the tuned model"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(artefact: Path, changes: dict, match: str) -> None:
    change(artefact, **changes)
    refused(artefact, match)


@pytest.mark.parametrize("key", ["format_version", "method", "settings", "class_names", "template", "backbone"])
def test_a_configuration_without_a_key_is_refused(artefact: Path, key: str) -> None:
    config = sealed.read(artefact / "config.json")
    del config[key]
    sealed.write(artefact / "config.json", config)
    refused(artefact, f"no '{key}' in config.json" if key == "format_version" else f"{key}: field required")
    (artefact / "config.json").write_text("[1, 2]", encoding="utf-8")
    refused(artefact, "cannot read the tuned model")


@pytest.mark.parametrize("name", sweep(sorted(METHODS), "coop", "drople", "linear_probe", "maple", "zero_shot"))
def test_tensors_that_do_not_fit_are_refused(tiny: Backbone, tmp_path: Path, name: str) -> None:
    save_artefact(find_method(name)(tiny, ("blue", "green", "red")), tmp_path)
    file = tmp_path / "prompts.safetensors"
    state, saved = load_file(file), json.loads((tmp_path / "config.json").read_text("utf-8"))["prompts"]
    for key, tensor in (
        (key, tensor) for key, tensor in state.items() if tensor.numel()
    ):  # a head's, before it is fitted
        wrong = [
            state | {key: torch.stack([tensor, tensor])},
            *([state | {key: tensor[..., :-1].contiguous()}] if tensor.ndim else []),
            {k: v for k, v in state.items() if k != key},
        ]
        for tensors in wrong:
            save_file(tensors, file)
            refused(tmp_path, "prompts.safetensors is not the file that was saved: tensor ")
            change(tmp_path, prompts=saved | {"sha256": sha256(file.read_bytes()).hexdigest()})
            refused(tmp_path, rf"prompts.safetensors in .* does not fit {name}: ")
            change(tmp_path, prompts=saved)
    save_file(state | {"extra": torch.zeros(1)}, file)
    refused(tmp_path, "saved: tensor 'extra' was added")
    change(tmp_path, prompts=saved | {"sha256": sha256(file.read_bytes()).hexdigest()})
    refused(tmp_path, f"does not fit {name}: .*extra")


def test_a_failed_write_leaves_the_old_file(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlprompt import files

    before = tree(artefact)
    monkeypatch.setattr(files.os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(OutputError, match=r"config\.json: disk full"):
        files.write_atomically(artefact / "config.json", "half")
    assert tree(artefact) == before
