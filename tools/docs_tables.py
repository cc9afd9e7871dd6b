"""Write the tables of methods, options, presets and data sets into the documentation, from the code.

    python tools/docs_tables.py           # rewrites what stands between <!-- table: … --> and <!-- end -->
    python tools/docs_tables.py --check   # names the pages that it would change; exit code 1 if there are any

A table is named by its kind and, for some kinds, by methods: ``options coop``, ``training coop``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pages import REPOSITORY, marks, rewrite, table, write_changed

from vlprompt.bench.protocols import PROTOCOLS
from vlprompt.cli.fields import read_fields
from vlprompt.config.presets import presets_of
from vlprompt.config.schema import build_config
from vlprompt.data.known.table import DATASETS
from vlprompt.errors import ConfigError
from vlprompt.methods import METHODS, Method

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
MARKED = marks("table", "end")
OPTIMIZERS = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}


def write_tables(page: str) -> str:
    """A page's text with its tables as the code has them; raises KeyError for a table that there is not."""

    def content(named: str) -> str:
        kind, *names = named.split()
        return TABLES[kind](*names)

    return rewrite(page, MARKED, content)


def official() -> str:
    """All methods and how they train, in short."""

    def in_short(name: str, cls: type[Method]) -> str:
        c = build_config(name)
        optimizer = f"{OPTIMIZERS[c.optim.name]} {c.optim.lr:g}"
        batch = "all images" if c.data.batch_size > 1e5 else f"batch {c.data.batch_size}"
        return f"{optimizer}, {batch}, {c.train.epochs} epochs" if "train.epochs" in cls.official else "no steps"

    rows = (
        (link("", name), learns(cls), f"{cls.paper} {cls.year}", in_short(name, cls), cls.parity)
        for name, cls in in_order()
    )
    return table(("method", "learns", "paper", "official settings", "checked"), rows)


def options(name: str) -> str:
    """A method's own options; the text is the docstring under the field."""
    config = METHODS[name].Config
    hints = get_type_hints(config)
    rows = ((f"`{f.name}`", shown(f.default), described(config, f.name, hints[f.name])) for f in fields(config))
    return table(("option", "default", "meaning"), rows)


def training(*names: str) -> str:
    """The official settings of methods, and their presets."""
    rows = []
    for name in names:
        rows.append((f"`{name}`", settings(name, METHODS[name].official)))
        for preset, values in presets_of(METHODS[name]).items():
            rows.append((f"`{name} --preset {preset}`", settings(name, values)))
    return table(("`vlprompt train`", "settings"), rows)


def datasets() -> str:
    """The known data sets that are not made by the package."""
    rows = (
        (
            f"`{d.name}`",
            f"[{d.title}]({d.homepage})",
            f"`{'/'.join(filter(None, (d.folder, d.images)))}/`",
            f"{d.classes:,}",
            " / ".join(f"{n:,}" if n else "–" for n in d.sizes),
            d.licence,
        )
        for d in DATASETS.values()
        if d.make is None
    )
    head = ("name", "in papers", "images lie below DATA in", "classes", "train / val / test", "licence note")
    return table(head, rows)


def protocols() -> str:
    """What `vlprompt bench` runs."""
    rows = (
        (
            f"`{name}`",
            p.trained_on,
            p.measured_on,
            ", ".join(map(str, p.shots)),
            f"`{p.preset}`" if p.preset else "–",
        )
        for name, p in PROTOCOLS.items()
    )
    return table(("protocol", "trained on", "measured on", "shots", "preset"), rows)


TABLES: dict[str, Callable[..., str]] = {t.__name__: t for t in (official, options, training, datasets, protocols)}


# --- parts ----------------------------------------------------------------------------------------


def in_order() -> list[tuple[str, type[Method]]]:
    """Methods that learn nothing first, then by year; those of one paper stand together."""
    return sorted(METHODS.items(), key=lambda item: (bool(item[1].official), item[1].year, item[1].paper))


def page_of(method: str) -> str:
    """The page that a method is described on, below docs: methods of one file have one, heads another together."""
    module = METHODS[method].__module__
    return "heads.md" if ".heads." in module else f"methods/{module.rpartition('.')[2]}.md"


def link(folder: str, method: str) -> str:
    return f"[`{method}`]({folder}{page_of(method)})"


def learns(cls: type[Method]) -> str:
    return cls.learns + (", from a teacher" if "teacher_probabilities" in cls.needs else "")


def described(config: type, field: str, hint: Any) -> str:
    """The docstring of a field, and the words that it may be."""
    owner = next(c for c in config.__mro__ if field in vars(c).get("__annotations__", {}))
    text = read_fields(Path(str(sys.modules[owner.__module__].__file__)))[owner.__qualname__][field].text
    words = get_args(hint) if get_origin(hint) is Literal else ()
    return text + (f" One of {', '.join(f'`{word}`' for word in words)}." if words else "")


def settings(method: str, values: Mapping[str, Any]) -> str:
    """Keys and values as the command line takes them, keys as short as is clear."""
    return " ".join(f"`{short(method, key, value)}={quoted(value)}`" for key, value in values.items())


def short(method: str, key: str, value: Any) -> str:
    name = key.rpartition(".")[2]
    try:
        same = build_config(method, overrides={name: value}) == build_config(method, overrides={key: value})
    except ConfigError:
        return key
    return name if same else key


def quoted(value: Any) -> str:
    return f'"{value}"' if " " in shown(value) else shown(value)


def shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "–" if not value else f"[{', '.join(map(str, value))}]" if len(value) < 9 else f"{len(value)} of them"
    return f"{value:g}" if isinstance(value, float) else str(value)


def main() -> int:
    """Rewrite the pages, or with ``--check`` name those that would change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    return write_changed({page: write_tables(page.read_text("utf-8")) for page in PAGES}, check)


if __name__ == "__main__":
    sys.exit(main())
