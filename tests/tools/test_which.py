"""Which method when, and what following `vlprompt compare` costs: on made-up figures, and on a handful of pictures."""

from __future__ import annotations

import csv
import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from tests.kit import TINY
from tests.kit.marks import slow
from tests.kit.pictures import make_photos
from tests.kit.results import PLAIN
from vlprompt.bench.bench import bench
from vlprompt.bench.protocols import Asked, plan
from vlprompt.bench.results import Row, to_csv
from vlprompt.bench.rows import read_rows, result_settings, rows_of_methods
from vlprompt.compare.plan import SHORTLIST, candidates
from vlprompt.errors import ConfigError, DataError

METHODS = ("zero_shot", "linear_probe", "coop")
ROWS = rows_of_methods(METHODS[:2])


@pytest.fixture
def which() -> ModuleType:
    return importlib.import_module("which")


@pytest.fixture
def regret() -> ModuleType:
    return importlib.import_module("regret")


def row(data: str, name: str, seed: int, accuracy: float) -> Row:
    known = {"protocol": "few-shot", "data": data, "measured_on": data, "classes": "all", "settings": name}
    return replace(PLAIN, **known, name=name, method=name, seed=seed, accuracy=accuracy)


@pytest.fixture
def figures(which: ModuleType, tmp_path: Path) -> Path:
    """zero_shot is quick, linear_probe better, coop slower and worse than that; its cost on caltech101 is missing."""
    accuracy = {"zero_shot": 20.0, "linear_probe": 60.0, "coop": 40.0}
    rows = [row(d, m, s, accuracy[m] + s) for d in which.DATA for m in METHODS for s in (1, 2, 3)]
    other = replace(rows[0], classes="base", accuracy=99.0)
    (tmp_path / "results.csv").write_text(to_csv([*rows, other]))
    seconds = {"zero_shot": 6.0, "linear_probe": 12.0, "coop": 600.0}
    costs = [which.Cost(d, m, 1, m, seconds[m]) for d in which.DATA for m in METHODS]
    which.write_csv(tmp_path / "cost.csv", costs[:-1], which.Cost)
    return tmp_path


# --- table and plot -------------------------------------------------------------------------------


def test_the_front_is_what_nothing_beats(which: ModuleType) -> None:
    points = {"a": (1.0, 50.0), "b": (2.0, 50.0), "c": (3.0, 60.0), "d": (3.0, 60.0), "e": (4.0, 55.0), "f": (0.5, 1.0)}
    assert which.front_of(points) == {"a", "c", "d", "f"}


def test_the_table_has_accuracies_costs_and_the_front(which: ModuleType, figures: Path) -> None:
    lines = [line.strip("| ").split(" | ") for line in which.Which(figures).table(METHODS).splitlines()]
    assert lines[0][:5] == ["method", "new names", "clothing, %", "imagenette, %", "CPU minutes, 10 classes"]
    both = "10 classes, 100 classes"
    assert lines[2] == ["`zero_shot`", "yes", *["22.00 ± 1.00"] * 2, "0.10", "22.00 ± 1.00", "0.10", both]
    assert lines[3] == ["`linear_probe`", "no", *["62.00 ± 1.00"] * 2, "0.20", "62.00 ± 1.00", "0.20", both]
    assert lines[4] == ["`coop`", "yes", *["42.00 ± 1.00"] * 2, "10", "42.00 ± 1.00", "missing"]


def test_a_cost_of_other_settings_is_refused(which: ModuleType, figures: Path) -> None:
    which.write_csv(figures / "cost.csv", [which.Cost("clothing", "coop", 1, "others", 1.0)], which.Cost)
    with pytest.raises(DataError, match=r"'coop' on clothing has other settings than its accuracies"):
        which.Which(figures)


def test_the_plot_names_every_point_once_in_a_panel(which: ModuleType, figures: Path) -> None:
    root = ElementTree.fromstring(which.Which(figures).plot())
    texts = [element.text for element in root.iter() if element.tag.endswith("}text")]
    assert (texts.count("linear_probe"), texts.count("coop")) == (2, 1)
    assert {"0.1", "0.2"} <= {*texts}


