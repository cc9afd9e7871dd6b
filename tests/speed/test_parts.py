"""What the speed measurements say about a step: operations as torch counts them, and parts that make up the whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from speed.__main__ import main
from speed.parts import Clock, Parts
from speed.step import Work, computed, one_step, training
from tests.kit import TINY
from tests.kit.marks import slow
from vlprompt.backbones.backbone import Backbone


@pytest.mark.parametrize("way", ["plain", "default"])
@pytest.mark.parametrize("method", ["coop", "cocoop", "ivlp"])
def test_operations_are_those_that_torch_counts(method: str, way: str, tiny: Backbone) -> None:
    work = Work(method, way, "tiny", 5, 3)
    with computed(work, tiny), sdpa_kernel(SDPBackend.MATH):
        job, parts, counter = training(work, tiny), Parts(Clock(torch.device("cpu"))), FlopCounterMode(display=False)
        with parts.watching(job, way != "plain"), counter:
            one_step(job)
    # What is left are the towers' projections, the logits and, of CoCoOp, the meta-net.
    assert sum(parts.flops.values()) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_the_command(python_speed, tmp_path: Path) -> None:
    file = tmp_path / "step.json"
    given = ["step", "coop", "maple", "--backbone", str(TINY), "--classes", "3", "--batch-size", "2", "--repeats", "1"]
    code, out, _ = python_speed(*given, "--no-memory", "--json", str(file))
    assert code == 0
    rows = json.loads(file.read_text())["rows"]
    assert [list(row["ways"]) for row in rows] == [["plain", "default", "bank"], ["plain", "default"]]
    assert out.count("\n| ") == 5
    for row in rows:
        assert row["ways"]["plain"]["loss"] == pytest.approx(row["ways"]["default"]["loss"], abs=1e-5)
        for way, r in row["ways"].items():
            assert sum(r["split_s"].values()) == pytest.approx(r["step_s"])
            assert min(r["split_s"].values()) >= 0
            assert (r["split_s"]["image"] == 0) == (way == "bank")


@slow
def test_the_way_with_towers_in_bf16(python_speed, tmp_path: Path) -> None:
    file = tmp_path / "step.json"
    given = ["step", "maple", "--backbone", "mini", "--classes", "3", "--ways", "default,bf16", "--repeats", "1"]
    assert python_speed(*given, "--json", str(file))[0] == 0
    default, bf16 = (json.loads(file.read_text())["rows"][0]["ways"][way] for way in ("default", "bf16"))
    assert bf16["loss"] != default["loss"] == pytest.approx(bf16["loss"], rel=0.05)
    assert (set(default["share_of_matmul_rate"]), bf16["share_of_matmul_rate"]) == ({"image", "text"}, {})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["step", "--ways", "planar"], "error: unknown way 'planar': did you mean 'plain'?"),
        (["step", "--backbone", "random:x"], "error: backbone 'random:x': no patch size"),
        (["step", "cop"], "error: unknown method 'cop': did you mean 'coop'?"),
        (["growth", "--ways", "bf16"], "error: unknown way 'bf16' (allowed: bank, default, plain)"),
        (["growth", "--along", "clases"], "error: unknown --along 'clases': did you mean 'classes'?"),
    ],
)
def test_bad_input_is_one_line(given: list[str], said: str, python_speed) -> None:
    code, _, error = python_speed(*given)
    assert code == 2
    assert error.startswith(said)
    assert error.count("\n") == 1


@pytest.fixture
def python_speed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """The command line of the speed measurements in this process: exit code, standard output, standard error."""

    def run(*given: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["speed", *given])
        return (main(), *capsys.readouterr())

    return run
