"""The demo: what it says, draws and leaves behind, and that its next commands work."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from tests.kit.command import vlprompt
from tests.kit.known import needs_openmoji
from tests.kit.marks import slow, sweep
from tests.kit.pictures import write_pictures
from vlprompt.bench.report.axes import Axes, step_of
from vlprompt.data.known import openmoji, table
from vlprompt.demo import demo, drawing
from vlprompt.demo.drawing import Curve, Shown, draw_curves, draw_predictions
from vlprompt.errors import ConfigError
from vlprompt.training.evaluate import harmonic_mean

SVG = "{http://www.w3.org/2000/svg}"
CLASSES = {
    "clothing-demo": ("hat", "pants", "shoes", "skirt"),
    "openmoji": ("mail", "money", "religious symbol", "zodiac sign"),
}


class Ran(NamedTuple):
    data: str
    folder: Path
    figures: dict[str, Any]
    text: str

    @property
    def show(self) -> demo.Show:
        return demo.SHOWS[self.data]

    @property
    def said(self) -> str:
        return " ".join(self.text.split())


@pytest.fixture(scope="module", params=sweep(demo.SHOWS, "openmoji"))
def ran(request, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    """The demo on four of the classes, with one epoch a method."""
    data, place = request.param, tmp_path_factory.mktemp("place")
    show, said = demo.SHOWS[data], list[str]()
    with pytest.MonkeyPatch.context() as patch:
        if data == "openmoji":
            needs_openmoji()
            few = tuple(p for p in openmoji.pictures() if p.class_name in CLASSES[data])
            patch.setattr(openmoji, "pictures", lambda: few)
        else:
            for part in ("train", "val", "test"):
                for name in CLASSES[data]:
                    shutil.copytree(table.PHOTOGRAPHS / part / name, place / "clothes" / part / name)
            patch.setattr(table, "PHOTOGRAPHS", place / "clothes")
        steps = {name for name in show.methods if "train.epochs" in show.methods[name]}
        fast = {
            name: dict(given) | ({"train.epochs": 1} if name in steps else {}) for name, given in show.methods.items()
        }
        patch.setitem(demo.SHOWS, data, replace(show, methods=fast))
        patch.chdir(place)
        figures = demo.run_demo(Path("demo"), said.append, data)
        yield Ran(data, Path("demo").resolve(), figures, "\n".join(said))


def test_the_table_holds_the_figures(ran: Ran):
    rows = ran.figures["methods"]
    assert list(rows) == list(ran.show.methods)
    assert next(iter(rows)) == demo.BEFORE
    assert ran.show.best in rows
    guessing = {"base": 50.0, "novel": 50.0, "harmonic_mean": 50.0} | ({"all": 25.0} if ran.show.twice else {})
    for name, row in {"guessing": guessing, **rows}.items():
        columns = ["base", "novel", "harmonic_mean", *(["all"] if ran.show.twice else [])]
        cells = [f"{row[key]:.1f}" if key in row else "-" for key in columns]
        assert re.search(rf"^{name} +{' +'.join(map(re.escape, cells))}$", ran.text, re.MULTILINE)
        if "novel" in row:
            assert row["harmonic_mean"] == pytest.approx(harmonic_mean(row["base"], row["novel"]))
        else:
            assert name == demo.PROBE
    assert {name for name, row in rows.items() if "all" in row} == set(ran.show.twice)
    gain = {half: rows[ran.show.best][half] - rows[demo.BEFORE][half] for half in ("base", "novel")}
    assert f"{gain['base']:+.1f} points on base, {gain['novel']:+.1f} on novel classes" in ran.text
    assert json.loads((ran.folder / "demo.json").read_text()) == ran.figures


def test_its_figures_are_those_of_evaluate(ran: Ran):
    best, names = ran.show.best, CLASSES[ran.data]
    for classes, run in (("base", best), ("novel", best), ("all", f"{best}-all")):
        if classes == "all" and best not in ran.show.twice:
            continue
        arguments = (ran.data, "--root", ran.folder / "data", "--classes", classes, "--json")
        result = vlprompt("evaluate", ran.folder / run, *arguments).json
        assert result["accuracy"] == pytest.approx(ran.figures["methods"][best][classes])
        assert result["classes"] == list({"base": names[:2], "novel": names[2:], "all": names}[classes])


def test_what_was_done_is_said(ran: Ran):
    base, novel = CLASSES[ran.data][:2], CLASSES[ran.data][2:]
    n = 52 if ran.data == "openmoji" else sum(1 for _ in table.PHOTOGRAPHS.rglob("*.jpg"))
    assert f"{n} {ran.show.thing}s of 4 classes" in ran.said
    assert f"base classes: 2, which are tuned on ({', '.join(base)})" in ran.said
    assert f"novel classes: 2, which are not ({', '.join(novel)})" in ran.said
    assert f"It sees {ran.show.shots} {ran.show.thing}s of each base class" in ran.said
    runs = [(name, name, "base") for name in ran.show.methods] + [(f"{n}-all", n, "all") for n in ran.show.twice]
    for folder, name, classes in runs:
        numbers = json.loads((ran.folder / folder / "metrics.json").read_text())["trainable_parameters"]
        assert f"{name}, {classes} classes … learned " in ran.said
        assert not numbers or f"({numbers:,} numbers)" in ran.said
    opening = ran.text[: ran.text.index("…\n")].strip().splitlines()
    assert len(opening) <= 16
    assert max(map(len, opening)) <= 120


def test_training_used_the_shots(ran: Ran):
    names = CLASSES[ran.data]
    for name, n in [(name, 2) for name in ran.show.methods] + [(f"{name}-all", 4) for name in ran.show.twice]:
        split = json.loads((ran.folder / name / "split.json").read_text())
        assert len(split["train"]) == n * ran.show.shots
        assert {row[2] for row in split["train"]} == set(names[:n])


def test_learning_curves_are_those_of_the_logs(ran: Ran):
    for name in ran.show.methods:
        log = [json.loads(line) for line in (ran.folder / name / "log.jsonl").read_text().splitlines()]
        assert bool(log) == (name not in (demo.BEFORE, demo.PROBE))
        if not log:
            continue
        (line,) = re.findall(rf"^{name} +loss.*$", ran.text, re.MULTILINE)
        _, _, first, losses, last, _, val, accuracies, kept = line.split()
        terms = [[value for key, value in row.items() if key not in ("epoch", "lr", "val_accuracy")] for row in log]
        assert (float(first), float(last)) == (round(sum(terms[0]), 2), round(sum(terms[-1]), 2))
        assert (float(val), float(kept)) == (round(log[0]["val_accuracy"], 1), round(log[-1]["val_accuracy"], 1))
        assert len(losses) == len(accuracies) == len(log)


def test_bars_go_from_the_least_to_the_most():
    assert demo._bars([4.0, 2.0, 1.0, 0.5]) == "█▄▂▁"
    assert demo._bars([7.4, 7.4]) == "▁▁"


def test_it_leaves_pictures_and_an_artefact(ran: Ran):
    with Image.open(ran.figures["picture"]) as image:
        assert image.mode == "RGB"
        assert min(image.size) > 200
        assert np.asarray(image).std() > 5
    drawn = ElementTree.parse(ran.figures["learning_curves"]).getroot()
    tuned = sum((ran.folder / name / "checkpoints").is_dir() for name in ran.show.methods)
    assert len(list(drawn.iter(f"{SVG}polyline"))) == 2 * tuned + 1
    folder = Path(ran.figures["artefact"])
    assert {file.name for file in folder.iterdir()} >= set(demo.FILES)
    assert f"{ran.figures['artefact']} ({', '.join(demo.FILES)}: " in ran.text


@slow
def test_the_next_commands_work(ran: Ran):
    write_pictures(Path("PHOTOS"), n=8)
    (Path("IMAGE.jpg")).write_bytes(next(Path("PHOTOS").rglob("*.png")).read_bytes())
    lines = [shlex.split(line) for line in ran.text.splitlines() if re.match("  .*vlprompt ", line)]
    commands = [line[next(i for i, word in enumerate(line) if word.endswith("vlprompt")) + 1 :] for line in lines]
    last = "evaluate" if ran.data == "openmoji" else "demo"
    assert [command[0] for command in commands] == ["train", "evaluate", "predict", last]
    done = [vlprompt(*command) for command in commands if command[0] != "demo"]
    assert [d.code for d in done] == [0] * len(done), [d.err for d in done]
    outputs = [d.out for d in done]
    assert "test images of 3 classes" in outputs[1]
    assert {"any", "other", "classes"} <= set(outputs[2].split())
    if ran.data == "openmoji":
        assert "test images of 2 classes (base)" in outputs[3]
        assert sorted(path.name for path in (ran.folder / "data").iterdir()) == ["openmoji", "openmoji-edges"]
    else:
        assert commands[3] == ["demo", "--data", "openmoji", "--out", "demo-drawings"]


@pytest.mark.parametrize(("found", "starts"), [("/usr/bin/vlprompt", "vlprompt"), (None, "{python} -m vlprompt")])
def test_commands_begin_with_what_can_be_called(
    found: str | None, starts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(demo.shutil, "which", lambda name: found)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    assert demo._command() == starts.format(python=sys.executable)
    monkeypatch.chdir(tmp_path)
    assert demo._command() == starts.format(python=".venv/bin/python")


def test_an_earlier_demo_is_made_anew_and_nothing_else_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Stop(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stop

    monkeypatch.setattr(demo, "load_dataset", stop)
    with pytest.raises(ConfigError, match=r"unknown data set of the demo 'openmojis': did you mean 'openmoji'"):
        demo.run_demo(tmp_path / "new", print, "openmojis")
    assert not (tmp_path / "new").exists()
    with pytest.raises(Stop):
        demo.run_demo(tmp_path / "new", print)
    (tmp_path / "new" / "predictions.png").write_bytes(b"old")
    with pytest.raises(Stop):
        demo.run_demo(tmp_path / "new", print)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["demo.json"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("")
    with pytest.raises(ConfigError, match="already in use"):
        demo.run_demo(tmp_path / "mine", print)
    assert (tmp_path / "mine" / "diary.txt").exists()


# --- drawing --------------------------------------------------------------------------------------


def colours(file: Path) -> set[tuple[int, ...]]:
    with Image.open(file) as image:
        return {colour for _, colour in image.getcolors(image.width * image.height) or ()}


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


def test_right_and_wrong_are_marked(tmp_path: Path):
    square = tmp_path / "square.png"
    Image.new("RGB", (16, 16), "#336699").save(square)
    names = {"zero_shot": "before", "maple": "after"}
    wrong = Shown(square, "blue", "red", "green")
    draw_predictions(tmp_path / "wrong.png", names, {"base classes": [wrong] * 5})
    draw_predictions(
        tmp_path / "mixed.png", names, {"base classes": [wrong], "novel classes": [Shown(*[square], *"bbb")]}
    )
    assert rgb(drawing.WRONG) in colours(tmp_path / "wrong.png")
    assert rgb(drawing.RIGHT) not in colours(tmp_path / "wrong.png")
    assert {rgb(drawing.WRONG), rgb(drawing.RIGHT), rgb("#336699")} <= colours(tmp_path / "mixed.png")


@pytest.mark.parametrize(
    "curve",
    [
        Curve([3.0, 2.0, 1.0], [10.0, 20.0, 30.0]),
        Curve([2.0, 2.0], [50.0, 50.0]),
        Curve([0.1], [0.0]),
        Curve([1e-6, 2e-6], [0.0, 100.0]),
        Curve([1.0] * 50, [float(i) for i in range(50)]),
    ],
    ids=["falling", "flat", "one epoch", "tiny", "long"],
)
def test_curves_stay_within_their_panels(curve: Curve, tmp_path: Path):
    draw_curves(tmp_path / "curves.svg", {"coop": curve, "maple": curve}, {"zero_shot": 12.0})
    _, *panels = ElementTree.parse(tmp_path / "curves.svg").getroot().iter(f"{SVG}svg")
    assert len(panels) == 2
    axes = Axes
    for panel, values, levels in zip(panels, curve, (0, 1), strict=True):
        lines = [[*map(float, re.split("[ ,]", line.get("points")))] for line in panel.iter(f"{SVG}polyline")]
        drawn = [line for line in lines if len(line) == 2 * len(values)]
        assert len(lines) == 2 + levels
        assert len(drawn) >= 2
        assert all(axes.LEFT <= x <= axes.RIGHT for line in lines for x in line[::2])
        assert all(axes.TOP <= y <= axes.BOTTOM for line in lines for y in line[1::2])
        assert {"epoch", "coop", "maple"} <= {text.text for text in panel.iter(f"{SVG}text")}
        falls = [b - a for a, b in pairwise(values)]
        rises = [a - b for a, b in pairwise(drawn[-1][1::2])]  # downwards on the sheet
        assert all((fall > 0) == (rise > 0) for fall, rise in zip(falls, rises, strict=True))


@pytest.mark.parametrize(("span", "step"), [(4.0, 1.0), (5.9, 1.0), (1.2, 0.2), (35.0, 10.0)])
def test_grid_lines_stand_at_round_numbers(span: float, step: float):
    assert step_of(span) == pytest.approx(step)
