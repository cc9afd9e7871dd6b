"""``vlprompt report``: averages, differences, missing runs, and the three forms, on made-up results."""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from scipy.stats import ttest_rel

from tests.kit import REPOSITORY, sealed
from tests.kit.results import PLAIN, figures
from vlprompt.bench.bench import note_planned
from vlprompt.bench.protocols import Asked, plan
from vlprompt.bench.report import plots
from vlprompt.bench.report.published import ELEVEN, published
from vlprompt.bench.report.report import latex, markdown, read_sections
from vlprompt.bench.report.tables import Cell, Difference, studies, tables
from vlprompt.bench.results import Row, to_csv
from vlprompt.errors import ConfigError, DataError
from vlprompt.training.evaluate import harmonic_mean

BASE = {("zero_shot", "dtd"): (50, 50, 50), ("zero_shot", "eurosat"): (60, 60, 60),
        ("coop", "dtd"): (70, 74, 72), ("coop", "eurosat"): (80, 81, 85)}  # fmt: skip
NOVEL = {("zero_shot", "dtd"): (52, 52, 52), ("zero_shot", "eurosat"): (62, 62, 62),
         ("coop", "dtd"): (40, 41, 45), ("coop", "eurosat"): (30, 35, 37)}  # fmt: skip


def base_to_novel() -> list[Row]:
    return [
        replace(PLAIN, name=name, method=name, data=data, measured_on=data, seed=seed, classes=classes, accuracy=value)
        for classes, figures in (("base", BASE), ("novel", NOVEL))
        for (name, data), values in figures.items()
        for seed, value in enumerate(values, 1)
    ]


def folder(place: Path, rows: list[Row]) -> Path:
    (place / "results.csv").write_text(to_csv(rows))
    return place


def cells(rows: list[Row], title: str, reference: str | None = None) -> dict[str, dict[str, Cell | Difference]]:
    (study,) = studies(rows)
    (table,) = (t for t in tables(study, reference) if t.title == title)
    return {name: dict(zip(table.head, line, strict=True)) for name, line in table.lines.items()}


def test_a_harmonic_mean_is_that_of_the_means() -> None:
    coop = cells(base_to_novel(), "dtd")["coop"]
    assert str(coop["base"]) == "72.00 ± 2.00"
    assert str(coop["novel"]) == f"42.00 ± {statistics.stdev((40, 41, 45)):.2f}"
    assert coop["HM"].mean == pytest.approx(harmonic_mean(72, 42))
    assert str(coop["HM"]) == f"{harmonic_mean(72, 42):.2f}"


def test_a_harmonic_mean_is_over_the_seeds_that_have_both(tmp_path: Path) -> None:
    """Seed 1 lacks the novel classes: its base accuracy is not in the harmonic mean either."""
    rows = [r for r in base_to_novel() if (r.name, r.data, r.classes, r.seed) != ("coop", "dtd", "novel", 1)]
    coop = cells(rows, "dtd")["coop"]
    assert coop["HM"].mean == pytest.approx(harmonic_mean(73, 43))
    assert str(coop["HM"]) == f"{harmonic_mean(73, 43):.2f} (2 of 3 seeds)"
    apart = [r for r in base_to_novel() if r.data == "dtd" and (r.seed == 1) == (r.classes == "base")]
    assert str(cells(apart, "dtd")["coop"]["HM"]) == "missing"
    (section,) = read_sections(folder(tmp_path, apart))
    assert list(section.plots) == ["Base and novel accuracy: dtd"]


def test_an_average_is_over_data_sets_then_seeds() -> None:
    coop = cells(base_to_novel(), "Average over 2 data sets")["coop"]
    by_seed = [75.0, 77.5, 78.5]
    assert list(coop["base"].values.values()) == by_seed
    assert coop["base"].mean == pytest.approx(statistics.mean(by_seed))
    assert coop["base"].std == pytest.approx(statistics.stdev(by_seed))
    assert coop["HM"].mean == pytest.approx(harmonic_mean(statistics.mean(by_seed), 38))


