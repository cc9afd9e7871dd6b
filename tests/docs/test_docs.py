"""The documentation: its Python runs, its commands parse, its links lead somewhere, its tables are the code's."""

from __future__ import annotations

import inspect
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import docs_tables
import numpy as np
import pytest
from PIL import Image

from tests.kit import REPOSITORY
from tests.kit.command import tree
from tests.kit.hub import Hub
from tests.kit.marks import slow
from vlprompt.cli import app
from vlprompt.config.schema import build_config, parse_override
from vlprompt.data.known.openmoji import CLASSES, pictures
from vlprompt.data.known.table import DATASETS
from vlprompt.data.splits import PARTS, Item, Split
from vlprompt.methods import METHODS, Method

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
LONG = ("docs/compare.md", "docs/python-api.md")  # pages whose code trains for seconds
PRECISE = ("train", "evaluate", "bench")
PLACEHOLDERS = {"METHOD": "coop", "SEED": "1"}
COLOURS = {"forget-me-not": (90, 120, 240), "otter": (120, 90, 60), "red_rose": (220, 40, 60)}


def name(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


def blocks(page: Path, *languages: str) -> list[str]:
    every = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [text for language, text in every if language in languages]


# A method of one's own, which is a file: docs/adding-a-method.md.
ADDING = REPOSITORY / "docs" / "adding-a-method.md"
OWN_FILE, OWN_METHOD = "my_taskres.py", blocks(ADDING, "python")[0]


# --- Python ---------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the photographs and the method's file that the pages speak of, to run them in."""
    rng = np.random.default_rng(0)
    for folder, colour in COLOURS.items():
        for i in range(8):
            pixels = (np.array(colour) + rng.integers(-40, 40, (64, 64, 3))).clip(0, 255).astype(np.uint8)
            file = tmp_path / "photos" / folder / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
    (tmp_path / OWN_FILE).write_text(OWN_METHOD, "utf-8")
    Hub(tmp_path / "hub", monkeypatch)
    monkeypatch.chdir(tmp_path)
    for registry in (METHODS, DATASETS):  # pages add to them
        for key in registry:
            monkeypatch.setitem(registry, key, registry[key])
    return tmp_path


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, id=name(p), marks=slow if name(p) in LONG else ()) for p in PAGES if blocks(p, "python")],
)
def test_python_runs(page: Path, place: Path) -> None:
    before = set(METHODS), set(DATASETS)
    namespace = {"__name__": "page"}
    try:
        for code in (code for code in blocks(page, "python") if code != OWN_METHOD):
            exec(compile(code, name(page), "exec", dont_inherit=True), namespace)
    finally:
        for registry, known in zip((METHODS, DATASETS), before, strict=True):
            for key in set(registry) - known:
                del registry[key]


# --- a method of one's own ---------------------------------------------------------------------------


@pytest.fixture
def own_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page's method in the folder where commands run."""
    (tmp_path / OWN_FILE).write_text(OWN_METHOD, "utf-8")
    monkeypatch.chdir(tmp_path)
    before, modules = dict(METHODS), set(sys.modules)
    yield
    METHODS.clear()
    METHODS.update(before)
    for module in (name for name in set(sys.modules) - modules if name.startswith("vlprompt_method_")):
        del sys.modules[module]  # another test's rows may be of the same file, which is to be registered again


