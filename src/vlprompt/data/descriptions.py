"""Further texts of each class, from a JSON file: name → list of texts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from vlprompt.data.splits import class_name, folded
from vlprompt.documents import MOST_JSON, check_text, parse_json, read_text
from vlprompt.errors import DataError, first_few, one_line

Descriptions = Mapping[str, Sequence[str]]
"""Texts of each class by its name."""


def read_descriptions(file: Path) -> dict[str, tuple[str, ...]]:
    """All texts of a file, in its order; underscores in its names are read as spaces.

    Raises DataError for a file that is no such JSON, a text without words, and two spellings of one name.
    """
    try:
        content = parse_json(read_text(file.expanduser(), MOST_JSON))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read descriptions {file}: {one_line(error)}") from None
    if not isinstance(content, dict) or not all(isinstance(texts, list) for texts in content.values()):
        raise DataError(f"descriptions {file} must be a JSON object: class name → list of texts")
    found: dict[str, tuple[str, ...]] = {}
    spelt: dict[str, str] = {}
    for name, texts in content.items():
        if not folded(name):
            raise DataError(f"descriptions {file}: {name!r} is no name")
        if bad := [text for text in texts if not _is_text(text)]:
            raise DataError(f"descriptions {file}: {one_line(repr(bad[0]), 60)} of '{name}' is no text")
        if (other := spelt.setdefault(folded(name), name)) != name:
            raise DataError(f"descriptions {file}: '{name}' is there twice, as '{other}' too")
        found[class_name(name)] = tuple(texts)
    return found


def _is_text(text: object) -> bool:
    if not isinstance(text, str) or not text.strip():
        return False
    try:
        check_text(text)
    except ValueError:
        return False
    return True


def texts_of(descriptions: Descriptions, class_names: Sequence[str], source: str) -> list[tuple[str, ...]]:
    """The texts of each class; names may be spelt in the ways that :func:`folded` leaves out.

    Raises DataError that names the ``source``, the classes without texts, and the nearest name that has some.
    """
    known = {folded(name): tuple(texts) for name, texts in descriptions.items()}
    if missing := [name for name in class_names if not known.get(folded(name))]:
        asked = {folded(name) for name in class_names}
        others = [name for name, texts in descriptions.items() if texts and folded(name) not in asked]
        raise DataError(f"{source} no texts of {missing_names(missing, others)}")
    return [known[folded(name)] for name in class_names]


def missing_names(missing: Sequence[str], others: Iterable[str]) -> str:
    """The names in words, with the one of the ``others`` that is nearest to the first."""
    spelt = {folded(name): name for name in others}
    near = get_close_matches(folded(missing[0]), spelt, 1, 0.6)
    listed = first_few([f"'{name}'" for name in missing])
    return listed + (f" (is '{spelt[near[0]]}' one of these?)" if near else "")


def strange_names(descriptions: Descriptions, known: Collection[str]) -> str | None:
    """The names that are not among those ``known``, in words, each with the nearest that is; None if all are."""
    spelt = {folded(name): name for name in known}
    strange: list[str] = []
    for name in (name for name in descriptions if folded(name) not in spelt):
        near = get_close_matches(folded(name), spelt, 1, 0.6) if len(strange) < 5 else []  # looking takes a while
        strange.append(f"'{name}'" + (f" (did you mean '{spelt[near[0]]}'?)" if near else ""))
    return first_few(strange) if strange else None


def check_descriptions(
    descriptions: Descriptions,
    class_names: Sequence[str],
    known: Collection[str],
    source: str,
    say: Callable[[str], object],
) -> None:
    """Raise DataError for classes without texts; ``say`` is told of names neither among them nor ``known``."""
    texts_of(descriptions, class_names, f"{source} have")
    if strange := strange_names(descriptions, [*class_names, *known]):
        say(f"{source} have texts of what is no class: {strange}")


def with_other(descriptions: Descriptions, other: Descriptions) -> dict[str, Sequence[str]]:
    """Both; where a name is in both, in whatever spelling, the ``other`` texts."""
    mine = {folded(name) for name in other}
    return {**{name: texts for name, texts in descriptions.items() if folded(name) not in mine}, **other}
