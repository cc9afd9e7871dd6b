"""Further texts of each class, from a JSON file: name → list of texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from difflib import get_close_matches
from pathlib import Path

from vlprompt.data.splits import class_name
from vlprompt.errors import DataError, first_few, one_line


def read_descriptions(
    file: Path,
    class_names: Sequence[str],
    known: Collection[str] = (),
    say: Callable[[str], object] = lambda text: None,
) -> dict[str, tuple[str, ...]]:
    """Texts of each class, in the file's order; underscores in its names are read as spaces.

    ``say`` is told of names that are neither classes nor among the others that are ``known``. Raises DataError for a
    file that is no such JSON, a class without texts (with the nearest name that has some), and a text without words.
    """
    try:
        content = json.loads(file.expanduser().read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read descriptions {file}: {one_line(error)}") from None
    if not isinstance(content, dict) or not all(isinstance(texts, list) for texts in content.values()):
        raise DataError(f"descriptions {file} must be a JSON object: class name → list of texts")
    found: dict[str, tuple[str, ...]] = {}
    for name, texts in content.items():
        if bad := [text for text in texts if not isinstance(text, str) or not text.strip()]:
            raise DataError(f"descriptions {file}: {bad[0]!r} of '{name}' is no text")
        if (spaced := class_name(name)) in found:
            raise DataError(f"descriptions {file}: '{name}' is there twice")
        found[spaced] = tuple(texts)
    if missing := [name for name in class_names if not found.get(name)]:
        near = get_close_matches(missing[0], [name for name in found if name not in class_names], 1, 0.6)
        raise DataError(
            f"descriptions {file} have no texts of {first_few([repr(name) for name in missing])}"
            + (f" (is '{near[0]}' one of these?)" if near else "")
        )
    if strange := [name for name in found if name not in class_names and name not in known]:
        say(f"descriptions {file} have texts of what is no class: {first_few([repr(name) for name in strange])}")
    return {name: found[name] for name in class_names}