def test_differences_are_paired_by_seed() -> None:
    lines = cells(base_to_novel(), "dtd")
    difference = lines["coop"]["HM − zero_shot"]
    coop = [harmonic_mean(b, n) for b, n in zip((70, 74, 72), (40, 41, 45), strict=True)]
    zero = [harmonic_mean(50, 52)] * 3
    assert difference.values == pytest.approx([c - z for c, z in zip(coop, zero, strict=True)])
    assert difference.p == pytest.approx(ttest_rel(coop, zero).pvalue)
    assert str(lines["zero_shot"]["HM − zero_shot"]) == "–"
    other = cells(base_to_novel(), "dtd", "coop")["zero_shot"]["HM − coop"]
    assert other.values == pytest.approx([-v for v in difference.values])
    assert str(Difference((1.0,))) == "+1.00"
    assert str(Difference((1.0, 1.0))) == "+1.00 ± 0.00"  # no spread: nothing to test
    assert "p < 0.001" in str(Difference((9.0, 9.1, 9.0)))


def test_missing_runs_are_shown(tmp_path: Path) -> None:
    rows = [r for r in base_to_novel() if (r.name, r.data, r.seed) != ("coop", "dtd", 2)]
    assert str(cells(rows, "dtd")["coop"]["base"]) == "71.00 ± 1.41 (2 of 3 seeds)"
    assert str(cells(rows, "Average over 2 data sets")["coop"]["HM"]).endswith("(2 of 3 seeds)")
    rows = [r for r in base_to_novel() if (r.name, r.data) != ("coop", "dtd")]
    assert str(cells(rows, "dtd")["coop"]["base"]) == "missing"
    assert str(cells(rows, "Average over 2 data sets")["coop"]["base"]) == "missing"
    gone = [replace(r, accuracy=None) for r in few_shot()]
    assert not read_sections(folder(tmp_path, gone))[0].plots
    text = markdown(read_sections(folder(tmp_path, rows)))
    assert "| coop | missing | missing | missing | – | missing |" in text
    assert "Missing runs: coop." in text


def test_runs_that_were_planned_are_missing_too(tmp_path: Path) -> None:
    methods = {m: (m, {}) for m in ("maple", "zero_shot", "coop")}
    note_planned(plan(Asked("base-to-novel", methods, ["eurosat", "dtd"], [1, 2, 3, 4])), tmp_path)
    (section,) = read_sections(folder(tmp_path, base_to_novel()))
    assert section.study.names == ("maple", "zero_shot", "coop")  # in the order that was asked for
    assert [t.title for t in section.tables] == ["Average over 2 data sets", "eurosat", "dtd"]
    assert "| maple | missing | missing | missing | – | missing |" in markdown([section])
    assert "72.00 ± 2.00 (3 of 4 seeds)" in markdown([section])


def planned(place: Path, protocol: str, data: list[str], split: str = "test", shots: tuple[int, ...] = ()) -> None:
    note_planned(plan(Asked(protocol, {"coop": ("coop", {})}, data, [1, 2], shots, split=split)), place)


def test_a_target_without_any_result_is_a_column_of_missing_values(tmp_path: Path) -> None:
    """It was asked for, so the average over the other targets must not pass for the average of all."""
    planned(tmp_path, "cross-dataset", ["imagenet", "sun397", "dtd", "eurosat"])
    for gone, average in ((set(), "missing"), ({"sun397"}, "46.00 ± 1.41")):
        file = tmp_path / "cross-dataset" / "planned.json"
        content = sealed.read(file)
        for run in content["runs"].values():
            run["measured"] = [m for m in run["measured"] if m["data"] not in gone]
        sealed.write(file, content)
        ((table,),) = (s.tables for s in read_sections(folder(tmp_path, transfer())))
        targets = [t for t in ("sun397", "dtd", "eurosat") if t not in gone]
        assert table.head == ("imagenet (source)", *targets, "average of targets", "train, s")
        line = dict(zip(table.head, map(str, table.lines["coop"]), strict=True))
        assert line["average of targets"] == average
        assert line.get("sun397", "missing") == "missing"
    one = [r for r in transfer() if (r.measured_on, r.seed) != ("eurosat", 2)]
    assert "| 45.00 (1 of 2 seeds) |" in markdown(read_sections(folder(tmp_path, one)))


