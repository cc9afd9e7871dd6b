"""``vlprompt report``: the tables and plots of a bench folder as Markdown, LaTeX and one HTML page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from vlprompt.bench.bench import PLANNED, read_planned
from vlprompt.bench.cells import AnyCell, Cell, Difference, Seconds
from vlprompt.bench.protocols import PROTOCOLS
from vlprompt.bench.report import plots
from vlprompt.bench.report.details import PerClass, gains, per_class, read_runs, unlike
from vlprompt.bench.report.published import SETTING, Published, published
from vlprompt.bench.report.tables import Study, Table, find_reference, studies, tables
from vlprompt.bench.results import RESULTS, read_results
from vlprompt.errors import ConfigError, DataError, unknown
from vlprompt.files import write_atomically

CONVENTIONS = (
    "Accuracy in percent: the mean over seeds ± its sample standard deviation, of the last epoch. An average over data "
    "sets counts the seeds that all of them have. HM is the harmonic mean of the mean base and the mean novel "
    "accuracy, of the seeds that have both. Differences are paired by seed (of HM: of each seed's HM); p is two-sided, "
    "of a t-test over seeds. “–”: the method cannot be asked. train, s: seconds that a run trained."
)
GROUP_NOTE = (
    "many, medium and few are the thirds of the classes by number of training images; “–”: no test image is of a class "
    "in that third."
)


@dataclass(frozen=True)
class Section:
    """A study with its tables, and its plots by caption."""

    study: Study
    reference: str
    tables: list[Table]
    plots: dict[str, str]
    notes: tuple[str, ...]


def read_sections(folder: Path, reference: str | None = None) -> list[Section]:
    """What there is to report of a bench folder, or of one that holds a results.csv only.

    Raises DataError for results that are not there, cannot be read or do not belong together, ConfigError for a
    reference that is no row of any study; where one study lacks it, a note says so.
    """
    rows = read_results(folder / RESULTS)
    if not rows:
        raise DataError(f"there are no results in {folder / RESULTS} yet")
    planned = [
        {"protocol": protocol, **run}
        for protocol in PROTOCOLS
        for run in read_planned(folder / protocol / PLANNED).values()
    ]
    sections, every = [], studies(rows, planned)
    names = list(dict.fromkeys(name for study in every for name in study.names))
    if reference is not None and reference not in names:
        raise ConfigError(unknown("reference", reference, names))
    for study in every:
        compared = find_reference(study, reference if reference in study.names else None)
        runs = read_runs(folder, study)
        made = [_beside_published(study, table) for table in tables(study, compared)]
        drawn = _plots(study, made, compared, plots.colours(names, compared), per_class(runs, study))
        notes = [PROTOCOLS[study.protocol].about] if study.protocol in PROTOCOLS else []
        notes += [GROUP_NOTE] if study.protocol == "long-tail" else []
        codes = sorted({row.code for row in study.rows})
        notes += [f"Code version {', '.join(codes)}."] if codes else ["There are no results yet."]
        notes += ["Versions differ between runs."] if len(codes) > 1 else []
        notes += unlike(runs.values(), study)
        if reference not in (None, compared):
            notes.append(f"There is no row '{reference}' here: the others are compared with {compared}.")
        sections.append(Section(study, compared, made, drawn, tuple(notes)))
    return sections


def write_report(folder: Path, reference: str | None = None) -> str:
    """Write report.md, report.tex and report.html into the folder; returns the Markdown."""
    sections = read_sections(folder, reference)
    text = markdown(sections)
    write_atomically(folder / "report.md", text)
    write_atomically(folder / "report.tex", latex(sections))
    write_atomically(folder / "report.html", html(sections))
    return text


def _beside_published(study: Study, table: Table) -> Table:
    """The table with what papers report of the rows' methods in the same setting, where they do."""
    methods = {row.name: row.method for row in study.rows}
    sources: dict[str, str] = {}
    for column, known in published(study.protocol, study.backbone, study.split, study.shots[0], table.data).items():
        beside = {name: known[methods[name]] for name in study.names if methods.get(name) in known}
        if beside:
            lines = tuple((name, (*cells, beside.get(name, Published()))) for name, cells in table.lines)
            head, best = (*table.head, f"published {column}"), (*table.best, None)
            table = replace(table, head=head, lines=lines, best=best)
            sources |= {name: figure.source for name, figure in beside.items()}
    if not sources:
        return table
    listed = "; ".join(f"{name}: {sources[name]}" for name in study.names if name in sources)
    return replace(table, note=f"{table.note} {SETTING}: {listed}.".strip())


