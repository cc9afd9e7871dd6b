"""Tables of the documentation are those of the committed figures, and a bench's figures get there without loss."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import results
import yaml

from tests.kit import REPOSITORY
from tests.kit.marks import slow
from vlprompt.bench.protocols import Asked, plan
from vlprompt.bench.results import Row, read_results, to_csv
from vlprompt.bench.rows import fingerprint, read_rows, unmarked
from vlprompt.errors import ConfigError

PAGES = [page for page in sorted((REPOSITORY / "docs").rglob("*.md")) if "<!-- results: " in page.read_text("utf-8")]
ROW = Row(
    "few-shot", "pets", "coop", "coop", "mini", 16, 1,
    "pets", "all", "test", 10, 50.0, 50.0, 0.1, 4, 8, 1.0, 1.0, "a", "1",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _folder(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    results.read.cache_clear()


def figures(folder: Path, *rows: Row, name: str = "of.csv") -> None:
    (folder / name).write_text(to_csv(rows), "utf-8")


def seeds(row: Row, *accuracies: float) -> list[Row]:
    return [replace(row, seed=seed, accuracy=float(a)) for seed, a in enumerate(accuracies, 1)]


# --- the pages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tables_are_those_of_the_figures(page, monkeypatch):
    """Otherwise: python tools/results.py."""
    monkeypatch.setattr(results, "RESULTS", REPOSITORY / "docs" / "results")
    text = page.read_text("utf-8")
    assert text.count("<!-- results: ") == text.count("<!-- end of results -->") == len(results.MARKED.findall(text))
    assert results.write_tables(text) == text


def settings_now(shown: results.Shown, name: str, row: tuple, shots: int) -> Iterator[str]:
    """Fingerprints of a row as its file and preset have it: with towers in either precision, and so on."""
    targets = ["clothing-demo"] if shown.protocol == "cross-dataset" else []
    for teacher, few, precision in product((None, "efficientnet-lite0"), (True, False), ("bf16", "fp32")):
        given = {"train.precision": precision, **({"data.allow_fewer": True} if few else {})}
        with suppress(ConfigError):  # without its teacher
            asked = Asked(shown.protocol, {name: row}, [shown.data, *targets], [1], [shots], given, teacher)
            yield fingerprint(plan(asked)[0].config)


@slow
def test_figures_have_the_settings_that_their_rows_have_now(monkeypatch):
    monkeypatch.setattr(results, "RESULTS", REPOSITORY / "docs" / "results")
    text = (REPOSITORY / "docs" / "results.md").read_text("utf-8")
    every = [results.Shown(**yaml.safe_load(found[1])) for found in results.MARKED.findall(text)]
    assert len(every) > 20
    wrong = []
    for shown in (shown for shown in every if isinstance(shown.rows, str)):
        rows, files = (
            read_rows(REPOSITORY / "tools" / shown.rows),
            [shown.of] if isinstance(shown.of, str) else shown.of,
        )
        of = [row for file in files for row in results.read(file)]
        of = [row for row in of if (row.protocol, row.data) == (shown.protocol, shown.data)]
        for name, shots, settings in {(unmarked(row.name), row.shots, row.settings) for row in of}:
            if name in rows and settings not in settings_now(shown, name, rows[name], shots):
                wrong.append(f"{shown.of}: {shown.data}, {name}, {shots} shots")
    assert not wrong


def test_results_has_tables():
    assert REPOSITORY / "docs" / "results.md" in PAGES


# --- a table --------------------------------------------------------------------------------------


def test_a_table_has_its_rows_in_order_without_seconds(tmp_path):
    zero, tip = replace(ROW, name="zero_shot"), replace(ROW, name="tip_adapter-memory")
    figures(tmp_path, *seeds(ROW, 40, 50, 60), *seeds(replace(ROW, name="dpl"), 1, 2, 3))
    figures(tmp_path, *seeds(zero, 45, 45, 45), *seeds(tip, 70), name="more.csv")
    named = "{of: [of.csv, more.csv], protocol: few-shot, data: pets, rows: [tip_adapter, zero_shot, coop]}"
    assert results.write_table(named).splitlines() == [
        "| method | 16 shots | 16 shots − zero_shot |",
        "| --- | --- | --- |",
        "| tip_adapter-memory | **70.00 (1 of 3 seeds)** | +25.00 |",
        "| zero_shot | 45.00 ± 0.00 | – |",
        "| coop | 50.00 ± 10.00 | +5.00 ± 10.00 (p = 0.478) |",
    ]


def test_rows_may_be_a_file_of_tools_and_need_not_all_be_measured(tmp_path):
    figures(tmp_path, *seeds(ROW, 40), *seeds(replace(ROW, name="zero_shot"), 45))
    lines = results.write_table("{of: of.csv, protocol: few-shot, data: pets, rows: tables/mini.yaml}").splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| zero_shot", "| coop"]


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("{of: of.csv, protocol: few-shot, data: cats}", "0 tables"),
        ("{of: of.csv, protocol: long-tail, data: pets}", "0 tables"),
        ("{of: of.csv, protocol: few-shot, data: pets, rows: [coop, cop]}", "has no cop:"),
    ],
)
def test_a_table_that_the_figures_do_not_make_is_refused(tmp_path, named, told):
    figures(tmp_path, *seeds(ROW, 40, 50, 60))
    with pytest.raises(ValueError, match=told):
        results.write_table(named)


def test_figures_of_two_backbones_are_not_one_table(tmp_path):
    figures(tmp_path, ROW, replace(ROW, backbone="large"))
    with pytest.raises(ValueError, match="2 tables"):
        results.write_table("{of: of.csv, protocol: few-shot, data: pets}")


def test_a_bad_mark_ends_in_one_line_and_changes_nothing(tmp_path, monkeypatch, capsys):
    figures(tmp_path, ROW)
    page = tmp_path / "page.md"
    before = "<!-- results: {of: of.csv, protocol: few-shot, data: cats} -->\n<!-- end of results -->\n"
    page.write_text(before, "utf-8")
    monkeypatch.setattr(results, "PAGES", [page])
    monkeypatch.setattr(sys, "argv", ["results.py"])
    with pytest.raises(SystemExit, match="2"):
        results.main()
    assert capsys.readouterr().err.splitlines()[-1].startswith("results.py: error: 0 tables (allowed: one): {of")
    assert page.read_text("utf-8") == before


# --- a bench's figures ----------------------------------------------------------------------------


def test_take_replaces_the_same_runs_and_keeps_the_others(tmp_path, capsys):
    bench, file = tmp_path / "bench", tmp_path / "of.csv"
    bench.mkdir()
    tail = [replace(ROW, protocol="long-tail", classes=classes) for classes in ("all", "few")]
    figures(tmp_path, *seeds(ROW, 40, 50, 60), *tail)
    # Measured again: seed 2, and the long tail, whose groups are other ones now.
    again = [replace(ROW, seed=2, accuracy=55.0), replace(tail[0], accuracy=70.0)]
    figures(bench, *again, replace(ROW, name="dpl"), name="results.csv")
    results.take(bench, file)
    first, _, third = seeds(ROW, 40, 50, 60)
    assert read_results(file) == [first, again[0], third, replace(ROW, name="dpl"), again[1]]
    assert capsys.readouterr().out == f"{file}: 3 runs taken, 2 of them in the place of others\n"
    before = file.read_bytes()
    results.take(bench, file)
    assert file.read_bytes() == before


def test_take_begins_a_file(tmp_path):
    figures(tmp_path, ROW, name="results.csv")
    results.take(tmp_path, tmp_path / "new.csv")
    assert read_results(tmp_path / "new.csv") == [ROW]
