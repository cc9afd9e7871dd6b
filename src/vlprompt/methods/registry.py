"""Where methods are found: in this package, in an installed one, or in a file of one's own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from vlprompt.data.files import content_hash
from vlprompt.errors import ConfigError, one_line, unknown
from vlprompt.methods.base import Method, MethodConfig

METHODS: dict[str, type[Method]] = {}
GROUP = "vlprompt.methods"
"""Entry points of this group are methods of other packages: ``name = "package.module:Class"``."""
M = TypeVar("M", bound=Method)


def register(name: str) -> Callable[[type[M]], type[M]]:
    """Make a method known under ``name``; raises ConfigError for what is no whole method, and if another one has it."""

    def add(cls: type[M]) -> type[M]:
        if not (isinstance(cls, type) and issubclass(cls, Method) and issubclass(cls.Config, MethodConfig)):
            raise ConfigError(f"method '{name}' is no Method, or its Config no MethodConfig")
        if lacking := [what for what in ("paper", "year", "learns") if not hasattr(cls, what)]:
            raise ConfigError(f"method '{name}' does not say its {', '.join(lacking)}")
        known = METHODS.get(name, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(f"there is a method '{name}' already, in {known.__module__}: choose another name")
        cls.name = name
        METHODS[name] = cls
        return cls

    return add


def find_method(name: str) -> type[Method]:
    """The method of that name, or in that file (``./my_method.py``).

    Raises ConfigError with the nearest name, or for a file that holds no method, or several.
    """
    if is_file(name):
        return _load(Path(name).expanduser().resolve())
    if name not in METHODS and name in (installed := _installed()):
        _import(installed[name])
    if name not in METHODS:
        raise ConfigError(unknown("method", name, method_names()))
    return METHODS[name]


def method_names() -> list[str]:
    """The names of the package's methods and of installed ones."""
    return sorted({*METHODS, *_installed()})


def is_file(name: str) -> bool:
    """Whether a method's name is that of a Python file."""
    return name.endswith(".py")


def file_of(cls: type[Method]) -> tuple[Path, str] | None:
    """The file that a method was loaded from and the SHA-256 of what was in it then; None for those of packages."""
    return _FILES.get(cls)


def source_of(method: Method) -> str:
    """What :func:`find_method` finds the method's class by."""
    file = file_of(type(method))
    return str(file[0]) if file else method.name


def file_fingerprint(name: str) -> str | None:
    """Twelve hexadecimal digits that stand for what is in a method's file now; None for a method of a package."""
    return content_hash(Path(name).expanduser())[:12] if is_file(name) else None


_FILES: dict[type[Method], tuple[Path, str]] = {}


def _load(file: Path) -> type[Method]:
    """Run a file, once for each content, and take the method that it registers."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"method file {file}: {error.strerror}") from None
    source, before = (file, sha256(content).hexdigest()), dict(METHODS)
    known = next((cls for cls in _FILES if _FILES[cls] == source), None)
    if known and METHODS.get(known.name) is known:
        return known
    for cls in (c for c in before.values() if c in _FILES and _FILES[c][0] == file):  # of another content
        METHODS.pop(cls.name)
    try:
        found = register(known.name)(known) if known else _run(file, content)
    except Exception:
        METHODS.clear()
        METHODS.update(before)
        raise
    _FILES[found] = source
    return found


def _run(file: Path, content: bytes) -> type[Method]:
    module_name = f"vlprompt_method_{sha256(str(file).encode() + content).hexdigest()[:16]}"
    module = sys.modules[module_name] = ModuleType(module_name)
    module.__file__ = str(file)
    try:
        # Python's loader would take compiled code of an earlier content of the same size and second.
        exec(compile(content, file, "exec"), vars(module))
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"method file {file} cannot be run: {type(error).__name__}: {one_line(error)}") from error
    found = [cls for cls in METHODS.values() if cls.__module__ == module_name]
    if len(found) != 1:
        names = ", ".join(cls.name for cls in found) or "none"
        raise ConfigError(f'method file {file} must register one method, with @register("name"); it registers {names}')
    return found[0]


@cache
def _installed() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _import(point: EntryPoint) -> None:
    try:
        cls = point.load()
    except Exception as error:
        raise ConfigError(f"method '{point.name}' of {point.value} cannot be imported: {one_line(error)}") from error
    register(point.name)(cls)
