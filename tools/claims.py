"""Write the tables of ``docs/claims.md``: what the three systems claim, each tested on the committed figures of runs.

    python tools/claims.py           # rewrites what stands between <!-- claims: … --> and <!-- end of claims -->
    python tools/claims.py --check   # changes nothing; exit code 1 if a page is not what the figures say

``tools/tables/claims.yaml`` holds the hypotheses; README has those that it marks ``front``. What has no figures is
named, and is "not measured" on the pages.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean, variance

import yaml
from pages import REPOSITORY, marks, rewrite, write_changed
from scipy.special import stdtr

from vlprompt.bench.report.tables import Cell, Difference, Table, studies, tables
from vlprompt.bench.results import Row, read_results

RESULTS, PAGE = REPOSITORY / "docs" / "results", REPOSITORY / "docs" / "claims.md"
README = REPOSITORY / "README.md"
HYPOTHESES = REPOSITORY / "tools" / "tables" / "claims.yaml"
MARKED = marks("claims", "end of claims")
SYSTEMS = {"drople": "DroPLe", "fdbpl": "FDBPL", "dpl": "DPL"}
LEVEL = 0.05


@dataclass(frozen=True)
class Hypothesis:
    """A figure of row ``a`` minus that of row ``b`` is above ``at_least``."""

    table: str
    claim: str
    a: str
    b: str
    results: str
    rows: str
    protocol: str
    figure: str
    data: tuple[str, ...]
    at_least: float = 0
    build: float = 0
    front: bool = False

    @property
    def null(self) -> float:
        """What differences are compared with: points, or of times the logarithm of a factor."""
        return math.log(self.at_least) if self.figure == "speed" else self.at_least


@dataclass(frozen=True)
class Tested:
    """What pairs say of a hypothesis."""

    n: int
    mean: float
    error: float | None
    """The mean's standard error; None where a data set has one pair alone."""
    p: float | None
    """Two-sided; None without an error, or where pairs do not differ among themselves."""
    verdict: str
    above: str
    """How many data sets agree, and p where each of them counts as one observation."""


def compare(pairs: Mapping[str, Sequence[float]], null: float = 0) -> Tested:
    """The mean over data sets of their mean differences, against ``null``.

    Only seeds vary: the standard error is made of the spread within each data set. Of one data set this is the paired
    t-test; of several, degrees of freedom are Welch's and Satterthwaite's.
    """
    groups, error, p = list(pairs.values()), None, None
    means = [mean(values) for values in groups]
    if all(len(values) > 1 for values in groups):
        parts = [variance(values) / len(values) for values in groups]
        error = math.sqrt(sum(parts)) / len(parts)
        if error > 1e-9:
            freedom = sum(parts) ** 2 / sum(v**2 / (len(g) - 1) for v, g in zip(parts, groups, strict=True))
            p = float(2 * stdtr(freedom, -abs(mean(means) - null) / error))
    verdict = "not told apart" if p is None or p >= LEVEL else "holds" if mean(means) > null else "fails"
    own = tuple(m - null for m in means)
    above = f"{sum(m > 0 for m in own)} of {len(own)}, p {shown(Difference(own).p)}" if len(own) > 1 else ""
    return Tested(sum(map(len, groups)), mean(means), error, p, verdict, above)


def holm(ps: Sequence[float | None]) -> list[float]:
    """p corrected for so many tests; what has none counts as 1."""
    known, corrected, highest = [1 if p is None else p for p in ps], [1.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=known.__getitem__)):
        corrected[i] = highest = max(highest, min(1, (len(ps) - rank) * known[i]))
    return corrected


# --- figures --------------------------------------------------------------------------------------


def read_hypotheses() -> list[Hypothesis]:
    """In the order of the page."""
    blocks = yaml.safe_load(HYPOTHESES.read_text("utf-8"))
    every = [{"table": name, **block["common"], **own} for name, block in blocks.items() for own in block["hypotheses"]]
    return [Hypothesis(**{**one, "data": tuple(one["data"])}) for one in every]


@cache
def read_tables(file: Path) -> tuple[list[Row], list[tuple[str, Table]]]:
    """What ``vlprompt report`` makes of a results file's test images, each table with its protocol."""
    rows = [row for row in read_results(file) if row.split == "test"] if file.exists() else []
    return rows, [(study.protocol, table) for study in studies(rows) for table in tables(study)]


def by_seed(h: Hypothesis, name: str, data: str, results: Path = RESULTS) -> dict[int, float]:
    """A row's figure on a data set; none where it is not measured."""
    rows, made = read_tables(results / h.results)
    if h.figure == "speed":
        own = [r for r in rows if (r.protocol, r.data, r.name) == (h.protocol, data, name)]
        if len({(r.backbone, r.shots) for r in own}) > 1:
            raise SystemExit(f"{h.results}: '{name}' on {data} has several backbones or shots (allowed: one of each)")
        seconds = {r.seed: r.train_seconds for r in own}
        share = h.build / len(seconds) if name == h.a and seconds else 0
        return {seed: -math.log(value + share) for seed, value in seconds.items()}
    found = [t for protocol, t in made if (protocol, t.data) == (h.protocol, (data,)) and h.figure in t.head]
    cells = [t.lines[name][t.head.index(h.figure)] for t in found if name in t.lines]
    if len(cells) > 1:
        raise SystemExit(f"{h.results}: '{name}' on {data} has several figures '{h.figure}' (allowed: one backbone)")
    return dict(cells[0].values) if cells and isinstance(cells[0], Cell) else {}


