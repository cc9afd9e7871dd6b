"""Several processes, and batches computed in parts, take the same steps as one process on whole batches."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kit import TINY
from tests.kit.command import environment, processes
from tests.kit.marks import slow, sweep
from tests.kit.pictures import CLASSES, make_pictures
from tests.kit.runs import arguments, log, prompts
from vlprompt.backbones.load import load_backbone
from vlprompt.config.schema import OptimConfig, TrainConfig, build_config
from vlprompt.data.batches import TrainingViews
from vlprompt.data.images import Preprocess
from vlprompt.data.reading import ImageReader
from vlprompt.errors import ConfigError
from vlprompt.methods import METHODS, Can, find_method
from vlprompt.methods.coop import CoOp
from vlprompt.training import distributed
from vlprompt.training.loop import Training
from vlprompt.training.run import saved_config, train

METHOD_SETTINGS = {"coop": [], "maple": [], "promptsrc": ["average_mean=2"], "prograd": []}
SETTINGS = ["train.epochs=2", "data.batch_size=5", "lr=0.0005"]  # shares of 3 and 2 images; small steps, for fp32


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"), train=5)


def alone(method: str, pictures: Path, out: Path, **more) -> Path:
    """The same run in this process alone."""
    given = dict(s.split("=") for s in [*SETTINGS, *METHOD_SETTINGS.get(method, [])])
    given |= {"data.name": str(pictures), "backbone": str(TINY), "data.workers": 0}
    given |= {"optim.warmup_epochs": 0, **more}
    train(build_config(method, overrides=given), out)
    return out


def close(run: Path, other: Path) -> None:
    """Prompts within 1e-5, and logs that say the same."""
    ours, theirs = prompts(run), prompts(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=0)
    for a, b in zip(log(run), log(other), strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():  # None: not measured in that epoch
            assert value == (b[key] if b[key] is None else pytest.approx(b[key], rel=1e-4)), key


@slow
def test_two_processes_equal_one(pictures, tmp_path):
    runs = [
        arguments(m, pictures, tmp_path / m, *SETTINGS, *more, "--json") for m, more in METHOD_SETTINGS.items()
    ] + [
        arguments("coupled", pictures, tmp_path / "coupled", *SETTINGS),
        arguments("coop", pictures, tmp_path / "too small", "data.batch_size=1"),
        ["train", "--resume", str(tmp_path / "coop")],
    ]  # fmt: skip
    (first, out, err), (second, other_out, other_err) = processes(["-m", "tests.kit.several", json.dumps(runs)])
    assert first == second == 0, err + other_err
    *results, codes = map(json.loads, out.splitlines())
    assert codes == [0, 0, 0, 0, 2, 2, 0]
    assert [r["run"] for r in results] == [str(tmp_path / m) for m in METHOD_SETTINGS]
    assert json.loads(other_out) == codes, "only the first process prints results"
    refused = [line for line in err.splitlines() if "error" in line]
    assert refused == [
        "error: method 'coupled' compares the images of a batch: it does not allow 2 processes",
        "error: a batch of 1 images is too small for 2 processes",
    ]
    assert [line.removeprefix("process 1: ") for line in other_err.splitlines() if "error" in line] == refused
    assert "epoch 1/2" not in other_err
    assert "in 2 processes" in err
    assert not (tmp_path / "coupled").exists()
    for method in METHOD_SETTINGS:
        close(tmp_path / method, alone(method, pictures, tmp_path / f"{method} alone"))


@slow
def test_torchrun_starts_them(pictures, tmp_path):
    # resumed in one process: how many there are decides nothing
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vlprompt"]
    command = [*command, *arguments("coop", pictures, tmp_path / "run", *SETTINGS, "--json")]
    done = subprocess.run([sys.executable, *command], env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["epochs"] == 2
    before = prompts(tmp_path / "run")
    train(saved_config(tmp_path / "run"), tmp_path / "run", resume=True)
    assert torch.equal(prompts(tmp_path / "run")["context.vectors"], before["context.vectors"])


@pytest.mark.parametrize("method", sweep([*METHOD_SETTINGS, "kgcoop", "cocoop", "vpt", "ivlp"], "coop", "prograd"))
def test_a_batch_in_parts_equals_a_whole_one(method, pictures):
    # in float64, where nothing but a wrong weight could make a difference
    files = sorted((pictures / "train").rglob("*.png"))
    labels = [CLASSES.index(file.parent.name) for file in files]
    backbone = load_backbone(str(TINY)).to(dtype=torch.float64)

    def tuned(parts: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        cls = find_method(method)
        ours = cls(backbone, CLASSES, cls.Config()).double()
        views = TrainingViews(files, labels, to_double(backbone.preprocess), 5, 1, reader=ImageReader(0))
        settings = TrainConfig(epochs=2, accumulate=parts)
        assert Training(ours, views, OptimConfig(lr=0.01, warmup_epochs=0), settings).run()
        return ours.state_dict()

    whole, parts = tuned(1), tuned(3)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=1e-9, rtol=0)


def to_double(preprocess: Preprocess) -> Preprocess:
    """The same views in float64."""

    class Double(Preprocess):
        def tensor(self, *given):
            return super().tensor(*given).double()

    return Double(**vars(preprocess))


def test_processes_wait_for_hours(monkeypatch):
    """The first looks at all images alone; by default the others would give up after ten minutes (NCCL)."""
    given = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda backend, **how: given.update(how))
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: None)
    with distributed.join_processes("cpu"):
        pass
    assert given["timeout"].total_seconds() >= 6 * 3600


def test_processes_that_nobody_started(pictures, tmp_path, monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"cannot join the 2 processes that WORLD_SIZE tells of: .*RANK"):
        alone("coop", pictures, tmp_path / "run")


def test_parts_that_are_refused(pictures, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"^a batch of 5 images is too small for train.accumulate = 6$"):
        alone("coop", pictures, tmp_path / "run", accumulate=6)

    class Coupled(CoOp):
        """A method whose loss compares images of a batch."""

        name = "coupled"

        class Config(CoOp.Config):
            """Those of coop."""

            can = CoOp.Config().can & ~Can.SPLIT_BATCHES

    monkeypatch.setitem(METHODS, "coupled", Coupled)
    with pytest.raises(ConfigError, match=r"^method 'coupled' compares .*: it does not allow train.accumulate = 2$"):
        alone("coupled", pictures, tmp_path / "run", accumulate=2)
    alone("coupled", pictures, tmp_path / "run")
