"""What a user can get wrong on the command line: one clear line, exit code 2, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import pickle
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.kit import TINY
from tests.kit.checks import tree
from tests.kit.command import vlprompt
from tests.kit.pictures import draw
from vlprompt.data.reading import ImageReader
from vlprompt.errors import OutputError
from vlprompt.files import write_atomically
from vlprompt.training import run as run_module

GOLDEN_BACKBONE = str(TINY)


def draw_classes(folder: Path, *names: str, images: int = 4) -> Path:
    for c, name in enumerate(names):
        for i in range(images):
            draw(folder / name / f"{i}.png", 100 * c + i)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The current folder, with ``photos`` of two classes in it."""
    draw_classes(tmp_path / "photos", "cat", "dog")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refuses(here):
    """The command ends with one line of error that says all of this, and leaves the folder as it was."""

    def call(says: str | tuple[str, ...], *arguments: object) -> None:
        before = tree(here)
        code, out, err = vlprompt(*arguments)
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code == 2, err
        assert out == ""
        assert len(errors) == 1
        assert err.endswith(f"{errors[0]}\n")
        for text in (says,) if isinstance(says, str) else says:
            assert text in errors[0]
        assert tree(here) == before

    return call


# --- data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["./photo"], ("folder photo does not exist: did you mean 'photos'?",)),
        (
            ["caltech11"],
            (
                "unknown data set 'caltech11': did you mean 'caltech101'?",
                "allowed: caltech101, clothing",
            ),
        ),
        (["dtd"], ("data set 'dtd' needs --root",)),
        (["dtd", "--root", "photos"], ("data set 'dtd': folder photos/dtd does not exist",)),
        (["photos/cat"], ("at least two classes are needed (found: none)",)),
        (["table.csv"], ("CSV file table.csv does not exist",)),
        (["photos", "--split-file", "x.json"], ("split file x.json does not exist",)),
        (["photos", "--shots", 3], ("class 'cat' has 2 training images, too few for 3 shots (and 1 more class)",)),
        (["photos", "--shots", 3], ("--allow-fewer uses what there is",)),
        (["photos", "--val-fraction", 1], ("data.val_fraction = 1.0 (allowed: less than 1)",)),
    ],
)
def test_missing_or_small_data(refuses, arguments, says):
    refuses(says, "train", "zero_shot", *arguments)


def test_allow_fewer(here):
    (here / "photos" / "cat" / "0.png").unlink()
    code, out, _ = vlprompt("train", "zero_shot", "photos", "--shots", 3, "--allow-fewer", "--out", "run", "--json")
    assert code == 0
    assert len(json.loads((here / "run" / "split.json").read_text())["train"]) == 4
    assert json.loads(out)["skipped"] == 0


@pytest.mark.parametrize("part", ["photos", "parts/train"])
def test_empty_class(refuses, here, part):
    (here / "photos" / "horse").mkdir()
    (here / "parts").mkdir()
    (here / "parts" / "train").symlink_to(here / "photos")
    refuses((f"class folder {part}/horse holds no images", ".png"), "train", "zero_shot", part.split("/")[0])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Cat", "classes 'Cat' and 'cat' have the same name for a text tower"),
        (" cat_", "classes ' cat_' and 'cat' have the same name for a text tower"),
        (" ", "a class has no name but ' '"),
        ("___", "a class has no name but '___'"),
    ],
)
def test_class_folders_that_read_alike_or_have_no_name(refuses, here, name, says):
    draw_classes(here / "photos", name)
    refuses(says, "train", "zero_shot", "photos")


@pytest.mark.parametrize("method", ["zero_shot", "coop", "promptsrc"])
def test_text_longer_than_the_backbone_reads(refuses, here, method):
    draw_classes(here / "photos", "cat dog " * 25)
    refuses(("cat dog cat", "tokens; the backbone reads at most"), "train", method, "photos", "--epochs", 1)


