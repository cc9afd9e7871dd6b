"""The loop's other promises: fp16, the epoch that is kept, reports, what is said at the start."""

from __future__ import annotations

import json
import signal
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.kit import TINY, sealed
from tests.kit.marks import sweep
from tests.kit.pictures import CLASSES, make_pictures
from tests.kit.runs import configured, log, prompts
from vlprompt.artefact.artefact import load_artefact, load_calibration
from vlprompt.artefact.calibration import fit_calibration
from vlprompt.backbones.load import load_backbone
from vlprompt.config.schema import OptimConfig, TrainConfig
from vlprompt.data.batches import TrainingViews
from vlprompt.data.reading import ImageReader
from vlprompt.data.splits import read_split
from vlprompt.errors import ConfigError, VlpromptError
from vlprompt.methods import find_method
from vlprompt.training.evaluate import EvaluationImages, predict_logits
from vlprompt.training.interrupt import deferred_interrupt
from vlprompt.training.loop import LossScale, Training
from vlprompt.training.run import train
from vlprompt.training.watchers import Watcher

# --- fp16 -----------------------------------------------------------------------------------------


def training(method: str, pictures: Path, precision: str, weight: float = 1.0, **config) -> Training:
    """A method's training on one batch of 12, its losses multiplied by ``weight``; lr 1 / weight undoes that."""
    cls = find_method(method)

    class Weighted(cls):
        def losses(self, batch):
            return {term: weight * value for term, value in super().losses(batch).items()}

    backbone = load_backbone(str(TINY), "cpu", precision)
    files = sorted((pictures / "train").rglob("*.png"))
    labels = [CLASSES.index(file.parent.name) for file in files]
    views = TrainingViews(files, labels, backbone.preprocess, 12, 1, reader=ImageReader(0))
    torch.manual_seed(1)
    optim = OptimConfig(lr=0.001 / weight, momentum=0, weight_decay=0, warmup_epochs=0)
    return Training(Weighted(backbone, CLASSES, cls.Config()), views, optim, TrainConfig(epochs=1, **config))


def move(job: Training) -> torch.Tensor:
    before = job.method.context.vectors.detach().clone()
    assert job.run()
    return job.method.context.vectors.detach() - before


@pytest.mark.parametrize(("method", "parts"), sweep(product(["coop", "prograd"], [1, 3]), ("prograd", 3)))
def test_fp16_towers_keep_small_gradients(method, parts, pictures):
    right = move(training(method, pictures, "fp32"))

    def error(job: Training) -> float:
        return ((move(job) - right).norm() / right.norm()).item()

    small = 1e-6  # gradients of such losses vanish in fp16
    assert error(training(method, pictures, "fp16", small, accumulate=parts)) < 0.1
    unscaled = training(method, pictures, "fp16", small, accumulate=parts)
    unscaled.scale = LossScale(1.0)
    assert error(unscaled) > 0.5


def test_a_step_that_overflows_is_left_out(pictures):
    job = training("prograd", pictures, "fp16")
    job.scale = LossScale(2.0**60)
    assert not move(job).any()
    assert job.scale == LossScale(2.0**59)
    job.scale, job.epoch = LossScale(2.0**10, good_steps=1999), 0
    assert move(job).any()
    assert job.scale == LossScale(2.0**11)


def test_scaling_does_not_hide_a_bad_gradient(pictures):
    job = training("coop", pictures, "fp16", weight=float("inf"))
    with pytest.raises(VlpromptError, match="loss term 'ce' is inf in epoch 1, step 1"):
        job.run()
    assert training("coop", pictures, "bf16").scale == training("coop", pictures, "fp32").scale == LossScale(1.0)


def test_fp16_scale_is_resumed(pictures, tmp_path):
    config = configured(pictures, **{"train.precision": "fp16", "train.epochs": 2})
    train(config, tmp_path / "run")
    before = prompts(tmp_path / "run")
    train(config, tmp_path / "run", resume=True)
    assert all(torch.equal(before[k], v) for k, v in prompts(tmp_path / "run").items())


# --- the epoch that is kept -----------------------------------------------------------------------


