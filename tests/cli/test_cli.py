"""The command line: its contract, its exit codes, and what it leaves behind."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from tests.kit import TINY, sealed
from tests.kit.checks import tree
from tests.kit.command import Done, environment, python, vlprompt
from tests.kit.marks import slow, sweep
from tests.kit.pictures import SHADES
from tests.kit.runs import RUN_FILES
from vlprompt import __version__
from vlprompt.bench.protocols import PROTOCOLS
from vlprompt.cli import app
from vlprompt.data.known.table import DATASETS
from vlprompt.methods import METHODS

COMMANDS = [name for name, command in typer.main.get_command(app).commands.items() if not command.hidden]
QUICK = ["--backbone", str(TINY), "--epochs", "1", "batch_size=4", "workers=1"]


@pytest.fixture(scope="module")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    out = tmp_path_factory.mktemp("runs") / "coop"
    done = vlprompt("train", "coop", photos, *QUICK, "n_ctx=4", "warmup_epochs=0", "--out", out, "--json")
    return out, done


@pytest.fixture(scope="module")
def run(trained: tuple[Path, Done]) -> Path:
    """A run folder."""
    assert trained[1].code == 0, trained[1].err
    return trained[0]


@pytest.fixture(scope="module")
def probe(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a model that knows its own classes only."""
    out = tmp_path_factory.mktemp("runs") / "probe"
    assert vlprompt("train", "linear_probe", photos, *QUICK, "C=100", "--out", out).code == 0
    return out


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- imports, help, lists -------------------------------------------------------------------------

HEAVY = ("torch", "transformers", "sklearn", "open_clip", "numpy", "PIL", "huggingface_hub")
NOTHING_HEAVY = (
    "import sys; heavy = [m for m in {heavy} if m in sys.modules]; sys.exit(f'imported {{heavy}}' if heavy else 0)"
)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"], ["train", "--help"], ["predict", "--hlp"]])
def test_help_and_import_are_light(arguments: list[str]) -> None:
    if arguments:
        first = f"""
import sys
from vlprompt.cli import main
sys.argv = ["vlprompt", *{arguments}]
try:
    main()
except SystemExit:
    pass
"""
    else:
        first = "import vlprompt\n"
    done = python("-c", first + NOTHING_HEAVY.format(heavy=HEAVY))
    assert done.returncode == 0, done.stderr


def test_both_ways_to_start_it() -> None:
    for start in (["-m", "vlprompt"], [Path(sys.executable).with_name("vlprompt")]):
        if isinstance(start[0], Path):
            if not start[0].is_file():
                continue
            done = subprocess.run([start[0], "--version"], capture_output=True, text=True)
        else:
            done = python(*start, "--version")
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{__version__}\n", "")


def test_help_lists_every_command() -> None:
    for arguments in (["--help"], []):
        done = vlprompt(*arguments)
        assert (done.code, done.err) == (0, "")
        assert all(f" {command} " in done.out for command in COMMANDS)
        assert "Example: vlprompt train" in done.out
    assert {"demo", "list", "train", "evaluate", "predict", "bench", "bank", "data"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_help_and_an_example(command: str) -> None:
    done = vlprompt(command, "--help")
    assert (done.code, done.err) == (0, "")
    assert f"Usage: vlprompt {command}" in done.out
    assert f"Example: vlprompt {command} " in done.out


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("methods", sorted(METHODS)),
        ("datasets", list(DATASETS)),
        (
            "backbones",
            ["mini", "FOLDER", "FILE.safetensors", "OWNER/MODEL", "open_clip:MODEL/TAG", "efficientnet-lite0"],
        ),
        ("protocols", list(PROTOCOLS)),
    ],
)
def test_lists(what: str, names: list[str]) -> None:
    rows = vlprompt("list", what, "--json").json[what]
    assert [row["name"] for row in rows] == names
    plain = vlprompt("list", what)
    head, *lines = plain.out.splitlines()
    assert (plain.code, plain.err) == (0, "")
    assert head.split() == list(rows[0])
    assert [line.split()[0] for line in lines] == names