def test_unusual_class_names_work(here):
    names = ["sea_horse", "café au lait", "🦊", "🐙 🐙", "Boeing 737-200", "<|endoftext|>"]
    draw_classes(here / "unusual", *names)
    code, _, err = vlprompt("train", "coop", "unusual", "n_ctx=1", "--epochs", 1, "--out", "run")
    assert code == 0, err
    saved = json.loads((here / "run" / "config.json").read_text("utf-8"))["class_names"]
    assert set(saved) == {*(name.strip() for name in names[1:]), "sea horse"}
    code, out, _ = vlprompt("predict", "run", "unusual/🦊", "--top", 1, "--json")
    assert code == 0
    assert len(json.loads(out)["predictions"]) == 4


@pytest.mark.parametrize("names", ["a,b,A", "a,sea_horse,sea horse", "a,,b", ""])
def test_bad_class_names_of_a_prediction(refuses, here, names):
    vlprompt("train", "zero_shot", "photos", "--out", "run")
    refuses("--class-names: ", "predict", "run", "photos", "--class-names", names)


# --- images ---------------------------------------------------------------------------------------


def spoil(path: Path, how: str) -> None:
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:200])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        Image.new("1", (14_000, 14_000)).save(path)


BAD = [("truncated", "truncated"), ("empty", "the file is empty"), ("bomb", "decompression bomb")]


@pytest.mark.parametrize(("how", "reason"), BAD)
def test_unreadable_images_stop_a_run_before_it_starts(refuses, here, how, reason):
    bad = Path("photos/cat/1.png")
    spoil(bad, how)
    table = ["path,label,split"]
    table += [f"{c}/{i}.png,{c},{'test' if i == 3 else 'train'}" for c in ("cat", "dog") for i in range(4)]
    (here / "photos" / "all.csv").write_text("\n".join(table))
    train = ("train", "coop", "photos/all.csv", "n_ctx=1", "--epochs", 1, "--out", "run")
    refuses((f"cannot read image {bad}: ", reason, "--skip-bad leaves such images out"), *train)
    code, out, err = vlprompt(*train, "--skip-bad", "--json")
    assert code == 0
    assert json.loads(out)["skipped"] == 1
    assert err.count("skipped: ") == err.count(str(bad)) == 1
    assert str(bad) not in (here / "run" / "split.json").read_text()


@pytest.mark.parametrize(("how", "reason"), BAD)
def test_unreadable_images_of_evaluate_and_predict(refuses, here, how, reason):
    vlprompt("train", "zero_shot", "photos", "--out", "run")
    bad = Path("photos/cat/1.png")
    spoil(bad, how)
    table = [f"{c}/{i}.png,{c},test" for c in ("cat", "dog") for i in range(4)]
    (here / "photos" / "test.csv").write_text("\n".join(["path,label,split", *table]))
    for command in (("evaluate", "run", "photos/test.csv"), ("predict", "run", "photos")):
        refuses((f"cannot read image {bad}: ", reason), *command)
        code, out, err = vlprompt(*command, "--skip-bad", "--json")
        assert code == 0
        assert (err.count("skipped: "), str(bad) in err) == (1, True)
        result = json.loads(out)
        assert result["skipped"] == 1
        assert result.get("n", len(result.get("predictions", ()))) == 7
    refuses(reason, "predict", "run", bad, "--skip-bad")


def test_an_image_beyond_the_readers_memory_is_found_while_training(refuses, here, monkeypatch):
    monkeypatch.setattr(run_module, "ImageReader", partial(ImageReader, room=0))
    for image in sorted(Path("photos/dog").iterdir()):
        spoil(image, "truncated")
    refuses("cannot read image photos/dog/", "train", "coop", "photos", "n_ctx=1", "--epochs", 1, "--out", "new/run")


