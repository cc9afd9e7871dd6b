"""``vlprompt report``: the tables and plots of a bench folder as Markdown, LaTeX and one HTML page."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from vlprompt.bench.bench import PLANNED, read_planned
from vlprompt.bench.figures import FIGURES, read_figures
from vlprompt.bench.protocols import PROTOCOLS, attack_of, seen
from vlprompt.bench.report import plots
from vlprompt.bench.report.document import document
from vlprompt.bench.report.published import SETTING, Published, published
from vlprompt.bench.report.tables import Cell, Difference, Study, Table, find_reference, studies, tables
from vlprompt.bench.results import RESULTS, Results, Row, read_results
from vlprompt.errors import ConfigError, DataError, first_few, unknown
from vlprompt.files import write_atomically

CONVENTIONS = (
    "Accuracy in percent: the mean over seeds ± its sample standard deviation, of the last epoch, if no note says that "
    "another one was chosen on val images. An average over data "
    "sets counts the seeds that all of them have. HM is the harmonic mean of the mean base and the mean novel "
    "accuracy, of the seeds that have both. Differences are paired by seed (of HM: of each seed's HM); p is two-sided, "
    "of a t-test over seeds. “–”: the method cannot be asked. train, s: seconds that a run trained."
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
    rows = checked_results(folder)
    planned = [{"protocol": p, **run} for p in PROTOCOLS for run in read_planned(folder / p / PLANNED).values()]
    sections, every = [], studies(rows, planned)
    names = dict.fromkeys(name for study in every for name in study.names)
    if reference is not None and reference not in names:
        raise ConfigError(unknown("reference", reference, names))
    for study in every:
        compared = find_reference(study, reference if reference in study.names else None)
        runs = _read_runs(folder, study)
        made = [_beside_published(study, table) for table in tables(study, compared)]
        notes = list(filter(None, (PROTOCOLS[study.protocol].about, PROTOCOLS[study.protocol].note)))
        notes += _orders(study, runs)
        codes = sorted({row.code for row in study.rows})
        notes += [f"Code version {', '.join(codes)}."] if codes else ["There are no results yet."]
        notes += ["Versions differ between runs."] if len(codes) > 1 else []
        notes += _unlike(study, runs)
        if reference not in (None, compared):
            notes.append(f"There is no row '{reference}' here: the others are compared with {compared}.")
        drawn = dict(_plots(study, made, compared)) | dict(_gains(study, compared, runs))
        sections.append(Section(study, compared, made, drawn, tuple(notes)))
    return sections


def checked_results(folder: Path) -> list[Row]:
    """The rows of a bench folder's results.csv; raises DataError for one that its run folders do not hold.

    Of a protocol without plan or runs in the folder, results.csv is all that there is.
    """
    rows, runs = read_results(folder / RESULTS), Results(folder)
    if not rows:
        raise DataError(f"there are no results in {folder / RESULTS} yet")
    measured = set(runs.read())
    ran = {row.protocol for row in measured if (folder / row.protocol / PLANNED).is_file()}
    if strange := [row for row in rows if row.protocol in ran and row not in measured]:
        row = strange[0]
        raise DataError(
            f"{folder / RESULTS} says of {row.data} {row.name}, {row.shots} shots, seed {row.seed} what its run folder "
            "does not: the bench repeated with skip_existing writes it again"
        )
    return rows


def write_report(folder: Path, reference: str | None = None) -> str:
    """Write report.md, report.tex and report.html into the folder; returns the Markdown."""
    sections = read_sections(folder, reference)
    text = markdown(sections)
    for kind, content in (("md", text), ("tex", latex(sections)), ("html", html(sections))):
        write_atomically(folder / f"report.{kind}", content)
    return text


def _beside_published(study: Study, table: Table) -> Table:
    """The table with what papers report of the rows' methods in the same setting, where they do."""
    methods = {row.name: row.method for row in study.rows}
    sources: dict[str, str] = {}
    for column, known in published(study.protocol, study.backbone, study.split, study.shots[0], table.data).items():
        if beside := {name: known[methods[name]] for name in study.names if methods.get(name) in known}:
            lines = {name: (*cells, beside.get(name, Published())) for name, cells in table.lines.items()}
            table = replace(table, head=(*table.head, f"published {column}"), lines=lines)
            sources |= {name: figure.source for name, figure in beside.items()}
    if not sources:
        return table
    listed = "; ".join(f"{name}: {sources[name]}" for name in study.names if name in sources)
    return replace(table, note=f"{table.note} {SETTING}: {listed}.".strip())


# --- what the run folders hold beside the results, where they are at hand ---------------------------

Runs = Mapping[Path, Mapping[str, Any]]
"""Figures by run folder."""


