"""Train the tokenizer of ``mini``: CLIP's byte-pair scheme on captions and everyday English.

    python tools/mini/tokenizer.py --data pretraining --out pretraining/mini

Counts come from the captions and tags, and from WordNet's own: how often each sense of a word was met in a tagged
corpus. All 256 bytes are tokens, inside and at the end of a word, so that no character is left out.
Writes ``tokenizer.json`` and ``tokenizer_config.json``.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from data import PACKAGES, package_folder
from vlprompt.backbones.tokenizer import EOS, SOS, bpe_from_merges
from vlprompt.files import write_atomically

VOCABULARY = 10_240
CONTEXT = 32
TEMPLATES = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a picture of a {}.",
    "an icon of a {}.",
    "an emoji of a {}.",
    "a drawing of a {}.",
    "a line drawing of the {}.",
    "a sketch of a {}.",
    "a cartoon {}.",
    "a black and white picture of a {}.",
    "a small picture of a {}.",
    "a centered satellite photo of {}.",
    "a close-up photo of a {}.",
    "a photo of a {}, a type of food.",
    "a photo of a {}, a type of animal.",
    "a photo of a {}, a type of plant.",
    "a photo of a person doing {}.",
    "itap of a {}.",
    "this is a {}.",
    "{}.",
)


def counts(data: Path, senses: Path) -> Counter[str]:
    """How often each word counts."""
    words: Counter[str] = Counter()

    def add(text: str, times: int) -> None:
        for word in re.findall(r"[^\W\d_]+|\d|[^\s\w]+", text.lower()):
            words[word] += times

    for line in senses.read_text(encoding="ascii").splitlines():
        lemma, *_, met = line.split()
        add(lemma.split("%")[0].replace("_", " "), 1 + int(met))
    for caption in json.loads((data / "captions.json").read_text(encoding="utf-8")):
        add(caption["text"], 20)
        for tag in caption["tags"]:
            add(tag, 5)
    for template in TEMPLATES:
        add(template.format(""), 1000)
    return words


def train(words: Counter[str], size: int) -> Tokenizer:
    """A tokenizer whose vocabulary has ``size`` entries: 512 bytes, merges, two special tokens."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(vocab_size=4 * size, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator((word for word, n in words.items() for _ in range(n)), trainer)
    merges = [" ".join(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    tokenizer = bpe_from_merges(merges[: size - 512 - 2])
    start, end = (tokenizer.get_vocab()[token] for token in (SOS, EOS))
    tokenizer.post_processor = processors.RobertaProcessing(
        (EOS, end), (SOS, start), trim_offsets=False, add_prefix_space=False
    )
    return tokenizer


def main() -> None:
    """Count, train, write."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that data.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the backbone")
    parser.add_argument("--size", type=int, default=VOCABULARY, help="entries of the vocabulary")
    options = parser.parse_args()
    senses = package_folder(PACKAGES["words"], options.data / "packages") / "dict" / "index.sense"
    tokenizer = train(counts(options.data, senses), options.size)
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "backend": "tokenizers",
        "bos_token": SOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "unk_token": EOS,
        "model_max_length": CONTEXT,
    }
    write_atomically(options.out / "tokenizer.json", tokenizer.to_str())
    write_atomically(options.out / "tokenizer_config.json", json.dumps(settings, indent=1) + "\n")
    print(f"{tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