def test_a_folder_that_may_not_be_read(refuses, here, monkeypatch):
    def refused(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("vlprompt.data.folders.subfolders", refused)
        refuses("error: photos: Permission denied", "train", "coop", "photos")


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["cop", "photos"], ("unknown method 'cop': did you mean 'coop'?", "allowed: apt, bayesian, clap, ")),
        (["coop", "photos", "--backbone", "mni"], ("no backbone 'mni': did you mean 'mini'?", "a hub id")),
        (["coop", "photos", "--backbone", "photos"], ("no backbone in photos: needs config.json",)),
        (["coop", "photos", "n_ctxt=4"], ("unknown key 'n_ctxt': did you mean 'method.n_ctx'?", "allowed keys: ")),
        (["coop", "photos", "n_ctx"], ("'n_ctx' is not key=value",)),
        (["coop", "photos", "n_ctx=0"], ("method.n_ctx = 0 (allowed: greater than or equal to 1)",)),
        (["coop", "photos", "n_ctx=four"], ("method.n_ctx = four (allowed: integer",)),
        (["coop", "photos", "n_ctx=true"], ("method.n_ctx = true (allowed: integer",)),
        (["coop", "photos", "seed=yes"], ("seed = yes (allowed: integer",)),
        (["coop", "photos", "lr=true"], ("optim.lr = true (allowed: number",)),
        (["coop", "photos", "lr=.nan"], ("optim.lr = nan",)),
        (["maple", "photos", "depth=99"], ("depth = 99 (allowed: 1 to",)),
        (["vpt", "photos", "depth=99"], ("depth = 99 (allowed: 1 to",)),
        (["coop", "photos", "--shots", "-1"], ("data.shots = -1 (allowed: greater than or equal to 1)",)),
        (["coop", "photos", "--shots", "0"], ("data.shots = 0 (allowed: greater than or equal to 1)",)),
        (["coop", "photos", "--shots", "x"], ("--shots", "integer")),
        (["coop", "photos", "--classes", "bse"], ("--classes", "'bse' is not one of 'base', 'novel', 'all'")),
        (["coop", "photos", "--precision", "fp61"], ("train.precision = fp61", "did you mean 'fp16'?")),
        (["coop", "photos", "--device", "cuda:99"], ("cannot use device 'cuda:99'",)),
        (["coop", "photos", "--preset", "few"], ("few",)),
        (["coop", "photos", "--config", "no.yaml"], ("cannot read configuration no.yaml",)),
        (["coop", "photos", "skip_bad=maybe"], ("data.skip_bad = maybe (allowed: boolean",)),
    ],
)
def test_bad_settings(refuses, arguments, says):
    refuses(says, "train", *arguments)


def test_all_problems_of_a_configuration_at_once(refuses):
    refuses(
        ("unknown key 'n_ctxt'", "optim.lr = -1", "data.shots = 0", "train.epochs = 0", "data.batch_size = x"),
        *("train", "coop", "photos", "n_ctxt=4", "lr=-1", "--shots", 0, "--epochs", 0, "batch_size=x"),
    )


# --- output ---------------------------------------------------------------------------------------


def test_output_folder_already_used(refuses, here):
    (here / "used").mkdir()
    (here / "used" / "notes.txt").write_text("mine")
    for out in ("used", "used/notes.txt"):
        refuses(f"output folder {out} is already in use: choose another", "train", "coop", "photos", "--out", out)
    refuses("output folder used is already in use", "demo", "--out", "used")


REFUSALS = [
    (errno.ENOSPC, "No space left on device"),
    (errno.EROFS, "Read-only file system"),
    (errno.EACCES, "Permission"),
]


@pytest.mark.parametrize(("code", "reason"), REFUSALS)
@pytest.mark.parametrize("call", ["replace", "mkdir"])
def test_output_that_cannot_be_written(refuses, here, monkeypatch, call, code, reason):
    def refused(path, *_, **__):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(os, call, refused)
    says = ("cannot make output folder new/run: " if call == "mkdir" else "cannot write new/run", reason)
    refuses(says, "train", "coop", "photos", "n_ctx=1", "--epochs", 1, "--out", "new/run")


