"""Sentence embeddings of captions, tags, sub-groups and English words: where ``mini`` has its sense of words from.

    python tools/mini/embed.py --data pretraining

Writes ``texts.json`` (the texts, in order) and ``texts.npy`` ([texts, 384], float16, unit length): embeddings of
all-MiniLM-L6-v2, which learned from a billion pairs of sentences. Captions come first, in the order of
``captions.json``; then the sub-groups of emoji and the classes of the data set ``openmoji``; then tags; then words;
then words combined at random (``"cat or dog"``, ``"small cat"``).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from data import PACKAGES, lemmas, package_folder
from vlprompt.backbones.lite0 import sentence_encoder
from vlprompt.data.known.openmoji import SUBGROUPS
from vlprompt.files import write_atomically


def embed(texts: Sequence[str]) -> Tensor:
    """[texts, 384], unit length."""
    return sentence_encoder()(texts)


COMBINED = 60_000


def all_texts(data: Path) -> list[str]:
    """Every text, captions as often as they stand, the others once."""
    captions = json.loads((data / "captions.json").read_text(encoding="utf-8"))
    groups = sorted({c["subgroup"].replace("-", " ") for c in captions if c["subgroup"]})
    tags = sorted({tag for c in captions for tag in c["tags"]})
    words = (data / "words.txt").read_text(encoding="utf-8").splitlines()
    things = [text for text in [*(c["text"] for c in captions), *tags] if text.count(" ") < 2 and text.islower()]
    adjectives = lemmas(package_folder(PACKAGES["words"], data / "packages"), "adj")
    draw = random.Random(0)
    combined = []
    for _ in range(COMBINED):
        one, other, adjective = draw.choice(things), draw.choice(things), draw.choice(adjectives)
        combined.append(draw.choice((f"{one} or {other}", f"{one} and {other}", f"{adjective} {one}")))
    kinds = json.loads((data / "kinds.json").read_text(encoding="utf-8"))
    named = [text for kind in kinds for text in (*kind["names"], kind["text"], *kind["above"])]
    glosses = [kind["gloss"] for kind in kinds]
    others = [*groups, *SUBGROUPS, *tags, *named, *glosses, *words, *combined]
    return [c["text"] for c in captions] + list(dict.fromkeys(others))


def main() -> None:
    """Embed and write."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that data.py wrote")
    data: Path = parser.parse_args().data
    texts = all_texts(data)
    vectors = embed(texts).half().numpy()
    unfinished = data / "texts.npy.partial"
    with unfinished.open("wb") as file:
        np.save(file, vectors)
    unfinished.replace(data / "texts.npy")
    write_atomically(data / "texts.json", json.dumps(texts, ensure_ascii=False, indent=0))
    print(f"{len(texts)} texts")


if __name__ == "__main__":
    main()