def test_planned_runs_are_missing_where_they_were_asked_for(tmp_path: Path) -> None:
    """What was asked on val images is not missing among the test images, and a protocol without results is shown."""
    rows = [r for r in base_to_novel() if r.name == "coop" and r.seed < 3]
    planned(tmp_path, "base-to-novel", ["dtd", "eurosat"])
    planned(tmp_path, "base-to-novel", ["dtd", "eurosat", "food101"], "val")
    planned(tmp_path, "few-shot", ["dtd"], shots=(1, 2))
    planned(tmp_path, "long-tail", ["dtd"])
    sections = read_sections(folder(tmp_path, rows))
    assert [s.study.title for s in sections] == [
        "base-to-novel, mini, 16 shots", "base-to-novel, mini, 16 shots, val images", "few-shot, mini",
        "long-tail, mini, 16 shots",
    ]  # fmt: skip
    test, val, shots, tail = sections
    assert "missing" not in markdown([test])
    assert [t.title for t in test.tables] == ["Average over 2 data sets", "dtd", "eurosat"]
    assert "| coop | missing | missing | missing | missing |" in markdown([val])
    assert len(val.tables) == 4
    assert "There are no results yet." in markdown([val])
    assert "| coop | missing | missing | missing |" in markdown([shots])
    assert "| coop | missing | missing | missing | missing | missing |" in markdown([tail])


def test_a_plan_that_cannot_be_read_is_neither_ignored_nor_overwritten(vlprompt, tmp_path: Path) -> None:
    planned(tmp_path, "base-to-novel", ["dtd"])
    file = tmp_path / "base-to-novel" / "planned.json"
    file.write_text(file.read_text()[:50])
    code, _, err = vlprompt("report", folder(tmp_path, base_to_novel()))
    assert code == 2
    assert err.startswith(f"error: cannot read {file}: ")
    assert err.count("\n") == 1
    with pytest.raises(DataError, match="remove it, and repeat the bench with skip_existing"):
        planned(tmp_path, "base-to-novel", ["eurosat"])
    assert len(file.read_text()) == 50


def test_what_a_method_cannot_be_asked_is_not_missing() -> None:
    rows = base_to_novel()
    probe = [
        replace(r, name="linear_probe", accuracy=None if r.classes == "novel" else 90.0)
        for r in rows
        if r.name == "coop"
    ]
    line = cells(rows + probe, "dtd")["linear_probe"]
    assert [str(c) for c in line.values()] == ["90.00 ± 0.00", "–", "–", "–", "2"]


def few_shot() -> list[Row]:
    return [
        replace(PLAIN, protocol="few-shot", classes="all", name=n, shots=shots, seed=seed, accuracy=a + shots + seed)
        for n, a in (("coop", 40.0), ("maple", 50.0))
        for shots in (1, 2, 4, 8, 16)
        for seed in (1, 2, 3)
    ]


def transfer() -> list[Row]:
    return [
        replace(PLAIN, protocol="cross-dataset", classes="all", data="imagenet", measured_on=on, seed=seed, accuracy=a)
        for on, values in (("imagenet", (70.0, 71.0)), ("dtd", (40.0, 44.0)), ("eurosat", (50.0, 50.0)))
        for seed, a in enumerate(values, 1)
    ]


def long_tail() -> list[Row]:
    return [
        replace(PLAIN, protocol="long-tail", classes=c, accuracy=a)
        for c, a in (("all", 60.0), ("many", 80.0), ("medium", 60.0), ("few", 40.0))
    ]


def test_few_shot_has_a_column_a_number_of_shots() -> None:
    line = cells(few_shot(), "dtd")["coop"]
    assert list(line) == ["1 shot", "2 shots", "4 shots", "8 shots", "16 shots", "16 shots − coop", "train, s"]
    assert str(line["4 shots"]) == "46.00 ± 1.00"


def test_cross_dataset_averages_the_targets() -> None:
    line = cells(transfer(), "imagenet")["coop"]
    assert [str(c) for c in line.values()] == ["70.50 ± 0.71", "42.00 ± 2.83", "50.00 ± 0.00", "46.00 ± 1.41", "2"]
    assert list(line) == ["imagenet (source)", "dtd", "eurosat", "average of targets", "train, s"]


def test_long_tail_has_groups() -> None:
    line = cells(long_tail(), "dtd")["coop"]
    shown = {k: str(c) for k, c in line.items()}
    assert shown == {"many": "80.00", "medium": "60.00", "few": "40.00", "all": "60.00", "train, s": "2"}