def test_methods_are_listed_first() -> None:
    assert vlprompt("list").out == vlprompt("list", "methods").out
    maple = next(row for row in vlprompt("list", "--json").json["methods"] if row["name"] == "maple")
    assert maple == {
        "name": "maple", "paper": "Khattak et al., CVPR", "year": 2023,
        "learns": "deep text prompts coupled to visual prompts", "needs": [], "parity": "golden",
        "presets": ["cross-dataset", "mini"],
    }  # fmt: skip


# --- train ----------------------------------------------------------------------------------------


def test_train_prints_one_json_object(trained: tuple[Path, Done]) -> None:
    out, done = trained
    result = done.json
    assert set(result) == {
        "run", "epochs", "train_accuracy", "val_accuracy", "trainable_parameters", "seconds", "skipped", "teacher",
        "kept_epoch",
    }  # fmt: skip
    assert result["run"] == str(out)
    assert result["epochs"] == 1
    assert 0 <= result["train_accuracy"] <= 100
    assert 0 <= result["val_accuracy"] <= 100
    assert result["trainable_parameters"] == 4 * 128
    assert result["seconds"] > 0
    assert {p.name for p in out.iterdir()} == RUN_FILES | {"checkpoints"}
    assert sealed.read(out / "metrics.json") == result
    assert "epoch 1/1  lr 0.002  ce " in done.err


def test_train_without_json_says_it_on_standard_error(photos: Path, empty: Path) -> None:
    done = vlprompt("train", "zero_shot", photos, *QUICK)
    assert (done.code, done.out) == (0, "")
    assert "zero_shot on" in done.err
    assert done.err.splitlines()[-1].endswith("saved in runs/photos-zero_shot-seed1")
    assert {p.name for p in (empty / "runs" / "photos-zero_shot-seed1").iterdir()} == RUN_FILES


def test_the_default_output_folder_has_the_datas_name(
    photos: Path, empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos)
    monkeypatch.setattr("vlprompt.training.run.train", lambda config, out, *rest, **more: pytest.fail(str(out)))
    table = photos / "table.csv"
    for data, name in ((".", "photos"), (f"{photos}/", "photos"), (table, "table"), ("caltech101", "caltech101")):
        with pytest.raises(pytest.fail.Exception, match=rf"\Aruns/{name}-coop-seed7\Z"):
            vlprompt("train", "coop", data, "--seed", 7)


