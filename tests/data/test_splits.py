"""Which images a run uses: split files given with --split-file, few-shot lists, val fractions, unreadable images."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.kit import SHARED, TINY
from tests.kit.checks import fails
from tests.kit.marks import sweep
from tests.kit.pictures import draw
from vlprompt.config.images import choose_images, run_split
from vlprompt.config.schema import build_config
from vlprompt.data import images, reading
from vlprompt.data.batches import TrainingViews, evaluation_batches
from vlprompt.data.datasets import LoadedDataset, load_dataset
from vlprompt.data.folders import from_folder
from vlprompt.data.images import Preprocess
from vlprompt.data.known.table import DATASETS
from vlprompt.data.reading import ImageReader, readable
from vlprompt.data.splits import Item, Split, check_class_names, read_split, write_split
from vlprompt.training.evaluate import score
from vlprompt.training.run import train

needs_shared = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the shared benchmark files are not here")
NAMES = ("cat", "dog", "horse")


@pytest.fixture
def photos(tmp_path) -> Path:
    """Three classes of ten images, as class folders."""
    for c, name in enumerate(NAMES):
        for i in range(10):
            draw(tmp_path / "photos" / name / f"{i}.png", 10 * c + i)
    return tmp_path / "photos"


def toy(train: int = 10, val: int = 0) -> Split:
    def items(part: str, n: int) -> tuple[Item, ...]:
        return tuple(Item(f"{part}/{c}/{i}.png", c) for c in range(3) for i in range(n))

    return Split(Path("root"), NAMES, items("train", train), items("val", val), items("test", 2))


def configured(**data):
    return build_config("zero_shot", overrides={f"data.{key}": value for key, value in data.items()})


# --- split files ----------------------------------------------------------------------------------


def test_a_runs_split_is_read_back_exactly(photos, tmp_path):
    given = {"data.name": str(photos), "data.shots": 2, "data.classes": "base"}
    train(build_config("zero_shot", overrides=given), tmp_path / "first")
    file = tmp_path / "first" / "split.json"
    loaded = load_dataset(photos, split_file=file)
    assert loaded.split == load_dataset(photos).split.subset("base").few_shot(2, 1)
    assert loaded.name == "photos"
    again = {"data.name": str(photos), "data.split_file": str(file)}
    train(build_config("zero_shot", overrides=again), tmp_path / "second")
    assert (tmp_path / "second" / "split.json").read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    "given",
    sweep([[], ["--shots", 2, "--seed", 3], ["--shots", 2, "--classes", "base"], ["--shots", 4, "--imbalance", 4],
           ["--imbalance", 2], ["--classes", "novel", "--val-fraction", 0.5]], ["--shots", 2, "--classes", "base"],
          ["--shots", 4, "--imbalance", 4]),
)  # fmt: skip
def test_a_split_that_is_published_is_that_of_a_run(vlprompt, photos, tmp_path, given):
    """The file is a run's, byte for byte; and a run that is given the file is the same run."""
    file, options = tmp_path / "split.json", [str(text) for text in given]
    code, out, err = vlprompt("data", "split", photos, *given, "--out", file, "--json")
    assert code == 0, err
    keys = {"--shots": "data.shots", "--imbalance": "imbalance", "--classes": "data.classes", "--seed": "seed"}
    keys["--val-fraction"] = "data.val_fraction"
    settings = [f"{keys[key]}={value}" for key, value in zip(options[::2], options[1::2], strict=True)]
    assert vlprompt("train", "zero_shot", photos, *settings, "--out", tmp_path / "run")[0] == 0
    assert file.read_bytes() == (tmp_path / "run" / "split.json").read_bytes()
    assert vlprompt("train", "zero_shot", photos, "--split-file", file, "--out", tmp_path / "again")[0] == 0
    assert file.read_bytes() == (tmp_path / "again" / "split.json").read_bytes()
    split = read_split(file, photos)
    counts = {part: len(split.items(part)) for part in ("train", "val", "test")}
    assert json.loads(out) == {"split": str(file), "classes": len(split.class_names), **counts}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "split.json is there already: choose another --out, or remove it"),
        (("--shots", 0), "data.shots = 0 (allowed: greater than or equal to 1)"),
        (("--shots", 99), "too few for 99 shots"),
        (("--imbalance", 0.5), "data.imbalance = 0.5 (allowed: greater than or equal to 1)"),
        (("--seed", -1), "seed = -1"),
        (("--classes", "bse"), "'bse' is not one of 'base', 'novel', 'all'"),
    ],
)
def test_splits_that_are_not_written(vlprompt, photos, tmp_path, given, message):
    (tmp_path / "split.json").write_text("mine")
    code, out, err = vlprompt(
        "data", "split", photos, *given, "--out", tmp_path / ("x.json" if given else "split.json")
    )
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert (tmp_path / "split.json").read_text() == "mine"
    assert not (tmp_path / "x.json").exists()


