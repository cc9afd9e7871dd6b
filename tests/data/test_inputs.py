"""Images, folders and tables that people really have: read as they are meant, told of, or refused in one line."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.kit.command import python, vlprompt
from tests.kit.marks import slow
from tests.kit.pictures import draw
from vlprompt.config.images import choose_images, image_notes
from vlprompt.config.schema import build_config
from vlprompt.data import files as files_module
from vlprompt.data.datasets import in_two_parts, load_dataset
from vlprompt.data.files import LeftOut, image_files, same_files
from vlprompt.data.folders import from_csv, from_folder, part_named
from vlprompt.data.images import load_image, white_above
from vlprompt.data.reading import ImageReader
from vlprompt.data.splits import read_split
from vlprompt.errors import ConfigError, DataError


def fails(message: str):
    return pytest.raises(DataError, match=message)


def touch(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(path.encode())  # no two are equal
    return root


def greys(root: Path, top: float, dtype: type = np.uint16, suffix: str = ".png") -> Path:
    """Class folders of grey squares from 0 to ``top``: the classes differ in which half is bright."""
    for c in range(2):
        for i in range(6):
            pixels = np.zeros((16, 16), np.float64)
            pixels[:, 8 * c : 8 * c + 8] = top - i
            (root / "ab"[c]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(dtype)).save(root / "ab"[c] / f"{i}{suffix}")
    return root


def value(image: Image.Image) -> int:
    return int(np.asarray(image)[0, 0, 0])


# --- deep greys -----------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [1023, 4095, 16383])
@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_white_of_deep_greys(tmp_path, top, suffix):
    file = tmp_path / f"grey{suffix}"
    for pixel, bright in ((top, 255), ((top + 1) // 2, 128), (0, 0)):
        Image.fromarray(np.full((4, 4), pixel, np.uint16)).save(file)
        assert value(load_image(file, white=top)) == bright
        assert value(load_image(file)) == round(pixel * 255 / 65535)
    Image.fromarray(np.full((4, 4), 65535, np.uint16)).save(file)
    assert value(load_image(file, white=top)) == 255


@pytest.mark.parametrize(
    ("greatest", "white"),
    [(1000, 1023), (4095, 4095), (4096, 8191), (9, 255), (65535, 65535), (0.7, 1), (1, 1), (3.2, 3.2), (70000, 131071)],
)
def test_white_above_what_the_training_images_hold(greatest, white):
    assert white_above(greatest) == white


@pytest.mark.parametrize(
    ("pixels", "white", "bright"),
    [(np.float32(0.5), 1, 128), (np.float32(2047.5), 4095, 128), (np.int32(65536), 131072, 128), (np.int32(9), 9, 255)],
)
def test_32_bit_greys_with_a_white(tmp_path, pixels, white, bright):
    Image.fromarray(np.full((4, 4), pixels)).save(tmp_path / "x.tiff")
    assert value(load_image(tmp_path / "x.tiff", white=white)) == bright
    assert value(load_image(Image.fromarray(np.full((4, 4), pixels)), white=white)) == bright


@pytest.mark.parametrize("white", [None, 4095])
@pytest.mark.parametrize(
    ("pixel", "reason"),
    [(np.int32(-1024), r"negative pixels \(down to -1024\), as CT values are"), (np.float32(-0.5), r"down to -0\.5"),
     (np.float32("nan"), "not finite"), (np.float32("inf"), "not finite")],
)  # fmt: skip
def test_greys_that_no_white_helps(tmp_path, pixel, reason, white):
    Image.fromarray(np.array([[pixel, 1]], pixel.dtype)).save(tmp_path / "x.tiff")
    with fails(reason):
        load_image(tmp_path / "x.tiff", white=white)


def test_formats_that_say_what_is_white(tmp_path):
    half = np.full((1, 2), 2048, ">u2").tobytes()
    (tmp_path / "own.pgm").write_bytes(b"P5 2 1 4095\n" + half)
    (tmp_path / "sixteen.pgm").write_bytes(b"P5 2 1 65535\n" + half)
    assert [value(load_image(tmp_path / "own.pgm", white=w)) for w in (None, 4095)] == [128, 128]
    assert [value(load_image(tmp_path / "sixteen.pgm", white=w)) for w in (None, 4095)] == [8, 128]


def test_dark_greys_are_counted_and_auto_mends_them(tmp_path):
    data = load_dataset(greys(tmp_path / "x", 4000))

    def read(**given: Any) -> tuple[list[str], float | None, int]:
        said: list[str] = []
        config = build_config("zero_shot", overrides={f"data.{key}": v for key, v in given.items()})
        with ImageReader(0) as reader:
            split, _ = choose_images(config, data, reader, said.append)
            said.remove(data.division)
            said += image_notes(config, data, split, reader)
            bright = max(np.asarray(reader.image(path)).max() for path in split.paths("train"))
        return said, reader.white, int(bright)

    said, white, bright = read()
    assert (white, bright) == (None, 16)
    assert said == [
        "note: 8 of 8 images of more than 8 bits look dark: they use up to 4000 of a range of 65535; data.white=4095 "
        "mends that, or data.white=auto"
    ]
    assert read(white="auto") == (["data.white = auto: 4095, by the training images"], 4095, 249)
    said, white, bright = read(white=3999)
    assert (white, bright, len(said)) == (3999, 255, 1)
    assert "have values above data.white = 3999, up to 4000" in said[0]
    for i in range(6):
        draw(tmp_path / "x" / "a" / f"{i}.png", i)
        draw(tmp_path / "x" / "b" / f"{i}.png", i + 9)
    assert read(white="auto")[0] == ["data.white = auto: no image has more than 8 bits"]
    assert read()[0] == []


def test_16_bit_colours_are_told_of(tmp_path):
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + np.full(12, 4095, ">u2").tobytes() for _ in range(4))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0))
    (tmp_path / "c.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    with ImageReader(0) as reader:
        assert value(reader.image(tmp_path / "c.png")) == 15
    assert "1 of 1 images of more than 8 bits look dark" in reader.range_notes()[0]
    with Image.open(tmp_path / "c.png") as opened:
        for image in (tmp_path / "c.png", opened):
            with fails("of 16-bit colours 8 bits are read"):
                load_image(image, white=4095)


def test_white_is_kept_with_the_model(tmp_path, monkeypatch):
    from vlprompt import PromptedModel

    monkeypatch.chdir(tmp_path)
    greys(tmp_path / "dark", 4095)
    greys(tmp_path / "bright", 65520)
    for name, white in (("dark", "auto"), ("bright", "null")):
        code, _, err = vlprompt("train", "linear_probe", name, f"white={white}", "--epochs", 1, "--out", f"run-{name}")
        assert code == 0, err
    assert json.loads((tmp_path / "run-dark" / "config.json").read_text())["white"] == 4095
    assert "white" not in json.loads((tmp_path / "run-bright" / "config.json").read_text())
    model = PromptedModel.from_pretrained("run-dark")
    assert model.method.white == 4095
    images = sorted(image_files(tmp_path / "dark"))
    by_hand = [Image.fromarray(np.rint(np.asarray(Image.open(i)) * (255 / 4095)).astype(np.uint8)) for i in images]
    np.testing.assert_array_equal(model.predict(images).probabilities, model.predict(by_hand).probabilities)
    code, out, err = vlprompt("predict", "run-dark", "dark", "--json")
    tops = [max(p["top"], key=lambda t: t["class"])["probability"] for p in json.loads(out)["predictions"]]
    np.testing.assert_allclose(tops, model.predict(images).probabilities[:, 1], atol=1e-6)
    assert "note" not in err
    with pytest.warns(UserWarning, match="12 of 12 images of more than 8 bits look dark"):
        PromptedModel.from_pretrained("run-bright").predict(images)
    code, _, err = vlprompt("evaluate", "run-bright", "dark")
    assert "images of more than 8 bits look dark" in err
    model.save_pretrained("again")
    assert PromptedModel.from_pretrained("again").method.white == 4095
    edited = json.loads((tmp_path / "again" / "config.json").read_text())
    (tmp_path / "again" / "config.json").write_text(json.dumps(edited | {"white": "bright"}))
    code, _, err = vlprompt("predict", "again", "dark")
    assert code == 2
    assert err.count("\n") == 1


def test_dark_greys_in_memory_are_told_of_too(tmp_path, tiny):
    from vlprompt import PromptedModel, build_method, fit

    greys(tmp_path, 4095)
    files = sorted(image_files(tmp_path))
    images, labels = [], [file.parent.name for file in files]
    for file in files:
        with Image.open(file) as image:
            images.append(image.copy())
    method = build_method("linear_probe", tiny, sorted(set(labels)))
    dark = f"{len(files)} of {len(files)} images of more than 8 bits look dark"
    with pytest.warns(UserWarning, match=dark):
        fit(method, images, labels)
    with pytest.warns(UserWarning, match=dark):
        PromptedModel(method).predict(images)
    method = fit(build_method("linear_probe", tiny, sorted(set(labels))), images, labels, white="auto")
    assert method.white == 4095


@pytest.mark.parametrize("white", ["0", "-5", "autom", ".inf", ".nan", "true"])
def test_bad_white(tmp_path, white):
    code, _, err = vlprompt("train", "coop", tmp_path, f"white={white}")
    assert code == 2
    assert "(allowed: auto, or a number above 0)" in err


# --- files left out -------------------------------------------------------------------------------


def test_files_left_out_are_counted_by_extension(tmp_path):
    touch(
        tmp_path,
        "a/1.jpg",
        "a/2.jfif",
        "a/3.JPE",
        "b/1.jp2",
        "b/x.psd",
        "b/y.psd",
        "b/notes.txt",
        "b/README",
        "a/4.heic",
    )
    draw(tmp_path / "b" / "picture.png", 1)
    (tmp_path / "b" / "picture.png").rename(tmp_path / "b" / "picture")
    (tmp_path / "b" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "b" / "round.jpg").symlink_to(tmp_path / "b" / "round.jpg")
    touch(tmp_path, "loose.png")
    left_out = LeftOut()
    split = from_folder(tmp_path, left_out)
    found = {item.path for part in ("train", "val", "test") for item in split.items(part)}
    assert found == {"a/1.jpg", "a/2.jfif", "a/3.JPE", "b/1.jp2", "b/picture"}
    assert left_out.files == {
        ".psd": 2, ".txt": 1, "without an extension": 1, "dead links": 1, "links in a circle": 1,
        ".heic (pip install 'vlprompt[heif]' reads them)": 1, f"images beside the folders of {tmp_path.name}": 1,
    }  # fmt: skip
    assert load_dataset(tmp_path).notes[0].startswith(f"note: left out of {tmp_path}: 2 .psd, 1 ")


def test_links_to_folders_are_followed_but_not_round(tmp_path):
    touch(tmp_path / "data", "a/1.png", "b/1.png")
    touch(tmp_path, "elsewhere/2.png", "elsewhere/in/3.png")
    (tmp_path / "data" / "a" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data" / "a")
    (tmp_path / "data" / "b" / "all").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "self").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "c").symlink_to(tmp_path / "elsewhere")
    left_out = LeftOut()
    split = from_folder(tmp_path / "data", left_out)
    assert split.class_names == ("a", "b", "c")
    found = {item.path for part in ("train", "val", "test") for item in split.items(part)}
    assert found == {"a/1.png", "a/more/2.png", "a/more/in/3.png", "b/1.png", "c/2.png", "c/in/3.png", "c/back/1.png"}
    assert left_out.files["links in a circle"] == 4


def test_a_folder_that_may_not_be_read_is_an_error(tmp_path, monkeypatch):
    touch(tmp_path, "a/1.png", "a/locked/2.png", "b/1.png")
    scan = os.scandir

    def scandir(place):
        if Path(place).name == "locked":
            raise PermissionError(13, "Permission denied", str(place))
        return scan(place)

    monkeypatch.setattr(os, "scandir", scandir)
    with fails("cannot read folder .*locked: Permission denied"):
        from_folder(tmp_path)


def test_predict_tells_what_it_leaves_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(4):
        draw(tmp_path / "photos" / "ab"[i % 2] / f"{i}.png", i)
    touch(tmp_path, "photos/a/clip.mov", "photos/a/scan.pdf", "films/x.mov")
    assert vlprompt("train", "zero_shot", "photos", "--out", "run")[0] == 0
    code, out, err = vlprompt("predict", "run", "photos", "--json")
    assert (code, len(json.loads(out)["predictions"])) == (0, 4)
    assert err == "note: left out of photos: 1 .mov, 1 .pdf\n" or err == "note: left out of photos: 1 .pdf, 1 .mov\n"
    code, _, err = vlprompt("predict", "run", "films")
    assert code == 2
    assert "no images in folder films" in err
    assert "it has 1 .mov" in err
    code, _, err = vlprompt("predict", "run", "/dev/zero")
    assert (code, err) == (2, "error: /dev/zero is neither an image nor a folder\n")


def test_only_the_documented_formats_are_opened(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    Image.new("RGB", (4, 4)).save(tmp_path / "icon.ico")
    (tmp_path / "icon.ico").rename(tmp_path / "icon.png")
    for name in ("x.jpg", "icon.png"):
        with Image.open(tmp_path / name):  # Pillow itself would
            pass
        with fails("not an image in a known format: .*JPEG"):
            load_image(tmp_path / name)


def test_heif_is_read_where_pillow_heif_is(tmp_path, monkeypatch):
    with fails(r"heic: not an image in a known format.*pip install 'vlprompt\[heif\]'"):
        load_image(touch(tmp_path, "x.heic") / "x.heic")
    monkeypatch.setattr(files_module, "_READS_HEIF", True)
    assert files_module.heif_advice(tmp_path / "x.heic") == ""


# --- parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "part"),
    [
        *((word, "train") for word in ("train", "Training", "TRAIN", "training_set", "seg_train", "train-images",
                                       "TrainData", "train2017", "Train Set", "images_train")),
        *((word, "val") for word in ("val", "Validation", "valid_set", "dev", "VAL")),
        *((word, "test") for word in ("test", "Testing", "test_set", "seg_test", "TestImages", "test1")),
        *((word, None) for word in ("trains", "train station", "seg_pred", "contest", "set", "2017", "train_test")),
    ],
)  # fmt: skip
def test_names_of_parts(name, part):
    assert part_named(name) == part


@pytest.mark.parametrize(
    ("train", "test"),
    [("Training", "Testing"), ("training_set", "test_set"), ("seg_train/seg_train", "seg_test/seg_test")],
)
def test_folders_of_parts_by_the_usual_names(tmp_path, train, test):
    touch(tmp_path, f"{train}/a/1.png", f"{train}/b/1.png", f"{test}/a/2.png", "seg_pred/9.png", "docs/x/y.png")
    left_out = LeftOut()
    split = from_folder(tmp_path, left_out)
    assert split.class_names == ("a", "b")
    assert [item.path for item in split.train] == [f"{train}/a/1.png", f"{train}/b/1.png"]
    assert [item.path for item in split.test] == [f"{test}/a/2.png"]
    assert left_out.notes(tmp_path) == (f"note: ignored in {tmp_path}: docs, seg_pred",)


@pytest.mark.parametrize(
    ("paths", "seen"),
    [
        (("Lernen/a/1.png", "Lernen/b/1.png", "Pruefen/a/1.png", "Pruefen/b/1.png"),
         "Lernen, Pruefen all hold folders a, b"),
        (("Lernen/a/1.png", "Lernen/x.png", "Pruefen/a/1.png", "Pruefen/x.png"), "all hold folders a"),
        (("dogs/poodle/1.png", "cats/1.png"), "dogs hold folders only, as poodle"),
        (("Testing/a/1.png", "Testing/b/1.png", "c/1.png"), "Testing hold folders only, as a, b"),
        (("train/dogs/poodle/1.png", "train/dogs/pug/1.png", "train/cats/1.png", "test/cats/2.png"),
         "dogs hold folders only, as poodle, pug"),
        (("train/x/a/1.png", "train/x/b/1.png", "train/y/a/1.png", "train/y/b/1.png"), "x, y all hold folders a, b"),
    ],
)  # fmt: skip
def test_folders_that_seem_to_be_no_classes(tmp_path, paths, seen):
    with fails(f"are its folders classes.*{seen}.*train, val and test"):
        from_folder(touch(tmp_path, *paths))


# --- the same image twice, one class --------------------------------------------------------------


def test_images_that_are_trained_and_tested_on_are_counted(tmp_path):
    touch(tmp_path, *(f"{c}/{i}.png" for c in "ab" for i in range(4)))
    (tmp_path / "a" / "copy.png").write_bytes((tmp_path / "a" / "0.png").read_bytes())
    rows = {
        "train": [["a/0.png", 0, "a"], ["b/0.png", 1, "b"]],
        "val": [["b/0.png", 1, "b"]],
        "test": [["a/copy.png", 0, "a"], ["a/1.png", 0, "a"], ["b/1.png", 1, "b"]],
    }
    (tmp_path / "split.json").write_text(json.dumps(rows))
    split = load_dataset(tmp_path, split_file=tmp_path / "split.json").split
    assert in_two_parts(split) == [
        "note: 1 of 1 val images are among the training images too: b/0.png",
        "note: 1 of 3 test images are among the training images too: a/copy.png",
    ]
    table = ["path,label,split", "a/0.png,a,train", "a/copy.png,a,test", "b/0.png,b,train", "b/1.png,b,test"]
    (tmp_path / "x.csv").write_text("\n".join(table))
    note = "note: 1 of 2 test images are among the training images too: a/copy.png"
    assert in_two_parts(load_dataset(tmp_path / "x.csv").split) == [note]
    code, _, err = vlprompt("data", "split", tmp_path / "x.csv", "--out", tmp_path / "few.json")
    assert (code, err.count(note)) == (0, 1)
    assert note in vlprompt("data", "check", tmp_path / "x.csv", "--quick").out


def test_same_files_compares_whole_contents(tmp_path):
    names = {"x": b"0" * 40_000, "y": b"0" * 39_999 + b"1", "z": b"0" * 40_000, "empty": b"", "none": b""}
    for name, content in names.items():
        (tmp_path / name).write_bytes(content)
    x, y, z, empty, none = (tmp_path / name for name in names)
    assert same_files([y, z, none], [x, empty, tmp_path / "gone"]) == [z]


@pytest.mark.parametrize("names", ["bird;fruit", "bird", '["bird", "fruit"]', '{"bird": 0}'])
def test_one_class_in_a_name_list(tmp_path, monkeypatch, names):
    monkeypatch.chdir(tmp_path)
    for i in range(4):
        draw(tmp_path / "photos" / "ab"[i % 2] / f"{i}.png", i)
    assert vlprompt("train", "zero_shot", "photos", "--out", "run")[0] == 0
    (tmp_path / "names.txt").write_text(names)
    (tmp_path / "lines.json").write_text('[\n"bird",\n"fruit"\n]')
    for given in (("--class-names", names), ("--class-names-file", "names.txt"), ("--class-names-file", "lines.json")):
        code, out, err = vlprompt("predict", "run", "photos", *given)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "there is only one class" in err or "not as JSON" in err


def test_one_class_in_a_run_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(8):
        draw(tmp_path / "photos" / "ab"[i % 2] / f"{i}.png", i)
    note = "note: there is only one class, 'a': every answer is right\n"
    code, _, err = vlprompt("train", "zero_shot", "photos", "--classes", "base", "--out", "run")
    assert (code, err.count(note)) == (0, 1)
    code, _, err = vlprompt("evaluate", "run", "photos", "--classes", "base")
    assert (code, err.count(note)) == (0, 1)


def test_one_class_in_the_python_api(tiny):
    import vlprompt as package

    with fails("there is only one class, 'a'"):
        package.build_method("coop", tiny, ["a"])
    model = package.PromptedModel(package.build_method("zero_shot", tiny, ["a", "b"]))
    image = Image.new("RGB", (32, 32))
    with fails("there is only one class, 'a'"):
        model.predict([image], class_names=["a"])
    with fails("there is only one class, 'a'"):
        package.evaluate(model, [image], ["a"], class_names=["a"])
    assert model.logits([image], class_names=["a"]).shape == (1, 1)


# --- tables and split files -----------------------------------------------------------------------


def table(folder: Path, *lines: str, encoding: str = "utf-8") -> Path:
    (folder / "data.csv").write_text("\n".join(lines), encoding=encoding)
    return folder / "data.csv"


def test_backslashes_and_trailing_commas(tmp_path):
    touch(tmp_path, "x/1.png", "x/y/2.png", "odd\\name.png")
    lines = ("path,label,split,", "x\\1.png,a,Training,", "x\\y\\2.png,b,train,,", "odd\\name.png,a,test,", ",,,", ",")
    split = from_csv(table(tmp_path, *lines))
    assert [item.path for item in split.train] == ["x/1.png", "x/y/2.png"]
    assert [item.path for item in split.test] == ["odd\\name.png"]


@pytest.mark.parametrize(
    ("lines", "encoding", "message"),
    [
        (["path;label", "1.png;a"], "utf-8", r"no column 'path' \(found: path;label\): .*commas, not by ';'"),
        (["path\tlabel", "1.png\ta"], "utf-8", r"found: path<TAB>label\): .*commas, not by TAB"),
        (["path|label", "1.png|a"], "utf-8", r"commas, not by '\|'"),
        (["path,label", "1.png,a", "2.png,é"], "cp1252", r"line 3: byte 0xe9 .*Windows-1252 \(cp1252\)"),
        (["path,label", "1.png,a"], "utf-16", "it is UTF-16"),
        (["path,label", "1.png,a"], "utf-16-le", "it is UTF-16"),
        (["path,label", "1.png,a", "2.png,"], "utf-8", "line 3: a class has no name: the label is ''"),
        (["path,label", "1.png,_ _", "2.png,b"], "utf-8", "line 2: a class has no name: the label is '_ _'"),
        (["path,label", ",a"], "utf-8", "line 2: the path is empty"),
        (["path,label,label", "1.png,a,b"], "utf-8", "has 2 columns 'label'"),
        (["path,label", "1.png,'a'", '2.png,"b', "1.png,c"], "utf-8", "line 4: a value has several lines"),
        (["path,label", f"{'x' * 5000}.png,a"], "utf-8", "line 2: image .*xxx.png does not exist"),
    ],
)  # fmt: skip
def test_tables_that_are_refused(tmp_path, lines, encoding, message):
    touch(tmp_path, "1.png", "2.png")
    with fails(message):
        from_csv(table(tmp_path, *lines, encoding=encoding))


def test_a_table_that_is_no_plain_file(tmp_path):
    (tmp_path / "zero.csv").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "dead.csv").symlink_to(tmp_path / "gone.csv")
    for name in ("zero.csv", "pipe.csv"):
        with fails(f"cannot read CSV file .*{name}: it is not a plain file"):
            load_dataset(tmp_path / name)
        with fails(f"cannot read split file .*{name}: it is not a plain file"):
            read_split(tmp_path / name, tmp_path)
    with fails(r"dead\.csv does not exist: it is a link to .*gone\.csv"):
        load_dataset(tmp_path / "dead.csv")
    with fails("unknown data set 'xxx"):
        load_dataset("x" * 5000)
    with fails(r"x\.csv does not exist"):
        load_dataset("x" * 5000 + ".csv")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("loop",), "unknown data set 'loop'"),
        (("./loop",), "folder loop does not exist: it is a link to loop"),
        (("x" * 5000,), "unknown data set 'xxx"),
        (("./" + "x" * 5000,), "xxx does not exist"),
        (("~nobody9/x",), "~nobody9/x does not exist"),
        (("/dev/zero",), "/dev/zero is not a .csv file"),
        (("dtd", "--root", "x" * 5000), "xxx/dtd does not exist"),
        (("dtd", "--root", "loop"), "loop/dtd does not exist"),
        (("photos", "--split-file", "x" * 5000), "xxx does not exist"),
        (("photos", "--split-file", "/dev/zero"), "/dev/zero: it is not a plain file"),
    ],
)
def test_strange_places_of_data_end_in_one_line(tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "photos/a/1.png", "photos/b/1.png")
    (tmp_path / "loop").symlink_to("loop")
    code, out, err = vlprompt("train", "zero_shot", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err


def test_split_files_of_windows(tmp_path):
    touch(tmp_path, "x/1.png", "x/2.png", "y\\3.png")
    rows = [["x\\1.png", 0, "a"], ["x\\2.png", 1, "b"], ["y\\3.png", 1, "b"]]
    (tmp_path / "split.json").write_text(json.dumps({"train": rows}), encoding="utf-8-sig")
    split = load_dataset(tmp_path, split_file=tmp_path / "split.json").split
    assert [item.path for item in split.train] == ["x/1.png", "x/2.png", "y\\3.png"]
    lists = [{"impath": f"C:\\data\\x\\{i}.png", "label": i - 1, "classname": "ab"[i - 1]} for i in (1, 2)]
    (tmp_path / "few.json").write_text(json.dumps({"train": {"data": lists}}))
    split = load_dataset(tmp_path, split_file=tmp_path / "few.json").split
    assert [item.path for item in split.train] == ["x/1.png", "x/2.png"]
    (tmp_path / "split.json").write_text('{"train": [["x\\1.png", 0, "a"]]}')
    with fails("paths are written with /"):
        read_split(tmp_path / "split.json", tmp_path)
    (tmp_path / "split.json").write_text(json.dumps({"train": [["/gone/1.png", 0, "a"], ["/gone/2.png", 1, "b"]]}))
    with fails("2 of 2 images do not exist"):
        load_dataset(tmp_path, split_file=tmp_path / "split.json")


def test_names_that_are_not_utf_8(tmp_path):
    for name in (b"caf\xe9", b"tea"):
        os.mkdir(os.path.join(os.fsencode(tmp_path), name))
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name, b"1.png"))).write_bytes(b"")
    with fails(r"class name 'caf\\udce9' is not UTF-8 text"):
        from_folder(tmp_path)
    (tmp_path / "split.json").write_text('{"train": [["a.png", 0, "\\ud800"], ["b.png", 1, "b"]]}')
    with fails(r"train\[0\]: class name '\\ud800' is not UTF-8 text"):
        read_split(tmp_path / "split.json", tmp_path)


@slow
def test_a_terminal_that_cannot_print_a_name(tmp_path):
    for i in range(4):
        draw(tmp_path / "photos" / ("café", "tea")[i % 2] / f"{i}.png", i)
    Path(os.fsdecode(os.fsencode(tmp_path / "photos" / "tea") + b"/caf\xe9.png")).write_bytes(
        (tmp_path / "photos" / "tea" / "1.png").read_bytes()
    )
    for command in (("train", "zero_shot", "photos", "--out", "run"), ("predict", "run", "photos/tea")):
        done = python("-m", "vlprompt", *command, cwd=tmp_path, PYTHONIOENCODING="ascii")
        assert done.returncode == 0, done.stderr
    assert "photos/tea/caf\\udce9.png" in done.stdout
    assert "caf\\xe9" in done.stdout
    code, _, err = vlprompt(
        "bank", "build", tmp_path / "photos", "--backbone", "mini", "--regions", 2, "--out", tmp_path / "bank"
    )
    assert code == 0, err
    assert vlprompt("bank", "verify", tmp_path / "bank", tmp_path / "photos")[0] == 0


# --- settings and places --------------------------------------------------------------------------


def test_no_flip_and_no_augmentation(tiny, tmp_path):
    import torch

    from vlprompt.data.batches import Batch, TrainingViews

    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for i, path in enumerate(paths):
        draw(path, i)
    whole = torch.stack([tiny.preprocess(load_image(path)) for path in paths])

    def in_order(batch: Batch) -> list[torch.Tensor]:
        assert batch.images is not None
        return list(batch.images[batch.labels.argsort()])

    def views(**given: Any) -> dict[int, torch.Tensor]:
        with ImageReader(0) as reader:
            made = TrainingViews(paths, range(4), tiny.preprocess, 4, 1, reader=reader, **given)
            return {e: torch.stack([x for batch in made.epoch(e) for x in in_order(batch)]) for e in range(8)}

    assert all(torch.equal(x, whole) for x in views(center=True).values())
    flipped, plain, mirrored = views(), views(flip=0.0), views(flip=1.0)
    for e, x in plain.items():
        assert torch.equal(x.flip(-1), mirrored[e])
        assert all(torch.equal(v, p) or torch.equal(v, p.flip(-1)) for v, p in zip(flipped[e], x, strict=True))
    assert 0 < sum(torch.equal(v, p) for e in plain for v, p in zip(flipped[e], plain[e], strict=True)) < 32


def test_a_bank_without_flips(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(8):
        draw(tmp_path / "photos" / "ab"[i % 2] / f"{i}.png", i)
    build = ("bank", "build", "photos", "--backbone", "mini", "--regions", 4, "--out")
    assert vlprompt(*build, "plain")[0] == 0
    assert vlprompt(*build, "straight", "--flip", 0)[0] == 0
    train = ("train", "coop", "photos", "n_ctx=1", "--epochs", 1)
    code, _, err = vlprompt(*train, "flip=0", "--bank", "plain", "--out", "run")
    assert code == 2
    assert "it was built with crops.flip = 0.5, not 0.0" in err
    assert vlprompt(*train, "flip=0", "--bank", "straight", "--out", "run")[0] == 0
    for setting, shown in (("augment=none", "views = center"), ("white=4095", "white = 4095.0")):
        code, _, err = vlprompt(*train, "flip=0", setting, "--bank", "straight", "--out", "other")
        assert code == 2
        assert f"data.{shown}" in err


@pytest.mark.filterwarnings("error")
def test_most_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("L", (60, 60), 9).save(tmp_path / "big.png")
    with ImageReader(0) as reader, fails(r"decompression bomb.*\(data\.max_pixels=N allows more\)"):
        reader.image(tmp_path / "big.png")
    with ImageReader(0, max_pixels=3600) as reader:
        assert reader.image(tmp_path / "big.png").crop((0, 0, 59, 59)).size == (59, 59)
    assert Image.MAX_IMAGE_PIXELS == 1000
    with ImageReader(0, max_pixels=3599) as reader, fails(r"3600 pixels; data\.max_pixels = 3599 is the limit"):
        reader.image(tmp_path / "big.png")


def test_pillows_warnings_are_not_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    for i in range(4):
        file = tmp_path / "photos" / "ab"[i % 2] / f"{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (60 * i, 9, 9)).save(file, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        code, _, err = vlprompt("train", "zero_shot", "photos", "--out", "run")
    assert code == 0, err
    assert "arning" not in err


def test_a_folder_called_like_a_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "eurosat/a/1.png", "eurosat/b/1.png", "clothing-demo/a/1.png")
    here = r"for the folder of that name here write \./"
    with fails(f"'eurosat' needs --root.*; {here}eurosat"):
        load_dataset("eurosat")
    with fails(f"eurosat.* does not exist.*{here}eurosat"):
        load_dataset("eurosat", "elsewhere")
    assert load_dataset("./eurosat").split.class_names == ("a", "b")
    (note,) = load_dataset("clothing-demo").notes
    assert note.startswith("note: data set 'clothing-demo' of ")
    assert note.endswith("; for the folder of that name here write ./clothing-demo")


def test_output_inside_the_data_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(8):
        draw(tmp_path / "photos" / "ab"[i % 2] / f"{i}.png", i)
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    commands = (
        ("train", "zero_shot", "photos"),
        ("train", "zero_shot", "photos", "--out", "link/run"),
        ("train", "zero_shot", "photos", "--out", "photos/a/run"),
        ("bench", "few-shot", "--methods", "coop", "--data", "photos", "--shots", 1, "--out", "photos/bench"),
        ("bank", "build", "photos", "--backbone", "mini", "--out", "photos/bank"),
        ("data", "split", "photos", "--out", "photos/split.json"),
    )
    before = sorted(tmp_path.rglob("*"))
    for command in commands[1:]:
        code, out, err = vlprompt(*command)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert "is inside the data set photos: choose a place outside it" in err
    monkeypatch.chdir(tmp_path / "photos")
    code, _, err = vlprompt("train", "zero_shot", ".")
    assert code == 2
    assert "--out runs/photos-zero_shot-seed1 is inside the data set" in err
    assert sorted(tmp_path.rglob("*")) == before


def test_resume_where_the_data_has_moved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(8):
        draw(tmp_path / "photos" / "ab"[i % 2] / f"{i}.png", i)
    assert vlprompt("train", "coop", "photos", "n_ctx=1", "--epochs", 1, "--out", "run")[0] == 0
    tuned = (tmp_path / "run" / "prompts.safetensors").read_bytes()
    (tmp_path / "photos").rename(tmp_path / "moved")
    code, _, err = vlprompt("train", "--resume", "run")
    assert code == 2
    assert "where the data has moved: vlprompt train --resume run DATA" in err
    code, _, err = vlprompt("train", "--resume", "run", "moved")
    assert code == 0, err
    assert (tmp_path / "run" / "prompts.safetensors").read_bytes() == tuned
    draw(tmp_path / "moved" / "a" / "more.png", 99)
    code, _, err = vlprompt("train", "--resume", "run", "moved")
    assert code == 2
    assert "no longer gives the images of its split.json" in err


def test_no_augmentation_and_other_views_contradict():
    assert build_config("coop", overrides={"augment": "none", "data.views": "center"}).data.views == "center"
    assert build_config("coop", overrides={"data.augment": "none"}).data.views == "center"
    with pytest.raises(ConfigError, match=r"data\.augment = none and data\.views = random contradict each other"):
        build_config("coop", overrides={"data.augment": "none", "views": "random"})
