"""Two storeys: the engine, whose parts import only what lies below them, and the lab built on it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import vlprompt

SOURCE = Path(vlprompt.__file__).parent
ENGINE = [
    "version", "errors", "files", "documents", "data", "backbones", "prompting", "methods", "artefact", "config",
    "bank", "training", "api", "sklearn", "__init__",
]  # fmt: skip
"""From the ground up."""
LAB = ["provision", "describe", "demo", "bench", "compare", "evaluation", "app", "cli", "__main__"]
BUILDS_BANKS = ("bank.build", "bank.towers", "bank.config")
"""The lab's part of ``bank``; the rest reads banks."""

LINES = {"the engine without its methods": 13_100, "all": 27_250}
"""What is allowed. Who needs more first looks for what can go."""


def imports(file: Path) -> Iterator[str]:
    """Modules of the package that a file imports anywhere in it, without the package's name."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vlprompt":
            whole = [node.module] if node.module != "vlprompt" else [f"vlprompt.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            whole = [a.name for a in node.names if a.name.startswith("vlprompt.")]
        else:
            continue
        yield from (name.removeprefix("vlprompt.") for name in whole)


def modules() -> Iterator[tuple[str, Path]]:
    """Every module's name and file."""
    for file in sorted(SOURCE.rglob("*.py")):
        parts = file.relative_to(SOURCE).with_suffix("").parts
        yield ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts), file


def part(module: str) -> str:
    """The folder or file at the top that a module belongs to."""
    return module.split(".")[0]


def in_lab(module: str) -> bool:
    return part(module) in LAB or module.startswith(BUILDS_BANKS)


def test_every_part_belongs_to_a_storey() -> None:
    assert {part(module) for module, _ in modules()} == {*ENGINE, *LAB}


def test_the_engine_never_imports_the_lab() -> None:
    found = [f"{m} imports {i}" for m, file in modules() if not in_lab(m) for i in imports(file) if in_lab(i)]
    assert not found


def test_imports_of_the_engine_point_downwards() -> None:
    floor = {name: i for i, name in enumerate(ENGINE)}
    found = [
        f"{m} imports {i}"
        for m, file in modules()
        if not in_lab(m)
        for i in imports(file)
        if floor[part(i)] > floor[part(m)]
    ]
    assert not found


def test_the_code_grows_knowingly() -> None:
    lines = {module: file.read_text("utf-8").count("\n") for module, file in modules()}
    own = [m for m in lines if part(m) == "methods" and m not in ("methods", "methods.base", "methods.registry")]
    engine = sum(n for module, n in lines.items() if not in_lab(module) and module not in own)
    found = {"the engine without its methods": engine, "all": sum(lines.values())}
    assert all(found[what] <= allowed for what, allowed in LINES.items()), found