def pairs(h: Hypothesis, results: Path = RESULTS) -> dict[str, list[float]]:
    """Differences by data set, of the seeds that both rows have."""
    both = {data: [by_seed(h, name, data, results) for name in (h.a, h.b)] for data in h.data}
    found = {data: [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())] for data, (a, b) in both.items()}
    return {data: values for data, values in found.items() if values}


def missing(h: Hypothesis) -> str:
    """Which rows lack which data sets, in a line; nothing if all is there."""
    gone = {name: [data for data in h.data if not by_seed(h, name, data)] for name in (h.a, h.b)}
    lack = "; ".join(f"'{name}' on {', '.join(data)}" for name, data in gone.items() if data)
    return lack and f"not measured: {h.claim}: {h.results} lacks {h.protocol}, {h.figure}, of {lack}"


# --- the page -------------------------------------------------------------------------------------


def write_page(text: str, hypotheses: Sequence[Hypothesis], results: Path = RESULTS) -> str:
    """The page with its tables as the figures have them; raises KeyError for a table that there is not."""
    known = {h: pairs(h, results) for h in hypotheses}
    tested = {h: compare(found, h.null) for h, found in known.items() if found}
    corrected = dict(zip(known, holm([tested[h].p if h in tested else None for h in known]), strict=True))

    def line(h: Hypothesis) -> str:
        """What a hypothesis comes to."""
        return cells(h, tested.get(h), shown(corrected[h]))

    def summary() -> Iterator[str]:
        yield f"{len(known)} hypotheses, of which {len(tested)} are measured.\n"
        yield "| system | claim | difference ± s. e. | p | Holm | verdict |\n|---|---|---|---|---|---|"
        yield from (f"| {SYSTEMS[h.table.split()[0]]} | {h.claim} | {line(h)} |" for h in known)

    def front() -> Iterator[str]:
        yield "| claim | difference ± s. e. | p | Holm | verdict |\n|---|---|---|---|---|"
        yield from (f"| {h.claim} | {line(h)} |" for h in known if h.front)

    def table(name: str) -> Iterator[str]:
        yield "| claim | data | pairs | difference ± s. e. | p | Holm | verdict | data sets above |"
        yield "|---" * 8 + "|"
        for h in (h for h in known if h.table == name):
            least = f", at least {number(h, h.at_least)}" if h.at_least else ""
            what, several = f"{h.claim}: `{h.a}` − `{h.b}`, {h.figure}{least}", len(h.data) > 1
            for data in known[h] if several else ():
                one = compare({data: known[h][data]}, h.null)
                yield f"| {what} | {data} | {one.n} | {cells(h, one, '')} | |"
                what = ""
            data = f"{len(known[h])} of {len(h.data)} data sets" if several else h.data[0]
            n, above = (tested[h].n, tested[h].above) if h in tested else (0, "")
            yield f"| {what} | {data} | {n} | {line(h)} | {above} |"

    def content(name: str) -> str:
        if name not in ("summary", "front", *(h.table for h in known)):
            raise KeyError(name)
        return "\n".join(summary() if name == "summary" else front() if name == "front" else table(name))

    return rewrite(text, MARKED, content)


def cells(h: Hypothesis, tested: Tested | None, corrected: str) -> str:
    """Difference, p, corrected p and verdict; the verdict is bold where p is corrected."""
    if tested is None:
        return "– | – | – | not measured"
    factor = math.exp(tested.mean)
    difference, scale = (factor, factor) if h.figure == "speed" else (tested.mean, 1)
    spread = "" if tested.error is None else f" ± {scale * tested.error:.2f}"
    verdict = f"**{tested.verdict}**" if corrected else tested.verdict
    return f"{number(h, difference)}{spread} | {shown(tested.p)} | {corrected} | {verdict}"


def number(h: Hypothesis, value: float) -> str:
    """A difference, or of times a factor."""
    return f"× {value:.2f}" if h.figure == "speed" else f"{value:+.2f}".replace("-", "−")


def shown(p: float | None) -> str:
    """A p-value."""
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def main() -> int:
    """Rewrite the pages, or with ``--check`` say whether they would change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    check, hypotheses = parser.parse_args().check, read_hypotheses()
    for told in filter(None, map(missing, hypotheses)):
        print(told, file=sys.stderr)
    return write_changed({page: write_page(page.read_text("utf-8"), hypotheses) for page in (PAGE, README)}, check)


if __name__ == "__main__":
    sys.exit(main())
