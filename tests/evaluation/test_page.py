"""The page of ``vlprompt evaluate --html``: its figures, its pictures, and how a browser shows it."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
from base64 import b64decode
from collections import Counter
from html import unescape
from pathlib import Path

import pytest
from PIL import Image

from tests.bench.test_browser import pixels, probed
from tests.kit import TINY
from tests.kit.browser import needs_browser
from tests.kit.command import vlprompt
from tests.kit.marks import slow
from tests.kit.pictures import SHADES, draw, make_photos, paint
from vlprompt.bench.report import plots
from vlprompt.bench.report.document import document


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Coloured squares; among the test images a copy of one trained on, and a red one among the blue."""
    folder = make_photos(tmp_path_factory.mktemp("data") / "photos", test=0)
    for c, (name, colour) in enumerate(SHADES.items()):
        for i in range(6):
            paint(folder / "test" / name / f"{i}.png", colour, seed=1000 + 10 * c + i)
    for part in ("train", "val", "test"):
        (folder / part / "red").rename(folder / part / "<b>red & wide")
    draw(folder / "train" / "blue" / "blocks.png", seed=7, width=4, height=4)
    with Image.open(folder / "train" / "blue" / "blocks.png") as image:
        image.resize((48, 48), Image.Resampling.NEAREST).save(folder / "test" / "blue" / "copy.png")
    shutil.move(folder / "test" / "<b>red & wide" / "0.png", folder / "test" / "blue" / "moved.png")
    return folder


@pytest.fixture(scope="module")
def run(photos: Path) -> Path:
    done = vlprompt("train", "gda", photos, "--backbone", TINY, "--out", photos.parent / "run", "data.workers=0")
    assert done.code == 0, done.err
    return photos.parent / "run"


@pytest.fixture(scope="module")
def page(photos: Path, run: Path) -> Path:
    file = photos.parent / "new" / "page.html"
    done = vlprompt("evaluate", run, photos, "--html", file, "--json")
    assert done.code == 0, done.err
    assert f"page written to {file}" in done.err
    file.with_suffix(".json").write_text(done.out)
    return file


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems allow no such names")
def test_names_that_are_no_utf_8_are_spelt_out(photos: Path, run: Path, tmp_path: Path) -> None:
    data = shutil.copytree(photos, tmp_path / "photos")
    file = data / "test" / "blue" / "moved.png"  # which is shown, as it is red
    file.rename(os.fsdecode(os.fsencode(file.parent) + b"/\xff.png"))
    done = vlprompt("evaluate", run, data, "--html", tmp_path / "page.html")
    assert done.code == 0, done.err
    assert "udcff.png" in (tmp_path / "page.html").read_text("utf-8")


def section(page: Path, head: str) -> str:
    found = re.search(rf"<h2>{head}</h2>(.*?)(?=<h2>|</body>)", page.read_text("utf-8"), re.DOTALL)
    assert found, head
    return found[1]


def captions(text: str) -> list[str]:
    found = re.findall(r"<figcaption>(.*?)</figcaption>", text, re.DOTALL)
    return [unescape(re.sub(r"<[^>]*>", " ", caption)).replace("\xa0", " ") for caption in found]


def test_its_figures_are_those_of_evaluate(page: Path) -> None:
    told, text = json.loads(page.with_suffix(".json").read_text()), page.read_text("utf-8")
    assert f"<b>{told['accuracy']:.1f} % ±" in text
    rows = re.findall(r"<tr><td>(.*?)</td><td>(\d+)</td><td class=bar[^>]*>([\d.]+)</td><td>([\d.]+)</td>", text)
    assert {unescape(name): (int(n), float(a), float(p)) for name, n, a, p in rows} == {
        name: (row["n"], round(row["recall"], 1), round(row["precision"], 1)) for name, row in told["by_class"].items()
    }
    assert [float(a) for _, _, a, _ in rows] == sorted(float(a) for _, _, a, _ in rows), "the worst first"
    counts = re.findall(r'text-anchor="middle"[^>]*>(\d+)</text>', section(page, "Confusion matrix"))
    assert sorted(map(int, counts)) == sorted([1, 2, 3, *(n for _, _, n in told["confusion"])])
    assert f"Calibration error {told['calibration_error']:.3f}, calibrated " in section(page, "Reliability")


