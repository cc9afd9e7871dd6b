"""What WordNet says of the 1,000 kinds of things that the teacher of ``mini`` tells apart.

    apt-get install wordnet-base
    python tools/mini/kinds.py --out pretraining

WordNet 3.0's noun offsets are ImageNet's ids. Writes ``kinds.json``: a list, in the order of the teacher's classes, of
``{"id", "text", "names", "gloss", "above", "unseen"}``. ``text`` is the first of the names, with what it is one of
where the name alone mostly means something else ("crane, wading bird"); ``above`` are the names of what it is one of,
the nearest first; ``unseen`` marks the ten classes of Imagenette, which ``mini`` never learns, since they measure it.
``--table`` writes the teacher's own table, ``src/vlprompt/backbones/kinds.tsv``, whose ids it keeps;
``directions.py`` then writes where they point.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlprompt.backbones import lite0
from vlprompt.files import write_atomically

WORDNET = Path("/usr/share/wordnet")
HEAD = "# ImageNet's 1,000 classes: WordNet id, text, names, gloss. WordNet 3.0, Copyright 2006 Princeton University."
UNSEEN = (
    "n01440764", "n02102040", "n02979186", "n03000684", "n03028079",
    "n03394916", "n03417042", "n03425413", "n03445777", "n03888257",
)  # fmt: skip
"""Imagenette's tench, English springer, cassette player, chain saw, church, French horn, garbage truck, gas pump, golf
ball and parachute."""


@dataclass(frozen=True)
class Synset:
    """Words for one thing, what they mean, and the offsets of what it is one of."""

    names: tuple[str, ...]
    gloss: str
    above: tuple[str, ...]


def synsets(folder: Path) -> dict[str, Synset]:
    """WordNet's nouns by offset."""
    out = {}
    for line in (folder / "data.noun").read_text(encoding="ascii").splitlines():
        if line.startswith(" "):
            continue
        facts, _, gloss = line.partition("|")
        offset, _, _, n, *rest = facts.split()
        words, pointers = rest[: 2 * int(n, 16) : 2], rest[2 * int(n, 16) + 1 :]
        above = tuple(pointers[i + 1] for i in range(0, len(pointers), 4) if pointers[i] in ("@", "@i"))
        names = tuple(word.replace("_", " ") for word in words)
        out[offset] = Synset(names, gloss.partition(";")[0].strip(), above)
    return out


def first_senses(folder: Path) -> dict[str, str]:
    """Of each noun in small letters: the offset of what it means most often."""
    out = {}
    for line in (folder / "index.noun").read_text(encoding="ascii").splitlines():
        if not line.startswith(" "):
            word, _, senses, *rest = line.split()
            out[word.replace("_", " ")] = rest[-int(senses)]
    return out


def line_above(offset: str, known: dict[str, Synset]) -> list[str]:
    """Offsets of what it is one of, the nearest first, by WordNet's first hypernyms."""
    out: list[str] = []
    while known[offset].above:
        offset = known[offset].above[0]
        out.append(offset)
    return out


def kinds(folder: Path) -> list[dict[str, Any]]:
    """The list that is written."""
    known, first = synsets(folder), first_senses(folder)
    out: list[dict[str, Any]] = []
    for id_ in [kind.id for kind in lite0.kinds()]:
        synset = known[id_[1:]]
        above = line_above(id_[1:], known)
        name = synset.names[0]
        clear = first.get(name.lower()) == id_[1:]
        out.append(
            {
                "id": id_,
                "text": name if clear else f"{name}, {known[above[0]].names[0]}",
                "names": synset.names,
                "gloss": synset.gloss,
                "above": [known[offset].names[0] for offset in above],
                "unseen": id_ in UNSEEN,
            }
        )
    return out


def main() -> None:
    """Read WordNet, write."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--wordnet", type=Path, default=WORDNET, help="folder of WordNet 3.0's files")
    parser.add_argument("--table", type=Path, help="write the teacher's table there, too")
    options = parser.parse_args()
    found = kinds(options.wordnet)
    if options.table:
        rows = ["\t".join((kind["id"], kind["text"], "; ".join(kind["names"]), kind["gloss"])) for kind in found]
        write_atomically(options.table, "\n".join([HEAD, *rows]) + "\n")
    write_atomically(options.out / "kinds.json", json.dumps(found, indent=0, ensure_ascii=False))
    print(f"{len(found)} kinds")


if __name__ == "__main__":
    main()
