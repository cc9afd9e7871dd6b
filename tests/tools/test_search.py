"""The search for settings: every method is given the same points, and the best on validation images is taken."""

import importlib.util
from dataclasses import replace

import pytest
import yaml

from tests.kit import REPOSITORY
from vlprompt.bench.results import Row, to_csv
from vlprompt.config.schema import build_config

FILE = REPOSITORY / "tools" / "search.py"


@pytest.fixture(scope="module")
def search():
    spec = importlib.util.spec_from_file_location("search", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_trials_are_the_same_points_for_every_method(search):
    methods = ["coop", "maple", "promptsrc"]
    rows = search.rows(methods, 8, 0)["rows"]
    assert len(rows) == 24
    assert search.rows(methods, 8, 0) == search.rows(methods, 8, 0) != search.rows(methods, 8, 1)
    official = {method: build_config(method).optim.lr for method in methods}
    for k in range(1, 9):
        coop, maple, promptsrc = (rows[f"{method}-{k}"] for method in methods)
        tokens = coop["method.n_ctx"]
        assert tokens == maple["method.n_ctx"] == promptsrc["method.n_ctx_text"] == promptsrc["method.n_ctx_vision"]
        assert "method.depth" not in coop
        assert maple["method.depth"] == promptsrc["method.depth_text"] == promptsrc["method.depth_vision"]
        assert len({row["train.epochs"] for row in (coop, maple, promptsrc)}) == 1
        rates = [rows[f"{m}-{k}"]["optim.lr"] / official[m] for m in methods]
        assert rates == pytest.approx([rates[0]] * 3, rel=1e-2)
    assert len({str(rows[f"promptsrc-{k}"]) for k in range(1, 9)}) == 8


def test_rows_are_settings_that_training_takes(search):
    for name, row in search.rows(["coop", "dpl", "drople", "fdbpl_coop", "kdpl_maple"], 3, 0)["rows"].items():
        settings = {key: value for key, value in row.items() if key not in ("method", "preset")}
        config = build_config(name.rsplit("-", 1)[0], overrides=settings)
        assert config.train.epochs == settings["train.epochs"]


def test_the_best_has_the_highest_harmonic_mean(search):
    rows, figures = {}, {}
    for method, means in (("coop", (3.0, 5.0, 4.0)), ("maple", (0.0, None))):
        for k, hm in enumerate(means, 1):
            rows[f"{method}-{k}"] = (method, {"preset": None, "lr": k})
            figures[f"{method}-{k}"] = {"base": 1.0, "novel": 1.0, "hm": hm}
    rows["coop-4"] = ("coop", {"lr": 4})  # has not been run
    found = search.best(rows, figures)
    assert {method: line["name"] for method, line in found.items()} == {"coop": "coop-2", "maple": "maple-1"}
    assert found["coop"]["settings"] == {"lr": 2}


def test_the_best_are_written_as_presets(search):
    text = search.FILE.read_text("utf-8")
    assert search.with_presets(text, {}) == text
    changed = search.with_presets(text, {"coop": {"settings": {"optim.lr": 0.5}}})
    assert yaml.safe_load(changed) == yaml.safe_load(text) | {"coop": {"optim.lr": 0.5}}
    assert changed.splitlines()[:2] == text.splitlines()[:2]


def test_figures_are_those_of_the_report(search, tmp_path):
    row = Row(
        "base-to-novel", "x", "coop-1", "coop", "mini", 16, 1, "x", "base", "val", 9, 60, 60, 0, 5, 8, 1, 1, "f", "1"
    )
    marked = [replace(row, name="promptkd-1-transductive", classes=part) for part in ("base", "novel")]
    (tmp_path / "results.csv").write_text(to_csv([row, replace(row, classes="novel", accuracy=30), *marked]))
    figures = {"base": 60, "novel": 30, "hm": pytest.approx(40)}
    assert search.read_figures(tmp_path) == {"coop-1": figures, "promptkd-1": dict.fromkeys(figures, pytest.approx(60))}


def test_the_small_presets_are_trials(search):
    found = yaml.safe_load(search.FILE.read_text("utf-8"))
    assert len(found) == 26
    trials = search.rows(sorted(found), 6, 0)["rows"]
    for method, preset in found.items():
        assert {"method": method, "preset": None} | preset in [trials[f"{method}-{k}"] for k in range(1, 7)]
