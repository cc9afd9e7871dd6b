"""Descriptions of classes, or a language model's prior about them: made class by class, and resumable."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from vlprompt.data.splits import check_class_names, class_name
from vlprompt.describe.language import LanguageModel
from vlprompt.documents import check_text, read_sealed, read_text, write_sealed
from vlprompt.errors import ConfigError, DataError, Interrupted, OutputError, one_line
from vlprompt.files import held, write_atomically
from vlprompt.prompting.prior import Past, Prior, fingerprint, write_prior

QUESTIONS = (
    "what does a {} look like?",
    "describe what the eye sees first in a {}.",
    "how would you recognise a {} in a photograph?",
    "name the colours and shapes that are typical of a {}.",
    "what sets a {} apart from things that look like it?",
    "describe the surface and texture of a {}.",
    "which visible parts does a {} have?",
    "how would you paint a {} so that everybody knows it?",
    "describe a {} to somebody who has never seen one.",
    "which visual details never fail to give away a {}?",
    "sum up the appearance of a {}.",
)
"""Eleven, as in DroPLe's code, in words of our own."""
SUFFIXES = (".json", ".safetensors")
MOST_QUESTIONS = 1 << 20
SETTINGS = "settings.json"

Say = Callable[[str], object]


def read_questions(file: Path | None) -> tuple[str, ...]:
    """One question a line, each with {} for the class name; the default ones without a file.

    Raises DataError for a file that cannot be read, or that holds none, a line without {}, or one twice.
    """
    if file is None:
        return QUESTIONS
    try:
        text = read_text(file.expanduser(), MOST_QUESTIONS)
        check_text(text)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read questions {file}: {one_line(error)}") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"questions {file}: there are none (one a line, with {{}} for the class name)")
    for i, line in enumerate(lines):
        if "{}" not in line:
            raise DataError(f"questions {file}: '{one_line(line, 60)}' has no {{}} for the class name")
        if line in lines[:i]:
            raise DataError(f"questions {file}: '{one_line(line, 60)}' is there twice")
    return tuple(lines)


def check_out(out: Path) -> None:
    """Raise ConfigError for what is neither descriptions nor a prior, OutputError for a file that is there already."""
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"--out {out} (allowed: a .json file for descriptions, a .safetensors file for a prior)")
    if out.exists():
        raise OutputError(f"{out} is there already: delete it, or choose another name")


def describe(
    language: LanguageModel,
    class_names: Sequence[str],
    questions: Sequence[str],
    out: Path,
    max_tokens: int,
    say: Say = lambda text: None,
) -> None:
    """Ask about every class, and write descriptions (.json) or a prior (.safetensors) to the new file ``out``.

    What is done stays in the folder ``OUT.part`` until all is, class by class: the same command goes on from there.
    Raises ConfigError if it was begun with other settings, BackboneError for a prior of a model that is not
    Llama-style, and DataError for a class that the model says nothing of.
    """
    check_out(out)
    check_class_names(class_names, "class names")
    names = [class_name(name) for name in class_names]
    whole = out.suffix == ".safetensors"
    layer = language.layer() if whole else {}
    if whole:
        language.check(layer, questions[0], names[0])
    settings: dict[str, Any] = {"model": language.fingerprint, "questions": list(questions)}
    settings |= {} if whole else {"max_tokens": max_tokens}
    part = out.with_name(f"{out.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    try:
        with held(part) as alone:
            if not alone:
                raise ConfigError(f"{part} is in use: another process is writing {out}")
            _begin(part, settings)
            files = [part / f"{sha256(name.encode()).hexdigest()[:32]}{out.suffix}" for name in names]
            for i, (name, file) in enumerate(zip(names, files, strict=True)):
                if file.exists():
                    continue
                if whole:
                    _write_past(file, language.past(questions, name))
                else:
                    write_sealed(file, {"texts": _texts(language, questions, name, max_tokens)})
                say(f"{i + 1} of {len(names)}: {name}")
            if whole:
                eps, scaling = language.numbers
                mark, asked = fingerprint(layer, questions, eps, scaling), tuple(questions)
                prior = Prior(out, language.name, asked, tuple(names), layer, eps, scaling, mark)
                write_prior(prior, list(map(_read_past, files)))
            else:
                texts = {name: _read(file)["texts"] for name, file in zip(names, files, strict=True)}
                write_atomically(out, json.dumps(texts, indent=1, ensure_ascii=False) + "\n")
    except KeyboardInterrupt:
        raise Interrupted(f"to continue: the same command again (what is done is in {part})") from None
    shutil.rmtree(part)


def _begin(part: Path, settings: dict[str, Any]) -> None:
    """Note what the folder is made with, or raise ConfigError naming what it was made with before."""
    file = part / SETTINGS
    if not file.exists():
        write_sealed(file, settings)
        return
    before = _read(file)
    if differ := [key for key in {**settings, **before} if settings.get(key) != before.get(key)]:
        raise ConfigError(f"{part} was begun with other {' and '.join(differ)}: give the same again, or delete it")


def _texts(language: LanguageModel, questions: Iterable[str], name: str, max_tokens: int) -> list[str]:
    """What the model says of a class, each text once."""
    said = dict.fromkeys(language.answer(question, name, max_tokens) for question in questions)
    texts = [text for text in said if text]
    if not texts:
        raise DataError(f"{language.name} says nothing of '{name}': ask it other questions (--questions FILE)")
    return texts


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_sealed(file, dict[str, Any])
    except (KeyError, OSError, ValueError) as error:
        raise DataError(f"cannot read {file}: {one_line(error)}; delete it, and repeat the command") from None


def _write_past(file: Path, past: Past) -> None:
    write_atomically(file, save({key: tensor.contiguous() for key, tensor in past._asdict().items()}))


def _read_past(file: Path) -> Past:
    try:
        return Past(**load_file(file))
    except (SafetensorError, OSError, TypeError) as error:
        raise DataError(f"cannot read {file}: {one_line(error)}; delete it, and repeat the command") from None
