"""Tables of accuracies in the documentation, from the figures in ``docs/results``, and those from benches.

    python tools/results.py           # rewrites what stands between <!-- results: … --> and <!-- end of results -->
    python tools/results.py --check   # changes nothing; exit code 1 if a page is not what the figures say
    python tools/results.py take runs/b2n docs/results/b2n-mini.csv

``take`` puts what a bench measured into a file of figures, in the place of what that has of the same runs.

A table is named by what it shows, in YAML: ``{of: official.csv, protocol: base-to-novel, data: clothing}``; ``of`` may
be several files. With ``rows``, names or a file of ``tools``, it has these rows alone, in their order; with
``reference`` another row than zero_shot is what they are compared with.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml
from pages import REPOSITORY, marks, rewrite, table, write_changed

from vlprompt.bench.report.tables import Cell, studies, tables
from vlprompt.bench.results import Row, read_results, to_csv
from vlprompt.bench.rows import read_rows, unmarked
from vlprompt.errors import VlpromptError
from vlprompt.files import write_atomically

RESULTS, PAGES = REPOSITORY / "docs" / "results", sorted((REPOSITORY / "docs").rglob("*.md"))
MARKED = marks("results", "end of results")


@dataclass(frozen=True)
class Shown:
    """What a table shows."""

    of: str | Sequence[str]
    protocol: str
    data: str
    rows: str | Sequence[str] = ()
    reference: str | None = None

    def names(self) -> Sequence[str]:
        """Of the rows, in order; none for all that there are."""
        return list(read_rows(REPOSITORY / "tools" / self.rows)) if isinstance(self.rows, str) else self.rows


@cache
def read(file: str) -> list[Row]:
    """The figures of test images in a file of ``docs/results``."""
    return [row for row in read_results(RESULTS / file) if row.split == "test"]


def write_table(named: str) -> str:
    """A table of the figures; raises ValueError where they do not make exactly one."""
    shown = Shown(**yaml.safe_load(named))
    files, names = [shown.of] if isinstance(shown.of, str) else shown.of, shown.names()
    rows = [row for file in files for row in read(file) if row.protocol == shown.protocol]
    if names:
        place = {name: i for i, name in enumerate(names)}
        rows = sorted((row for row in rows if unmarked(row.name) in place), key=lambda row: place[unmarked(row.name)])
        # Rows that a file of figures lacks are left out, but names that are given are all to be there.
        if missing := [] if isinstance(shown.rows, str) else place.keys() - {unmarked(row.name) for row in rows}:
            raise ValueError(f"{shown.of} has no {', '.join(sorted(missing))}: {named}")
    found = [t for study in studies(rows) for t in tables(study, shown.reference) if t.data == (shown.data,)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} tables (allowed: one): {named}")
    made, kept = found[0], len(found[0].head) - 1  # not the seconds, which are this or that machine's
    lines = {
        name: [f"**{cell}**" if made.is_best(name, i) else str(cell) for i, cell in enumerate(cells[:kept])]
        for name, cells in made.lines.items()
        if not isinstance(cells[0], Cell) or cells[0].mean is not None
    }
    return table(("method", *made.head[:kept]), ([name, *cells] for name, cells in lines.items()))


def write_tables(text: str) -> str:
    """A page's text with its tables as the figures have them."""
    return rewrite(text, MARKED, write_table)


def take(bench: Path, file: Path) -> None:
    """Put a bench's figures into a file of figures, by name; runs that it has anew are replaced."""

    def run(row: Row) -> tuple:
        return row.protocol, row.data, row.name, row.backbone, row.shots, row.seed, row.split

    new = read_results(bench / "results.csv")
    old = read_results(file) if file.exists() else []
    taken = {run(row) for row in new}
    kept = [row for row in old if run(row) not in taken]
    write_atomically(file, to_csv(sorted([*kept, *new], key=run)))
    print(f"{file}: {len(taken)} runs taken, {len(taken & {run(row) for row in old})} of them in the place of others")


def main() -> int:
    """Read the arguments and do what they say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    commands = parser.add_subparsers(dest="command")
    taking = commands.add_parser("take", help="put a bench's figures into a file of figures")
    taking.add_argument("bench", type=Path, help="the bench's folder")
    taking.add_argument("file", type=Path, help="the file of figures")
    args = parser.parse_args()
    try:
        if args.command == "take":
            take(args.bench, args.file)
            return 0
        return write_changed({page: write_tables(page.read_text("utf-8")) for page in PAGES}, args.check)
    except (VlpromptError, ValueError, TypeError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