def test_a_group_without_images_is_not_a_missing_run() -> None:
    """With two classes none is in the last third."""
    line = cells([r for r in long_tail() if r.classes != "few"], "dtd")["coop"]
    assert [str(c) for c in line.values()] == ["80.00", "60.00", "–", "60.00", "2"]
    more = [r for r in long_tail() if r.classes != "few"] + [replace(r, name="gone", data="x") for r in long_tail()]
    assert {str(c) for c in list(cells(more, "dtd")["gone"].values())[:4]} == {"missing"}


def test_studies_are_apart_by_backbone_shots_and_split() -> None:
    rows = base_to_novel()
    more = [replace(r, **change) for r in rows for change in ({"backbone": "b"}, {"shots": 4}, {"split": "val"})]
    titles = [s.title for s in studies(rows + more + few_shot())]
    assert titles == [
        "base-to-novel, b, 16 shots", "base-to-novel, mini, 16 shots", "base-to-novel, mini, 16 shots, val images",
        "base-to-novel, mini, 4 shots", "few-shot, mini",
    ]  # fmt: skip


def test_runs_of_other_settings_are_not_averaged() -> None:
    first, *rest = base_to_novel()
    with pytest.raises(DataError, match="'zero_shot' on dtd has other settings for seed 2 than for seed 1"):
        studies([replace(first, settings="g"), *rest])


def test_a_row_of_two_methods_is_refused() -> None:
    rows = [replace(row, method="maple") if (row.name, row.data) == ("coop", "dtd") else row for row in base_to_novel()]
    with pytest.raises(DataError, match="'coop' is coop on eurosat and maple on dtd"):
        studies(rows)


def test_results_without_what_an_average_is_of(tmp_path: Path) -> None:
    """A source without targets, tasks of which none is measured: missing, as other runs are."""
    rows = [replace(PLAIN, protocol=name, classes="all") for name in ("cross-dataset", "class-incremental")]
    for section in read_sections(folder(tmp_path, rows)):
        assert "missing" in {str(cell) for line in section.tables[0].lines.values() for cell in line}


