"""Where a run's time goes: the parts of a real run, and heads that fit on what the tower has seen once."""

from __future__ import annotations

import argparse

import pytest

from speed import heads, job
from tests.kit import TINY
from tests.kit.marks import slow
from vlprompt.errors import VlpromptError


@slow
def test_the_parts_of_a_run(photos) -> None:
    row = job.one("coop", str(photos), ["--backbone", str(TINY), "--epochs", "1"])
    for part in ("start-up", "images", "steps: towers", "steps", "evaluation: towers", "files"):
        assert row[part] > 0, part
    assert row["fit"] < 0.05 * row["cpu_s"]  # nothing is fitted
    assert abs(row["other"]) < 0.5 * row["cpu_s"]
    assert job.table({"rows": [{"method": "coop", **row}]}).count("| `coop` |") == 1


def test_heads_share_a_pass(photos) -> None:
    parser = argparse.ArgumentParser()
    heads.arguments(parser)
    given = ["linear_probe", "clap", "--data", str(photos), "--shots", "2", "--backbone", str(TINY)]
    result = heads.run(parser.parse_args(given))
    assert [r["fit_s"] > 0 for r in result["rows"]] == [True, True]
    assert len(result["passes"]) == 2  # of training and of val images, for both heads
    assert heads.table(result).count("| `clap` |") == 1


@slow
def test_a_run_that_fails_says_why(tmp_path) -> None:
    with pytest.raises(VlpromptError, match="nowhere"):
        job.one("coop", str(tmp_path / "nowhere"), [])
