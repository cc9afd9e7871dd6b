"""What ``vlprompt evaluate`` measures: which images, among which classes, and the figures it prints."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from pathlib import Path
from shutil import copytree

import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

from tests.kit import TINY
from tests.kit.command import vlprompt
from tests.kit.hub import Hub
from tests.kit.pictures import draw, paint
from vlprompt.data.splits import find_classes
from vlprompt.methods import METHODS

COLOURS = {
    "blue": (30, 30, 220), "dark_green": (30, 200, 30), "red": (220, 30, 30), "white": (225, 225, 225),
}  # fmt: skip
KINDS = {"coop": ["n_ctx=2"], "csc": ["n_ctx=2", "class_specific=true"], "linear_probe": ["C=100"]}


@pytest.fixture(scope="module")
def flat(tmp_path_factory) -> Path:
    """Ten pictures of each of four classes, which training divides."""
    folder = tmp_path_factory.mktemp("data") / "flat"
    for c, (name, colour) in enumerate(COLOURS.items()):
        for i in range(10):
            paint(folder / name / f"{i}.png", colour, 100 * c + i)
    return folder


@pytest.fixture(scope="module")
def runs(flat, tmp_path_factory) -> dict[str, Path]:
    """A run of each kind of method on it."""
    out = tmp_path_factory.mktemp("runs")
    for name, settings in KINDS.items():
        method = "coop" if name == "csc" else name
        done = vlprompt(
            "train", method, flat, "--backbone", TINY, *settings, "batch_size=10", "warmup_epochs=0", "--epochs", 2,
            "--out", out / name,
        )  # fmt: skip
        assert done.code == 0, done.err
        assert "names no train, val and test images: half of each class's are train" in done.err
        assert "(20, 8 and 12)" in done.err
    return {name: out / name for name in KINDS}


@pytest.fixture
def some(tmp_path) -> Path:
    """A test folder with two of the classes, otherwise spelled, and noise in one of them."""
    folder = tmp_path / "some"
    for i in range(5):
        paint(folder / "Dark green" / f"{i}.png", COLOURS["dark_green"], 900 + i)
        draw(folder / "RED" / f"{i}.png", 50 + i, 32, 32)
    return folder


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


@pytest.mark.parametrize("name", KINDS)
def test_some_of_the_models_classes(name, runs, some):
    own = vlprompt("evaluate", runs[name], some, "--json")
    assert own.json["classes"] == ["blue", "dark green", "red", "white"]
    assert (own.json["among"], own.json["split"], own.json["n"]) == ("model", "all", 10)
    assert set(own.json["per_class"]) == {"dark green", "red"}
    assert "has 2 of the model's 4 classes: scored among all of the model's (--among folder" in own.err
    assert vlprompt("evaluate", runs[name], some, "--among", "model", "--json").json == own.json
    predicted = Counter(row["prediction"] for row in rows_of(vlprompt("evaluate", runs[name], some, "--csv").out))
    alone = vlprompt("evaluate", runs[name], some, "--among", "folder", "--json").json
    assert alone["classes"] == ["Dark green", "RED"]
    assert alone["among"] == "folder"
    assert alone["accuracy"] >= own.json["accuracy"]
    if name == "linear_probe":  # noise is nearer to white than to what it is called
        assert predicted["white"] + predicted["blue"] > 0
        assert alone["accuracy"] > own.json["accuracy"]


@pytest.mark.parametrize("name", KINDS)
def test_a_subset_of_the_names_is_the_same_model_with_fewer_answers(name, runs, some):
    image = some / "RED" / "0.png"
    every = vlprompt("predict", runs[name], image, "--json").json["predictions"][0]["top"]
    few = vlprompt("predict", runs[name], image, "--class-names", "RED,dark_green", "--json")
    both = {t["class"]: t["probability"] for t in few.json["predictions"][0]["top"]}
    of = {t["class"]: t["probability"] for t in every}
    total = of["red"] + of["dark green"]
    assert both == pytest.approx({"RED": of["red"] / total, "dark_green": of["dark green"] / total}, abs=1e-5)


def test_classes_that_a_model_of_its_own_classes_lacks(runs, some):
    for name, method in (("linear_probe", "linear_probe"), ("csc", "coop")):
        done = vlprompt("predict", runs[name], some, "--class-names", "red,whit")
        assert done.code == 2
        assert done.err == f"error: {method} knows its own 4 classes alone, not 'whit': did you mean 'white'?\n"


def test_some_names_that_are_none_of_the_models(runs, some):
    paint(some / "pink" / "0.png", (255, 150, 180), 1)
    told = vlprompt("evaluate", runs["coop"], some, "--json")
    assert (told.json["among"], told.json["classes"]) == ("folder", ["Dark green", "RED", "pink"])
    assert "1 of 3 classes are none of the model's ('pink'): scored among those of 'some'" in told.err
    refused = vlprompt("evaluate", runs["coop"], some, "--among", "model")
    assert (refused.code, refused.out) == (2, "")
    assert refused.err == "error: --among model: 1 of 3 classes are none of the model's: 'pink'\n"


def test_one_of_the_models_classes(runs, some, tmp_path):
    (some / "RED").rename(tmp_path / "apart")
    result = vlprompt("evaluate", runs["linear_probe"], some, "--json").json
    assert (result["among"], len(result["classes"]), set(result["per_class"])) == ("model", 4, {"dark green"})
    alone = vlprompt("evaluate", runs["linear_probe"], some, "--among", "folder")
    assert (alone.code, alone.out) == (2, "")
    assert "data set 'some' has the class 'Dark green' alone: nothing to tell it from" in alone.err
    assert vlprompt("train", "coop", some, "--out", tmp_path / "run").code == 2


def test_halves_of_the_classes_are_told_apart_alone(runs, flat):
    base = vlprompt("evaluate", runs["linear_probe"], flat, "--classes", "base", "--json")
    assert (base.json["among"], base.json["classes"], base.json["n"]) == ("folder", ["blue", "dark green"], 6)
    among = vlprompt("evaluate", runs["linear_probe"], flat, "--classes", "base", "--among", "model", "--json").json
    assert (among["n"], len(among["classes"])) == (6, 4)


def test_which_classes_are_which():
    known = ("sea horse", "Café", "cat", "cat")
    assert find_classes(("cafe\u0301", "SEA_horse", "cat", "dog"), known) == [1, 0, None, None]
    assert find_classes(("sea horse", "Sea_Horse"), known) == [None, None]
    assert find_classes(known, known) == [0, 1, 2, 3]


# --- which images ---------------------------------------------------------------------------------


def test_the_folder_of_the_run_is_measured_on_its_test_part(runs, flat, tmp_path):
    done = vlprompt("evaluate", runs["coop"], flat, "--json")
    assert (done.json["split"], done.json["n"]) == ("test", 12)
    assert "was trained on images of 'flat': its test part is measured (--split all" in done.err
    moved = copytree(flat, tmp_path / "elsewhere")
    assert vlprompt("evaluate", runs["coop"], moved, "--json").json["n"] == 12
    for part, n in (("train", 20), ("val", 8), ("test", 12), ("all", 40)):
        told = vlprompt("evaluate", runs["coop"], flat, "--split", part, "--json")
        assert (told.json["split"], told.json["n"]) == (part, n)
        seen = f"was trained on 20 of these {n} images" in told.err
        assert seen == (part in ("train", "all"))


@pytest.mark.parametrize("change", ["removed", "moved to another class", "a row removed", "renamed elsewhere"])
def test_data_that_have_changed_since_are_measured_on_the_runs_test_images(change, runs, flat, tmp_path):
    run = json.loads((runs["linear_probe"] / "split.json").read_text())
    trained, tested = {row[0] for row in run["train"]}, {row[0] for row in run["test"]}
    gone, data = min(trained), copytree(flat, tmp_path / "changed")
    if change == "moved to another class":
        (data / gone).rename(data / "white" / "moved.png")
    elif change == "a row removed":
        rows = [f"{x.relative_to(data)},{x.parent.name}" for x in data.rglob("*.png") if x != data / gone]
        data = data / "list.csv"
        data.write_text("\n".join(["path,label", *rows]))
    else:
        (data / gone).unlink()
    if change == "renamed elsewhere":  # and an image to test too
        (data / min(tested)).rename(data / "white" / "moved.png")
        tested -= {min(tested)}
    done = vlprompt("evaluate", runs["linear_probe"], data, "--csv")
    root = data.parent if data.suffix else data
    assert {str(Path(row["image"]).relative_to(root)) for row in rows_of(done.out)} == tested
    assert f"{runs['linear_probe']} was trained on images of '{data.stem}': " in done.err
    assert "trained on 19 of these" not in done.err
    every = vlprompt("evaluate", runs["linear_probe"], data, "--split", "all")
    assert re.search(r"was trained on 19 of these (39|40) images", every.err), every.err


def test_a_run_is_told_from_its_data_by_one_image(runs, flat, tmp_path):
    run = json.loads((runs["linear_probe"] / "split.json").read_text())
    data = copytree(flat, tmp_path / "flat")
    for path, *_ in run["train"][1:] + run["test"]:
        (data / path).unlink()
    done = vlprompt("evaluate", runs["linear_probe"], data, "--json")
    assert (done.json["split"], done.json["n"]) == ("all", 9)
    assert "was trained on 1 of these 9 images" in done.err


def test_images_of_the_same_names_in_another_folder(runs, flat, tmp_path):
    for c, (name, colour) in enumerate(COLOURS.items()):
        for i in range(10):
            paint(tmp_path / "new" / name / f"{i}.png", colour, 7000 + 100 * c + i)
    done = vlprompt("evaluate", runs["coop"], tmp_path / "new", "--json")
    assert (done.json["split"], done.json["n"]) == ("all", 40)
    assert "data set 'new' names no train, val and test images: all are measured" in done.err
    part = vlprompt("evaluate", runs["coop"], tmp_path / "new", "--split", "test", "--json")
    assert part.json["n"] == 12
    assert "half of each class's are train, a fifth val, the rest test, drawn by their names (20, 8 and 12)" in part.err


def test_a_list_without_parts_is_measured_whole(runs, some):
    images = sorted(some.rglob("*.png"))
    table = [f"{path.relative_to(some)},{path.parent.name}" for path in images]
    (some / "list.csv").write_text("\n".join(["path,label", *table]))
    result = vlprompt("evaluate", runs["coop"], some / "list.csv", "--json").json
    assert (result["n"], result["split"], result["among"]) == (10, "all", "model")


def test_a_known_data_set_keeps_its_parts_and_its_classes(runs):
    result = vlprompt("evaluate", runs["coop"], "clothing-demo", "--json").json
    assert (result["split"], result["among"]) == ("test", "folder")


# --- figures --------------------------------------------------------------------------------------


def test_figures_and_rows_agree_with_scikit_learn(runs, some):
    result = vlprompt("evaluate", runs["linear_probe"], some, "--json").json
    done = vlprompt("evaluate", runs["linear_probe"], some, "--csv")
    assert done.code == 0
    assert f"accuracy {result['accuracy']:.2f} % on 10 images of 2 classes (all), among 4 of the model" in done.err
    rows = rows_of(done.out)
    assert [row["image"] for row in rows] == [str(path) for path in sorted(some.rglob("*.png"))]
    truth, predicted = ([row[key] for row in rows] for key in ("truth", "prediction"))
    assert truth == ["dark green"] * 5 + ["red"] * 5
    assert all(0.25 <= float(row["probability"]) <= 1 for row in rows)
    assert result["accuracy"] == pytest.approx(100 * accuracy_score(truth, predicted))
    here = ["dark green", "red"]
    means = precision_recall_fscore_support(truth, predicted, labels=here, average="macro", zero_division=0)[:3]
    assert [result[key] for key in ("precision", "recall", "f1")] == pytest.approx([100 * m for m in means])
    assert result["macro_accuracy"] == pytest.approx(result["recall"])
    each = zip(*precision_recall_fscore_support(truth, predicted, labels=here, zero_division=0), strict=True)
    for name, (precision, recall, f1, n) in zip(here, each, strict=True):
        expected = {"n": n, "precision": 100 * precision, "recall": 100 * recall, "f1": 100 * f1}
        assert result["by_class"][name] == pytest.approx(expected)
    matrix = confusion_matrix(truth, predicted, labels=result["classes"])
    assert result["confusion"] == [[c, p, matrix[c, p]] for c in range(4) for p in range(4) if matrix[c, p]]


def test_one_output(runs, some):
    done = vlprompt("evaluate", runs["coop"], some, "--csv", "--json")
    assert (done.code, done.err) == (2, "error: --json and --csv exclude each other\n")


# --- RUN on the hub -------------------------------------------------------------------------------


def test_a_run_may_be_a_hub_id(runs, some, tmp_path, monkeypatch):
    Hub(tmp_path / "hub", monkeypatch)
    copytree(runs["coop"], tmp_path / "hub" / "someone" / "colours")
    monkeypatch.chdir(tmp_path)
    model, image = "someone/colours", some / "RED" / "0.png"
    for command in (
        ("evaluate", model, some),
        ("predict", model, image),
        ("export", model, "--out", tmp_path / "c.safetensors"),
        ("explain", model, image, "--out", tmp_path / "x.png"),
    ):
        assert vlprompt(*command).code == 0
    here = vlprompt("predict", runs["coop"], image, "--json").json
    assert vlprompt("predict", model, image, "--json").json == here
    gone = vlprompt("predict", "someone/gone", image)
    assert (gone.code, gone.err) == (
        2,
        "error: no folder 'someone/gone', and not on the hub: 404: no such repository\n",
    )
    (tmp_path / "runs").mkdir()
    local = vlprompt("predict", "runs/gone", image)  # the folder is here: no network is asked
    assert (local.code, "no tuned model in runs/gone" in local.err) == (2, True)


def test_downloaded_models_bring_no_code(flat, tmp_path, monkeypatch):
    own = tmp_path / "own.py"
    own.write_text(
        "from vlprompt.methods.coop import CoOp\nfrom vlprompt.methods.registry import register\n\n\n"
        '@register("evaluate_test")\nclass Own(CoOp):\n    """CoOp."""\n'
    )
    done = vlprompt("train", own, flat, "--backbone", TINY, "n_ctx=1", "--epochs", 1, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    METHODS.pop("evaluate_test")
    Hub(tmp_path / "hub", monkeypatch)
    copytree(tmp_path / "run", tmp_path / "hub" / "someone" / "own")
    monkeypatch.chdir(tmp_path)
    refused = vlprompt("evaluate", "someone/own", flat)
    assert refused.code == 2
    assert "which is not run for a downloaded model" in refused.err
