"""Runs that are killed, interrupted, stopped by a bad loss, and resumed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.kit.command import environment
from tests.kit.marks import slow, sweep
from tests.kit.pictures import make_pictures
from tests.kit.runs import StopsAfter, arguments, configured, log, prompts
from vlprompt.data.datasets import load_dataset
from vlprompt.errors import ArtefactError, ConfigError, DataError, Interrupted, VlpromptError
from vlprompt.methods import METHODS
from vlprompt.methods.coop import CoOp
from vlprompt.training import checkpoints
from vlprompt.training import run as run_module
from vlprompt.training.checkpoints import checkpoint_file
from vlprompt.training.run import saved_config, train
from vlprompt.training.watchers import Watcher

EPOCHS = 4
METHOD_SETTINGS = {"coop": [], "promptsrc": ["average_mean=3"]}


def same(run: Path, other: Path) -> None:
    """Bit-identical prompts, the same checkpoint but for the time it took, and the same log."""
    ours, theirs = prompts(run), prompts(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert log(run) == log(other)


# --- killed ---------------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize("method", METHOD_SETTINGS)
def test_a_killed_run_resumes_to_the_same_bits(method, pictures, tmp_path):
    rng = random.Random(method)
    deaths = {
        "whole": [],
        "times": [rng.uniform(0.05, 0.25), rng.uniform(0.05, 0.25), rng.uniform(0.1, 0.7), rng.uniform(0.1, 0.7)],
        # The n-th file of a life. Of the first: 1-4 configuration, environment, split, log; then log and checkpoint
        # of each epoch, and at last metrics and the three of the tuned model. Later lives have no configuration.
        "files": [2, 5, -4, 5, -8, -4],
    }
    more = [f"train.epochs={EPOCHS}", *METHOD_SETTINGS[method]]
    runs = [
        {"out": str(tmp_path / name), "deaths": d, "argv": arguments(method, pictures, tmp_path / name, *more)}
        for name, d in deaths.items()
    ]
    helper = [sys.executable, "-m", "tests.kit.kill_often", json.dumps(runs)]
    done = subprocess.run(helper, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    none, times, files = json.loads(done.stdout)
    assert none == 0
    assert times >= 2  # the first two come early, on a machine that has grown faster too
    assert files == len(deaths["files"])
    for name in ("times", "files"):
        same(tmp_path / name, tmp_path / "whole")
        assert [row["epoch"] for row in log(tmp_path / name)] == list(range(1, EPOCHS + 1))
        assert not list((tmp_path / name).rglob(".*")), "a killed process's unfinished file was left"


# --- interrupted ----------------------------------------------------------------------------------


def test_ctrl_c_finishes_the_step_and_says_how_to_resume(vlprompt, pictures, tmp_path):
    settings = ["train.epochs=2", "data.batch_size=1"]
    assert vlprompt(*arguments("coop", pictures, tmp_path / "whole", *settings))[0] == 0
    run = tmp_path / "stop ped"
    process = subprocess.Popen(
        [sys.executable, "-m", "vlprompt", *arguments("coop", pictures, run, *settings)],
        env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (run / "log.jsonl").exists() and process.poll() is None:  # it comes right before the first step
        time.sleep(0.01)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert err.splitlines()[-1] == f"interrupted; to continue: vlprompt train --resume '{run}'"
    assert checkpoint_file(run).is_file()
    code, out, err = vlprompt("train", "--resume", str(run), "--json")
    assert code == 0
    assert "resumed after epoch" in err
    assert json.loads(out)["epochs"] == 2
    same(run, tmp_path / "whole")


@pytest.fixture(scope="module", params=["coop", "promptsrc", "drople"])
def whole(request, pictures, tmp_path_factory) -> Path:
    """A run of two epochs that nothing stopped."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(configured(pictures, request.param, **{"train.epochs": 2, "optim.name": "adamw"}), out)
    return out


@pytest.mark.parametrize("n", sweep([1, 2, 3, 5], 3))
def test_an_interrupt_within_an_epoch_loses_nothing(n, whole, tmp_path):
    config = saved_config(whole)
    with pytest.raises(Interrupted, match=r"vlprompt train --resume"):
        train(config, tmp_path / "stopped", [StopsAfter(n)])
    progress = StopsAfter(-1)
    assert saved_config(tmp_path / "stopped") == config
    train(config, tmp_path / "stopped", [progress], resume=True)
    assert progress.started == (3, 2, n + 1)  # the step after the signal is the last that is done
    same(tmp_path / "stopped", whole)


# --- refused --------------------------------------------------------------------------------------


def test_resume_takes_the_runs_own_settings_only(vlprompt, pictures, tmp_path):
    train(configured(pictures, **{"train.epochs": 1}), tmp_path / "run")
    for extra in (["coop"], ["--epochs", "3"], ["--out", "x"], ["--dry-run"], ["coop", str(pictures), "lr=1"]):
        code, _, err = vlprompt("train", *extra, "--resume", str(tmp_path / "run"))
        assert code == 2
        assert err == "error: --resume takes everything from the run's config.yaml: give nothing else but --json\n"


