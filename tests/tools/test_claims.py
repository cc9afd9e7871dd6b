"""The page of claims: its tables are those of the figures, its statistic is right, its rows exist."""

import sys
from dataclasses import replace

import claims
import pytest
import yaml
from scipy import stats

from tests.kit import REPOSITORY
from vlprompt.bench.report.tables import Difference
from vlprompt.bench.results import Row, to_csv
from vlprompt.bench.rows import read_rows
from vlprompt.config.presets import presets_of
from vlprompt.methods import METHODS

# --- the page -------------------------------------------------------------------------------------


def test_tables_are_those_of_the_figures(monkeypatch):
    """Otherwise: python tools/claims.py."""
    monkeypatch.setattr(sys, "argv", ["claims.py", "--check"])
    assert claims.main() == 0


def test_every_table_is_on_the_page():
    marks = [found[1] for found in claims.MARKED.findall(claims.PAGE.read_text("utf-8"))]
    assert marks == ["summary", *dict.fromkeys(h.table for h in claims.read_hypotheses())]
    assert [found[1] for found in claims.MARKED.findall(claims.README.read_text("utf-8"))] == ["front"]
    with pytest.raises(KeyError, match="no such"):
        claims.write_page("<!-- claims: no such -->\n<!-- end of claims -->", claims.read_hypotheses())


def test_a_changed_page_is_found_and_not_written(monkeypatch, tmp_path, capsys):
    page = claims.REPOSITORY / "docs" / "claims.md"
    changed = tmp_path / "claims.md"
    changed.write_text(page.read_text("utf-8").replace(" hypotheses, of which ", " hypotheses; "), "utf-8")
    before = changed.read_text("utf-8")
    monkeypatch.setattr(claims, "PAGE", changed)
    monkeypatch.setattr("pages.REPOSITORY", tmp_path)
    for words, code in ((["--check"], 1), ([], 0), (["--check"], 0)):
        monkeypatch.setattr(sys, "argv", ["claims.py", *words])
        assert (claims.main(), changed.read_text("utf-8") == before) == (code, words == ["--check"] and code == 1)
    assert capsys.readouterr().out == "claims.md\nclaims.md\n"
    assert changed.read_text("utf-8") == page.read_text("utf-8")


def test_rows_are_those_of_their_files():
    for h in claims.read_hypotheses():
        assert {h.a, h.b} <= read_rows(REPOSITORY / h.rows).keys(), h.claim


def test_pieces_of_fdbpl_have_the_settings_of_the_whole():
    """If the preset of fdbpl_coop has changed, `set` in tools/ablations/fdbpl.yaml is to follow it."""
    own = yaml.safe_load((REPOSITORY / "tools" / "ablations" / "fdbpl.yaml").read_text("utf-8"))["set"]
    assert own == presets_of(METHODS["fdbpl_coop"])["mini"] | {"preset": None, "method.init": "a photo of a"}


# --- the statistic --------------------------------------------------------------------------------


def test_one_data_set_is_a_paired_t_test():
    pairs = [1.0, 2.0, 6.0]  # mean 3, variance 7, standard error √(7 / 3)
    tested = claims.compare({"d": pairs})
    assert (tested.n, tested.mean, tested.error) == (3, 3, pytest.approx(1.527525))
    assert tested.p == pytest.approx(stats.ttest_1samp(pairs, 0).pvalue) == pytest.approx(Difference(tuple(pairs)).p)
    assert (tested.verdict, tested.above) == ("not told apart", "")
    assert claims.compare({"d": pairs}, -1).p == pytest.approx(stats.ttest_1samp(pairs, -1).pvalue)