def _plots(
    study: Study,
    made: Sequence[Table],
    reference: str,
    colour: Mapping[str, str],
    classes: PerClass,
) -> dict[str, str]:
    """Of the first table (the average, or the only data set), of each table's shots, and of each data set's classes."""
    first, drawn = made[0], {}

    def means(column: str) -> dict[str, float]:
        place = first.head.index(column)
        cells = {name: cells[place] for name, cells in first.lines}
        return {name: c.mean for name, c in cells.items() if isinstance(c, Cell) and c.mean is not None}

    if study.protocol == "base-to-novel":
        base, novel = means("base"), means("novel")
        points = {name: (base[name], novel[name]) for name in base if name in novel}
        if means("HM"):
            drawn[f"Harmonic mean: {first.title}"] = plots.bars(means("HM"), colour, "Harmonic mean")
        if points:
            drawn[f"Base and novel accuracy: {first.title}"] = plots.base_and_novel(points, colour, "Base and novel")
    elif study.protocol == "few-shot":
        for table in made:
            lines: dict[str, dict[int, tuple[float, float]]] = {}
            for name, cells in table.lines:
                for shots, cell in zip(study.shots, cells, strict=False):
                    if isinstance(cell, Cell) and cell.mean is not None:
                        lines.setdefault(name, {})[shots] = cell.mean, cell.std or 0.0
            if lines:
                drawn[f"Accuracy and shots: {table.title}"] = plots.curves(lines, colour, "Accuracy and shots")
    for data, rows in classes.items():
        for name in study.names:
            gain = gains(rows.get(name, {}), rows.get(reference, {}))
            if name != reference and gain:
                caption = f"Gain of each class, in points: {name} over {reference} on {data}"
                drawn[caption] = plots.gains(gain, caption)
    return drawn


# --- Markdown -------------------------------------------------------------------------------------


def markdown(sections: Sequence[Section]) -> str:
    """All tables as Markdown."""
    parts = ["# Results", CONVENTIONS]
    for section in sections:
        parts += [f"## {section.study.title}", " ".join(section.notes)]
        for table in section.tables:
            lines = [f"| method | {' | '.join(table.head)} |", "|---" * (len(table.head) + 1) + "|"]
            for name, cells in table.lines:
                shown = (f"**{c}**" if _is_best(c, best) else str(c) for c, best in zip(cells, table.best, strict=True))
                lines.append(f"| {table.label(name).replace('|', '/')} | {' | '.join(shown)} |")
            parts += [f"### {table.title}", "\n".join(lines), *([table.note] if table.note else [])]
    return "\n\n".join(parts) + "\n"


def _is_best(cell: AnyCell, best: float | None) -> bool:
    """Whether it is bold: the highest as it is printed, so that ties are all bold."""
    return isinstance(cell, Cell) and None not in (best, cell.mean) and f"{cell.mean:.2f}" == f"{best:.2f}"


# --- LaTeX ----------------------------------------------------------------------------------------

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "−": "$-$", "–": "--", "“": "``", "”": "''",
    "<": "$<$", ">": "$>$", "|": r"\textbar{}", "→": r"$\rightarrow$", "†": r"$^\dagger$", "×": r"$\times$",
}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)


def latex(sections: Sequence[Section]) -> str:
    """All tables for a document that loads ``booktabs``."""
    parts = ["% Needs \\usepackage{booktabs}.", f"% {_tex(CONVENTIONS)}"]
    for section in sections:
        parts.append(f"% {_tex(section.study.title)}: {_tex(' '.join(section.notes))}")
        for table in section.tables:
            lines = [
                r"\begin{table}[t]", r"\centering", rf"\caption{{{_tex(section.study.title)}: {_tex(table.title)}}}",
                rf"\begin{{tabular}}{{l{'c' * len(table.head)}}}", r"\toprule",
                " & ".join(map(_tex, ("method", *table.head))) + r" \\", r"\midrule",
            ]  # fmt: skip
            for name, cells in table.lines:
                shown = [
                    rf"\textbf{{{_tex(str(c))}}}" if _is_best(c, best) else _tex(str(c))
                    for c, best in zip(cells, table.best, strict=True)
                ]
                lines.append(" & ".join([_tex(table.label(name)), *shown]) + r" \\")
            lines += [r"\bottomrule", r"\end{tabular}"]
            lines += [rf"\par\smallskip{{\footnotesize {_tex(table.note)}}}"] if table.note else []
            parts.append("\n".join([*lines, r"\end{table}"]))
    return "\n\n".join(parts) + "\n"


