"""Make ``src/vlprompt/data/known/openmoji.tsv``: code points, name, sub-group and family of the data set's pictures.

    python tools/openmoji_table.py

Needs ``npm``, which brings the Unicode names and sub-groups in the package ``emojibase-data``. The committed
table is all that vlprompt reads; run this only to change it.
"""

from __future__ import annotations

import json
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from vlprompt.data.known.openmoji import SUBGROUPS

SOURCE = "emojibase-data@17.0.0"
TABLE = Path(__file__).parent.parent / "src" / "vlprompt" / "data" / "openmoji.tsv"

# Emoji that differ by these alone are one family.
JOINER, SELECTOR = "200D", "FE0F"
DROPPED = {"2640", "2642", "27A1", "1F9B0", "1F9B1", "1F9B2", "1F9B3"}  # after a joiner: gender, direction, hair
NEUTRAL = {"1F468": "1F9D1", "1F469": "1F9D1", "1F466": "1F9D2", "1F467": "1F9D2"}  # man, woman, boy, girl

# Of these the first picture of each family is enough; other people reach sixteen only with their men and women.
FIRST_ONLY = {"person-activity", "person-resting", "person-role", "person-sport"}

TWICE = {"kiss: woman, man", "couple with heart: woman, man"}  # pictures that are there already

COLOURS = "red|pink|orange|yellow|green|light blue|blue|purple|brown|black|grey|white"
ALIKE = (
    # faces
    r"(grinning|beaming) .*",
    r"(face|(winking|squinting) face) with tongue",
    r"kissing face.*",
    r"(slightly smiling|upside-down) face|smiling face with smiling eyes",
    r"(neutral|expressionless) face|face without mouth",
    r"(confused|frowning|slightly frowning) face|frowning face with open mouth|face with diagonal mouth",
    r"(anguished|fearful) face",
    r"(weary|tired) face",
    r"(hushed|astonished) face",
    r"(enraged|angry) face",
    r"(smiling|angry) face with horns",
    # hands and people
    r"backhand index pointing .*",
    r"(left|right)wards hand|raised hand|raised back of hand",
    r"palm (up|down) hand",
    r"(left|right)wards pushing hand",
    r"(left|right)-facing fist",
    r"thumbs .*",
    r".* (frowning|pouting)",
    r"(Santa|Mrs\.|Mx) Claus",
    r".* holding hands",
    r"kiss.*",
    r"couple with heart.*",
    r"person with crown|prince|princess",
    r"pregnant .*",
    r".*feeding.*",
    r"(wo)?man dancing",
    # animals, plants, food
    r"(guide|service) dog",
    r"(black )?cat",
    r"(black )?bird",
    r"empty nest|nest with eggs",
    r"(red|green) apple",
    # places and weather
    r"(snow-capped )?mountain",
    r"(derelict )?house",
    r"wedding|church",
    r"police car|taxi|automobile",
    r"oncoming (police car|taxi|automobile)",
    r"(horizontal|vertical) traffic light",
    r"(new|full|crescent|(first|last) quarter|(waxing|waning) \w+) moon",
    r"(first|last) quarter moon face",
    r"(new|full) moon face",
    r"cloud with .*",
    r"sun behind .*",
    r"snowman.*",
    # objects
    r"(sun)?glasses",
    r"speaker \w+ volume",
    r"bell.*",
    r"optical disk|dvd",
    r"(low )?battery",
    r"magnifying glass .*",
    r"(green|blue|orange) book|notebook with decorative cover",
    r"(yen|dollar|euro|pound) banknote",
    r"envelope|e-mail",
    r"(in|out)box tray",
    r".* mailbox with .*",
    r"chart (in|de)creasing",
    r"(tear-off )?calendar",
    # symbols
    rf"({COLOURS}) heart",
    r"(up|down|left|right)(-\w+)? arrow",
    r"(right|left) arrow curving (right|left)",
    r"right arrow curving (up|down)",
    r"[A-Z!]+ arrow",
    r"(men|women)’s room",
    r"passport control|customs",
    r"star of David|dotted six-pointed star",
    r"(play|reverse|upwards|downwards) button",
    r"fast.* button",
    r"(next|last) track button",
    r"repeat .*",
)
"""Emoji whose names match one of these are drawn alike (colours, mirror images, phases, …): one family too."""

HEADER = f"""\
# Pictures in OpenMoji, written by tools/openmoji_table.py. Do not edit.
# Source: npm package {SOURCE} (MIT licence, copyright 2017-2019 Miles Johnson), which
# arranges the Unicode emoji data and English CLDR names (copyright 1991-2025 Unicode, Inc., Unicode licence
# v3, SPDX Unicode-3.0). Without skin tones. A family is named by its first picture.
"""


class Row(NamedTuple):
    """A line of the table."""

    codepoints: str
    name: str
    subgroup: str
    family: str


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        package = fetch(Path(temporary))
        emoji = json.loads((package / "en" / "data.json").read_text(encoding="utf-8"))
        names = json.loads((package / "meta" / "groups.json").read_text(encoding="utf-8"))["subgroups"]
    lines = ["\t".join(Row._fields), *("\t".join(row) for row in rows(emoji, names))]
    TABLE.write_text(HEADER + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines) - 1} pictures, {TABLE.stat().st_size} bytes")


def fetch(folder: Path) -> Path:
    """The unpacked npm package."""
    subprocess.run(["npm", "pack", "--silent", SOURCE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (archive,) = folder.glob("*.tgz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / "package"


def rows(emoji: Iterable[dict[str, Any]], names: dict[str, str]) -> list[Row]:
    """The lines of the table, in Unicode's order. Skin tones lie inside their neutral entry, and so stay out."""
    class_of = {subgroup: name for name, subgroups in SUBGROUPS.items() for subgroup in subgroups}
    found: list[Row] = []
    first: dict[tuple[str, str], str] = {}
    for entry in sorted(emoji, key=lambda entry: entry.get("order", 0)):
        subgroup = names[str(entry["subgroup"])] if "subgroup" in entry else ""
        if subgroup not in class_of or entry["label"] in TWICE:
            continue
        family = first.setdefault((class_of[subgroup], family_key(entry)), entry["hexcode"])
        if subgroup not in FIRST_ONLY or family == entry["hexcode"]:
            found.append(Row(entry["hexcode"], entry["label"], subgroup, family))
    return found


def family_key(entry: dict[str, Any]) -> str:
    """What all members of a family have in common."""
    for pattern in ALIKE:
        if re.fullmatch(pattern, entry["label"]):
            return pattern
    head, *tail = entry["hexcode"].replace(f"-{SELECTOR}", "").split(f"-{JOINER}-")
    parts = [head, *(part for part in tail if part not in DROPPED)]
    return JOINER.join(NEUTRAL.get(part, part) for part in parts)


if __name__ == "__main__":
    main()