def test_planted_images_are_shown(page: Path) -> None:
    told = json.loads(page.with_suffix(".json").read_text())
    mistakes = [
        re.match(r" *(.*?)  ([\d.]+) % labelled  (.*?)  ([\d.]+) % ", text).groups()  # type: ignore[union-attr]
        for text in captions(section(page, "The most confident mistakes"))
    ]
    wrong = {(told["classes"][p], told["classes"][c]): n for c, p, n in told["confusion"] if c != p}
    assert Counter((predicted, label) for predicted, _, label, _ in mistakes) == wrong
    assert [float(p) for _, p, _, _ in mistakes] == sorted((float(p) for _, p, _, _ in mistakes), reverse=True)
    assert all(float(own) <= float(p) for _, p, _, own in mistakes)
    (pair,) = captions(section(page, "Near-duplicates of training images"))
    assert re.fullmatch(r"correlation (1\.000|0\.9\d+) +blue/copy.png +blue/blocks.png *", pair)
    assert "have a correlation of 0.95 or more." in section(page, "Near-duplicates of training images")
    first = captions(section(page, "Doubtful labels"))[0]
    assert first.split() == ["labelled", "blue", "rather", "<b>red", "&", "wide", "blue/moved.png"]


def test_it_needs_nothing_else(page: Path) -> None:
    text = page.read_text("utf-8")
    sources = re.findall(r'(?:src|href)="?([^">]*)', text)
    assert len(sources) >= 3
    for source in sources:
        head, _, data = source.partition(",")
        assert head == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(b64decode(data))) as image:
            assert max(image.size) <= 150
    assert "<b>red & wide" not in text, "names are escaped"
    assert not re.search(r"<script|@import|url\(", text)


def test_a_model_that_does_not_say_what_it_was_trained_on(photos: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "split.json").unlink()
    (tmp_path / "few" / "blue").mkdir(parents=True)
    draw(tmp_path / "few" / "blue" / "a.png")
    done = vlprompt("evaluate", tmp_path / "run", tmp_path / "few", "--html", tmp_path / "page.html")
    assert done.code == 0, done.err
    assert "Not looked for: the model does not say" in section(
        tmp_path / "page.html", "Near-duplicates of training images"
    )
    assert "Not looked for: that takes 3 images" in section(tmp_path / "page.html", "Doubtful labels")


def test_images_that_were_trained_on(photos: Path, run: Path, tmp_path: Path) -> None:
    done = vlprompt("evaluate", run, photos, "--split", "train", "--html", tmp_path / "page.html")
    assert done.code == 0, done.err
    assert "13 of the images themselves were trained on." in section(
        tmp_path / "page.html", "Near-duplicates of training images"
    )


def test_bad_input(photos: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "there.html").write_text("mine")
    (tmp_path / "file").write_text("")
    draw(tmp_path / "strange" / "horse" / "a.png")
    draw(tmp_path / "strange" / "cow" / "a.png")
    for data, out, says in (
        (photos, tmp_path / "folder.html", "is there already: delete it, or choose another name"),
        (photos, tmp_path / "there.html", "is there already: delete it, or choose another name"),
        (photos, tmp_path, "must end in .html"),
        (photos, tmp_path / "page.htm", "must end in .html"),
        (photos, tmp_path / "file" / "page.html", "cannot write"),
    ):
        done = vlprompt("evaluate", run, data, "--html", out)
        assert (done.code, done.out) == (2, ""), done.err
        error = done.err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert str(out) in error
        assert says in error
    done = vlprompt("evaluate", run, tmp_path / "strange", "--among", "model", "--html", tmp_path / "page.html")
    assert done.code == 2
    assert "--among model: 2 of 2 classes are none of the model's" in done.err
    assert not (tmp_path / "page.html").exists()
    assert (tmp_path / "there.html").read_text() == "mine"


@slow
@needs_browser
def test_in_a_browser(page: Path, tmp_path: Path) -> None:
    shutil.copy(page, tmp_path / "page.html")
    assert probed(tmp_path / "page.html") == {"plots": 2, "faults": [], "requests": []}
    picture = pixels(tmp_path / "page.html")
    assert 0.005 < (picture < 200).any(axis=2).mean() < 0.5
    assert (picture == (0x00, 0x72, 0xB2)).all(axis=2).any()  # the curve of the calibrated probabilities


@slow
@needs_browser
@pytest.mark.parametrize("n", [2, 40])
def test_charts_of_many_classes_in_a_browser(n: int, tmp_path: Path) -> None:
    names = [f"class {i} with a name that is quite long" for i in range(n)]
    counts = {(i, j): 1 + (1000 if i == j else (7 * i + j) % 5) for i in range(n) for j in range(n) if (i + j) % 3 == 0}
    bins = [(0.1 * i, min(1.0, 0.13 * i), 10 * i) for i in range(1, 10)]
    charts = [
        plots.matrix(names, counts, "Confusion matrix"),
        plots.reliability(
            {"calibrated": bins, "as the model says": bins[:1]},
            dict.fromkeys(("calibrated", "as the model says"), "#0072b2"),
            "Reliability",
        ),
    ]
    (tmp_path / "page.html").write_text(document("charts", charts), "utf-8")
    assert probed(tmp_path / "page.html") == {"plots": 2, "faults": [], "requests": []}
