"""Make ``tests/golden``: the golden vectors, small enough to commit.

    python tools/reduce_golden.py GOLDEN_FOLDER tests/golden

GOLDEN_FOLDER holds ``backbone/`` (CLIP in Hugging Face format with the whole CLIP vocabulary) and
``cases/METHOD/CASE.{json,safetensors}``. What changes on the way to OUT, and nothing else:

- the vocabulary keeps the 512 byte tokens, every merge that is applied while one of the tests' texts is tokenised,
  and the two special tokens. A merge that is never applied cannot change a text's segmentation. Ids are renumbered
  without gaps in their old order, so that the end token stays the largest id;
- the text token embedding keeps the rows of those tokens, exactly as stored (fp16);
- ``tokenized_prompts`` in the cases is written in the new ids.

The tool stops, before it writes anything, if a text is not tokenised as before.
``OUT/backbone`` and ``OUT/cases`` are replaced.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from vlprompt.backbones.tokenizer import EOS, SOS
from vlprompt.methods.templates import ENSEMBLES

CONTEXTS = {"a photo of a", "a photo of no"}
"""Beside those that the cases name."""

BYTES = 512
"""Tokens that are no merges: each byte, inside a word and at its end."""

EMBEDDING = "text_model.embeddings.token_embedding.weight"
COPIED = ("preprocessor_config.json", "tokenizer_config.json")

Json = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One golden case: ``name`` is METHOD/CASE."""

    name: str
    file: Path
    info: Json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("golden", type=Path, metavar="GOLDEN_FOLDER", help="the whole set")
    parser.add_argument("out", type=Path, metavar="OUT", help="the reduced set")
    arguments = parser.parse_args()
    golden, out = arguments.golden, arguments.out

    cases = read_cases(golden / "cases")
    texts = sorted(needed_texts(cases))
    settings = json.loads((golden / "backbone" / "tokenizer.json").read_text("utf-8"))
    kept = kept_ids(settings, texts)
    reduced = reduce_tokenizer(settings, kept)
    new_id = {old: new for new, old in enumerate(kept)}
    check_texts(settings, reduced, new_id, texts)
    tensors = {case.name: reduce_case(case, new_id) for case in cases}

    write_backbone(golden / "backbone", fresh(out / "backbone"), kept, reduced)
    folder = fresh(out / "cases")
    for case in cases:
        target = folder / f"{case.name}.safetensors"
        target.parent.mkdir(exist_ok=True)
        save_file(tensors[case.name], target)
        shutil.copyfile(case.file, target.with_suffix(".json"))
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{len(cases)} cases, {len(kept)} tokens for {len(texts)} texts, {size / 1e6:.2f} MB")


def read_cases(folder: Path) -> list[Case]:
    """Every case in ``folder``, by name."""
    files = sorted(folder.glob("*/*.json"))
    return [Case(f"{f.parent.name}/{f.stem}", f, json.loads(f.read_text("utf-8"))) for f in files]


def needed_texts(cases: list[Case]) -> set[str]:
    """Every text that a test of these cases tokenises: names, contexts, and both together in every template."""
    names, contexts, whole = set(), set(CONTEXTS), set()
    templates = {template for ensemble in ENSEMBLES.values() for template in ensemble}
    for case in cases:
        info = case.info
        hyper = info.get("hyper") or {}
        for key in ("classnames", "novel_classnames", "text_to_text_classnames"):
            names |= {name.replace("_", " ") for name in info.get(key) or hyper.get(key) or ()}
        contexts |= {v.replace("_", " ") for k, v in hyper.items() if k.lower().startswith("ctx_init") and v}
        templates |= {v for k, v in hyper.items() if k.lower().endswith("template") and "{}" in v}
        templates |= {*info.get("templates", ()), *hyper.get("lasp_templates", ())}
        whole |= {text for texts in (info.get("gpt_prompts") or {}).values() for text in texts}
    contexts |= {"X X"} | {f"X {context}" for context in contexts}  # placeholders of learned tokens without words
    sentences = {f"{context} {{}}." for context in contexts} | templates
    return names | contexts | whole | {sentence.format(name) for sentence in sentences for name in names}