def test_a_reference_that_is_no_row(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown reference 'cop': did you mean 'coop'"):
        read_sections(folder(tmp_path, base_to_novel()), "cop")


def test_a_reference_that_one_study_lacks(tmp_path: Path) -> None:
    """The others are compared with it all the same; that one says what it is compared with."""
    first, second = read_sections(folder(tmp_path, base_to_novel() + few_shot()), "zero_shot")
    assert (first.reference, second.reference) == ("zero_shot", "coop")
    assert "There is no row" not in " ".join(first.notes)
    assert "There is no row 'zero_shot' here: the others are compared with coop." in second.notes


@pytest.mark.parametrize("key", ["data", "name", "measured"])
def test_figures_of_a_run_without_its_name(vlprompt, tmp_path: Path, key: str) -> None:
    figures(folder(tmp_path, base_to_novel()), "coop", 1, {"dotted": 50.0})
    file = next(tmp_path.rglob("figures.json"))
    sealed.write(file, {k: v for k, v in sealed.read(file).items() if k != key})
    code, out, err = vlprompt("report", tmp_path)
    assert (code, out) == (2, "")
    assert err.endswith(f"cannot read {file}: {key}: field required\n")
    assert err.count("\n") == 1


def test_published_figures_stand_beside_ours_in_the_same_setting_only(tmp_path: Path) -> None:
    rows = [
        replace(r, data=data, measured_on=data, name=name, method=method, backbone="openai-clip-vit-base-patch16")
        for r in base_to_novel()
        if (r.name, r.data) == ("coop", "dtd")
        for data in ELEVEN
        for name, method in (("coop", "coop"), ("fdbpl_coop", "fdbpl_coop"), ("maple", "coop"), ("n", "drople"))
    ]
    text = markdown(read_sections(folder(tmp_path, rows)))
    assert "| coop | **72.00 ± 2.00** | **42.00 ± 2.65** | **53.05** | – | 2 | – | 71.66 |" in text
    assert "| fdbpl_coop | **72.00 ± 2.00** | **42.00 ± 2.65** | **53.05** | +0.00 ± 0.00 | 2 | – | – |" in text
    assert "Published with OpenAI's CLIP ViT-B/16, 16 shots and the paper's own settings, on " in text
    assert "test images: coop: Zhou et al., CVPR 2022; maple: Zhou et al., CVPR 2022; n: arXiv 2512.07234, " in text
    assert [line.split(" | ")[-2:] for line in text.splitlines() if line.startswith(("| maple |", "| n |"))][:2] == [
        ["–", "71.66 |"],
        ["86.12", "82.10 |"],
    ]
    assert (text.count("published HM"), text.count("published base")) == (1, 1 + 6)
    dtd = text.split("### dtd")[1].split("###")[0]
    assert "| 2 | 85.43 |" in dtd
    assert "on test images: n: arXiv 2512.07234, " in dtd
    assert "ublished" not in text.split("### eurosat")[1].split("###")[0]
    assert "published HM" in markdown(
        read_sections(folder(tmp_path, [replace(r, backbone="open_clip-ViT-B-16-openai") for r in rows]))
    )
    weights = ("mini", "open_clip-ViT-B-16-laion2b_s34b_b88k", "my-vitb16", "google-vit-base-patch16-224")
    changes = [*({"backbone": name} for name in weights), {"shots": 4}, {"split": "val"}, {"method": "kdpl_coop"}]
    others = [[replace(r, **change) for r in rows] for change in changes]
    others += [[r for r in rows if r.data != "dtd" and r.name != "n"]]  # ten data sets have no published mean
    for other in others:
        assert "ublished" not in markdown(read_sections(folder(tmp_path, other)))


def test_the_page_about_reproducing_has_the_same_published_figures() -> None:
    page = (REPOSITORY / "docs" / "reproduce.md").read_text("utf-8")
    told = dict(re.findall(r"^\| \[`(\w+)`\]\(.*?\) \| ([\d.]+)", page, re.MULTILINE))
    figures = published("base-to-novel", "openai-clip-vit-base-patch16", "test", 16, ELEVEN)["HM"]
    assert told == {name: str(figure) for name, figure in figures.items()}
    assert all(figure.source for figure in figures.values())


# --- the three forms ------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags that must be closed are, and nothing is fetched from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe")
        assert not any(key in ("src", "href") for key, _ in attrs)
        self.seen.append(tag)
        if tag not in ("meta", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_gains_of_classes_are_paired_by_seed(tmp_path: Path) -> None:
    """A seed that only one of the two rows has does not count."""
    for name, seed, accuracy in (("zero_shot", 1, 50.0), ("coop", 1, 60.0), ("coop", 2, 100.0), ("zero_shot", 3, 0.0)):
        figures(tmp_path, name, seed, {"dotted": accuracy})
    (section,) = read_sections(folder(tmp_path, [r for r in base_to_novel() if r.data == "dtd"]))
    assert "+10.0" in texts(section.plots["Gain of each class, in points: coop over zero_shot on dtd"])


def test_the_command_writes_three_forms(vlprompt, tmp_path: Path) -> None:
    folder(tmp_path, base_to_novel() + few_shot() + transfer() + long_tail())
    for seed in (1, 2):
        figures(tmp_path, "zero_shot", seed, {"<b>&": 50, "dotted": 20})
        figures(tmp_path, "coop", seed, {"<b>&": 60 + seed, "dotted": 10})
    code, out, err = vlprompt("report", tmp_path)
    assert code == 0
    assert out == (tmp_path / "report.md").read_text("utf-8")
    assert err.startswith("written: ")
    assert "\n| coop | **72.00 ± 2.00** | 42.00 ± 2.65 | **53.05** | " in out
    page = Page()
    content = (tmp_path / "report.html").read_text("utf-8")
    page.feed(content)
    assert not page.open
    assert page.seen.count("table") == out.count("\n### ") == 6
    assert page.seen.count("svg") == 4
    assert {"HM 55", "+11.5", "−10.0", "<b>&", "training images a class"} <= set(texts(content))
    tex = (tmp_path / "report.tex").read_text("utf-8")
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") == 6
    assert r"coop & \textbf{72.00 $\pm$ 2.00} & 42.00 $\pm$ 2.65 & \textbf{53.05} & " in tex
    assert r"zero\_shot & 50.00" in tex
    for line in tex.splitlines():
        if line.endswith(r"\\"):
            assert line.count(" & ") + 1 in (6, 8)


def texts(page: str) -> list[str]:
    """What the plots of a page say; raises if one is not well-formed."""
    parts = [part.partition("</svg>")[0] + "</svg>" for part in page.split("<svg")[1:]]
    return [text.text or "" for part in parts for text in ElementTree.fromstring("<svg" + part).iter() if text.text]


def test_json_has_every_table(vlprompt, tmp_path: Path) -> None:
    code, out, _ = vlprompt("report", folder(tmp_path, base_to_novel()), "--json")
    assert code == 0
    average, dtd, _ = json.loads(out)["tables"]
    assert average["title"] == "Average over 2 data sets"
    assert dtd["rows"]["coop"]["base"] == {"mean": 72, "std": 2, "by_seed": {"1": 70, "2": 74, "3": 72}}


def test_names_are_escaped(tmp_path: Path) -> None:
    rows = [replace(r, name=f"a|b & 50% {r.name}") for r in base_to_novel()]
    sections = read_sections(folder(tmp_path, rows))
    assert r"a\textbar{}b \& 50\% coop &" in latex(sections)
    assert "| a/b & 50% coop |" in markdown(sections)


def test_a_small_p_in_latex(tmp_path: Path) -> None:
    """A bare < is printed as ¡ in LaTeX's usual font encoding."""
    rows = [replace(r, accuracy=70 + r.seed * 1e-3 if r.name == "coop" else 50.0) for r in base_to_novel()]
    text = latex(read_sections(folder(tmp_path, rows)))
    assert "(p $<$ 0.001)" in text
    assert "<" not in text.replace("$<$", "")
    assert r"a $>$ b" in latex(read_sections(folder(tmp_path, [replace(r, name=f"a > b {r.name}") for r in rows])))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "it has no results.csv"),
        (lambda p: (p / "results.csv").write_text(to_csv([])), "there are no results in"),
        (lambda p: (p / "results.csv").write_text(to_csv([PLAIN]).replace("50.0", "x", 1)), "line 2: accuracy = 'x'"),
        (lambda p: folder(p, [replace(PLAIN, protocol="few-shots")]), "unknown protocol 'few-shots'"),
    ],
)
def test_bad_input(vlprompt, tmp_path: Path, make, message: str) -> None:
    make(tmp_path)
    before = sorted(tmp_path.iterdir())
    code, out, err = vlprompt("report", tmp_path)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