def test_a_method_of_ones_own_is_trained_and_compared(place: Path, own_method: None, vlprompt) -> None:
    """The page's commands, one after the other."""
    assert OWN_METHOD.startswith(f"# {OWN_FILE}\n")
    lines = [line for block in blocks(ADDING, "bash") for line in block.splitlines()]
    assert [line.split()[1] for line in lines] == ["train", "evaluate", "predict", "bench"]
    for line in lines:
        words = shlex.split(line)[1:]
        code, _, err = vlprompt(*words)
        assert code == 0, err
    rows = (place / "benches" / "taskres" / "results.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]]


def test_the_pages_functions_take_what_it_says() -> None:
    listed = re.findall(r"^\| `(\w+)\(([^)`]*)\)`", ADDING.read_text("utf-8"), re.MULTILINE)
    assert len(listed) > 10
    for function, arguments in listed:
        taken = list(inspect.signature(getattr(Method, function)).parameters)[1:]
        assert len(taken) == len([a for a in arguments.split(",") if a]), f"{function} takes {taken}"


# --- commands -------------------------------------------------------------------------------------


def commands() -> Iterator[tuple[Path, list[str]]]:
    """Every ``vlprompt …`` line of an unmarked or bash block, unless it is a description with […]."""
    for page in PAGES:
        for block in blocks(page, "", "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("vlprompt ") and "[" not in line:
                    words = shlex.split(line, comments=True)[1:]
                    yield page, [PLACEHOLDERS.get(word, word) for word in words]


def test_there_are_commands_on_every_page_that_should_have_some() -> None:
    used = {name(page) for page, _ in commands()}
    assert used >= {"README.md", "docs/quick-start.md", "docs/reproduce.md", "docs/adding-a-dataset.md"}
    assert used >= {name(method_page(method)) for method in METHODS}


@pytest.mark.parametrize(("page", "words"), [pytest.param(p, w, id=f"{name(p)}: {' '.join(w)}") for p, w in commands()])
def test_commands_are_valid(page: Path, words: list[str], own_method: None) -> None:
    command, rest = tree(app), words
    while hasattr(command, "resolve_command"):  # a group of commands
        _, command, rest = command.resolve_command(command.make_context("vlprompt", rest[:1]), rest)
    given = command.make_context(words[0], rest).params  # raises for unknown options, bad values, what is missing
    if words[0] == "train" and given["resume"] is None:
        settings = dict(parse_override(text) for text in given["settings"] or [])
        config = build_config(given["method"], given["preset"], overrides=settings)
        assert not settings.keys() & config.options.unused().keys()


def test_every_method_is_reproduced_in_one_precision() -> None:
    given = [words for page, words in commands() if name(page) == "docs/reproduce.md"]
    assert {words[1] for words in given if words[0] == "train"} == set(METHODS)
    assert all(words[words.index("--precision") + 1] == "fp16" for words in given if words[0] in PRECISE)


def benches() -> Iterator[tuple[str, list[str]]]:
    """Every ``vlprompt bench`` of the pages and of the tables in ``tools``, if its file of rows is there."""
    every = [(name(page), words) for page, words in commands()]
    for file in sorted((REPOSITORY / "tools").rglob("*.yaml")):
        lines = re.findall(r"^# +vlprompt (.+)$", file.read_text("utf-8"), re.MULTILINE)
        every += [(name(file), shlex.split(line)) for line in lines]
    for where, words in every:
        rows = words[words.index("--rows") + 1] if "--rows" in words else None
        if words[0] == "bench" and (rows is None or (REPOSITORY / rows).is_file()):
            yield where, words


def takes_seconds(where: str, words: list[str]) -> bool:
    """Whether a bench has the dozens of rows of a table, or a teacher whose texts another model reads."""
    return any(word.startswith(("docs/results", "tools/", "efficientnet")) for word in (where, *words))


@pytest.mark.parametrize(
    ("where", "words"),
    [pytest.param(w, b, id=f"{w}: {' '.join(b)}", marks=[slow] if takes_seconds(w, b) else []) for w, b in benches()],
)
def test_benches_can_begin(
    vlprompt, tmp_path: Path, own_method: None, monkeypatch: pytest.MonkeyPatch, where: str, words: list[str]
) -> None:
    """Their runs can be planned and, with the data set that is everywhere, have images enough."""
    given = [word.replace(f"./{OWN_FILE}", str(tmp_path / OWN_FILE)) for word in words]
    gone = ("mini-teacher", "drawn")  # of earlier commits, as the page says
    given = ["mini" if word in gone else word for word in given]
    given += ["--out", str(tmp_path / "out")]
    if words[words.index("--data") + 1] != "openmoji":
        given.append("--dry-run")
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("vlprompt.bench.bench._begin", lambda *given: [])
    monkeypatch.setattr("vlprompt.bench.bench.find_bank", lambda config, class_names: None)  # a page builds them
    monkeypatch.setattr("vlprompt.data.datasets.absent", lambda split: [])  # nothing is drawn
    for key in (key for key in DATASETS if key.startswith("openmoji")):
        monkeypatch.setitem(DATASETS, key, replace(DATASETS[key], make=openmoji))
    code, _, err = vlprompt(*given)
    assert code == 0, err


def openmoji(folder: Path) -> Split:
    """The data set's split, without its pictures."""
    items = {part: [Item(p.path, CLASSES.index(p.class_name)) for p in pictures() if p.split == part] for part in PARTS}
    return Split(folder, CLASSES, *(tuple(items[part]) for part in PARTS))


# --- links and settings ---------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", [*PAGES, *sorted((REPOSITORY / "tools").rglob("*.md"))], ids=name)
def test_files_of_the_repository_are_where_pages_say(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    named = {file for file in re.findall(r"`((?:src|tests|tools|speed|docs)/[\w./-]+)`", text) if "NAME" not in file}
    assert [file for file in named if not (REPOSITORY / file).exists()] == []


def method_page(method: str) -> Path:
    """Methods of one file have one page, heads another together."""
    module, docs = METHODS[method].__module__, REPOSITORY / "docs"
    return docs / "heads.md" if ".heads." in module else docs / "methods" / f"{module.rpartition('.')[2]}.md"


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_page_has_all_parts(method: str) -> None:
    text = method_page(method).read_text("utf-8")
    for head in ("Equations", "Settings", "Where it differs from the official code", "Parity", "Use"):
        assert f"\n## {head}\n" in text
    tables = [words.split() for words in re.findall("<!-- table: (.+?) -->", text)]
    assert any(kind == "training" and method in names for kind, *names in tables) or not METHODS[method].official
    # A method with the options of its student has them on the student's page.
    documented = [c.name for c in METHODS[method].__mro__ if "name" in vars(c) and documents(c)]
    assert documented
    assert fields(METHODS[documented[0]].Config) == fields(METHODS[method].Config) or documented[0] == method


def documents(cls: type[Method]) -> bool:
    """Whether the options of a method are on its page."""
    return f"<!-- table: options {cls.name} -->" in method_page(cls.name).read_text("utf-8")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_tables_are_those_of_the_code(page: Path) -> None:
    """Otherwise: python tools/docs_tables.py."""
    text = page.read_text("utf-8")
    assert text.count("<!-- table: ") == text.count("<!-- end -->") == len(docs_tables.MARKED.findall(text))
    assert docs_tables.write_tables(text) == text


def test_changed_tables_are_found() -> None:
    page = method_page("coop").read_text("utf-8")
    changed = page.replace("| `n_ctx` | 16 |", "| `n_ctx` | 17 |")
    assert changed != page == docs_tables.write_tables(changed)
