"""The tool for base-to-novel tables, on a stand-in for the command line: what it runs, keeps, refuses and writes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from vlprompt.methods import METHODS

TOOLS = Path(__file__).parents[1] / "tools"
ACCURACY = {("base", "1"): 80.0, ("base", "2"): 90.0, ("novel", "1"): 40.0, ("novel", "2"): 60.0}


class CommandLine:
    """Stands for `vlprompt`: writes down what it is asked, and answers; stops at the ``stop``-th command."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.stop: int | None = None

    def __call__(self, *arguments: str) -> dict[str, Any]:
        if len(self.asked) == self.stop:
            self.stop = None
            if arguments[0] == "train":  # stopped within a run
                folder = Path(arguments[-1])
                folder.mkdir(parents=True)
                (folder / "config.yaml").touch()
            raise KeyboardInterrupt
        self.asked.append(arguments)
        if arguments[0] == "train":
            return {"seconds": 7.0, "trainable_parameters": 12}
        seed = Path(arguments[1]).name.removeprefix("seed_")
        return {"accuracy": ACCURACY[arguments[arguments.index("--classes") + 1], seed]}


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch):
    spec = importlib.util.spec_from_file_location("base_to_novel", TOOLS / "base_to_novel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "vlprompt", CommandLine())
    return module


def rows_file(folder: Path, text: str) -> Path:
    (folder / "rows.yaml").write_text(text, encoding="utf-8")
    return folder / "rows.yaml"


ROWS = """
method: dpl
set: {carry: add}
rows:
  exact: {instance_to_prompt: exact}
  of its own: {carry: replace, init: null}
  frozen: {method: zero_shot}
"""


def test_rows_of_named_settings(tool, tmp_path: Path, capsys) -> None:
    file, out = rows_file(tmp_path, ROWS), tmp_path / "out"
    tool.main(["photos", "--rows", str(file), "--seeds", "1", "2", "--split", "val", "--out", str(out)])
    trained = [a for a in tool.vlprompt.asked if a[0] == "train"]
    first, second, third = trained[::2]
    assert first[:3] == ("train", "dpl", "photos")
    assert [a for a in first if "=" in a] == ["carry=add", "instance_to_prompt=exact"]
    assert [a for a in second if "=" in a] == ["carry=replace", "init=null"]
    assert third[1] == "zero_shot"
    assert not any("=" in a for a in third)
    for given, seed in zip(trained, [1, 2] * 3, strict=True):
        assert given[given.index("--seed") + 1] == str(seed)
        assert given[given.index("--classes") + 1] == "base"
        assert given[-1].endswith(f"seed_{seed}")
    measured = [a for a in tool.vlprompt.asked if a[0] == "evaluate"]
    assert len(measured) == 12
    assert all(a[-2:] == ("--split", "val") for a in measured)
    printed = capsys.readouterr().out
    assert printed == (out / "val.md").read_text("utf-8")
    assert "| exact | 85.00 ± 7.07 | 50.00 ± 14.14 | 62.96 | 7 |" in printed.splitlines()
    lines = json.loads((out / "val.json").read_text("utf-8"))
    assert [line["name"] for line in lines] == ["exact", "of its own", "frozen"]
    assert lines[0]["settings"] == {"carry": "add", "instance_to_prompt": "exact"}
    assert lines[0]["runs"][1] == {"base": 90.0, "novel": 60.0, "seconds": 7.0}
    assert not (out / "test.md").exists()


def test_methods_by_name(tool, tmp_path: Path, capsys) -> None:
    tool.main(["photos", "--methods", "coop", "linear_probe", "--seeds", "1", "--set", "lr=1", "--out", str(tmp_path)])
    assert all("lr=1" in a for a in tool.vlprompt.asked if a[0] == "train")
    head, _, coop, probe = capsys.readouterr().out.splitlines()
    assert head.startswith("| method |")
    assert coop == "| coop | 80.00 ± 0.00 | 40.00 ± 0.00 | 53.33 | 7 |"
    assert probe == "| linear_probe | 80.00 ± 0.00 | – | – | 7 |"


@pytest.mark.parametrize("stop", range(6))
def test_it_resumes_wherever_it_was_stopped(tool, tmp_path: Path, capsys, stop: int) -> None:
    given = ["photos", "--methods", "coop", "--seeds", "1", "2", "--out", str(tmp_path)]
    tool.vlprompt.stop = stop
    with pytest.raises(KeyboardInterrupt):
        tool.main(given)
    tool.main(given)
    asked = tool.vlprompt.asked
    assert len(asked) == 6  # nothing is done twice
    resumed = [a for a in asked if "--resume" in a]
    assert resumed == (
        [("train", "--resume", str(tmp_path / "coop" / f"seed_{1 + stop // 3}"))] if stop % 3 == 0 else []
    )
    tool.main(given)
    assert len(asked) == 6
    tool.main([*given, "--split", "val"])  # other images, the same runs
    assert [a[0] for a in asked[6:]] == ["evaluate"] * 4
    assert capsys.readouterr().out.count("85.00 ± 7.07") == 3


def test_other_settings_under_the_same_name_are_refused(tool, tmp_path: Path) -> None:
    given = ["photos", "--methods", "coop", "--seeds", "1", "--out", str(tmp_path)]
    tool.main(given)
    with pytest.raises(
        SystemExit, match=r"seed_1 was run as 'train coop photos .*': choose another --out, or remove it"
    ):
        tool.main([*given, "--set", "lr=1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "must hold rows: names with settings"),
        ("method: dpl\nrows: {}", "must hold rows: names with settings"),
        ("method: dpl\nrow: {}\nrows: {a: {}}", r"unknown key 'row' \(allowed: method, set, rows\)"),
        ("rows: {a: {lr: 1}}", "row 'a' names no method"),
        ("method: dpl\nrows: {a/b: {}}", "row 'a/b' is no name of a folder"),
        ("method: dlp\nrows: {a: {}}", "error: .*method.*'dlp'"),
        ("method: dpl\nrows: {a: {}, b: {carry: ad}}", "error: method.carry = ad .*did you mean 'add'"),
        ("method: dpl\nrows: {a: {}, b: {scale: 1}}", "error: unknown key 'scale'"),
    ],
)
def test_rows_that_cannot_be_run_are_refused_first(tool, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        tool.main(["photos", "--rows", str(rows_file(tmp_path, text)), "--out", str(tmp_path / "out")])
    assert not tool.vlprompt.asked
    assert not (tmp_path / "out").exists()


def test_only_some_rows(tool, tmp_path: Path) -> None:
    given = ["photos", "--rows", str(rows_file(tmp_path, ROWS)), "--seeds", "1", "--out", str(tmp_path / "out")]
    tool.main([*given, "--only", "frozen"])
    assert [a[1] for a in tool.vlprompt.asked if a[0] == "train"] == ["zero_shot"]
    with pytest.raises(SystemExit, match=r"no row 'frosen' \(allowed: exact, of its own, frozen\)"):
        tool.main([*given, "--only", "frosen"])


@pytest.mark.parametrize("file", sorted((TOOLS / "ablations").glob("*.yaml")), ids=lambda f: f.stem)
def test_ablations_are_settings_that_the_methods_know(tool, file: Path, tmp_path: Path) -> None:
    rows = tool.read_rows(file)
    assert file.stem in METHODS
    assert len({json.dumps(row) for row in rows.values()}) == len(rows) > 3  # no row twice
    tool.main(["photos", "--rows", str(file), "--seeds", "1", "--out", str(tmp_path)])
    assert len([a for a in tool.vlprompt.asked if a[0] == "train"]) == len(rows)