def test_train_in_a_process_of_its_own(photos: Path, tmp_path: Path) -> None:
    """Nothing but the JSON object on standard output, whatever the libraries print."""
    done = python("-m", "vlprompt", "train", "maple", photos, *QUICK, "depth=2", "--out", "run", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert json.loads(done.stdout)["run"] == "run"
    assert "epoch 1/1" in done.stderr


def test_dry_run_prints_a_configuration_that_is_accepted(photos: Path, empty: Path) -> None:
    options = ["--shots", 2, "--classes", "base", "--seed", 5, "--precision", "bf16", "--preset", "cross-dataset"]
    first = vlprompt("train", "maple", photos, *QUICK, *options, "lr=1e-3", "init=the 日本", "--dry-run")
    assert (first.code, first.err) == (0, "")
    content = yaml.safe_load(first.out)
    assert content["method"] == {"name": "maple", "n_ctx": 2, "depth": 3, "init": "the 日本"}
    assert content["data"]["shots"] == 2
    assert content["optim"]["lr"] == 0.001
    (empty / "c.yaml").write_text(first.out, encoding="utf-8")
    again = vlprompt("train", "maple", photos, "--config", "c.yaml", "--dry-run")
    assert (again.code, again.out) == (0, first.out)
    as_json = vlprompt("train", "maple", photos, "--config", "c.yaml", "--dry-run", "--json")
    assert as_json.json == content
    changed = vlprompt("train", "maple", photos, "--config", "c.yaml", "--epochs", 9, "lr=2", "--dry-run")
    assert yaml.safe_load(changed.out)["train"]["epochs"] == 9
    assert yaml.safe_load(changed.out)["optim"]["lr"] == 2
    assert {p.name for p in empty.iterdir()} == {"c.yaml"}


def test_every_setting_of_a_run_can_be_given(empty: Path) -> None:
    """A dry run needs neither data nor backbone."""
    for method in METHODS:
        content = yaml.safe_load(vlprompt("train", method, "nowhere", "--dry-run").out)
        flat = [
            f"{section}.{key}={'null' if value is None else value}"
            for section in ("data", "teacher", "optim", "train", "method")
            for key, value in content[section].items()
            if (section, key) != ("method", "name")
        ]
        given = vlprompt("train", method, "nowhere", *flat, "--dry-run")
        assert given.code == 0, given.err
        assert yaml.safe_load(given.out) == content


# --- evaluate -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("part", "n"), [("test", 9), ("val", 6)])
def test_evaluate(photos: Path, run: Path, part: str, n: int) -> None:
    result = vlprompt("evaluate", run, photos, "--split", part, "--json").json
    assert set(result) == {
        "accuracy", "n", "classes", "per_class", "calibration_error", "skipped", "split", "among", "macro_accuracy",
        "precision", "recall", "f1", "by_class", "confusion",
    }  # fmt: skip
    assert result["n"] == n
    assert result["classes"] == ["blue", "green", "red"]
    assert set(result["per_class"]) == set(SHADES)
    assert result["accuracy"] == pytest.approx(sum(result["per_class"].values()) / 3)
    assert 0 <= result["calibration_error"] <= 1
    plain = vlprompt("evaluate", run, photos, "--split", part)
    assert (plain.code, plain.err) == (0, "")
    assert f"accuracy {result['accuracy']:.2f} % on {n} {part} images of 3 classes (all)" in plain.out


def test_evaluate_agrees_with_the_run(photos: Path, run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    result = vlprompt("evaluate", run, photos, "--split", "val", "--json").json
    assert result["accuracy"] == metrics["val_accuracy"]


def test_evaluate_on_halves_of_the_classes(photos: Path, run: Path) -> None:
    base, novel = (vlprompt("evaluate", run, photos, "--classes", half, "--json").json for half in ("base", "novel"))
    assert base["classes"] == ["blue", "green"]
    assert (base["n"], novel["n"]) == (6, 3)
    assert novel["per_class"] == {"red": 100}


# --- predict --------------------------------------------------------------------------------------


def check_predictions(result: dict[str, Any], images: list[Path], top: int, names: set[str]) -> None:
    assert set(result) == {"predictions", "skipped"}
    assert [p["image"] for p in result["predictions"]] == [str(i) for i in images]
    for prediction in result["predictions"]:
        assert set(prediction) == {"image", "top"}
        assert all(set(t) == {"class", "probability"} for t in prediction["top"])
        probabilities = [t["probability"] for t in prediction["top"]]
        assert len(probabilities) == min(top, len(names))
        assert probabilities == sorted(probabilities, reverse=True)
        assert {t["class"] for t in prediction["top"]} <= names
        assert all(0 <= p <= 1 for p in probabilities)
        if top >= len(names):
            assert sum(probabilities) == pytest.approx(1)
            assert {t["class"] for t in prediction["top"]} == names


@pytest.mark.parametrize("top", [1, 2, 100])
def test_predict(photos: Path, run: Path, top: int) -> None:
    images = [photos / "test" / "red" / "1.png", *sorted((photos / "val").rglob("*.png"))]
    result = vlprompt("predict", run, images[0], photos / "val", "--top", top, "--json").json
    check_predictions(result, images, top, set(SHADES))


def test_predict_agrees_with_evaluate(photos: Path, run: Path, probe: Path) -> None:
    for model in (run, probe):
        accuracy = vlprompt("evaluate", model, photos, "--json").json["accuracy"]
        predictions = vlprompt("predict", model, photos / "test", "--json").json["predictions"]
        right = [p["top"][0]["class"] == Path(p["image"]).parent.name for p in predictions]
        assert accuracy == pytest.approx(100 * sum(right) / len(right))


def test_predict_under_other_class_names(photos: Path, run: Path, tmp_path: Path) -> None:
    image, names = photos / "test" / "red" / "1.png", ["a red thing", "向日葵", "подсолнух", "café"]
    given = vlprompt("predict", run, image, "--class-names", " , ".join(names), "--json").json
    check_predictions(given, [image], 5, set(names))
    for encoding in ("utf-8", "utf-8-sig"):  # some editors put a mark in front
        (tmp_path / "names.txt").write_text("\n".join([*names, "", "  "]), encoding=encoding)
        from_file = vlprompt("predict", run, image, "--class-names-file", tmp_path / "names.txt", "--json").json
        assert from_file == given
    (tmp_path / "names.txt").write_text("salt, pepper\nred", encoding="utf-8")  # a comma is part of a name here
    check_predictions(
        vlprompt("predict", run, image, "--class-names-file", tmp_path / "names.txt", "--json").json,
        [image], 5, {"salt, pepper", "red"},
    )  # fmt: skip


def test_predict_prints_tables(photos: Path, run: Path, tmp_path: Path) -> None:
    image = tmp_path / 'a "red", square.png'
    image.write_bytes((photos / "test" / "red" / "1.png").read_bytes())
    top = vlprompt("predict", run, image, "--json").json["predictions"][0]["top"]
    table = vlprompt("predict", run, image, "--csv")
    rows = list(csv.reader(io.StringIO(table.out)))
    assert (table.code, table.err) == (0, "")
    assert rows == [["image", "class", "probability"]] + [
        [str(image), t["class"], f"{t['probability']:.6f}"] for t in top
    ]
    plain = vlprompt("predict", run, image, "--top", 1)
    assert (plain.code, plain.err) == (0, "")
    assert plain.out == f"{image}\n  {100 * top[0]['probability']:5.1f} %  {top[0]['class']}\n"


@slow
def test_json_can_be_printed_in_any_encoding(photos: Path, run: Path) -> None:
    image = photos / "test" / "red" / "1.png"
    done = python(
        "-m", "vlprompt", "predict", run, image, "--class-names", "red,向日葵", "--json", PYTHONIOENCODING="ascii"
    )
    assert done.returncode == 0, done.stderr
    check_predictions(json.loads(done.stdout), [image], 5, {"red", "向日葵"})


def test_predict_skips_hidden_files_and_what_is_no_image(photos: Path, run: Path, tmp_path: Path) -> None:
    for name in ("b.png", "deeper/a.PNG", ".hidden.png", "._b.png", "__MACOSX/b.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((photos / "test" / "red" / "1.png").read_bytes())
    result = vlprompt("predict", run, tmp_path, "--json").json
    assert [p["image"] for p in result["predictions"]] == [str(tmp_path / "b.png"), str(tmp_path / "deeper" / "a.PNG")]


def test_a_model_moves_with_its_backbone_named_anew(photos: Path, run: Path, tmp_path: Path) -> None:
    image = photos / "test" / "red" / "1.png"
    expected = vlprompt("predict", run, image, "--json").json
    for name in ("config.json", "prompts.safetensors"):  # nothing else is needed
        (tmp_path / name).write_bytes((run / name).read_bytes())
    backbone = sealed.read(tmp_path / "config.json")["backbone"]
    sealed.change(tmp_path / "config.json", backbone=backbone | {"name": "/elsewhere/clip"})
    lost = vlprompt("predict", tmp_path, image)
    assert lost.code == 2
    assert "no backbone '/elsewhere/clip'" in lost.err
    assert vlprompt("predict", tmp_path, image, "--backbone", TINY, "--json").json == expected


# --- bad input ------------------------------------------------------------------------------------


@dataclass
class Places:
    """What the bad commands below may name."""

    photos: Path
    run: Path
    probe: Path
    here: Path

    @property
    def image(self) -> Path:
        return self.photos / "test" / "red" / "1.png"


def train_(*rest: object, method: str = "coop", data: object = None) -> Callable[[Places], list[object]]:
    return lambda p: ["train", method, p.photos if data is None else data, "--backbone", TINY, *rest]


def predict_(*rest: object) -> Callable[[Places], list[object]]:
    return lambda p: ["predict", p.run, p.image, *rest]


BAD: dict[str, tuple[Callable[[Places], list[object]], str]] = {
    "unknown command": (lambda p: ["trian", "coop", p.photos], "No such command 'trian'"),
    "unknown option": (train_("--shot", 2), "No such option: --shot"),
    "option without its value": (train_("--shots"), "--shots"),
    "missing argument": (lambda p: ["train", "coop"], "missing METHOD and DATA (or --resume RUN)"),
    "unknown thing to list": (lambda p: ["list", "method"], "'method' is not one of 'methods', 'backbones', 'data"),
    "unknown method": (train_(method="cop"), "unknown method 'cop': did you mean 'coop'?"),
    "unknown preset": (train_("--preset", "few"), "unknown preset of coop 'few'"),
    "unknown key": (train_("n_ctxx=3"), "unknown key 'n_ctxx': did you mean 'method.n_ctx'?"),
    "no key and value": (train_("n_ctx"), "'n_ctx' is not key=value"),
    "value out of range": (train_("n_ctx=0"), "method.n_ctx = 0 (allowed: greater than or equal to 1)"),
    "value of another type": (train_("lr=fast"), "optim.lr = fast (allowed: number"),
    "several problems": (train_("lr=-1", "nctx=1", "--epochs", 0), "train.epochs = 0 (allowed: greater than or equal"),
    "option of another type": (train_("--seed", "one"), "Invalid value for '--seed'"),
    "option out of range": (train_("--seed", -1), "seed = -1 (allowed: greater than or equal to 0)"),
    "seed too large": (train_("--seed", 2**70), "seed = 1180591620717411303424 (allowed: less than"),
    "a setting against an option": (train_("seed=2", "--seed", 3), "seed = 2 and seed = 3 are both given: they contra"),
    "a short key against an option": (train_("epochs=2", "--epochs", 3), "epochs = 2 and train.epochs = 3 are both"),
    "a setting against the data": (train_("data.name=other"), "data.name = other and data.name = "),
    "bench: a setting against an option": (
        lambda p: ["bench", "few-shot", "--methods", "coop", "--data", p.photos, "--out", "o", "--backbone", TINY,
                   "backbone=mini"], "backbone = mini and backbone = "),
    "bench: a seed against its seeds": (
        lambda p: ["bench", "few-shot", "--methods", "coop", "--data", p.photos, "--out", "o", "--seeds", "3",
                   "seed=2"], "seed = 2: the protocol and what is asked of bench decide it (3)"),
    "bench: other data": (
        lambda p: ["bench", "few-shot", "--methods", "coop", "--data", p.photos, "--out", "o", "data.name=other"],
        "data.name = other: the protocol and what is asked of bench decide it"),
    "bench: a teacher against another": (
        lambda p: ["bench", "few-shot", "--methods", "kdpl_coop", "--data", p.photos, "--out", "o", "--teacher", "mini",
                   "teacher.backbone=other"], "teacher.backbone = other and teacher.backbone = mini are both given"),
    "bank: a setting": (
        lambda p: ["bank", "build", p.photos, "seed=2", "--seed", 3, "--backbone", TINY, "--out", "b"], "seed=2"),
    "no shots": (train_("--shots", 0), "data.shots = 0 (allowed: greater than or equal to 1)"),
    "too many shots": (train_("--shots", 99), "class 'blue' has 4 training images, too few for 99 shots"),
    "unknown half": (train_("--classes", "old"), "'old' is not one of 'base', 'novel', 'all'"),
    "unknown precision to train": (train_("--precision", "fp8"), "train.precision = fp8 (allowed: 'fp32', 'bf16' or"),
    "unknown device": (train_("--device", "toaster"), "cannot use device 'toaster'"),
    "unknown backbone": (lambda p: ["train", "coop", p.photos, "--backbone", "nano"], "no backbone 'nano' (allowed:"),
    "backbone is something else": (lambda p: ["train", "coop", p.photos, "--backbone", p.photos], "no backbone in"),
    "prompts deeper than the tower": (train_("depth=13", method="maple"), "prompt depth = 13 (allowed: 1 to 12"),
    "more prompts than the tower reads": (train_("n_ctx=80"), "the backbone reads at most 77"),
    "template without a place": (train_("template=photo", method="zero_shot"), "photo (allowed: text with {} for the"),
    "unknown data set": (train_(data="caltech"), "unknown data set 'caltech': did you mean 'caltech101'?"),
    "data set without root": (train_(data="caltech101"), "data set 'caltech101' needs --root"),
    "data folder missing": (train_(data="./no/photos"), "does not exist"),
    "data folder empty": (train_(data="."), "at least two classes are needed (found: none)"),
    "data is an image": (lambda p: ["train", "coop", p.image, "--backbone", TINY], "is not a .csv file"),
    "configuration missing": (train_("--config", "c.yaml"), "cannot read configuration c.yaml"),
    "configuration for another method": (lambda p: ["train", "maple", p.photos, "--config", p.run / "config.yaml"],
                                         "method.name = coop: the command asks for 'maple'"),
    "output in use": (lambda p: ["train", "coop", p.photos, "--backbone", TINY, "--out", p.run], "is already in use"),
    "output below a file": (lambda p: ["train", "coop", p.photos, "--backbone", TINY, "--out", p.image / "x"],
                            "cannot make output folder"),
    "run missing to evaluate": (lambda p: ["evaluate", "norun", p.photos], "no tuned model in norun"),
    "data missing to evaluate": (lambda p: ["evaluate", p.run, "./no"], "does not exist"),
    "unknown part": (lambda p: ["evaluate", p.run, p.photos, "--split", "tests"], "'tests' is not one of 'all', 'trai"),
    "unknown classes": (lambda p: ["evaluate", p.run, p.photos, "--among", "run"], "'run' is not one of 'model', 'fol"),
    "run missing to predict": (lambda p: ["predict", "norun", p.image], "no tuned model in norun"),
    "run is a file": (lambda p: ["predict", p.run / "config.json", p.image], "no tuned model in"),
    "image missing": (predict_("no.png"), "image no.png does not exist"),
    "folder without images": (predict_("."), "no images in folder ."),
    "image is something else": (lambda p: ["predict", p.run, p.run / "config.json"], "not an image in a known format"),
    "no top": (predict_("--top", 0), "Invalid value for '--top'"),
    "two outputs": (predict_("--csv", "--json"), "--json and --csv exclude each other"),
    "unknown precision to predict": (predict_("--precision", "fp8"), "unknown precision 'fp8' (allowed: fp32, bf16"),
    "another backbone": (predict_("--backbone", "mini"), "but 'mini' has other weights"),
    "class named twice": (predict_("--class-names", "cat,dog,cat"), "--class-names: 2 classes are named 'cat'"),
    "class without a name": (predict_("--class-names", "cat,,dog"), "--class-names: a class has no name"),
    "no class names": (predict_("--class-names", ""), "a class has no name"),
    "class name too long": (predict_("--class-names", "cat," + "q " * 80), "the backbone reads at most 77"),
    "class names twice": (predict_("--class-names", "a,b", "--class-names-file", "n.txt"), "exclude each other"),
    "class names file missing": (predict_("--class-names-file", "n.txt"), "cannot read class names from n.txt"),
    "class names file is an image": (lambda p: ["predict", p.run, p.image, "--class-names-file", p.image],
                                     "cannot read class names from"),
    "probe under other names": (lambda p: ["predict", p.probe, p.image, "--class-names", "a,b"],
                                "linear_probe knows its own 3 classes alone, not 'a'"),
}  # fmt: skip


@pytest.mark.parametrize("what", list(BAD))
def test_bad_input_ends_in_one_line_and_code_2(what: str, photos: Path, run: Path, probe: Path, empty: Path) -> None:
    command, message = BAD[what]
    arguments = command(Places(photos, run, probe, empty))
    before = [tree(folder) for folder in (photos, run.parent, probe.parent)]
    done = vlprompt(*arguments)
    assert done.code == 2, done.err
    assert done.out == ""
    *before_it, line = done.err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert "Value error" not in line
    assert not before_it or what == "more prompts than the tower reads"  # found by the first step
    assert tree(empty) == {}
    assert [tree(folder) for folder in (photos, run.parent, probe.parent)] == before


def test_bad_input_is_the_same_with_json(photos: Path, run: Path, empty: Path) -> None:
    for arguments in (
        ["list", "method"],
        ["train", "cop", photos],
        ["evaluate", run, "./no"],
        ["predict", run, "no.png"],
    ):
        plain, as_json = vlprompt(*arguments), vlprompt(*arguments, "--json")
        assert (as_json.code, as_json.out) == (2, "")
        assert as_json.err == plain.err


@pytest.mark.parametrize("command", ["train", "evaluate", "predict"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_and_broken(
    command: str, error: type[BaseException], photos: Path, run: Path, empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt is code 130 without a traceback; our own faults keep theirs."""

    def stop(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("vlprompt.backbones.backbone.Backbone.encode_images", stop)
    arguments = {
        "train": ["train", "coop", photos, *QUICK, "--out", "out"],
        "evaluate": ["evaluate", run, photos],
        "predict": ["predict", run, photos / "test"],
    }[command]
    if error is RuntimeError:
        with pytest.raises(RuntimeError):
            vlprompt(*arguments)
        return
    done = vlprompt(*arguments)
    assert (done.code, done.out) == (130, "")
    hint = "; to continue: vlprompt train --resume out" if command == "train" else ""
    assert done.err.splitlines()[-1] == f"interrupted{hint}"
    assert "Traceback" not in done.err
    assert not (empty / "out" / "prompts.safetensors").exists()


INTERRUPTS = """
import signal
try:
    exec("signal.raise_signal(signal.SIGINT)")  # Python would end by the signal, as an interrupt in exec was seen
except KeyboardInterrupt:
    raise ImportError("initialization failed")  # as some modules do
"""


@pytest.mark.parametrize(("module", "start"), sweep(
    [("typer", "main"), ("torch", "main"), ("PIL", "main"), ("torch", "script"), ("typer", "script")],
    ("torch", "main"), ("typer", "script"),
))  # fmt: skip
def test_an_interrupt_while_modules_are_imported(photos: Path, tmp_path: Path, module: str, start: str) -> None:
    (tmp_path / module).mkdir()
    (tmp_path / module / "__init__.py").write_text(INTERRUPTS)
    way = ["-m", "vlprompt"] if start == "main" else ["-c", "from vlprompt.__main__ import main; main()"]
    given = environment()
    given["PYTHONPATH"] = os.pathsep.join([str(tmp_path), given["PYTHONPATH"]])
    for command in (["train", "coop", photos], ["predict", "run", photos], ["evaluate", "run", photos]):
        done = subprocess.run(
            [sys.executable, *way, *map(str, command)], env=given, cwd=tmp_path, capture_output=True, encoding="utf-8"
        )
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
    assert {path.name for path in tmp_path.iterdir()} == {module}


WAITING = """
import os, sys
import vlprompt.cli
from vlprompt.__main__ import main
vlprompt.cli.main = lambda: print(os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
main()
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
    ids=["default", "count", "policy"],
)
def test_how_threads_wait_is_set_before_pytorch_and_left_to_the_user(given: dict[str, str], expected: str) -> None:
    assert python("-c", WAITING, **given).stdout == f"{expected} False\n"


WITHOUT_BF16 = """
import vlprompt.backbones.load
from vlprompt.cli import main
vlprompt.backbones.load.cpu_has = lambda precision: precision == "fp32"
main()
"""


def test_a_warning_is_one_line(run: Path, photos: Path) -> None:
    done = python("-c", WITHOUT_BF16, "predict", run, photos, "--precision", "bf16", "--json")
    assert done.returncode == 0, done.stderr
    line = "warning: this processor has no instructions for bf16: it takes several times as long as fp32 here"
    assert done.stderr.splitlines().count(line) == 1
    assert "load.py" not in done.stderr


def test_an_error_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = python("-m", "vlprompt", "train", "cop", "x", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: unknown method 'cop'")
    assert done.stderr.count("\n") == 1
