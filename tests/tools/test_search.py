"""The search for settings: every method is given the same points, and the best on validation images is taken."""

import shutil
from dataclasses import replace

import pytest
import search
import yaml

from tests.kit import REPOSITORY
from vlprompt.bench.results import Row, to_csv
from vlprompt.bench.rows import read_rows
from vlprompt.config.schema import build_config
from vlprompt.demo.demo import SHOWS


def test_trials_are_the_same_points_for_every_method():
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


def test_rows_are_settings_that_training_takes():
    rows = search.rows(["coop", "dpl", "drople", "fdbpl_coop", "kdpl_maple"], 3, 0)["rows"]
    del rows["zero_shot"]
    for name, row in rows.items():
        settings = {key: value for key, value in row.items() if key not in ("method", "preset")}
        config = build_config(name.rsplit("-", 1)[0], overrides=settings)
        assert config.train.epochs == settings["train.epochs"]


def figures(**hm: float) -> dict[str, dict[str, float]]:
    return {name: {"base": value, "novel": value, "hm": value} for name, value in hm.items()}


TRIALS = {name: (name[0], {"preset": None, "lr": name}) for name in ("a1", "a2", "a3", "a4", "b1", "b2")}
TRIALS |= {"zero_shot": ("zero_shot", {})}
FIRST = {
    "x": figures(a1=50, a2=70, a3=60, a4=40, b1=60, b2=60),
    "y": figures(a1=83, a2=62, a3=61, a4=82, b1=40, b2=30),
}


def test_the_three_trials_of_each_method_with_the_highest_mean_over_data_sets_are_run_again():
    assert search.finalists(TRIALS, FIRST) == ["a1", "a2", "a4", "b1", "b2"]
    with pytest.raises(ValueError, match="not yet run on y: b2"):
        search.finalists(TRIALS, {**FIRST, "y": figures(a1=83, a2=62, a3=61, a4=82, b1=40)})


def test_the_highest_mean_over_every_seed_is_taken():
    found = search.search(TRIALS, FIRST, FIRST)
    assert {method: line["name"] for method, line in found.items()} == {"a": "a1", "b": "b1"}
    assert found["a"] == {"name": "a1", "settings": {"lr": "a1"}, "x": FIRST["x"]["a1"], "y": FIRST["y"]["a1"]}
    final = {"x": figures(a1=50, a2=70, a4=60, b1=40, b2=60), "y": figures(a1=60, a2=50, a4=50, b1=40, b2=30)}
    assert {m: line["name"] for m, line in search.search(TRIALS, FIRST, final).items()} == {"a": "a2", "b": "b2"}
    final["x"] |= figures(a3=99)
    assert search.search(TRIALS, FIRST, final)["a"]["name"] == "a2"
    del final["y"]["b2"]
    with pytest.raises(ValueError, match="not yet run with every seed on y: b2"):
        search.search(TRIALS, FIRST, final)


def test_the_best_are_written_as_presets():
    text = search.FILE.read_text("utf-8")
    assert search.with_presets(text, {}) == text
    changed = search.with_presets(text, {"coop": {"settings": {"optim.lr": 0.5}}})
    assert yaml.safe_load(changed) == yaml.safe_load(text) | {"coop": {"optim.lr": 0.5}}
    assert changed.splitlines()[:2] == text.splitlines()[:2]


ROW = Row("base-to-novel", "x", "coop-1", "coop", "mini", 16, 1, "x", "base", "val", 9, 60, 60, 0, 5, 8, 1, 1, "f", "1")


def test_figures_are_those_of_the_report(tmp_path):
    marked = [replace(ROW, name="promptkd-1-transductive", classes=part) for part in ("base", "novel")]
    other = [replace(row, data="y", measured_on="y") for row in marked]
    for folder, rows in (("a", [ROW, replace(ROW, classes="novel", accuracy=30), *marked]), ("b", [*other, *marked])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "results.csv").write_text(to_csv(rows))
    parts = {"base": 60, "novel": 30, "hm": pytest.approx(40)}
    level = dict.fromkeys(parts, pytest.approx(60))
    first, final = search.read_figures([tmp_path / "a", tmp_path / "b"])
    assert first == final == {"x": {"coop-1": parts, "promptkd-1": level}, "y": {"promptkd-1": level}}