def _read_runs(folder: Path, study: Study) -> Runs:
    places = [f"{study.protocol}/*/*/{study.backbone}/shots_{shots}/*/{FIGURES}" for shots in study.shots]
    return {file.parent: read_figures(file.parent) or {} for place in places for file in sorted(folder.glob(place))}


def _orders(study: Study, runs: Runs) -> list[str]:
    """In which order classes arrived, by data set and seed."""
    found: dict[str, str] = {}
    for figures in runs.values():
        for m in figures["measured"]:
            t, n = seen(m["classes"]) or (0, 0)
            if t and t == n == study.tasks and m["split"] == study.split and m.get("class_names"):
                names = m["class_names"]
                tasks = (names[i * len(names) // n : (i + 1) * len(names) // n] for i in range(n))
                found[f"{m['data']}, seed {figures['seed']}"] = " | ".join(map(first_few, tasks))
    return [f"Classes arrived in this order: {'; '.join(f'{k}: {v}' for k, v in found.items())}."] if found else []


def _unlike(study: Study, runs: Runs) -> list[str]:
    """Notes on what should be the same in runs of a study and is not, and on runs that are not of the last epoch."""
    found: dict[str, set[str | None]] = {}
    common: dict[str, dict[str, None]] = {}
    chosen: dict[str, None] = {}
    for figures in runs.values():
        weights = figures.get("weights", {})
        same = {"Weights of the backbone": weights.get("backbone")}
        same[f"Weights of the teacher of {figures['name']}"] = weights.get("teacher")
        for m in (m for m in figures["measured"] if m["split"] == study.split):
            of = f"{m['classes']} classes" + (f" of seed {figures['seed']}" if seen(m["classes"]) else "")
            images = f"{study.split.capitalize()} images of {m['data']}, {of},"
            same[images] = m.get("images_fingerprint")
        for what, value in same.items():
            found.setdefault(what, set()).add(value)
        for key, setting in figures.get("common", {}).items():
            common.setdefault(key, {})[str(setting)] = None
        if figures.get("kept_epoch") is not None:
            chosen[figures["name"]] = None
    numbers: dict[str, set[int]] = {}
    for row in (row for row in study.rows if row.images):
        of = f"{row.measured_on}, {row.classes} classes" + (f" of seed {row.seed}" if seen(row.classes) else "")
        numbers.setdefault(of, set()).add(row.images)
    notes = [f"{what} differ between runs." for what, values in found.items() if len(values - {None}) > 1]
    notes += [f"{key} differs between runs: {', '.join(values)}." for key, values in common.items() if len(values) > 1]
    notes += [
        f"Numbers of {study.split} images of {of}, differ between runs: {', '.join(map(str, sorted(values)))}."
        for of, values in numbers.items()
        if len(values) > 1
    ]
    return notes + ([f"Of {', '.join(chosen)} the epoch that is best on val images is kept."] if chosen else [])


def _gains(study: Study, reference: str, runs: Runs) -> Iterator[tuple[str, str]]:
    """Plots of each class's gain, paired by seed, on the data set that was trained on; in few-shot, of most shots."""
    accuracy: dict[str, dict[str, dict[tuple[str, str], float]]] = {}  # data set, row, (seed, class)
    for folder, figures in runs.items():
        for m in figures["measured"] if folder.parent.name == f"shots_{study.shots[-1]}" else ():
            if m["data"] == figures["data"] and m["split"] == study.split and not attack_of(m["classes"]):
                own = accuracy.setdefault(figures["data"], {}).setdefault(figures["name"], {})
                own |= {(folder.name, name): value for name, value in m.get("per_class", {}).items()}
    for data, rows in accuracy.items():
        other = rows.get(reference, {})
        for name in (name for name in study.names if name != reference):
            found: dict[str, list[float]] = {}
            for key, value in rows.get(name, {}).items():
                if key in other:
                    found.setdefault(key[1], []).append(value - other[key])
            if found:
                caption = f"Gain of each class, in points: {name} over {reference} on {data}"
                yield caption, plots.gains({c: statistics.mean(values) for c, values in found.items()}, caption)


def _plots(study: Study, made: Sequence[Table], reference: str) -> Iterator[tuple[str, str]]:
    """Of the first table (the average, or the only data set); in few-shot, of every table."""
    colour = plots.colours(study.names, reference)

    def known(table: Table, column: int) -> dict[str, Cell]:
        cells = {name: line[column] for name, line in table.lines.items()}
        return {name: c for name, c in cells.items() if isinstance(c, Cell) and c.mean is not None}

    if study.protocol == "base-to-novel":
        base, novel, both = ({n: c.mean or 0.0 for n, c in known(made[0], i).items()} for i in range(3))
        if both:
            yield f"Harmonic mean: {made[0].title}", plots.bars(both, colour, "Harmonic mean")
        if points := {name: (base[name], novel[name]) for name in base if name in novel}:
            drawn = plots.base_and_novel(points, colour, "Base and novel")
            yield f"Base and novel accuracy: {made[0].title}", drawn
    for table in made if study.protocol == "few-shot" else ():
        lines: dict[str, dict[int, tuple[float, float]]] = {}
        for column, shots in enumerate(study.shots):
            for name, cell in known(table, column).items():
                lines.setdefault(name, {})[shots] = cell.mean or 0.0, cell.std or 0.0
        if lines := {name: lines[name] for name in study.names if name in lines}:
            yield f"Accuracy and shots: {table.title}", plots.curves(lines, colour, "Accuracy and shots")


# --- the three forms ------------------------------------------------------------------------------


def markdown(sections: Sequence[Section]) -> str:
    """All tables as Markdown."""
    parts = ["# Results", CONVENTIONS]
    for section in sections:
        parts += [f"## {section.study.title}", " ".join(section.notes)]
        for table in section.tables:
            lines = [f"| method | {' | '.join(table.head)} |", "|---" * (len(table.head) + 1) + "|"]
            for name, cells in table.lines.items():
                shown = (f"**{c}**" if table.is_best(name, i) else str(c) for i, c in enumerate(cells))
                lines.append(f"| {name.replace('|', '/')} | {' | '.join(shown)} |")
            parts += [f"### {table.title}", "\n".join(lines), *([table.note] if table.note else [])]
    return "\n\n".join(parts) + "\n"


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "−": "$-$", "–": "--", "“": "``", "”": "''",
    "<": "$<$", ">": "$>$", "|": r"\textbar{}", "→": r"$\rightarrow$", "×": r"$\times$",
}  # fmt: skip


def _tex(text: object) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in str(text))


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
            for name, cells in table.lines.items():
                shown = (rf"\textbf{{{_tex(c)}}}" if table.is_best(name, i) else _tex(c) for i, c in enumerate(cells))
                lines.append(" & ".join([_tex(name), *shown]) + r" \\")
            lines += [r"\bottomrule", r"\end{tabular}"]
            lines += [rf"\par\smallskip{{\footnotesize {_tex(table.note)}}}"] if table.note else []
            parts.append("\n".join([*lines, r"\end{table}"]))
    return "\n\n".join(parts) + "\n"


