"""The docstrings under dataclass fields, which are the help texts of options and the tables of the documentation."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from inspect import cleandoc
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple


class Field(NamedTuple):
    """What a file says about a field."""

    text: str
    """The docstring under it."""
    default: Any
    """Its default, if that is a literal; None otherwise."""


def read_fields(file: Path) -> dict[str, dict[str, Field]]:
    """The fields with a docstring of a Python file's classes, by the class's qualified name and the field's.

    The file is read, not imported: ``--help`` has no time for what the configuration imports.
    """
    return {name: dict(_fields(node)) for name, node in _classes(ast.parse(file.read_text("utf-8")).body)}


def _classes(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.ClassDef]]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield prefix + node.name, node
            yield from _classes(node.body, f"{prefix}{node.name}.")


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, Field]]:
    for field, below in pairwise(node.body):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name), value=value), ast.Expr(value=ast.Constant(value=str(text))):
                default = value.value if isinstance(value, ast.Constant) else None
                yield name, Field(" ".join(cleandoc(text).split()), default)
