"""``vlprompt compare``: held-out images, time, the table, the recommendation, and the model that it leaves."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import vlprompt as package
from tests.kit import TINY
from tests.kit.checks import tree
from tests.kit.command import vlprompt
from tests.kit.pictures import make_photos
from vlprompt.artefact.artefact import load_artefact, load_calibration
from vlprompt.backbones.backbone import Backbone
from vlprompt.compare import plan
from vlprompt.compare import run as run_module
from vlprompt.compare.clock import Deadline
from vlprompt.compare.plan import SHORTLIST, Cost, Costs, Held, candidates, hold_out
from vlprompt.compare.rows import Row, best_of, ranked, reason_for, row_of, table
from vlprompt.data.datasets import LoadedDataset, load_dataset
from vlprompt.data.splits import Item, Split, read_split
from vlprompt.documents import read_sealed
from vlprompt.errors import ConfigError, DataError
from vlprompt.methods import METHODS
from vlprompt.training.run import Result, saved_config

FAST = "zero_shot,linear_probe,gda"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 training and 2 test images of each of three classes."""
    return make_photos(tmp_path_factory.mktemp("small"), train=6, val=0, test=2)


def compared(data: Path, out: Path, *more: object, methods: str = FAST) -> Any:
    return vlprompt("compare", data, "--backbone", TINY, "--methods", methods, "--out", out, *more)