def html(sections: Sequence[Section]) -> str:
    """One page that needs no other file and no network: tables and plots."""
    body = [f"<h1>Results</h1><p>{escape(CONVENTIONS)}</p>"]
    for section in sections:
        body.append(f"<h2>{escape(section.study.title)}</h2><p class=note>{escape(' '.join(section.notes))}</p>")
        body += map(_html_table, section.tables)
        for c, drawn in sorted(section.plots.items(), key=lambda plot: plot[0].startswith("Gain")):
            folded = f"<details><summary>{escape(c)}</summary>{drawn}</details>"
            whole = f"<figure>{drawn}<figcaption>{escape(c)}</figcaption></figure>"
            body.append(folded if c.startswith("Gain") else whole)
    return document("Results", body)


def _html_table(table: Table) -> str:
    heads = (escape(text).replace("_", "_<wbr>").replace(", ", ",&nbsp;") for text in ("method", *table.head))
    head = "".join(f"<th>{text}</th>" for text in heads)
    rows = []
    for name, cells in table.lines.items():
        shown = []
        for i, cell in enumerate(cells):
            mark = " class=missing" if isinstance(cell, Cell) and cell.incomplete else ""
            parts = " ".join(f"<span>{escape(part)}</span>" for part in re.split(r" (?=± |\()", str(cell)))
            shown.append(f"<td{mark}>{f'<b>{parts}</b>' if table.is_best(name, i) else parts}</td>")
        rows.append(f"<tr><td>{escape(name)}</td>{''.join(shown)}</tr>")
    note = f"<p class=note>{escape(table.note)}</p>" if table.note else ""
    many = " class=many" if len(table.head) > 7 else ""
    return (
        f"<h3>{escape(table.title)}</h3><div class=wide><table{many}><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>{note}"
    )


def to_dict(sections: Sequence[Section]) -> list[dict[str, Any]]:
    """The tables as JSON values."""

    def cell(value: Any) -> dict[str, Any]:
        if isinstance(value, Difference):
            return {"differences": list(value.values), "p": value.p}
        return {"mean": value.mean} | ({"std": value.std, "by_seed": value.values} if isinstance(value, Cell) else {})

    return [
        {
            "protocol": section.study.protocol,
            "backbone": section.study.backbone,
            "shots": list(section.study.shots),
            "split": section.study.split,
            "reference": section.reference,
            "title": table.title,
            "rows": {n: dict(zip(table.head, map(cell, line), strict=True)) for n, line in table.lines.items()},
        }
        for section in sections
        for table in section.tables
    ]