def test_a_split_file_replaces_the_split_of_any_data_set(photos, tmp_path, monkeypatch):
    file = tmp_path / "split.json"
    split = replace(from_folder(photos), val=())
    write_split(split, file)
    assert load_dataset(photos, split_file=file).split == split
    (photos / "table.csv").write_text("path,label\n")  # its own rows are not read
    assert load_dataset(photos / "table.csv", split_file=file).split == split
    monkeypatch.setitem(DATASETS, "dtd", replace(DATASETS["dtd"], folder="photos", images=""))
    loaded = load_dataset("dtd", tmp_path, file)
    assert (loaded.split, loaded.template) == (split, "{} texture.")


def test_a_split_file_that_does_not_test_a_class(photos, tmp_path, monkeypatch):
    """A benchmark's must, as its own split does; that of one's own images need not."""
    file = tmp_path / "split.json"
    split = from_folder(photos)
    split = replace(split, test=tuple(item for item in split.test if item.label < 2))
    write_split(split, file)
    monkeypatch.setitem(DATASETS, "dtd", replace(DATASETS["dtd"], folder="photos", images=""))
    with fails(r"split file .*split\.json: train and test have different classes: 1 only in train \(horse\)"):
        load_dataset("dtd", tmp_path, file)
    assert load_dataset(photos, split_file=file).split == split


def test_classes_without_images_are_named(vlprompt, photos, tmp_path):
    """In the parts that have images of other classes, wherever they are read; nothing fails for that."""
    for part in ("train", "val", "test"):
        for name in NAMES[: 3 if part == "train" else 1]:
            shutil.copytree(photos / name, tmp_path / "own" / part / name)
    given = ("--backbone", TINY, "data.workers=0")
    note = "note: data set 'own' has no {} images of 2 of 3 classes (dog, horse)"
    code, _, err = vlprompt("train", "zero_shot", tmp_path / "own", *given, "--out", tmp_path / "run")
    assert (code, [err.count(note.format(part)) for part in ("val", "test")]) == (0, [1, 1])
    code, out, err = vlprompt("evaluate", tmp_path / "run", tmp_path / "own", "--json")
    assert (code, err, list(json.loads(out)["per_class"])) == (0, note.format("test") + "\n", ["cat"])
    whole = "data set 'photos' names no train, val and test images: all are measured\n"
    assert vlprompt("evaluate", tmp_path / "run", photos)[2] == whole
    bench = ("bench", "few-shot", "--methods", "zero_shot", "--seeds", "1,2", "--shots", "2", "--out", tmp_path / "out")
    code, _, err = vlprompt(*bench, "--data", f"{tmp_path / 'own'},{photos}", *given)
    assert (code, err.count(note.format("test"))) == (0, 1)
    assert err.count("note: ") == 1 + err.count(" images are among the training images too") == 3


def test_split_files_that_do_not_fit(photos, tmp_path):
    file = tmp_path / "split.json"
    split = from_folder(photos)
    write_split(split, file)
    with fails(r"split\.json is no data set: give the images as DATA, and this file with --split-file"):
        load_dataset(file)
    with fails(r"splt\.json does not exist: did you mean 'split\.json'"):
        load_dataset(photos, split_file=tmp_path / "splt.json")
    with fails(r"CSV file .*nothing\.csv does not exist"):
        load_dataset(photos / "nothing.csv", split_file=file)
    images = sum(len(split.items(part)) for part in ("train", "val", "test"))
    (photos / split.test[0].path).unlink()
    with fails(rf"split\.json: image .*{split.test[0].path} does not exist: did you mean"):
        load_dataset(photos, split_file=file)
    for item in split.test[1:7]:
        (photos / item.path).unlink()
    named = ", ".join(item.path for item in split.test[:5])
    with fails(rf"split\.json: 7 of {images} images do not exist in .*photos: {named} and 2 more"):
        load_dataset(photos, split_file=file)


