"""Texts to token ids, by the `tokenizers` library, from the files that come with a checkpoint."""

from __future__ import annotations

import gzip
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from vlprompt.backbones.convert import read_json
from vlprompt.errors import BackboneError, DataError, one_line

SPACE = "▁"  # SentencePiece's
SOS, EOS = "<|startoftext|>", "<|endoftext|>"
FILES = ("tokenizer.json", "vocab.json", "merges.txt", "bpe_simple_vocab_16e6.txt.gz")
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
"""CLIP's pre-tokenisation: English clitics, runs of letters, single digits, runs of anything else."""


@dataclass(frozen=True)
class TextTokenizer:
    """Token ids of texts without padding; ``start`` and ``end`` are the special tokens around them.

    A text in which a special token is written (``<|endoftext|>``) holds its letters, not the token.
    """

    tokenizer: Tokenizer
    context_length: int
    start: tuple[int, ...]
    end: tuple[int, ...]
    pad: int | None = None
    """Set where the tower was trained on padded texts and reads the padding (SigLIP)."""
    unknown: int | None = None
    """What stands for letters that the vocabulary does not have, where that is a token of its own (SigLIP)."""

    def __post_init__(self) -> None:
        self.tokenizer.encode_special_tokens = True

    def words(self, text: str) -> list[int]:
        """Token ids of a text without special tokens.

        Characters outside a small vocabulary are left out: CLIP's tokenizers would put the end token in their place.
        """
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return [i for i in ids if i not in self.end]

    def reads(self, text: str) -> tuple[bool, bool]:
        """Whether the vocabulary knows anything of a text, and whether it knows all of it."""
        lost = {*self.end, self.unknown}
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        known = [i for i in ids if i not in lost]
        return any((self.tokenizer.id_to_token(i) or "").strip(SPACE) for i in known), len(known) == len(ids)

    def finish(self, ids: Sequence[int], name: str) -> list[int]:
        """Special tokens (and padding, where the tower reads it) around ``ids``.

        Raises DataError naming ``name`` if the text does not fit the context length.
        """
        full = [*self.start, *ids, *self.end]
        if len(full) > self.context_length:
            short = name if len(name) <= 60 else name[:57] + "…"
            raise DataError(
                f"text of class '{short}' has {len(full)} tokens; the backbone reads at most {self.context_length}"
            )
        return full if self.pad is None else full + [self.pad] * (self.context_length - len(full))

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of whole texts, special tokens included; each list ends at the pooled token."""
        return [self.finish(self.words(text), text) for text in texts]


def load_clip_tokenizer(folder: Path, context_length: int) -> TextTokenizer:
    """CLIP's byte-pair tokenizer from any of the files in ``FILES``.

    Texts are put in lower case and white space is joined, as in OpenAI's tokenizer; HTML entities stay as they are.
    """
    if (folder / "tokenizer.json").is_file():
        tokenizer = _read_tokenizer_json(folder / "tokenizer.json")
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocab = read_json(folder / "vocab.json")
        try:
            lines = (folder / "merges.txt").read_text("utf-8").splitlines()
            tokenizer = _clip_bpe(vocab, [line for line in lines if line and not line.startswith("#version")])
        except Exception as error:  # the library raises bare Exception
            raise BackboneError(f"cannot read the tokenizer in {folder}: {one_line(error)}") from None
    elif (folder / "bpe_simple_vocab_16e6.txt.gz").is_file():
        with gzip.open(folder / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as file:
            lines = file.read().splitlines()[1:]
        tokenizer = bpe_from_merges(lines[: 49152 - 256 - 2])  # as many as OpenAI uses of them
    else:
        raise BackboneError(f"no tokenizer in {folder}: needs tokenizer.json, vocab.json + merges.txt or {FILES[-1]}")
    start, end = (tokenizer.token_to_id(t) for t in (SOS, EOS))
    if start is None or end is None:
        raise BackboneError(f"tokenizer in {folder} has no {SOS} and {EOS}: not a CLIP tokenizer")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return TextTokenizer(tokenizer, context_length, (start,), (end,))


def load_siglip_tokenizer(folder: Path, context_length: int, *, canonical: bool = False) -> TextTokenizer:
    """SigLIP's tokenizer: no start token, one end token, padded to the context length.

    SigLIP and SigLIP 2 were trained on texts in lower case, which the files of SigLIP 2 do not say. ``canonical``, as
    open_clip reads texts for them, also drops punctuation, whatever the file does.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        other = next((f.name for f in sorted(folder.glob("*.model"))), None)
        reason = f"; {other} is not read: the model's repository on the hub has tokenizer.json" if other else ""
        raise BackboneError(f"no tokenizer.json in {folder}: SigLIP's tokenizer is read from it{reason}")
    tokenizer = _read_tokenizer_json(file)
    steps: list[normalizers.Normalizer] = [normalizers.Lowercase()]
    if canonical:
        punctuation = Regex("[" + re.escape(string.punctuation.replace("_", "")) + "]")
        steps = [
            normalizers.Replace("_", " "), normalizers.Replace(punctuation, ""), *steps,
            normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(),
        ]  # fmt: skip
    tokenizer.normalizer = normalizers.Sequence([*steps, *([tokenizer.normalizer] if tokenizer.normalizer else [])])
    settings_file = folder / "tokenizer_config.json"
    settings = read_json(settings_file) if settings_file.is_file() else {}
    end, pad, unknown = (
        _token_id(tokenizer, settings.get(f"{key}_token") or default)
        for key, default in (("eos", "</s>"), ("pad", "</s>"), ("unk", "<unk>"))
    )
    if end is None or pad is None:
        raise BackboneError(f"tokenizer in {folder} has no end or padding token")
    # What the file's own post-processor adds is what the model was trained with (SigLIP 2 adds no end token).
    added = tokenizer.encode("a").ids
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    tokenizer.no_padding()
    tokenizer.no_truncation()
    ends = (end,) if added[len(bare) :][:1] == [end] else ()
    return TextTokenizer(tokenizer, context_length, (), ends, pad, unknown)


def _token_id(tokenizer: Tokenizer, token: Any) -> int | None:
    text = token.get("content") if isinstance(token, dict) else token
    return tokenizer.token_to_id(text) if isinstance(text, str) else None


def _read_tokenizer_json(file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise BackboneError(f"cannot read {file}: {one_line(error)}") from None


def bpe_from_merges(merges: list[str]) -> Tokenizer:
    """CLIP's tokenizer by its merges: ids are 256 bytes, the same at a word's end, merges, two special tokens."""
    # pre_tokenizers.ByteLevel.alphabet() has no order; OpenAI's is printable bytes first, then the others from U+0100.
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [b for b in range(256) if b not in printable]
    alphabet = [chr(b) for b in printable] + [chr(256 + n) for n in range(len(others))]
    names = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(m.split()) for m in merges), SOS, EOS]
    return _clip_bpe({name: i for i, name in enumerate(names)}, merges)


def _clip_bpe(vocab: dict[str, int], merges: list[str]) -> Tokenizer:
    pairs = [(a, b) for a, b in (line.split() for line in merges)]
    tokenizer = Tokenizer(models.BPE(vocab, pairs, unk_token=EOS, end_of_word_suffix="</w>", fuse_unk=False))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([SOS, EOS])
    return tokenizer