def test_select_val_keeps_the_first_best_epoch(pictures, tmp_path, monkeypatch):
    from vlprompt.training import run

    accuracies = iter([50.0, 80.0, 80.0])
    monkeypatch.setattr(run, "score", lambda *_: SimpleNamespace(accuracy=next(accuracies, 0.0)))
    settings = {"optim.lr": 0.01, "train.epochs": 3}
    _, result = train(configured(pictures, **settings, **{"train.select": "val"}), tmp_path / "best")
    assert result.val_accuracy == 80.0
    assert [row["val_accuracy"] for row in log(tmp_path / "best")] == [50.0, 80.0, 80.0]
    assert "3 (kept: 2, chosen on the val images)" in (tmp_path / "best" / "README.md").read_text()
    stopped = configured(pictures, **settings)
    monkeypatch.setattr(run, "score", lambda *_: SimpleNamespace(accuracy=0.0))
    seen = {}

    class Watch(Watcher):
        def start(self, training):
            self.vectors = training.method.context.vectors

        def epoch(self, log):
            seen[log.epoch + 1] = self.vectors.detach().clone()

    train(stopped, tmp_path / "last", [Watch()])
    best, last = (prompts(tmp_path / name)["context.vectors"] for name in ("best", "last"))
    assert torch.equal(best, seen[2])
    assert torch.equal(last, seen[3])
    assert not torch.equal(best, last)