def test_two_runs_that_write_one_folder(pictures, tmp_path, monkeypatch):
    """The second is refused, and what the first has there stays: while it runs, and if both began together."""

    class Resumes(Watcher):
        def step(self):
            with pytest.raises(ConfigError, match=r"another process has begun a run there"):
                train(config, tmp_path / "run", resume=True)
            tried.append(1)

    def load(*given):
        monkeypatch.undo()  # what comes now is the other run, which is faster
        train(config, tmp_path / "both")
        return load_dataset(*given)

    config, tried = configured(pictures, **{"train.epochs": 1}), []
    train(config, tmp_path / "run", [Resumes()])
    assert tried
    monkeypatch.setattr(run_module, "load_dataset", load)
    with pytest.raises(ConfigError, match=r"another process has begun a run there"):
        train(replace(config, seed=2), tmp_path / "both")
    assert saved_config(tmp_path / "both") == config
    same(tmp_path / "both", tmp_path / "run")


def test_train_needs_method_and_data(vlprompt):
    code, _, err = vlprompt("train", "coop")
    assert (code, err) == (2, "error: missing METHOD and DATA (or --resume RUN)\n")


def test_what_cannot_be_resumed(tiny, pictures, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"no run to resume in .*: it has no config.yaml"):
        saved_config(tmp_path)
    own = make_pictures(tmp_path / "pictures")
    config = configured(own, **{"train.epochs": 1})
    run = tmp_path / "run"
    train(config, run)
    with pytest.raises(ConfigError, match=r"already in use: .* see --resume"):
        train(config, run)
    file = checkpoint_file(run)
    whole = file.read_bytes()
    file.write_bytes(whole[:200])
    with pytest.raises(ArtefactError, match=r"cannot read checkpoint .*last.safetensors"):
        train(config, run, resume=True)
    file.write_bytes(whole.replace(b'format_version\\": 3', b'format_version\\": 9'))
    with pytest.raises(ArtefactError, match="has format_version 9; this vlprompt reads up to 3"):
        train(config, run, resume=True)
    fingerprint = tiny.fingerprint.encode()
    file.write_bytes(whole.replace(fingerprint, fingerprint[::-1]))
    with pytest.raises(ArtefactError, match=r"checkpoint .*last.safetensors is damaged: its content is not what was"):
        train(config, run, resume=True)
    with safe_open(file, "pt") as f:
        checksum = f.metadata()["sha256"]
    with monkeypatch.context() as m:
        m.setattr(checkpoints, "_checksum", lambda *given: checksum)  # as if such weights had been saved
        with pytest.raises(ArtefactError, match="was begun on other weights than"):
            train(config, run, resume=True)
    file.write_bytes(whole)
    (own / "train" / "cat" / "0.png").rename(own / "train" / "cat" / "9.png")
    with pytest.raises(ConfigError, match=r"cannot resume .*: its data set no longer gives the images of its split"):
        train(config, run, resume=True)
    assert file.read_bytes() == whole


# --- a loss or gradient that is not finite ---------------------------------------------------------


@pytest.fixture
def bad_method():
    """A CoOp with a second term, whose value or gradient is not finite in the fifth step."""

    class Bad(CoOp):
        """Goes wrong once."""

        steps, gradient_only = 0, False

        def losses(self, batch):
            type(self).steps += 1
            x = self.context.vectors.sum()
            bad = (x - x).abs().sqrt() if self.gradient_only else x * float("nan")  # 0, with gradient 0/0
            return {**super().losses(batch), "extra": bad if self.steps == 5 else 0 * x}

    Bad.name = "bad"
    METHODS["bad"] = Bad
    yield Bad
    del METHODS["bad"]


@pytest.mark.parametrize(
    ("gradient_only", "says"),
    [(False, "loss term 'extra' is nan"), (True, "the gradient of 'context.vectors' is not finite")],
)
def test_what_is_not_finite_stops_the_run(bad_method, gradient_only, says, pictures, tmp_path):
    bad_method.gradient_only = gradient_only
    config = configured(pictures, "bad")
    with pytest.raises(VlpromptError, match=rf"^training stopped: {says} in epoch 2, step 2$"):
        train(config, tmp_path / "run")
    assert [row["epoch"] for row in log(tmp_path / "run")] == [1]
    seen = StopsAfter(-1)
    train(config, tmp_path / "run", [seen], resume=True)  # from the checkpoint of epoch 1; this time all is well
    assert seen.started == (3, 3, 3)
    bad_method.steps = 5
    train(config, tmp_path / "never", resume=False)
    same(tmp_path / "run", tmp_path / "never")


# --- a picture that cannot be read ------------------------------------------------------------------


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_bad_picture_is_found_before_a_run_and_before_it_goes_on(part, tmp_path):
    own, run = make_pictures(tmp_path / "pictures"), tmp_path / "run"
    picture = own / part / "cat" / "0.png"
    whole = picture.read_bytes()
    config = configured(own, "vpt")
    picture.write_bytes(whole[:60])
    with pytest.raises(DataError):
        train(config, run)
    assert not run.exists()
    picture.write_bytes(whole)
    with pytest.raises(Interrupted):
        train(config, run, [StopsAfter(2)])
    picture.write_bytes(whole[:60])
    with pytest.raises(DataError):
        train(config, run, resume=True)
    picture.write_bytes(whole)
    train(config, run, resume=True)
    assert [row["epoch"] for row in log(run)] == [1, 2, 3]