# --- HTML -----------------------------------------------------------------------------------------

_STYLE = """
body { font: 15px/1.5 sans-serif; color: #222; background: #fff; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
body > p { max-width: 52rem }
table { border-collapse: collapse; margin: .5rem 0 1rem; font-variant-numeric: tabular-nums }
div.wide { overflow-x: auto }
th, td { padding: .2rem .7rem; text-align: right; vertical-align: top }
th { vertical-align: bottom }
td span { white-space: nowrap }
table.many { font-size: 13px }
table.many :is(th, td) { padding: .2rem .4rem }
th:first-child, td:first-child { text-align: left }
thead th { border-bottom: 2px solid #222 }
tbody tr:nth-child(even) { background: #f5f5f5 }
td.missing { color: #b00020; font-style: italic }
svg { max-width: 100%; height: auto }
figure { margin: 1rem 0 }
figcaption, p.note { color: #555 }
"""


def html(sections: Sequence[Section]) -> str:
    """One page that needs no other file and no network: tables and plots."""
    body = [f"<h1>Results</h1><p>{escape(CONVENTIONS)}</p>"]
    for section in sections:
        body.append(f"<h2>{escape(section.study.title)}</h2><p class=note>{escape(' '.join(section.notes))}</p>")
        body += map(_html_table, section.tables)
        whole = {c: p for c, p in section.plots.items() if not c.startswith("Gain")}
        body += [f"<figure>{p}<figcaption>{escape(c)}</figcaption></figure>" for c, p in whole.items()]
        body += [
            f"<details><summary>{escape(c)}</summary>{p}</details>" for c, p in section.plots.items() if c not in whole
        ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Results</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _html_table(table: Table) -> str:
    heads = (escape(text).replace("_", "_<wbr>").replace(", ", ",&nbsp;") for text in ("method", *table.head))
    head = "".join(f"<th>{text}</th>" for text in heads)
    rows = []
    for name, cells in table.lines:
        shown = []
        for cell, best in zip(cells, table.best, strict=True):
            missing = (
                isinstance(cell, Cell) and not cell.not_asked and (cell.mean is None or len(cell.values) < cell.seeds)
            )
            mark = " class=missing" if missing else ""
            parts = " ".join(f"<span>{escape(part)}</span>" for part in re.split(r" (?=± |\()", str(cell)))
            text = f"<b>{parts}</b>" if _is_best(cell, best) else parts
            shown.append(f"<td{mark}>{text}</td>")
        rows.append(f"<tr><td>{escape(table.label(name))}</td>{''.join(shown)}</tr>")
    note = f"<p class=note>{escape(table.note)}</p>" if table.note else ""
    many = " class=many" if len(table.head) > 7 else ""
    return (
        f"<h3>{escape(table.title)}</h3><div class=wide><table{many}><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>{note}"
    )


def to_dict(sections: Sequence[Section]) -> list[dict[str, Any]]:
    """The tables as JSON values."""

    def cell(value: AnyCell) -> dict[str, Any]:
        if isinstance(value, Difference):
            return {"differences": list(value.values), "p": value.p}
        if isinstance(value, Seconds | Published):
            return {"mean": value.mean}
        return {"mean": value.mean, "std": value.std, "by_seed": value.values}

    return [
        {
            "protocol": section.study.protocol,
            "backbone": section.study.backbone,
            "shots": list(section.study.shots),
            "split": section.study.split,
            "reference": section.reference,
            "title": table.title,
            "rows": {
                name: {head: cell(c) for head, c in zip(table.head, cells, strict=True)} for name, cells in table.lines
            },
        }
        for section in sections
        for table in section.tables
    ]