def test_several_data_sets_count_the_same_and_lend_no_spread():
    """By hand: variances 1 and 4 of three pairs each, so √(1/3 + 4/3) / 2 and (5/3)² / ((1/9 + 16/9) / 2) degrees."""
    pairs = {"c": [1.0, 2.0, 3.0], "d": [10.0, 12.0, 14.0]}
    tested = claims.compare(pairs)
    assert (tested.n, tested.mean, tested.error) == (6, 7, pytest.approx(0.645497))
    assert tested.p == pytest.approx(2 * stats.t.sf(7 / 0.645497, 50 / 17), rel=1e-5)
    assert (tested.verdict, tested.above) == ("holds", f"2 of 2, p {stats.ttest_1samp([2, 12], 0).pvalue:.3f}")
    assert claims.compare({d: [-x for x in values] for d, values in pairs.items()}).verdict == "fails"
    alone = claims.compare({**pairs, "e": [5.0]})
    assert (alone.error, alone.p, alone.verdict) == (None, None, "not told apart")
    assert claims.compare({"d": [2.0, 2.0]}).p is None


def test_holm():
    assert claims.holm([0.01, 0.04, None, 0.03]) == pytest.approx([0.04, 0.09, 1, 0.09])


# --- from figures to lines ------------------------------------------------------------------------


def test_a_page_of_figures(tmp_path):
    values = {"a": [(80, 50), (82, 52), (84, 51)], "b": [(70, 50), (70, 50), (71, 48)]}
    both = [("base", 0), ("novel", 1)]
    rows = [
        Row(
            "base-to-novel", data, name, "coop", "mini", 16, seed, data, classes, "test", 100, float(of[i]), None,
            0.1, 8, 1, 10.0 if name == "a" else 40.0 + seed, 0.1, f"{name}-{data}", "0.1",
        )
        for data in ("imagenette", "clothing")
        for name, seeds in values.items()
        for seed, of in enumerate(seeds, 1)
        for classes, i in both
    ]  # fmt: skip
    (tmp_path / "r.csv").write_text(to_csv(rows), "utf-8")
    first = claims.Hypothesis(
        "dpl x", "A is above", "a", "b", "r.csv", "", "base-to-novel", "base", ("imagenette", "clothing", "openmoji")
    )
    speed = replace(first, claim="A is fast", figure="speed", data=("clothing",), at_least=3, build=6)
    gone = replace(first, claim="C is above", a="c", results="none.csv")
    (tmp_path / "s.csv").write_text(to_csv([*rows, *(replace(row, shots=1) for row in rows)]), "utf-8")
    with pytest.raises(SystemExit, match="'a' on clothing has several backbones or shots"):
        claims.by_seed(replace(speed, results="s.csv"), "a", "clothing", tmp_path)
    both_marks = "".join(f"<!-- claims: {name} -->\n<!-- end of claims -->\n" for name in ("summary", "dpl x"))
    lines = claims.write_page(both_marks, [first, speed, gone], tmp_path).splitlines()
    assert lines[1] == "3 hypotheses, of which 2 are measured."
    assert "| A is above: `a` − `b`, base | imagenette | 3 | +11.67 ± 0.88 | 0.006 |  | holds | |" in lines
    total = claims.compare({"imagenette": [10, 12, 13], "clothing": [10, 12, 13]})
    assert (
        f"|  | 2 of 3 data sets | 6 | +11.67 ± {total.error:.2f} | < 0.001 | < 0.001 | **holds** | 2 of 2, p – |"
        in lines
    )
    quotients = [41 / 12, 42 / 12, 43 / 12]  # the build's 6 seconds are shared by three runs
    [fast] = [line for line in lines if "at least × 3.00" in line]
    assert f"× {(quotients[0] * quotients[1] * quotients[2]) ** (1 / 3):.2f} ± 0.05" in fast
    assert "| DPL | C is above | – | – | – | not measured |" in lines
    assert "| C is above: `c` − `b`, base | 0 of 3 data sets | 0 | – | – | – | not measured |  |" in lines


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    h = claims.Hypothesis("dpl x", "A is above", "a", "b", "none.csv", "", "few-shot", "1 shot", ("clothing", "dtd"))
    told = "not measured: A is above: none.csv lacks few-shot, 1 shot, of 'a' on clothing, dtd; 'b' on clothing, dtd"
    assert claims.missing(h) == told