def few_shot_list(split: Split, prefix: str) -> str:
    def rows(part: str) -> list[dict]:
        return [
            {"impath": prefix + item.path, "label": item.label, "classname": split.class_names[item.label]}
            for item in split.items(part)
        ]

    return json.dumps({part: {"data": rows(part), "indices": []} for part in ("train", "val")})


@pytest.mark.parametrize("prefix", ["./data/photos/", "/home/somebody/DATA/photos/", ""])
def test_published_few_shot_lists(photos, tmp_path, prefix):
    few = replace(from_folder(photos).few_shot(2, seed=3), test=())
    file = tmp_path / "shot_2-seed_3.json"
    file.write_text(few_shot_list(few, prefix))
    assert read_split(file, photos) == few
    base = load_dataset(photos, split_file=file).split.subset("base")
    assert (base.class_names, len(base.train)) == (("cat", "dog"), 4)
    given = {"data.name": str(photos), "data.split_file": str(file), "data.classes": "novel"}
    method, _ = train(build_config("zero_shot", overrides=given), tmp_path / "run")
    assert method.class_names == ("horse",)


def test_few_shot_lists_of_other_images(photos, tmp_path):
    file = tmp_path / "list.json"
    file.write_text(few_shot_list(toy(2), "./data/other/"))
    with fails(r"list\.json: \./data/other/train/0/0\.png is not below .*photos"):
        read_split(file, photos)
    rows = [["./a/cat/0.png", 0, "cat"], ["./b/dog/0.png", 1, "dog"]]
    parts = {"train": {"data": [dict(zip(("impath", "label", "classname"), row, strict=True)) for row in rows]}}
    file.write_text(json.dumps(parts))
    with fails(r"list\.json: \./b/dog/0\.png does not begin like \./a/cat/0\.png"):
        read_split(file, photos)
    file.write_text(json.dumps({"train": {"data": [{"impath": "cat/0.png", "label": "0"}]}}))
    with fails(r"train\[0\] is not \[path, label, class name\]"):
        read_split(file, photos)


@needs_shared
@pytest.mark.parametrize("shots", [1, 4, 16])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_published_lists_of_caltech(shots, seed):
    whole = load_dataset("caltech101", SHARED / "data").split
    file = SHARED / "data" / "fewshot" / "caltech-101" / f"shot_{shots}-seed_{seed}.json"
    few = load_dataset("caltech101", SHARED / "data", file).split  # checks that every image exists
    assert few.class_names == whole.class_names
    assert set(few.train) <= set(whole.train)
    assert set(few.val) <= set(whole.val)
    assert np.array_equal(np.bincount([item.label for item in few.train]), [shots] * 100)
    base, novel = few.subset("base"), few.subset("novel")
    assert len(base.train) == len(novel.train) == 50 * shots
    assert base.class_names == whole.subset("base").class_names
    assert (
        run_split(configured(shots=shots), LoadedDataset("caltech101", few, "{}")).train
        == few.subset("all").few_shot(shots, seed).train
    )


# --- class names ----------------------------------------------------------------------------------


def test_split_files_may_repeat_class_names(tmp_path):
    (tmp_path / "split.json").write_text(
        json.dumps(
            {"train": [["a.jpg", 0, "missile"], ["b.jpg", 1, "missile"], ["c.jpg", 2, "x_y"], ["d.jpg", 3, "X y"]]}
        )
    )
    split = read_split(tmp_path / "split.json", tmp_path)
    assert split.class_names == ("missile", "missile", "x y", "X y")
    result = score(torch.eye(4), torch.tensor([0, 0, 2, 3]), split.class_names)
    assert result.classes == split.class_names
    assert result.per_class == {"missile (class 0)": 50, "x y": 100, "X y": 100}


