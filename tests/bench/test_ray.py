"""``vlprompt bench --engine ray``: on a Ray of this machine, started for the test; without Ray, that it says so."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kit import TINY
from tests.kit.command import environment
from tests.kit.marks import slow
from vlprompt.bench import on_ray
from vlprompt.bench.protocols import Asked, Run, plan
from vlprompt.bench.results import read_results
from vlprompt.errors import ConfigError

QUICK = ("--backbone", str(TINY), "warmup_epochs=0", "data.workers=0", "data.batch_size=2", "--shots", "2")
OWN = """
from vlprompt.methods import register
from vlprompt.methods.zero_shot import ZeroShot

@register("own")
class Own(ZeroShot):
    pass
"""
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra: ray)")


def command(*given: object) -> list[str]:
    words = ["bench", "base-to-novel", "--engine", "ray", "--data", "photos", "--out", "out", *given, *QUICK]
    return [sys.executable, "-m", "vlprompt", *map(str, words)]


@contextmanager
def started(folder: Path, *given: object) -> Iterator[subprocess.Popen[str]]:
    """In a process of its own, which can be interrupted; Ray's processes end with it, and do not give way to others."""
    process = subprocess.Popen(
        command(*given), cwd=folder, env=environment(RAY_ADDRESS="", RAY_worker_niceness="0"),
        start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def done(folder: Path, *given: object) -> tuple[int, str, str]:
    with started(folder, *given) as process:
        out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def when(process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    while not happened():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


@slow
@needs_ray
def test_a_bench_on_ray(photos: Path, tmp_path: Path) -> None:
    """The same figures as without it, also of a method in a file; a run that fails is reported and the rest goes on."""
    (tmp_path / "own.py").write_text(OWN)
    given = ("--methods", "coop,./own.py", "--seeds", "1,2", "epochs=1", "--json")
    code, out, err = done(tmp_path, *given, "--workers", "2")
    assert code == 0, err
    assert json.loads(out)["done"] == 4
    local = [sys.executable, "-m", "vlprompt", "bench", "base-to-novel", "--data", "photos", "--out", "local", *given]
    subprocess.run([*local, *QUICK], cwd=tmp_path, env=environment(), check=True, capture_output=True)
    figures = [
        [
            (r.name, r.seed, r.classes, r.accuracy, r.calibration_error)
            for r in read_results(tmp_path / o / "results.csv")
        ]
        for o in ("out", "local")
    ]
    assert figures[0] == figures[1]
    for file in (tmp_path / "photos" / "train" / "cat").iterdir():
        file.write_bytes(b"no picture")
    code, out, err = done(tmp_path, "--methods", "coop", "--seeds", "1,3", "epochs=1", "--json", "--skip-existing")
    assert code == 1
    assert json.loads(out)["kept"] == 1
    ((run, reason),) = json.loads(out)["failed"].items()
    assert run == "base-to-novel/photos/coop/backbone/shots_2/seed_3"
    assert "cannot read image" in reason


@slow
@needs_ray
def test_a_process_that_is_killed(photos: Path, tmp_path: Path) -> None:
    given = ("--methods", "coop", "--seeds", "1,2", "epochs=50", "--workers", "1", "--json")
    with started(tmp_path, *given) as process:
        when(process, lambda: any((tmp_path / "out").glob("*/*/*/*/*/seed_1/config.yaml")))
        os.kill(task_below(process.pid), signal.SIGKILL)
        out, err = process.communicate(timeout=600)
    assert process.returncode == 1, err
    (reason,) = json.loads(out)["failed"].values()
    assert reason.startswith("its process ended: ")
    assert json.loads(out)["done"] == 1


def task_below(pid: int) -> int:
    """The process that does a run, among those that ``pid`` has started: its title is that of the task."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    parents = {int(own): int(parent) for own, parent, *_ in map(str.split, listed.splitlines()[1:])}
    tasks = [int(own) for own, _, title, *_ in map(str.split, listed.splitlines()[1:]) if title == "ray::_task"]
    (found,) = [task for task in tasks if parents.get(parents[task]) == pid]  # its parent is Ray's own of the machine
    return found


@slow
@needs_ray
def test_an_interrupted_bench_goes_on(photos: Path, tmp_path: Path) -> None:
    """Ctrl-C, as a terminal sends it: to every process of the group."""
    given = ("--methods", "coop", "--seeds", "1,2", "epochs=50", "--workers", "1")
    with started(tmp_path, *given) as process:
        when(process, lambda: any((tmp_path / "out").glob("*/*/*/*/*/seed_1/checkpoints/*")))
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=600)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "interrupted; 0 of 2 runs are finished; to continue: --skip-existing"
    code, _, err = done(tmp_path, *given, "--skip-existing")
    assert code == 0, err
    assert len(read_results(tmp_path / "out" / "results.csv")) == 4


@slow
@needs_ray
def test_a_cluster_that_is_not_there(vlprompt, photos: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "nonsense://1")
    code, out, err = vlprompt(*command("--methods", "coop")[3:])
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: cannot use Ray (nonsense://1): ")
    assert not (tmp_path / "out").exists()


def test_without_ray(vlprompt, photos: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    code, out, err = vlprompt(*command("--methods", "coop")[3:])
    assert (code, out) == (2, "")
    assert err == "error: --engine ray needs Ray: pip install 'vlprompt[ray]'\n"
    assert not (tmp_path / "out").exists()


def test_an_engine_that_is_none(vlprompt) -> None:
    code, _, err = vlprompt("bench", "few-shot", "--methods", "coop", "--data", "x", "--out", "o", "--engine", "rai")
    assert code == 2
    assert "'rai' is not one of 'local', 'ray'" in err
    assert err.count("\n") == 1


def asking(device: str) -> list[Run]:
    return plan(Asked("base-to-novel", {"coop": ("coop", {})}, ["x"], [1], settings={"train.device": device}))


@pytest.mark.parametrize(
    ("device", "gpus", "workers", "share"),
    [("cpu", 2, 4, 0), ("cuda", 2, None, 1), ("cuda", 2, 1, 1), ("cuda", 2, 4, 0.5), ("cuda", 2, 6, 0.3333)],
)
def test_a_run_takes_its_share_of_a_gpu(device: str, gpus: int, workers: int | None, share: float) -> None:
    assert on_ray._gpus_of_a_run(asking(device), gpus, workers) == share


def test_gpus_that_ray_cannot_give() -> None:
    with pytest.raises(ConfigError, match=r"\Atrain.device = cuda: Ray knows no GPU\Z"):
        on_ray._gpus_of_a_run(asking("cuda"), 0, None)
    with pytest.raises(ConfigError, match=r"\Atrain.device = cuda:1: Ray chooses which GPU, write cuda\Z"):
        on_ray._gpus_of_a_run(asking("cuda:1"), 2, None)