def test_a_page_is_written_and_then_left_alone(
    which: ModuleType, figures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, plot = figures / "page.md", figures / "which.svg"
    page.write_text("before\n<!-- figures: which -->\n<!-- end figures -->\nafter\n", "utf-8")
    monkeypatch.setattr(which, "PAGE", page)
    monkeypatch.setattr(which, "PLOT", plot)
    assert which.page(figures, check=True) == 1
    assert not plot.exists()
    assert which.page(figures, check=False) == 0
    assert page.read_text("utf-8").startswith("before\n<!-- figures: which -->\n| method |")
    assert page.read_text("utf-8").endswith("(which.svg)\n<!-- end figures -->\nafter\n")
    capsys.readouterr()
    assert which.page(figures, check=True) == 0
    assert capsys.readouterr().out == ""


def test_rows_have_the_settings_that_compare_gives(which: ModuleType) -> None:
    """Otherwise, a preset has come or gone: write it into tools/tables/which.yaml."""
    rows = read_rows(which.ROWS)
    assert {*SHORTLIST} < {*rows}
    runs = plan(Asked("few-shot", rows, ["caltech101"], (1,), (16,), {"backbone": "mini"}))
    given = {"data.name": "caltech101", "data.shots": 16, "backbone": "mini"}
    compared = {c.name: c.config for c in candidates(list(rows), given)}
    for run in runs:
        assert result_settings(run.config) == result_settings(compared[run.name]), run.name


# --- regret ---------------------------------------------------------------------------------------


def test_regret_is_told_beside_that_of_one_method(which: ModuleType, regret: ModuleType, figures: Path) -> None:
    first = ["coop", 45.0, 41.0, 41.0, "linear_probe", 61.0, 20.0, "", ""]
    second = ["linear_probe", 65.0, 62.0, 62.0, "linear_probe", 62.0, 0.0, "coop", "coop"]
    runs = enumerate((first, second), 1)
    found = [regret.Regret("clothing", seed, 5.0, " ".join(METHODS), *rest) for seed, rest in runs]
    which.write_csv(figures / "regret.csv", found, regret.Regret)
    assert which.read_csv(figures / "regret.csv", regret.Regret) == found
    text = regret.table(found, which.read_table(figures))
    assert "| clothing | 1 | `coop` | 45.0 | 41.0 | `linear_probe` | 61.0 | 20.0 |  |" in text
    assert "On average 10.00 points are lost over 2 comparisons of 5 minutes, 20.00 at most." in text
    assert "loses at least 0.00 on average: with `linear_probe`" in text
    assert "The runs of `coop` have other settings" in text


@pytest.fixture
def small(which: ModuleType, regret: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures in the place of clothing, four shots and the tiny backbone."""
    make_photos(tmp_path / "data" / "clothing", train=6, val=2, test=4)
    for module in (which, regret):
        monkeypatch.setattr(module, "BACKBONE", str(TINY))
        monkeypatch.setattr(module, "SHOTS", 4)
    return tmp_path


def test_the_model_that_compare_leaves_is_the_benchs(which: ModuleType, regret: ModuleType, small: Path) -> None:
    """It has the same images and settings, so that the bench's figures are hindsight."""
    methods, out, root = list(ROWS), small / "out", small / "data"
    runs = which.planned(ROWS, ["clothing"], root, out, (1,))
    assert not bench(runs, out, skip_existing=True).failed
    given = ["clothing"], root, small / "regret", out, methods, 5.0, (1,), small / "regret.csv"
    regret.do_regret(*given)
    (found,) = which.read_csv(small / "regret.csv", regret.Regret)
    assert (found.test, found.other_settings, found.left_out) == (found.row, "", "")
    accuracy = {row.name: row.accuracy for row in which.read_table(out)}
    assert found.regret == max(accuracy.values()) - accuracy[found.recommended]
    regret.do_regret(*given)  # nothing is compared again
    assert which.read_csv(small / "regret.csv", regret.Regret) == [found]
    with pytest.raises(ConfigError, match="compared other methods"):
        regret.do_regret(*given[:4], ["zero_shot"], *given[5:])
    with pytest.raises(DataError, match=r"no run of clothing, 2, zero_shot \(data set, seed, method\)"):
        regret.do_regret(*given[:6], (2,), given[7])


@slow
def test_a_training_is_timed_once_and_measured(which: ModuleType, small: Path) -> None:
    runs = which.planned(ROWS, ["clothing"], small / "data", small / "out", (1, 2))
    stopped = small / "out" / runs[0].folder
    stopped.mkdir(parents=True)
    (stopped / "config.yaml").write_text("half of it")
    assert which.do_runs(runs, small / "out", 1) == 0
    with (small / "out" / "cost.csv").open() as stream:
        costs = list(csv.DictReader(stream))
    assert [(cost["name"], cost["seed"]) for cost in costs] == [("zero_shot", "1"), ("linear_probe", "1")]
    assert all(float(cost["cpu_seconds"]) > 0.5 for cost in costs)
    assert which.do_runs(runs, small / "out", 1) == 0
    assert len(which.read_table(small / "out")) == 4
    with (small / "out" / "cost.csv").open() as stream:
        assert list(csv.DictReader(stream)) == costs


# --- what is committed ----------------------------------------------------------------------------


def test_the_page_has_the_committed_figures(which: ModuleType, regret: ModuleType) -> None:
    """Otherwise: python tools/which.py page, python tools/regret.py page."""
    if (which.FIGURES / "results.csv").is_file():
        assert which.page(which.FIGURES, check=True) == 0
    if regret.REGRET.is_file():
        content = regret.table(which.read_csv(regret.REGRET, regret.Regret), which.read_table(which.FIGURES))
        page = which.PAGE.read_text("utf-8")
        assert which.marked(page, "regret", content) == page
