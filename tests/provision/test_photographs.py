"""Imagenette, Tiny-ImageNet and the clothes: their layouts as published, fetched from a server of our own."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kit.known import PHOTOGRAPHS, draw
from tests.kit.server import Server
from vlprompt.data.datasets import load_dataset
from vlprompt.data.images import load_image
from vlprompt.data.known.layouts import IMAGENETTE
from vlprompt.data.known.table import DATASETS
from vlprompt.errors import DataError

TINY = {"n01443537": "goldfish, Carassius auratus", "n01629819": "European fire salamander, Salamandra salamandra"}
CLOTHES = ("dress", "hat", "t-shirt")


def build(top: Path, name: str) -> None:
    """What the data set's archive unpacks to."""
    if name == "imagenette":
        for part, n in (("train", 20), ("val", 3)):
            for key in IMAGENETTE:
                for i in range(n):
                    draw(top / "imagenette2-160" / part / key / f"{key}_{i}.JPEG", i)
    elif name == "tiny_imagenet":
        folder = top / "tiny-imagenet-200"
        for key in TINY:
            for i in range(20):
                draw(folder / "train" / key / "images" / f"{key}_{i}.JPEG", i)
            (folder / "train" / key / f"{key}_boxes.txt").write_text("")
        rows = [(f"val_{i}.JPEG", key) for i, key in enumerate([*TINY] * 2)]
        for file, _ in rows:
            draw(folder / "val" / "images" / file)
        (folder / "val" / "val_annotations.txt").write_text("".join(f"{f}\t{key}\t0\t0\t9\t9\n" for f, key in rows))
        (folder / "wnids.txt").write_text("\n".join(reversed(TINY)) + "\n")
        (folder / "words.txt").write_text("n00001740\tentity\n" + "".join(f"{k}\t{v}\n" for k, v in TINY.items()))
    else:
        for part, n in (("train", 4), ("validation", 1), ("test", 2)):
            for label in CLOTHES:
                for i in range(n):
                    draw(top / "clothing-dataset-small-master" / part / label / f"{i}.jpg", i)
        (top / "clothing-dataset-small-master" / "README.md").write_text("CC0")


def archive_of(top: Path, name: str) -> bytes:
    """Packed as it is published."""
    content = io.BytesIO()
    if name.endswith("tgz"):
        with tarfile.open(fileobj=content, mode="w:gz") as tar:
            for folder in top.iterdir():
                tar.add(folder, folder.name)
    else:
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as packed:
            for file in sorted(top.rglob("*")):
                packed.write(file, file.relative_to(top))
    return content.getvalue()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(params=PHOTOGRAPHS)
def published(request, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set's name; its miniature is on the server under the name of the real archive."""
    name = request.param
    build(tmp_path / "original", name)
    (source,) = DATASETS[name].sources
    archive = archive_of(tmp_path / "original", source.name)
    server.files = {f"/{source.name}": archive}
    checksum = source.checksum and f"md5:{hashlib.md5(archive).hexdigest()}"
    ours = replace(source, urls=(f"{server.url}/{source.name}",), checksum=checksum)
    monkeypatch.setitem(DATASETS, name, replace(DATASETS[name], sources=(ours,)))
    return name


def test_what_is_fetched_loads(vlprompt, published: str, tmp_path: Path) -> None:
    root = tmp_path / "data"
    code, _, err = vlprompt("data", "get", published, "--root", root)
    assert code == 0, err
    assert ("no checksum is known" in err) == (published == "clothing")
    split = load_dataset(published, root).split
    classes, n = {
        "imagenette": (tuple(IMAGENETTE.values()), (18, 2, 3)),
        "tiny_imagenet": (("goldfish", "European fire salamander"), (18, 2, 2)),
        "clothing": (CLOTHES, (4, 1, 2)),
    }[published]
    assert split.class_names == classes
    for part, each in zip(("train", "val", "test"), n, strict=True):
        assert Counter(split.labels(part)) == dict.fromkeys(range(len(classes)), each)
        assert all(path.is_file() for path in split.paths(part))
    parts = [set(split.paths(part)) for part in ("train", "val", "test")]
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
    for item in (*split.train, *split.test):  # each image is of the class that its path says
        key = next((k for k in (IMAGENETTE | TINY) if f"{k}_" in item.path), None)
        if key:
            assert (IMAGENETTE | TINY)[key].startswith(split.class_names[item.label])
    assert load_dataset(published, root).split == split
    code, out, _ = vlprompt("data", "check", published, "--root", root)
    assert "missing" not in out


def test_splits_do_not_change(tmp_path: Path) -> None:
    build(tmp_path, "imagenette")
    (tmp_path / "imagenette2-160").rename(tmp_path / "imagenette")
    split = load_dataset("imagenette", tmp_path).split
    assert [item.path for item in split.val[:2]] == VAL
    build(tmp_path, "tiny_imagenet")
    assert load_dataset("Tiny-ImageNet", tmp_path).name == "tiny_imagenet"


VAL = ["train/n01440764/n01440764_1.JPEG", "train/n01440764/n01440764_16.JPEG"]


def test_a_copy_in_three_parts_is_read_as_it_is(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        for label in ("church", "golf_ball"):
            draw(tmp_path / "imagenette" / part / label / "1.jpg")
    split = load_dataset("imagenette", tmp_path).split
    assert split.class_names == ("church", "golf ball")
    assert [len(split.items(part)) for part in ("train", "val", "test")] == [2, 2, 2]


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    build(tmp_path, "imagenette")
    (tmp_path / "imagenette2-160").rename(tmp_path / "imagenette")
    draw(tmp_path / "imagenette" / "train" / "n00000001" / "1.JPEG")
    with pytest.raises(DataError, match=r"train/n00000001: unknown class of Imagenette 'n00000001'"):
        load_dataset("imagenette", tmp_path)
    with pytest.raises(DataError, match=r"data set 'tiny_imagenet': folder .*tiny-imagenet-200 does not exist"):
        load_dataset("tiny_imagenet", tmp_path)
    build(tmp_path, "tiny_imagenet")
    folder = tmp_path / "tiny-imagenet-200"
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn00000001\t0\t0\t9\t9\n")
    with pytest.raises(DataError, match=r"val_annotations\.txt, line 1: class 'n00000001' is not in wnids\.txt"):
        load_dataset("tiny_imagenet", tmp_path)
    (folder / "words.txt").write_text("n01443537\tgoldfish\n")
    with pytest.raises(DataError, match=r"words\.txt does not name class 'n01629819' of wnids\.txt"):
        load_dataset("tiny_imagenet", tmp_path)
    (folder / "words.txt").unlink()
    with pytest.raises(DataError, match=r"words\.txt does not exist"):
        load_dataset("tiny_imagenet", tmp_path)


def test_the_photographs_that_come_along() -> None:
    dataset = DATASETS["clothing-demo"]
    split = load_dataset("clothing-demo").split
    assert len(split.class_names) == dataset.classes == 10
    assert tuple(len(split.items(part)) for part in ("train", "val", "test")) == dataset.sizes
    assert set(Counter(split.labels("train")).values()) == {16}
    assert set(Counter(split.labels("val")).values()) == {4}
    files = [file for part in ("train", "val", "test") for file in split.paths(part)]
    assert sum(file.stat().st_size for file in files) <= 2e6
    assert all(min(load_image(file).size) <= 128 for file in files[::20])
    assert len({hashlib.sha256(file.read_bytes()).hexdigest() for file in files}) == len(files)
    assert "CC0 1.0 Universal" in (split.root / "LICENSE").read_text("utf-8")
