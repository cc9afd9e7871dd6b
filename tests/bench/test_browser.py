"""The page of ``vlprompt report`` in a real browser: drawn, nothing cut off or on top of another, nothing fetched."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.kit import TINY
from tests.kit.browser import BROWSER, needs_browser
from tests.kit.marks import slow
from tests.kit.pictures import make_pictures
from tests.kit.results import PLAIN, figures
from vlprompt.bench.report.published import ELEVEN
from vlprompt.bench.report.report import write_report
from vlprompt.bench.results import Row, to_csv
from vlprompt.methods import METHODS

pytestmark = [slow, needs_browser]

PROBE = """<script>addEventListener("load", () => {
  document.querySelectorAll("details").forEach(part => { part.open = true; });
  const faults = [], plots = [...document.querySelectorAll("svg")];
  const room = element => element.getBoundingClientRect();
  const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3;
  for (const plot of plots) {
    const sheet = room(plot), texts = [...plot.querySelectorAll("text")];
    if (sheet.width < 100 || sheet.height < 20) faults.push("not drawn: " + plot.textContent);
    texts.forEach((text, i) => {
      const box = room(text);
      if (box.left < sheet.left || box.right > sheet.right || box.top < sheet.top - 1 || box.bottom > sheet.bottom + 1)
        faults.push("cut off: " + text.textContent);
      for (const other of texts.slice(i + 1))
        if (meet(box, room(other))) faults.push("on top of each other: " + text.textContent + ", " + other.textContent);
    });
  }
  for (const part of document.querySelectorAll("th, td, p, figcaption, summary, div.wide"))
    if (part.scrollWidth > part.clientWidth + 1) faults.push("too wide: " + part.textContent.slice(0, 80));
  for (const picture of document.images)
    if (!picture.complete || !picture.naturalWidth) faults.push("missing image: " + picture.alt);
  if (document.documentElement.scrollWidth > innerWidth) faults.push("the page is too wide");
  const requests = performance.getEntriesByType("resource").map(entry => entry.name);
  document.body.textContent = JSON.stringify({plots: plots.length, faults, requests});
  document.body.id = "found";
});</script>"""


def browse(page: Path, *options: str) -> tuple[str, list[str]]:
    """What a headless browser prints, and what scripts and the page's errors leave on its console.

    It may reach no other machine.
    """
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={page.parent / 'browser'}", *options]
    command += ["--enable-logging=stderr"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, re.findall(r":CONSOLE[^\]]*\] (.*)", done.stderr)


def probed(page: Path) -> dict[str, Any]:
    """The number of plots, what looks wrong, and what was fetched, as the browser lays the page out."""
    probe = page.with_name("probe.html")
    probe.write_text(page.read_text("utf-8").replace("</body>", f"{PROBE}</body>"), "utf-8")
    printed, console = browse(probe, "--window-size=1200,900", "--dump-dom")
    found = re.search(r'<body id="found">(.*?)</body>', printed, re.DOTALL)
    assert found, "the page did not load"
    told = json.loads(unescape(found[1]))
    return {**told, "faults": told["faults"] + console}


def pixels(page: Path) -> np.ndarray:
    """A picture of the top of the page, [H, W, 3]."""
    picture = page.with_name("page.png")
    browse(page, "--window-size=1200,1600", f"--screenshot={picture}")
    return np.asarray(Image.open(picture).convert("RGB"))


def test_a_small_report(vlprompt, tmp_path: Path) -> None:
    """Of real runs: nothing is wrong with the page, and its picture has ink and the plots' colours."""
    photos = make_pictures(tmp_path / "photos")
    (photos / "val").rename(photos / "test")
    given = ["--methods", "zero_shot,coop", "--data", photos, "--seeds", "1,2", "--shots", "1,2", "epochs=1"]
    given += ["warmup_epochs=0", "data.workers=0", "--backbone", TINY, "--out", tmp_path / "out"]
    for protocol in ("few-shot", "long-tail"):
        assert vlprompt("bench", protocol, *given)[0] == 0
    given[7] = "2"
    assert vlprompt("bench", "base-to-novel", *given)[0] == 0
    assert vlprompt("report", tmp_path / "out")[0] == 0
    page = tmp_path / "out" / "report.html"
    assert probed(page) == {"plots": page.read_text("utf-8").count("<svg"), "faults": [], "requests": []}
    picture = pixels(page)
    ink = (picture < 200).any(axis=2)
    assert 0.005 < ink.mean() < 0.5
    assert ink.any(axis=1).sum() > 300  # rows of the picture that are not blank
    assert (picture == (0x99, 0x99, 0x99)).all(axis=2).any()  # zero_shot's bar
    assert (picture == (0x00, 0x72, 0xB2)).all(axis=2).any()  # coop's


def many() -> list[Row]:
    """More of everything than papers have: all methods and long names, eleven data sets and targets, three seeds."""
    rng = np.random.default_rng(0)
    rows = []
    for name in (*METHODS, "settings of its own with a name that does not end", "words"):
        good, common = (
            rng.uniform(30, 90),
            replace(PLAIN, name=name, method="coop", backbone="openai-clip-vit-base-patch16"),
        )
        for seed in (1, 2, 3):
            for protocol, data, measured_on, classes, shots in [
                *(("base-to-novel", d, d, c, 16) for d in sorted(ELEVEN) for c in ("base", "novel")),
                *(("few-shot", "dtd", "dtd", "all", s) for s in (1, 2, 4, 8, 16)),
                *(("cross-dataset", "imagenet", d, "all", 16) for d in ("imagenet", *sorted(ELEVEN - {"imagenet"}))),
                *(("long-tail", "dtd", "dtd", c, 16) for c in ("all", "many", "medium", "few")),
            ]:
                if (name, seed, data) != ("maple", 2, "eurosat"):  # one is missing
                    place = {"data": data, "measured_on": measured_on, "classes": classes, "shots": shots, "seed": seed}
                    accuracy = min(100.0, round(good + rng.normal(), 2))
                    rows.append(replace(common, protocol=protocol, accuracy=accuracy, train_seconds=12345.6, **place))
    return rows


def test_a_large_report(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text(to_csv(many()))
    for name, good in (("zero_shot", 50.0), ("coop", 40.0)):
        classes = {f"class {i} with a name that is quite long": good + (i % 7) * (name == "coop") for i in range(60)}
        figures(tmp_path, name, 1, classes, "openai-clip-vit-base-patch16")
    write_report(tmp_path)
    assert probed(tmp_path / "report.html") == {"plots": 4, "faults": [], "requests": []}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (('x="', 'x="9'), "cut off: "),
        (("table {", "table { font-size: 60px;"), "too wide: "),
        (("font-size=\"12\"", "font-size=\"40\""), "on top of each other: "),
        (("<h1>", '<img src="https://example.org/a.png"><h1>'), "https://example.org/a.png"),
        (("<h1>", '<img src="data:image/png;base64,AAAA" alt="x"><h1>'), "missing image: x"),
        (("<h1>", "<script>nothing()</script><h1>"), "Uncaught ReferenceError: nothing is not defined"),
    ],
)  # fmt: skip
def test_the_probe_finds_faults(tmp_path: Path, change: tuple[str, str], fault: str) -> None:
    (tmp_path / "results.csv").write_text(to_csv([row for row in many() if row.name in ("coop", "zero_shot")]))
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert change[0] in page
    (tmp_path / "report.html").write_text(page.replace(*change))
    found = probed(tmp_path / "report.html")
    assert any(fault in text for text in found["faults"] + found["requests"])
