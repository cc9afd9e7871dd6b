"""Tables between marks in pages of the documentation, which tools write from code or committed figures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from vlprompt.files import write_atomically

REPOSITORY = Path(__file__).parents[1]


def marks(kind: str, end: str, name: str = ".+?") -> re.Pattern[str]:
    """What stands between ``<!-- kind: name -->`` and ``<!-- end -->``, with both."""
    return re.compile(rf"(<!-- {kind}: ({name}) -->\n).*?(<!-- {end} -->)", re.DOTALL)


def rewrite(text: str, marked: re.Pattern[str], content: Callable[[str], str]) -> str:
    """A page's text with the content of each name between its marks."""
    return marked.sub(lambda found: f"{found[1]}{content(found[2])}\n{found[3]}", text)


def write_changed(files: Mapping[Path, str], check: bool) -> int:
    """Name the files whose content is another, and write them unless they are only checked; 1 if a check finds any."""
    changed = [file for file, text in files.items() if not file.is_file() or file.read_text("utf-8") != text]
    for file in changed:
        print(file.relative_to(REPOSITORY) if file.is_relative_to(REPOSITORY) else file)
        if not check:
            write_atomically(file, files[file])
    return int(check and bool(changed))


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """In Markdown."""
    head = tuple(head)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ("---",) * len(head), *rows))