def test_select_val_needs_val_images(tmp_path):
    pictures = make_pictures(tmp_path / "pictures", val=0)
    with pytest.raises(ConfigError, match=r"^train.select = val: there are no val images to select on$"):
        train(configured(pictures / "train", **{"train.select": "val"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def val_logits(pictures: Path, run: Path) -> tuple[torch.Tensor, torch.Tensor]:
    split = read_split(run / "split.json", pictures)
    images = EvaluationImages(split.paths("val"), split.labels("val"), ImageReader(0))
    return predict_logits(load_artefact(run), images, split.class_names), images.labels


@pytest.mark.parametrize(("given", "measured"), sweep([
    ({}, [7]), ({"train.val_every": 0}, [7]), ({"train.val_every": 1}, range(1, 8)), ({"train.val_every": 8}, [7]),
    ({"train.val_every": 3}, [3, 6, 7]), ({"train.select": "val"}, range(1, 8)),
], ({"train.val_every": 3}, [3, 6, 7]), ({"train.select": "val"}, range(1, 8))))  # fmt: skip
def test_val_images_are_measured_every_so_many_epochs_and_at_the_end(given, measured, pictures, tmp_path, monkeypatch):
    """They are predicted then and no other time, and what is trained is the same."""
    from vlprompt.training import run

    parts = []
    predict = run.predict_logits
    monkeypatch.setattr(run, "predict_logits", lambda *a: (parts.append(len(a[1].labels)), predict(*a))[1])
    _, result = train(configured(pictures, "vpt", **{"train.epochs": 7}, **given), tmp_path / "run")
    rows = log(tmp_path / "run")
    assert [row["epoch"] for row in rows if row["val_accuracy"] is not None] == [*measured]
    kept = int(
        sealed.read(tmp_path / "run" / "config.json")["about"]["epochs"].partition("kept: ")[2].split(",")[0] or 7
    )
    assert result.val_accuracy == rows[kept - 1]["val_accuracy"]
    assert parts == [6] * (len(measured) + (kept != 7)), "once more where an earlier epoch's prompts are kept"
    assert load_calibration(tmp_path / "run") == fit_calibration(*val_logits(pictures, tmp_path / "run"))[0]
    if not given:
        train(configured(pictures, "vpt", **{"train.epochs": 7, "train.val_every": 1}), tmp_path / "often")
        assert all(torch.equal(v, prompts(tmp_path / "often")[k]) for k, v in prompts(tmp_path / "run").items())


def test_a_resumed_run_measures_the_same_epochs(pictures, tmp_path):
    config = configured(pictures, "vpt", **{"train.epochs": 5, "train.val_every": 2})
    train(config, tmp_path / "whole")

    class Stop(Watcher):
        def epoch(self, log):
            if log.epoch == 2:
                raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        train(config, tmp_path / "run", [Stop()])
    train(config, tmp_path / "run", resume=True)
    assert [row["val_accuracy"] is not None for row in log(tmp_path / "run")] == [False, True, False, True, True]
    assert log(tmp_path / "run") == log(tmp_path / "whole")
    assert load_calibration(tmp_path / "run") == load_calibration(tmp_path / "whole")


@pytest.mark.parametrize(("method", "given", "why"), [
    ("coop", {"train.select": "val"}, "train.select = val"), ("tip_adapter_f", {}, "tip_adapter_f"),
])  # fmt: skip
def test_an_interval_without_effect_is_told(method, given, why, pictures, tmp_path):
    said = []
    few = {"train.epochs": 1, **({"data.views": 1} if method == "tip_adapter_f" else {}), **given}
    train(configured(pictures, method, **few, **{"train.val_every": 5}), tmp_path / "run", say=said.append)
    assert f"train.val_every = 5 has no effect: {why} measures every epoch" in said


@pytest.mark.parametrize("value", ["-1", "1.5", "often", "true", "1e10"])
def test_bad_intervals_are_refused_in_a_line(value, pictures, tmp_path, vlprompt):
    done = vlprompt("train", "coop", pictures, f"val_every={value}", "--out", tmp_path / "run")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "train.val_every" in done.err
    assert not (tmp_path / "run").exists()


def test_the_option_sets_the_interval(pictures, vlprompt):
    done = vlprompt("train", "coop", pictures, "--val-every", 0, "--dry-run", "--json")
    assert done.json["train"]["val_every"] == 0
    assert vlprompt("train", "coop", pictures, "--val-every", -1).code == 2


def test_a_second_interrupt_is_at_once_where_it_may_insist():
    with deferred_interrupt(insist=False) as asked:
        assert not asked()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert asked()
    with deferred_interrupt() as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


# --- reports and what is said ---------------------------------------------------------------------


def test_wandb_gets_each_epoch_once(pictures, tmp_path, monkeypatch):
    calls = []

    class Run:
        id = "abc"

        def log(self, values, step):
            calls.append((step, set(values)))

        def finish(self):
            calls.append("finish")

    def init(**given):
        calls.append((given["project"], given["name"], given["id"], given["config"]["method"]["name"]))
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    config = configured(pictures, **{"train.report_to": "wandb", "train.epochs": 2})
    train(config, tmp_path / "run")
    figures = {"lr", "ce", "val_accuracy"}
    assert calls == [("vlprompt", "run", None, "coop"), (1, figures - {"val_accuracy"}), (2, figures), "finish"]
    calls.clear()
    train(config, tmp_path / "run", resume=True)
    assert calls == [("vlprompt", "run", "abc", "coop"), "finish"]


def test_tensorboard_gets_each_epoch_once(pictures, tmp_path, monkeypatch):
    calls = []

    class Writer:
        def __init__(self, folder, purge_step):
            calls.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            calls.append((name, step))

        def close(self):
            calls.append("close")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    config = configured(pictures, **{"train.report_to": "tensorboard", "train.epochs": 2, "train.val_every": 1})
    train(config, tmp_path / "run")
    folder = str(tmp_path / "run" / "tensorboard")
    assert (calls[0], calls[-1]) == ((folder, 1), "close")
    assert sorted(calls[1:-1]) == sorted((name, step) for name in ("lr", "ce", "val_accuracy") for step in (1, 2))
    calls.clear()
    train(config, tmp_path / "run", resume=True)
    assert calls == [(folder, 3), "close"]


def test_tensorboard_files(pictures, tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed (extra: tensorboard)")
    train(configured(pictures, **{"train.report_to": "tensorboard"}), tmp_path / "run")
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


@pytest.mark.parametrize(("service", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_report_that_is_not_installed(service, module, pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    says = rf"^train.report_to = {service}: it is not installed \(pip install 'vlprompt\[{service}\]'\)$"
    with pytest.raises(ConfigError, match=says):
        train(configured(pictures, **{"train.report_to": service}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_start_lists_what_is_learned(pictures, tmp_path):
    said = []
    train(configured(pictures, "maple", **{"train.epochs": 1}), tmp_path / "run", say=said.append)
    learned = said[0].splitlines()[1]
    assert learned.endswith(
        "learned parameters: 9 × coupled.projections.*.weight [128, 128], 9 × coupled.projections.*.bias [128], "
        "context.vectors [2, 128], context.deep [8, 2, 128]"
    )
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert learned.startswith(f"{metrics['trainable_parameters']:,} learned parameters")
