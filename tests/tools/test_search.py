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
    assert rows.pop("zero_shot") == {"method": "zero_shot"}
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
    rows = search.rows(["coop", "dpl", "drople", "fdbpl_coop", "kdpl_maple"], 3, 0)["rows"]
    del rows["zero_shot"]
    for name, row in rows.items():
        settings = {key: value for key, value in row.items() if key not in ("method", "preset")}
        config = build_config(name.rsplit("-", 1)[0], overrides=settings)
        assert config.train.epochs == settings["train.epochs"]


def figures(**hm: float) -> dict[str, dict[str, float]]:
    return {name: {"base": value, "novel": value, "hm": value} for name, value in hm.items()}


def test_trials_are_gone_through_until_one_does_no_harm_on_the_second_data_set(search):
    rows = {name: (name[0], {"preset": None, "lr": name}) for name in ("a1", "a2", "a3", "b1", "b2", "c1")}
    rows |= {"zero_shot": ("zero_shot", {})}
    first = figures(a1=50, a2=70, a3=60, b1=70, b2=70, c1=40)
    assert search.search(rows, first, {}) == ({}, ["zero_shot", "a2", "b1", "c1"])
    second = figures(zero_shot=66, a2=63.9, b1=64)
    found, missing = search.search(rows, first, second)
    assert list(found) == ["b"]
    assert missing == ["a3", "c1"]
    second |= figures(a3=10, c1=3)
    found, missing = search.search(rows, first, second)
    assert (list(found), missing) == (["b", "c"], ["a1"])
    second |= figures(a1=5)  # all three lose more than two points: the highest mean over both
    found, missing = search.search(rows, first, second)
    assert {method: line["name"] for method, line in found.items()} == {"a": "a2", "b": "b1", "c": "c1"}
    assert missing == []
    assert found["a"] == {"settings": {"lr": "a2"}, "first": first["a2"], "second": second["a2"], "name": "a2"}
    assert search.search(rows, first, second | figures(a1=83))[0]["a"]["name"] == "a2"
    assert search.search(rows, first, second | figures(a1=84))[0]["a"]["name"] == "a1"


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
    parts = {"base": 60, "novel": 30, "hm": pytest.approx(40)}
    assert search.read_figures(tmp_path) == {"coop-1": parts, "promptkd-1": dict.fromkeys(parts, pytest.approx(60))}
    assert search.read_figures(tmp_path / "not yet") == {}


def test_nothing_is_taken_before_every_trial_has_been_run(search, tmp_path, monkeypatch, capsys):
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump(search.rows(["coop"], 2, 0)))
    row = Row(
        "base-to-novel", "x", "coop-1", "coop", "mini", 16, 1, "x", "base", "val", 9, 60, 60, 0, 5, 8, 1, 1, "f", "1"
    )
    for folder, names in (("first", ["coop-1"]), ("whole", ["coop-1", "coop-2"]), ("second", ["zero_shot"])):
        (tmp_path / folder).mkdir()
        run = [replace(row, name=name, classes=part) for name in names for part in ("base", "novel")]
        (tmp_path / folder / "results.csv").write_text(to_csv(run))
    for first, says in (("first", "first data set: coop-2"), ("whole", "second data set: coop-1")):
        given = ["search.py", "best", tmp_path / "rows.yaml", tmp_path / first, tmp_path / "second", "--write"]
        monkeypatch.setattr("sys.argv", list(map(str, given)))
        with pytest.raises(SystemExit) as ended:
            search.main()
        assert ended.value.code == 2
        assert capsys.readouterr().err.endswith(f"error: not yet run on the {says}\n")


def test_the_small_presets_are_trials(search):
    found = yaml.safe_load(search.FILE.read_text("utf-8"))
    assert len(found) == 26
    trials = search.rows(sorted(found), 6, 0)["rows"]
    for method, preset in found.items():
        assert {"method": method, "preset": None} | preset in [trials[f"{method}-{k}"] for k in range(1, 7)]