@pytest.fixture(scope="module")
def done(small: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a comparison, and what it said."""
    out = tmp_path_factory.mktemp("compared") / "out"
    return out, compared(small, out, "--json").json


# --- images held out ------------------------------------------------------------------------------


def split_of(train: Sequence[int], val: Sequence[int]) -> Split:
    """So many images of each class in train, and in val."""
    parts = [
        tuple(Item(f"{part}/{c}/{i}.png", c) for c, n in enumerate(counts) for i in range(n))
        for part, counts in (("train", train), ("val", val))
    ]
    return Split(Path("photos"), tuple(f"class {c}" for c in range(len(train))), *parts, (Item("test/0.png", 0),))


def held_out(split: Split) -> Held:
    return hold_out(LoadedDataset("photos", split, "a photo of a {}."), split)


def test_val_images_are_held_out_where_there_are_enough() -> None:
    held = held_out(split_of([4, 4], [2, 2]))
    assert held.how == "4 val images"
    assert [len(fold.train) for fold in held.folds] == [8]
    assert (len(held.whole.train), held.whole.val, held.whole.test) == (12, (), ())


@pytest.mark.parametrize(("train", "val", "folds"), [([6, 7], [0, 0], 3), ([2, 5], [0, 0], 2), ([2, 2], [1, 1], 3)])
def test_folds_are_stratified_and_hold_each_image_out_once(train: list[int], val: list[int], folds: int) -> None:
    split = split_of(train, val)
    held = held_out(split)
    assert len(held.folds) == folds
    assert held.how == f"{folds} stratified folds of {sum(train) + sum(val)} training images"
    out = [item for fold in held.folds for item in fold.val]
    assert sorted(out, key=str) == sorted([*split.train, *split.val], key=str)
    for fold in held.folds:
        assert not set(fold.train) & set(fold.val)
        assert {item.label for item in fold.train} == {0, 1}
        for c in (0, 1):
            n = train[c] + val[c]
            assert sum(item.label == c for item in fold.val) in (n // folds, -(-n // folds))


def test_one_image_of_a_class_cannot_be_held_out() -> None:
    with pytest.raises(
        DataError, match=r"class 'class 1' has 1 image to train on; to hold some out, every class needs"
    ):
        held_out(split_of([3, 1], [0, 0]))


# --- the table and what to take -------------------------------------------------------------------


def row(method: str, accuracy: float, *, macro: float = 50.0, seconds: float = 1.0, new_names: bool = False) -> Row:
    return Row(method, None, accuracy, 1.0, macro, 0.1, 0.05, seconds, 1000, new_names)


def test_figures_of_a_row() -> None:
    logits = torch.tensor([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    labels = torch.tensor([0, 0, 1, 1])
    found = row_of("m", None, logits, logits / 4, labels, ["a", "b"], 2.5, 10, True)
    assert (found.accuracy, found.macro_accuracy) == (75.0, 75.0)
    assert found.standard_error == pytest.approx(100 * (0.75 * 0.25 / 4) ** 0.5)
    assert found.calibration_error == pytest.approx(torch.sigmoid(torch.tensor(4.0)).item() - 0.75)
    assert found.calibrated_error == pytest.approx(0.75 - torch.sigmoid(torch.tensor(1.0)).item())


def test_the_most_accurate_is_best_then_by_class_then_the_quicker() -> None:
    rows = [row("slow", 90, seconds=9), row("quick", 90, seconds=2), row("fair", 90, macro=60), row("poor", 80)]
    assert [r.method for r in ranked(rows)] == ["fair", "quick", "slow", "poor"]
    assert best_of(rows).method == "fair"
    assert [line.split()[0] for line in table(rows).splitlines()] == ["method", "fair", "quick", "slow", "poor"]


def test_the_reason_names_what_cannot_be_told_apart_and_what_takes_new_names() -> None:
    right = {
        "head": torch.tensor([True] * 95 + [False] * 5),
        "near": torch.tensor([True] * 93 + [False] * 7),  # 2 ± 1.4 points below
        "far": torch.tensor([True] * 60 + [False] * 40),
    }
    rows = [row("head", 95), row("near", 93, seconds=3), row("far", 60, new_names=True)]
    text = reason_for(rows, right)
    assert text.startswith("head is the most accurate on held-out images: 95.0 %.")
    assert "Not told from it by these images: near (2.0 ± 1.4 points below, 3 s)." in text
    assert text.endswith("of those that take new class names far is best (60.0 %).")
    assert reason_for(rows[:1], right) == "head is the only method that was compared."


# --- methods and time -----------------------------------------------------------------------------


def test_the_shortlist_begins_with_what_is_cheap() -> None:
    found = candidates(SHORTLIST, {"backbone": "mini"})
    names = [c.name for c in found]
    assert set(names) == set(SHORTLIST)
    assert names[:2] == ["zero_shot", "linear_probe"]
    assert [c.name for c in found if c.light] == [*names[:2], "gda", "tip_adapter", "clap", "prolip"]
    by_name = {c.name: c for c in found}
    assert (by_name["coop"].preset, by_name["prolip"].preset, by_name["clap"].preset) == ("mini", "quick", None)
    assert {c.name: c.preset for c in candidates(["coop"], {"backbone": "openai/clip-vit-base-patch16"})} == {
        "coop": "few-shot"
    }


def test_many_images_need_fewer_views() -> None:
    clap, coop = candidates(["clap", "coop"], {"backbone": "mini"})[::-1]
    assert clap.views == 20
    assert [clap.with_views_for(n).views for n in (4, 16, 32, 300, 10000)] == [20, 20, 10, 2, 1]
    assert coop.with_views_for(300) == coop


def test_costs_are_those_of_measured_steps(small: Path, tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load_dataset(small)
    held = held_out(replace(dataset.split, val=()))
    coop, gda, probe, vpt = (
        candidates([name], {"backbone": str(TINY), "data.name": str(small), "data.batch_size": 4})[0]
        for name in ("coop", "gda", "linear_probe", "vpt")
    )
    costs = Costs(tiny, dataset.template, held)
    assert costs.per_image > 0
    costs.per_image = 2.0
    monkeypatch.setattr(plan.Costs, "_seconds_of_a_step", lambda self, c, fold: 0.5 if c is coop else 0.0)
    # 18 images, each seen once, in 3 folds: 12 to train on, 3 batches of 4 in 200 epochs, 4 batches of all.
    assert costs.of(probe) == Cost(compared=2.0 * 18, retrained=0.0)
    assert costs.of(coop) == Cost(2.0 * 18 + 3 * 0.5 * 200 * 3, 0.5 * 200 * 4)
    assert costs.of(gda) == Cost(2.0 * (18 + 10 * 3 * 12), 2.0 * 10 * 18)
    # With a tower of its own, of all folds to measure it, and of all images again.
    assert costs.of(vpt) == Cost(2.0 * 3 * 18, 2.0 * 18)
    costs.seen(gda)
    assert costs.of(gda).compared == costs.of(probe).compared == 0.0
    assert costs.of(coop).compared == 3 * 0.5 * 200 * 3


def test_a_step_is_measured(small: Path, tiny: Backbone) -> None:
    dataset = load_dataset(small)
    costs = Costs(tiny, dataset.template, held_out(replace(dataset.split, val=())))
    settings = {"backbone": str(TINY), "data.name": str(small), "data.batch_size": 4, "data.workers": 0}
    for name, steps in (("coop", True), ("clap", True), ("zero_shot", False)):
        cost = costs.of(candidates([name], settings)[0])
        without = Costs.of(costs, replace(candidates(["zero_shot"], settings)[0]))
        assert (cost.compared > without.compared) == steps


def test_what_does_not_fit_is_named(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = plan.Costs._seconds_of_a_step
    monkeypatch.setattr(
        plan.Costs, "_seconds_of_a_step", lambda s, c, f: 1e3 if c.name == "coop" else measured(s, c, f)
    )
    told = compared(small, tmp_path / "out", "--json", "--minutes", "2", methods="coop,zero_shot").json
    assert [r["method"] for r in told["rows"]] == ["zero_shot"]
    (left,) = told["left_out"]
    assert left["method"] == "coop"
    assert left["needs"] > 1e5
    assert re.fullmatch(r"about \d+ s, and \d+ s to train the best: \d+ s are left", left["reason"])
    assert "coop" in (tmp_path / "out" / "compare.html").read_text()


def test_a_method_that_takes_too_long_is_stopped(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "Deadline", lambda at: Deadline(0.0))
    told = compared(small, tmp_path / "out", "--json", methods="zero_shot,clap").json
    assert [r["method"] for r in told["rows"]] == ["zero_shot"]
    assert told["left_out"][0]["reason"] == "it took longer than was estimated, and was stopped"


def test_a_method_that_fails_does_not_stop_the_others(small: Path, tmp_path: Path) -> None:
    told = compared(small, tmp_path / "out", "--json", methods="zero_shot,kdpl_coop").json
    assert [r["method"] for r in told["rows"]] == ["zero_shot"]
    assert told["left_out"][0]["method"] == "kdpl_coop"
    assert "teacher.backbone" in told["left_out"][0]["reason"]


# --- the whole ------------------------------------------------------------------------------------


def test_what_is_said_is_what_was_measured(done: tuple[Path, dict[str, Any]], small: Path) -> None:
    out, told = done
    assert {r["method"] for r in told["rows"]} == set(FAST.split(","))
    assert told["best"] == told["rows"][0]["method"] != "zero_shot"
    assert told["held_out"] == "3 stratified folds of 18 training images"
    assert told["images"] == 18
    assert told["left_out"] == []
    assert json.loads((out / "compare.json").read_text()) == told
    takes = {r["method"]: r["new_names"] for r in told["rows"]}
    assert takes == {"zero_shot": True, "linear_probe": False, "gda": True}
    assert all(r["size"] > 0 and 0 <= r["accuracy"] <= 100 for r in told["rows"])


def test_the_best_is_trained_on_all_images_and_ready(done: tuple[Path, dict[str, Any]], small: Path) -> None:
    out, told = done
    method = load_artefact(out)
    assert method.name == told["best"]
    assert len(read_split(out / "split.json", small).train) == 18
    assert saved_config(out).method == told["best"]
    assert read_sealed(out / "metrics.json", Result).run == str(out)
    calibration = load_calibration(out)
    assert calibration is not None
    assert sum(map(len, calibration.misfit)) == 18
    predictions = vlprompt("predict", out, small / "test", "--json", "--sets", "0.9").json["predictions"]
    assert len(predictions) == 6
    assert all("set" in p for p in predictions)
    assert not (out / "candidates" / ".shared").exists()
    code, _, err = vlprompt("export", out, "--int8", "--out", out.parent / "small.onnx")
    assert code == 0, err
    assert "accuracy on 6 test images of small" in err, "the run's split names them"


def test_the_page_needs_nothing_else(done: tuple[Path, dict[str, Any]]) -> None:
    out, told = done
    page = (out / "compare.html").read_text()
    for text in (*FAST.split(","), told["reason"][:40], "standard error", "<svg"):
        assert text in page
    assert not re.search(r"(?:src|href)=|@import|url\(", page)


@pytest.fixture(scope="module")
def with_val(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Images with a val part, which a comparison trains on at last, and its folder."""
    photos = make_photos(tmp_path_factory.mktemp("with val") / "photos", train=4, val=2, test=2)
    out = photos.parent / "out"
    code, _, err = compared(photos, out, methods="linear_probe")
    assert code == 0, err
    return photos, out


@pytest.mark.parametrize(
    ("part", "of"), [("val", ["6 of these 6"]), ("all", ["18 of these 24"]), ("train", []), ("test", [])]
)
def test_evaluate_says_that_val_images_were_trained_on(
    part: str, of: list[str], with_val: tuple[Path, Path], tmp_path: Path
) -> None:
    photos, out = with_val
    code, _, err = vlprompt("evaluate", out, photos, "--split", part, "--html", tmp_path / "page.html")
    assert code == 0, err
    assert re.findall(r"note: .* was trained on (\d+ of these \d+) images", err) == of
    if of:
        assert f"{of[0].split()[0]} of the images themselves were trained on" in (tmp_path / "page.html").read_text()


def test_the_run_may_be_moved(with_val: tuple[Path, Path]) -> None:
    photos, out = with_val
    away = out.rename(out.with_name("away"))
    try:
        code, _, err = vlprompt("calibrate", away, photos)
        assert (code, "6 of 6 images were trained on" in err) == (2, True), err
        code, _, err = vlprompt("export", away, "--int8", "--out", away.parent / "small.onnx")
        assert (code, "accuracy on 6 test images of photos" in err) == (0, True), err
    finally:
        away.rename(out)


def test_a_second_call_trains_nothing_again(
    done: tuple[Path, dict[str, Any]], small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, told = done

    def none(*given: object, **more: object) -> None:
        raise AssertionError("nothing is to be trained")

    monkeypatch.setattr(run_module, "train", none)
    again = compared(small, out, "--json").json
    assert again["rows"] == told["rows"]


def test_other_pixels_under_the_same_names_are_another_comparison(tmp_path: Path) -> None:
    data = make_photos(tmp_path / "photos", train=6, val=0, test=0)
    assert compared(data, tmp_path / "out", methods="zero_shot").code == 0
    shutil.copy(next((data / "train").glob("*/5.png")), next((data / "train").glob("*/0.png")))
    again = compared(data, tmp_path / "out", methods="zero_shot")
    assert again.code == 2
    assert "holds a comparison of other images or settings" in again.err


def test_a_changed_method_of_ones_own_is_compared_anew(small: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    text = "from vlprompt.methods import register\nfrom vlprompt.methods.zero_shot import ZeroShot\n\n\n"
    text += '@register("mine")\nclass Mine(ZeroShot):\n    """Zero-shot."""\n'
    for content in (text, text + "    changed = True\n"):
        file.write_text(content)
        assert compared(small, tmp_path / "out", methods=str(file)).code == 0
    METHODS.pop("mine", None)
    assert len(list((tmp_path / "out" / "candidates").glob("mine-*.safetensors"))) == 2 * 3, "each fold again"


def test_a_stopped_comparison_goes_on(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, real, calls = tmp_path / "out", run_module.train, []

    def stops(config: Any, *given: Any, **more: Any) -> Any:
        calls.append(config.method)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(config, *given, **more)

    monkeypatch.setattr(run_module, "train", stops)
    stopped = compared(small, out, methods="zero_shot,linear_probe")
    assert stopped.code == 130
    assert "interrupted; to continue: give the same command again" in stopped.err
    assert not (out / "config.json").exists()
    told = compared(small, out, "--json", methods="zero_shot,linear_probe").json
    assert calls[5:] == ["linear_probe", "linear_probe", told["best"]]
    whole = compared(small, tmp_path / "whole", "--json", methods="zero_shot,linear_probe").json
    for a, b in zip(told["rows"], whole["rows"], strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}


def test_python(small: Path, tmp_path: Path) -> None:
    said: list[str] = []
    result = package.compare(
        small, methods=["zero_shot"], backbone=str(TINY), out=tmp_path / "out", say=said.append, minutes=1
    )
    assert result.best == "zero_shot"
    assert result.reason == "zero_shot is the only method that was compared."
    assert said[-1] == "zero_shot is trained on all 18 images"
    assert package.PromptedModel.from_pretrained(result.run).calibration is not None
    assert callable(package.compare)
    with pytest.raises(ConfigError, match="there are none to compare"):
        package.compare(small, methods=[])


# --- bad input ------------------------------------------------------------------------------------


def one_class(folder: Path) -> Path:
    make_photos(folder)
    for part in ("train", "val", "test"):
        for name in ("green", "red"):
            shutil.rmtree(folder / part / name)
    return folder


@pytest.mark.parametrize(
    ("data", "arguments", "says"),
    [
        (make_photos, ["--minutes", "0.1"], "minutes = 0.1 (allowed: 1 or more)"),
        (make_photos, ["--minutes", "-3"], "minutes = -3"),
        (make_photos, ["--minutes", "nan"], "minutes = nan"),
        (make_photos, ["--methods", "zero_shot,linear_prob"], "'linear_prob': did you mean 'linear_probe'?"),
        (make_photos, ["--methods", ","], "there are none to compare"),
        (make_photos, ["--shots", "9"], "class 'blue' has 4 training images, too few for 9 shots"),
        (make_photos, ["--precision", "fp8"], "train.precision"),
        (one_class, [], "at least two classes are needed (found: blue)"),
        (lambda f: make_photos(f, train=1, val=0, test=0), [], "class 'blue' has 1 image to train on"),
        (lambda f: f / "gone", [], "does not exist"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(tmp_path: Path, data: Any, arguments: list[str], says: str) -> None:
    place = data(tmp_path / "photos")
    before = tree(tmp_path)
    ended = vlprompt("compare", place, "--backbone", TINY, "--out", tmp_path / "out", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
    assert says in ended.err
    assert tree(tmp_path) == before


def test_a_folder_in_use_is_left_alone(small: Path, done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    ended = compared(small, tmp_path)
    assert (ended.code, "is already in use, and holds no comparison" in ended.err) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    inside = compared(small, small / "train" / "compared")
    assert (inside.code, inside.err.count("\n"), "is inside the data set" in inside.err) == (2, 1, True)
    assert not (small / "train" / "compared").exists()
    other = make_photos(tmp_path / "other", train=3)
    ended = compared(other, done[0])
    assert (ended.code, "holds a comparison of other images or settings" in ended.err) == (2, True)


def test_an_unreadable_image_is_named_and_may_be_left_out(tmp_path: Path) -> None:
    data = make_photos(tmp_path / "photos", train=4, val=0)
    (data / "train" / "red" / "0.png").write_bytes(b"no image")
    ended = compared(data, tmp_path / "out", methods="zero_shot")
    assert (ended.code, "--skip-bad leaves such images out" in ended.err) == (2, True)
    assert not (tmp_path / "out").exists()
    assert compared(data, tmp_path / "out", "--skip-bad", "--json", methods="zero_shot").json["images"] == 11