@pytest.mark.parametrize("other", ["sea horse", "Sea_Horse", " SEA  horse "])
def test_user_classes_may_not_read_alike(other):
    with fails(f"here: classes 'sea_horse' and '{other}' have the same name for a text tower"):
        check_class_names(["sea_horse", "cup", other], "here")
    with fails(f"here: 2 classes are named '{other}'"):
        check_class_names([other, "cup", other], "here")
    check_class_names(["sea horse", "seahorse", "é", "e", "🦊", "🐙"], "here")
    with fails("same name"):
        check_class_names(["caf\u00e9", "cafe\u0301"], "here")


@pytest.mark.parametrize("name", ["", " ", "_", " _ \t"])
def test_classes_without_a_name(name):
    with fails("here: a class has no name"):
        check_class_names(["cup", name], "here")


# --- val fraction, shots --------------------------------------------------------------------------


def test_val_fraction_moves_the_same_images_for_every_seed_and_number_of_shots():
    split = toy().with_val(0.25)
    assert np.array_equal(np.bincount([item.label for item in split.val]), [2, 2, 2])
    assert sorted(split.train + split.val, key=lambda item: item.path) == sorted(toy().train, key=lambda i: i.path)
    assert replace(toy(), train=toy().train[::-1]).with_val(0.25) == split
    assert replace(split.few_shot(8, 1), val=()) == replace(split, val=())
    data = LoadedDataset("toy", toy(), "{}")
    for shots in (1, 4, 8):
        chosen = run_split(configured(shots=shots, val_fraction=0.25), data)
        assert set(chosen.val) <= set(split.val)
        assert set(chosen.train) <= set(split.train)
        assert len(chosen.train) == 3 * shots
    with fails("class 'cat' has 8 training images, too few for 9 shots"):
        run_split(configured(shots=9, val_fraction=0.25), data)
    assert toy(3).with_val(0.3).val == ()
    assert [len(toy(100).with_val(share).val) for share in (0.29, 0.57, 0.58)] == [3 * 29, 3 * 57, 3 * 58]


def test_val_fraction_leaves_a_val_split_alone(photos):
    data = LoadedDataset("toy", toy(val=3), "{}")
    assert run_split(configured(val_fraction=0.5), data) == data.split
    said: list[str] = []
    with ImageReader(0) as reader:
        choose_images(configured(val_fraction=0.5), load_dataset(photos), reader, said.append)
    assert said[0] == "data set 'photos' has val images: data.val_fraction is not used"
    assert said[1:] == [load_dataset(photos).division]
    with fails("there is a val split already"):
        toy(val=3).with_val(0.5)
    with fails("val fraction = 1"):
        toy().with_val(1)


def test_allow_fewer_uses_what_there_is():
    split = replace(
        toy(), train=tuple(item for item in toy().train if item.path not in ("train/1/0.png", "train/1/1.png"))
    )
    with fails(r"class 'dog' has 8 training images, too few for 9 shots; --allow-fewer uses what there is\Z"):
        split.few_shot(9, 1)
    with fails(r"class 'cat' has 10 .* too few for 11 shots \(and 2 more classes\)"):
        split.few_shot(11, 1)
    few = split.few_shot(9, 1, allow_fewer=True)
    assert np.array_equal(np.bincount([item.label for item in few.train]), [9, 8, 9])
    empty = replace(split, train=tuple(item for item in split.train if item.label != 2))
    with fails(r"class 'horse' has 0 training images"):
        empty.few_shot(9, 1, allow_fewer=True)
    with fails("classes without training images: 'horse'"):
        run_split(configured(), LoadedDataset("toy", empty, "{}"))


# --- reading --------------------------------------------------------------------------------------


def test_unreadable_images_make_room_for_the_next(photos):
    data = load_dataset(photos)
    drawn = run_split(configured(shots=2), data)
    wider = run_split(configured(shots=3), data)
    broken = data.split.root / drawn.train[0].path
    broken.write_bytes(broken.read_bytes()[:100])
    (photos / drawn.val[0].path).write_bytes(b"")
    said: list[str] = []
    with ImageReader(2) as reader:
        with fails(r"2 of \d+ images: cannot read image .*; cannot read image .*empty; --skip-bad leaves"):
            choose_images(configured(shots=2), data, reader, said.append)
        assert not said
        split, skipped = choose_images(configured(shots=2, skip_bad=True), data, reader, said.append)
    assert skipped == len(said) - 1 == 2
    assert str(broken) in said[0]
    assert "the file is empty" in said[1]
    assert len(split.train) == 6
    assert set(split.train) == (set(drawn.train) | {i for i in wider.train if i.label == 0}) - {drawn.train[0]}
    assert drawn.val[0] not in split.val