def test_final_figures_are_means_of_the_trials_run_with_every_seed(tmp_path):
    runs = [("coop-1", 1, 60), ("coop-1", 2, 70), ("coop-2", 1, 50)]
    rows = [replace(ROW, name=n, seed=s, accuracy=a, classes=c) for n, s, a in runs for c in ("base", "novel")]
    (tmp_path / "results.csv").write_text(to_csv(rows))
    first, final = search.read_figures([tmp_path])
    assert {name: own["hm"] for name, own in first["x"].items()} == pytest.approx({"coop-1": 60, "coop-2": 50})
    assert final == {"x": {"coop-1": dict.fromkeys(("base", "novel", "hm"), pytest.approx(65))}}


def test_a_data_set_that_lacks_a_seed_altogether_is_not_left_out_of_the_choice(tmp_path):
    runs = [("x", 1), ("x", 2), ("y", 1)]
    rows = [replace(ROW, data=d, measured_on=d, seed=s, classes=c) for d, s in runs for c in ("base", "novel")]
    (tmp_path / "results.csv").write_text(to_csv(rows))
    first, final = search.read_figures([tmp_path])
    assert set(first["y"]) == {"coop-1"}
    assert final["y"] == {}
    with pytest.raises(ValueError, match="not yet run with every seed on y: coop-1"):
        search.search({"coop-1": ("coop", {})}, first, final)


@pytest.mark.parametrize("other", [{"split": "test"}, {"protocol": "few-shot", "classes": "all"}])
def test_only_val_images_in_base_to_novel_choose(tmp_path, other):
    rows = [ROW, replace(ROW, classes="novel"), replace(ROW, seed=2, **other)]
    (tmp_path / "results.csv").write_text(to_csv(rows))
    with pytest.raises(ValueError, match=r"there are figures of .* \(allowed: base-to-novel with --split val\)"):
        search.read_figures([tmp_path])


def test_nothing_is_taken_before_every_trial_has_been_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump(search.rows(["coop"], 2, 0)))
    (tmp_path / "results.csv").write_text(to_csv([ROW, replace(ROW, classes="novel")]))
    given = ["search.py", "best", tmp_path / "rows.yaml", tmp_path, "--write"]
    monkeypatch.setattr("sys.argv", list(map(str, given)))
    before = search.FILE.read_bytes()
    with pytest.raises(SystemExit, match="2"):
        search.main()
    assert capsys.readouterr().err.endswith("error: not yet run on x: coop-2\n")
    assert search.FILE.read_bytes() == before


def test_the_small_presets_are_what_the_committed_search_found(tmp_path):
    shutil.copy(REPOSITORY / "docs" / "results" / "search.csv", tmp_path / "results.csv")
    presets = yaml.safe_load(search.FILE.read_text("utf-8"))
    assert len(presets) == 26
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump(search.rows(sorted(presets), 6, 0)))
    first, final = search.read_figures([tmp_path])
    trials = read_rows(tmp_path / "rows.yaml")
    assert all(set(known) == {*search.finalists(trials, first)} for known in final.values())
    found = search.search(trials, first, final)
    assert {method: line["settings"] for method, line in found.items()} == presets
    assert all(set(line) == {"name", "settings", "imagenette", "openmoji"} for line in found.values())


def test_the_demo_has_the_best_trials_on_validation_images_that_keep_novel_classes(tmp_path):
    """The highest harmonic mean of those that lose at most three novel points, of all where none does."""
    for data, file in (("clothing", "search-demo.csv"), ("openmoji", "search.csv")):
        (tmp_path / data).mkdir()
        shutil.copy(REPOSITORY / "docs" / "results" / file, tmp_path / data / "results.csv")
        figures = search.read_figures([tmp_path / data])[0][data]
        shown = SHOWS.get(f"{data}-demo") or SHOWS[data]
        tuned = {name: given for name, given in shown.methods.items() if "optim.lr" in given}
        assert len(tuned) >= 2
        for name, given in tuned.items():
            trials = search.rows([name], 6, 0)["rows"]
            own = [trial for trial in trials if trial != "zero_shot"]
            keeping = [trial for trial in own if figures[trial]["novel"] >= figures["zero_shot"]["novel"] - 3]
            best = trials[max(keeping or own, key=lambda trial: figures[trial]["hm"])]
            settings = {key: value for key, value in best.items() if key not in ("method", "preset")}
            assert build_config(name, overrides=given) == build_config(name, overrides=settings)


def test_the_trial_beside_the_preset_of_drople_is_that_of_the_demo():
    ((method, given),) = read_rows(REPOSITORY / "tools" / "tables" / "drople-trial.yaml").values()
    settings = {key: value for key, value in given.items() if key != "preset"}
    assert build_config(method, overrides=settings) == build_config(
        "drople", overrides=SHOWS["clothing-demo"].methods["drople"]
    )