# --- plots ----------------------------------------------------------------------------------------


def test_a_long_list_of_gains_shows_both_ends() -> None:
    drawn = texts(plots.gains({f"c{i}": float(i) for i in range(100)}, "t"))
    assert {"c99", "c80", "c19", "c0", "60 classes in between"} <= set(drawn)
    assert "c50" not in drawn


@pytest.mark.parametrize("value", [0.0, 1e-3, 100.0])
def test_plots_of_one_point(value: float) -> None:
    grey = {"a": "#999"}
    assert "a" in texts(plots.bars({"a": value}, grey, "t"))
    assert "a" in texts(plots.base_and_novel({"a": (value, value)}, grey, "t"))
    assert "a" in texts(plots.curves({"a": {1: (value, 0.0)}}, grey, "t"))
    assert "+0.0" in texts(plots.gains({"a": 0.0}, "t"))


def test_lines_of_equal_harmonic_mean_are_where_they_should_be() -> None:
    """A point whose harmonic mean is the line's lies on it."""
    points = {"x": (80.0, 60.0), "y": (60.0, 90.0)}
    drawn = plots.base_and_novel(points, dict.fromkeys(points, "#000"), "t")
    root = ElementTree.fromstring(drawn)
    curves = [[tuple(map(float, p.split(","))) for p in e.get("points").split()] for e in root if "polyline" in e.tag]
    names = [e.text for e in root if e.text and e.text.startswith("HM ")]
    (x, y), (x2, y2) = [(float(e.get("cx")), float(e.get("cy"))) for e in root if "circle" in e.tag][:2]

    def undo(px: float, py: float) -> tuple[float, float]:
        return 80 + (px - x) / (x2 - x) * -20, 60 + (py - y) / (y2 - y) * 30

    assert len(curves) == len(names) >= 2
    for curve, name in zip(curves, names, strict=True):
        for point in curve:
            assert harmonic_mean(*undo(*point)) == pytest.approx(float(name.removeprefix("HM ")), abs=0.05)