def test_every_image_of_a_class_unreadable(photos):
    for path in (photos / "dog").iterdir():
        path.write_bytes(b"")
    for shots, message in ((None, "classes without training images: 'dog'"), (1, "class 'dog' has 0 training images")):
        with ImageReader(0) as reader, fails(message):
            choose_images(configured(shots=shots, skip_bad=True), load_dataset(photos), reader, lambda _: None)


def test_readable_images_of_an_evaluation(photos):
    paths = sorted((photos / "dog").iterdir())
    paths[3].write_bytes(b"no image")
    said: list[str] = []
    with ImageReader(0) as reader:
        assert readable(paths, reader, False, said.append) == list(range(10))
        assert not said
        assert readable(paths, reader, True, said.append) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
        assert len(said) == 1
        with fails("not an image"):
            readable([paths[3]], reader, True, said.append)


def test_images_are_decoded_once_by_threads_that_start_once(photos, tmp_path, monkeypatch):
    decoded: list[Path] = []
    pools: list[int] = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, workers: int, **options) -> None:
            pools.append(workers)
            super().__init__(workers, **options)

    def load(path):
        decoded.append(path)
        return images.load_image(path)

    monkeypatch.setattr(reading, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(reading, "load_image", load)
    given = {"data.name": str(photos), "train.epochs": 3, "data.workers": 2}
    train(build_config("vpt", overrides=given), tmp_path / "run")
    split = load_dataset(photos).split
    assert pools == [2]
    assert sorted(decoded) == sorted(split.paths("train") + split.paths("val"))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vlprompt-images")]


def test_a_reader_keeps_what_fits_and_checks_no_more(photos, monkeypatch):
    paths = sorted((photos / "dog").iterdir())
    decoded: list[Path] = []
    monkeypatch.setattr(reading, "load_image", lambda path: decoded.append(path) or images.load_image(path))
    paths[8].write_bytes(b"no image")
    paths[9].write_bytes(b"")
    with ImageReader(0, room=3 * 20 * 24 * 2) as reader:
        assert list(reader.unreadable(paths, everything=False)) == [paths[9]]
        assert decoded == [*paths[:3], paths[9]]
        assert list(reader.unreadable(paths)) == paths[8:]
        decoded.clear()
        assert reader.image(paths[0]) is reader.image(paths[0])
        reader.image(paths[5])
        assert decoded == [paths[5]]


@pytest.mark.parametrize("room", [0, 1 << 20])
def test_views_do_not_depend_on_threads_or_memory(photos, room):
    paths = sorted(photos.rglob("*.png"))
    preprocess = Preprocess(16, (0, 0, 0), (1, 1, 1))

    def views(workers: int, room: int) -> list[torch.Tensor]:
        with ImageReader(workers, room) as reader:
            training = TrainingViews(paths, range(30), preprocess, 7, 3, reader=reader)
            made = [views.images for epoch in range(2) for views in training.epoch(epoch)]
            return made + list(evaluation_batches(paths, preprocess, reader, 8))

    expected = views(0, 0)
    assert [len(batch) for batch in expected] == [7] * 8 + [8, 8, 8, 6]
    assert all(torch.equal(a, b) for a, b in zip(expected, views(3, room), strict=True))
    assert not torch.equal(expected[0], expected[4])


def test_an_unreadable_image_among_views_is_named(photos):
    paths = sorted(photos.rglob("*.png"))
    paths[4].write_bytes(b"")
    preprocess = Preprocess(16, (0, 0, 0), (1, 1, 1))
    with ImageReader(2) as reader, fails(rf"{paths[4]}: the file is empty"):
        list(evaluation_batches(paths, preprocess, reader, 2))


def test_pillows_draft_mode_is_not_exact(tmp_path):
    """Why images are decoded at full size."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((640, 480)).save(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as draft:
        draft.draft("RGB", (64, 64))
        small = draft.convert("RGB")
    preprocess = Preprocess(32, (0, 0, 0), (1, 1, 1))
    assert small.width < 640
    assert not torch.equal(preprocess(small), preprocess(images.load_image(tmp_path / "a.jpg")))