def kept_ids(settings: Json, texts: list[str]) -> list[int]:
    """Old ids of the reduced vocabulary, in their old order."""
    vocab, merges = settings["model"]["vocab"], [pair(m) for m in settings["model"]["merges"]]
    merged, special = {a + b for a, b in merges}, {SOS, EOS}
    kept = {token for token in vocab if token not in merged and token not in special}
    if len(kept) != BYTES:
        raise SystemExit(f"{len(kept)} tokens are no merges (CLIP's tokenizer: {BYTES})")
    rank = {merge: i for i, merge in enumerate(merges)}
    tokenizer = Tokenizer.from_str(json.dumps(settings))
    for word in {word for text in texts for word in pre_tokens(tokenizer, text)}:
        kept |= {a + b for a, b in applied_merges(word, rank)}
    ids = sorted(vocab[token] for token in kept | special)
    if ids[-2:] != [vocab[SOS], vocab[EOS]]:
        raise SystemExit("the special tokens are not the largest ids")
    return ids


def pre_tokens(tokenizer: Tokenizer, text: str) -> list[str]:
    """The words that merges do not cross, one character a byte."""
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))]


def applied_merges(word: str, rank: dict[tuple[str, str], int]) -> list[tuple[str, str]]:
    """Byte-pair encoding of one word: the adjacent pair of lowest rank is merged first, everywhere it stands."""
    parts = [*word[:-1], word[-1] + "</w>"]
    applied = []
    while pairs := [p for p in pairwise(parts) if p in rank]:
        best = min(pairs, key=rank.__getitem__)
        applied.append(best)
        merged, i = [], 0
        while i < len(parts):
            here = tuple(parts[i : i + 2]) == best
            merged.append("".join(best) if here else parts[i])
            i += 2 if here else 1
        parts = merged
    return applied


def pair(merge: str | list[str]) -> tuple[str, str]:
    """A merge's two parts, of which older files make one string."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def reduce_tokenizer(settings: Json, kept: list[int]) -> Json:
    """``tokenizer.json`` with the kept tokens only, renumbered."""
    new_id = {old: new for new, old in enumerate(kept)}
    model = settings["model"]
    vocab = {t: new_id[i] for t, i in sorted(model["vocab"].items(), key=lambda item: item[1]) if i in new_id}
    merges = [m for m in model["merges"] if "".join(pair(m)) in vocab]
    added = [token | {"id": new_id[token["id"]]} for token in settings["added_tokens"]]
    ends = {key: [token, new_id[i]] for key in ("sep", "cls") for token, i in [settings["post_processor"][key]]}
    return settings | {
        "added_tokens": added,
        "post_processor": settings["post_processor"] | ends,
        "model": model | {"vocab": vocab, "merges": merges},
    }


def check_texts(full: Json, reduced: Json, new_id: dict[int, int], texts: list[str]) -> None:
    """Stop unless the reduced tokenizer gives every text the full one's ids, renumbered."""
    before, after = (Tokenizer.from_str(json.dumps(settings)) for settings in (full, reduced))
    for tokenizer in (before, after):
        tokenizer.no_truncation()
        tokenizer.no_padding()
    for text in texts:
        expected = [new_id.get(i) for i in before.encode(text).ids]
        if (found := after.encode(text).ids) != expected:
            raise SystemExit(f"'{text}' is tokenised as {found}, not {expected}")


def reduce_case(case: Case, new_id: dict[int, int]) -> dict[str, Tensor]:
    """A case's tensors, its token ids renumbered."""
    tensors = load_file(case.file.with_suffix(".safetensors"))
    if (old := tensors.get("tokenized_prompts")) is not None:
        if missing := set(old.flatten().tolist()) - set(new_id):
            raise SystemExit(f"{case.name}: the reduced vocabulary has no tokens {sorted(missing)}")
        tensors["tokenized_prompts"] = old.clone().apply_(new_id.__getitem__)
    return tensors


def write_backbone(source: Path, target: Path, kept: list[int], tokenizer: Json) -> None:
    """The backbone with the kept rows of the token embedding."""
    with safe_open(source / "model.safetensors", "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors[EMBEDDING] = tensors[EMBEDDING][torch.tensor(kept)]
    save_file(tensors, target / "model.safetensors", metadata)

    config = json.loads((source / "config.json").read_text("utf-8"))
    start, end = len(kept) - 2, len(kept) - 1
    text = config["text_config"]
    text |= {"vocab_size": len(kept), "bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    lines = json.dumps(tokenizer, ensure_ascii=False, indent=1)
    (target / "tokenizer.json").write_text(lines + "\n", "utf-8")
    for name in COPIED:
        shutil.copyfile(source / name, target / name)


def fresh(folder: Path) -> Path:
    """``folder``, emptied."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


if __name__ == "__main__":
    main()