def test_a_disk_that_fills_up_at_the_end_keeps_what_was_logged(here, monkeypatch):
    def full(folder, *_):
        raise OutputError(f"cannot write {folder}: No space left on device")

    monkeypatch.setattr(run_module, "save_artefact", lambda method, folder, *_: full(folder))
    code, _, err = vlprompt("train", "coop", "photos", "n_ctx=1", "--epochs", 1, "--out", "run")
    assert code == 2
    assert err.endswith("error: cannot write run: No space left on device\n")
    assert {path.name for path in (here / "run").iterdir()} >= {"config.yaml", "split.json", "log.jsonl"}
    assert not [path for path in (here / "run").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(("code", "reason"), REFUSALS)
@pytest.mark.parametrize("call", ["write", "move"])
def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch, call, code, reason):
    write_atomically(tmp_path / "file", "old")

    def refused(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync" if call == "write" else "replace", refused)
    with pytest.raises(OutputError, match=rf"\Acannot write {tmp_path}/file: {reason}"):
        write_atomically(tmp_path / "file", "new")
    monkeypatch.undo()
    assert tree(tmp_path) == {"file": b"old"}


def test_other_commands_with_a_full_disk(refuses, here, monkeypatch):
    torch.save({"weight": torch.ones(2)}, here / "old.pt")
    monkeypatch.setattr(
        os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
    )
    refuses("cannot write new.safetensors: No space left on device", "convert", "old.pt", "new.safetensors")
    code, _, err = vlprompt("demo", "--out", "new")
    assert (code, err) == (2, "error: cannot write new/demo.json: No space left on device\n")
    assert not any((here / "new").iterdir())


# --- models ---------------------------------------------------------------------------------------


class Harmful:
    """Writes a file when it is unpickled."""

    def __reduce__(self):
        return Path.write_text, (Path("harm"), "done")


def test_pickles_and_torchscript_are_not_run(refuses, here):
    (here / "pickle.pt").write_bytes(pickle.dumps({"weight": Harmful()}))
    torch.save({"weight": Harmful()}, here / "torch.bin")
    with zipfile.ZipFile(here / "script.pt", "w") as archive:
        archive.writestr("script/code/__torch__.py", "")
        archive.writestr("script/constants.pkl", "")
    for name in ("pickle.pt", "torch.bin", "script.pt"):
        refuses(f"{name} is not a .safetensors file: convert it first", "train", "coop", "photos", "--backbone", name)
    refuses("torch.bin holds objects beside tensors", "convert", "torch.bin", "x.safetensors")
    refuses("script.pt is a TorchScript archive", "convert", "script.pt", "x.safetensors")
    refuses("pickle.pt", "convert", "pickle.pt", "x.safetensors")
    (here / "pickle.pt").rename(here / "renamed.safetensors")
    refuses("cannot read renamed.safetensors", "train", "coop", "photos", "--backbone", "renamed.safetensors")


@pytest.fixture
def tuned(here) -> Path:
    """A model tuned on the embedded backbone."""
    code, _, err = vlprompt("train", "coop", "photos", "n_ctx=1", "--epochs", 1, "--out", "run")
    assert code == 0, err
    return here / "run"


def test_a_model_on_another_backbone_or_with_other_tensors(refuses, tuned):
    refuses(
        ("run was tuned on backbone 'mini'", "has other weights"),
        *("evaluate", "run", "photos", "--backbone", GOLDEN_BACKBONE),
    )
    weights = load_file(tuned / "prompts.safetensors")
    save_file({**weights, "extra": torch.ones(1)}, tuned / "prompts.safetensors")
    refuses("prompts.safetensors is not the file that was saved: tensor 'extra' was added", "predict", "run", "photos")
    (tuned / "prompts.safetensors").write_bytes(pickle.dumps({"vectors": Harmful()}))
    refuses("cannot read the tuned model in run", "predict", "run", "photos")
    (tuned / "prompts.safetensors").unlink()
    refuses("cannot read the tuned model in run", "predict", "run", "photos")


def test_no_model(refuses, here):
    refuses("no tuned model in photos", "predict", "photos", "photos")
    refuses("no tuned model in nowhere", "evaluate", "nowhere", "photos")


def test_images_and_classes_that_a_model_cannot_use(refuses, tuned):
    refuses("image nothing.jpg does not exist", "predict", "run", "nothing.jpg")
    long = "cat dog " * 25
    refuses(("text of class 'cat dog", "the backbone reads at most"), "predict", "run", "photos", "--class-names", long)
    refuses("no class names", "predict", "run", "photos", "--class-names-file", os.devnull)
    refuses("data set 'photos' has no val images", "evaluate", "run", "photos", "--split", "val")
