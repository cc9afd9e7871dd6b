"""The docstrings under dataclass fields, which are the help texts of options and the tables of the documentation."""

from __future__ import annotations

import ast
from inspect import cleandoc
from itertools import pairwise
from pathlib import Path


def field_docs(file: Path) -> dict[str, dict[str, str]]:
    """The text under each field of a Python file's classes, by the class's qualified name and the field's.

    The file is read, not imported: ``--help`` has no time for what the configuration imports.
    """
    found: dict[str, dict[str, str]] = {}

    def read(body: list[ast.stmt], prefix: str) -> None:
        for statement in body:
            if isinstance(statement, ast.ClassDef):
                name = prefix + statement.name
                found[name] = {
                    field.target.id: " ".join(cleandoc(text.value.value).split())
                    for field, text in pairwise(statement.body)
                    if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
                    if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
                    if isinstance(text.value.value, str)
                }
                read(statement.body, f"{name}.")

    read(ast.parse(file.read_text("utf-8")).body, "")
    return found
