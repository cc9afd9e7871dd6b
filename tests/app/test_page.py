"""The page of ``vlprompt app`` in a real browser, which may reach nothing but this machine."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, expect, sync_playwright

from tests.kit.browser import BROWSER, needs_browser
from tests.kit.marks import slow
from tests.kit.pictures import SHADES, paint
from vlprompt.api import PromptedModel
from vlprompt.training.explain import relevance

NAMES = list(SHADES)
BRIGHTEST = (253, 231, 37)
"""Of viridis."""
pytestmark = needs_browser
expect.set_options(timeout=30_000)


@pytest.fixture(scope="module")
def browser():
    """One for all tests."""
    with sync_playwright() as play:
        given = ["--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        started = play.chromium.launch(executable_path=BROWSER, args=given)
        yield started
        started.close()


@pytest.fixture
def page(browser, served: str) -> Iterator[Page]:
    """The page, opened; at the end, all that it has asked for was here, and its scripts have not failed."""
    opened, seen, wrong = browser.new_page(viewport={"width": 1500, "height": 1000}), [], []
    opened.on("request", lambda request: seen.append(request.url))
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda line: wrong.append(line.text) if "Security" in line.text else None)
    opened.goto(served)
    expect(opened.locator("#runs h2")).to_have_text(["runs/a", "runs/b", "runs/c"])
    yield opened
    opened.close()
    assert {re.match("(data:|[^?]*?/(?=[^/]*$))", url)[0] for url in seen} <= {served, "data:"}
    assert not wrong


def choose(page: Page, *files: Path) -> None:
    page.set_input_files("#files", files)


def drop(page: Page, file: Path) -> None:
    """Drop a file on the page, as the browser tells it."""
    given = page.evaluate_handle(
        """([name, content]) => {
          const given = new DataTransfer();
          given.items.add(new File([Uint8Array.from(atob(content), c => c.charCodeAt(0))], name));
          return given;
        }""",
        [file.name, base64.b64encode(file.read_bytes()).decode()],
    )
    page.dispatch_event("body", "drop", {"dataTransfer": given})


def panel(page: Page, file: str, run: int) -> Locator:
    return page.locator("article", has_text=file).locator(".panel").nth(run)


def shown(model: PromptedModel, picture: Path, names: list[str]) -> tuple[list[str], list[str]]:
    """Names and percentages of the two bars that a panel should show."""
    p = model.predict([picture], names).probabilities[0]
    order = np.argsort(-p)[:2]
    return [names[c] for c in order], [f"{100 * p[c]:.1f} %" for c in order]


def expect_bars(place: Locator, bars: tuple[list[str], list[str]]) -> None:
    expect(place.locator(".why")).to_have_text(bars[1])
    for i, name in enumerate(bars[0]):
        expect(place.locator(".bar input").nth(i)).to_have_value(name)


def test_pictures_are_scored_and_explained(page: Page, models, picture: Path, tmp_path: Path) -> None:
    paint(tmp_path / "blue.png", SHADES["blue"], 3, 40)
    choose(page, picture, tmp_path / "blue.png")
    for file in (picture, tmp_path / "blue.png"):
        for run, model in enumerate(models):
            expect_bars(panel(page, file.name, run), shown(model, file, NAMES))
            best = model.predict([file]).names[0]
            expect(panel(page, file.name, run).locator("figcaption")).to_have_text(f"what speaks for {best}")
            expect(panel(page, file.name, run).locator(".none")).to_have_count(int(run == 0))
    assert page.get_by_text("none of these", exact=True).count() == 2
    assert "not calibrated" in page.locator("#runs").inner_text()

    place = panel(page, "red.png", 1)
    other = place.locator(".bar input").nth(1).input_value()
    place.locator(".why").nth(1).click()
    expect(place.locator("figcaption")).to_have_text(f"what speaks for {other}")
    page.locator("#overlay").fill("100")
    heat = np.asarray(Image.open(io.BytesIO(place.locator("canvas").screenshot())).convert("RGB")).astype(int)
    pixels = models[1].backbone.preprocess(Image.open(picture))
    expected = relevance(models[1].method, pixels, class_index=NAMES.index(other)).map
    top, left = divmod(int(expected.argmax()), len(expected))
    y, x = (int((i + 0.5) * side / len(expected)) for i, side in zip((top, left), heat.shape, strict=False))
    assert np.abs(heat[y, x] - BRIGHTEST).max() < 40

    page.locator("article", has_text="blue.png").get_by_title("Remove").click()
    expect(page.locator("article")).to_have_count(1)
    width = page.locator("body").bounding_box()["width"]
    assert all(box.bounding_box()["x"] + box.bounding_box()["width"] <= width for box in page.locator(".panel").all())


@slow
def test_class_names_are_edited_in_place(page: Page, models, picture: Path) -> None:
    """Runs with the same names keep the same names, but for one that knows no others."""
    choose(page, picture)
    expect(page.get_by_text("what speaks for")).to_have_count(3)
    first = panel(page, "red.png", 0).locator(".bar input").first
    was, new = first.input_value(), "a cherry"
    first.fill(new)
    first.press("Enter")
    names = [new if name == was else name for name in NAMES]
    for run in (0, 1):
        expect_bars(panel(page, "red.png", run), shown(models[run], picture, names))
        expect(page.get_by_label(f"Class names of runs/{'ab'[run]}")).to_have_value("\n".join(names))
    expect_bars(panel(page, "red.png", 2), shown(models[2], picture, NAMES))
    expect(page.get_by_text("none of these", exact=True)).to_have_count(0)
    expect(page.locator("#runs .note").filter(has_text="it does not tell “none of these”")).to_have_count(1)

    page.locator("summary").nth(1).click()
    typed = page.get_by_label("Class names of runs/b")
    typed.fill("sky\nsea\ngrass\nsand\n")
    for run in (0, 1):
        expect_bars(panel(page, "red.png", run), shown(models[run], picture, ["sky", "sea", "grass", "sand"]))
    expect(page.locator("#runs summary")).to_have_text(["4 class names", "4 class names", "3 class names"])
    for text, says in (
        ("sky\nsea\nsky", "2 classes are named 'sky'"),
        ("sky\n\nsea", "a class has no name"),
        ("", "a class has no name"),
        ("sky", "there is only one class, 'sky'"),
    ):
        typed.fill(text)
        expect(page.locator("#runs [role=alert]").nth(1)).to_contain_text(says)
    page.locator("details").nth(1).locator("button").click()
    expect(page.locator("#runs [role=alert]").nth(1)).to_be_empty()
    for run in (0, 1):
        expect_bars(panel(page, "red.png", run), shown(models[run], picture, NAMES))

    page.locator("summary").nth(2).click()
    page.get_by_label("Class names of runs/c").fill("red\nsky")
    expect(page.locator("#runs [role=alert]").nth(2)).to_contain_text("linear_probe knows its own 3 classes alone")


def test_errors_are_shown(page: Page, picture: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "large.jpg").write_bytes(bytes(21 * 2**20))
    for name, says in (
        ("notes.txt", "notes.txt: not an image in a known format"),
        ("large.jpg", "large.jpg: 21.0 MB (allowed: 20 MB)"),
    ):
        choose(page, tmp_path / name)
        expect(page.locator("#error")).to_contain_text(says)
        expect(page.locator("article")).to_have_count(0)
    drop(page, picture)
    expect(page.get_by_text("what speaks for")).to_have_count(3)
    expect(page.locator("#error")).to_be_empty()


def test_a_page_that_lost_its_server(browser, served_for_a_while, picture: Path) -> None:
    opened = browser.new_page()
    with served_for_a_while as url:
        opened.goto(url)
        expect(opened.locator("#runs h2")).to_have_count(3)
    choose(opened, picture)
    expect(opened.locator(".panel [role=alert]").first).to_have_text("no answer: is vlprompt app still running?")
    opened.close()
