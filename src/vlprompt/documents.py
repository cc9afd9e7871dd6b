"""JSON and YAML files: read within limits, nothing in them twice; what we write as JSON carries its checksum."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from vlprompt.errors import one_line
from vlprompt.files import write_atomically

MOST_JSON, MOST_YAML = 1 << 29, 1 << 18
"""Bytes that are read of a file; settings that people write are a few thousand."""
MOST_NODES, MOST_DEPTH = 20_000, 50
"""Values in a YAML text, each counted as often as an alias repeats it; and lists or mappings in one another."""
CHECKSUM = "sha256"

T = TypeVar("T")


def read_text(file: Path, most: int) -> str:
    """A file's text. Raises ValueError if it is longer than ``most`` bytes or no UTF-8; OSError as ever.

    No more is read than that, so a device that never ends is refused too.
    """
    with file.open("rb") as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it is longer than {most:,} bytes")
    return content.decode("utf-8")


# --- JSON -----------------------------------------------------------------------------------------


def parse_json(text: str) -> Any:
    """Plain values; raises ValueError for what is no JSON, a repeated key, or too deep a nesting."""
    try:
        return json.loads(text, object_pairs_hook=_each_once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(file: Path, kind: type[T]) -> T:
    """What a JSON file that others wrote holds, checked against a type; raises ValueError or OSError saying why not."""
    return fitted(kind, parse_json(read_text(file, MOST_JSON)))


def read_sealed(file: Path, kind: type[T]) -> T:
    """The same of a file that :func:`write_sealed` wrote; raises ValueError too if it is not what was written."""
    return fitted(kind, unsealed(parse_json(read_text(file, MOST_JSON))))


def write_sealed(file: Path, content: Mapping[str, Any], indent: int | None = None) -> None:
    """Write a JSON file with its checksum; raises OutputError as :func:`write_atomically` does."""
    whole = sealed(content)
    try:
        write_atomically(file, json.dumps(whole, indent=indent, ensure_ascii=False))
    except UnicodeEncodeError:  # the name of a file that is no UTF-8
        write_atomically(file, json.dumps(whole, indent=indent))


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content, and as its last key the SHA-256 over all of it: no change of a value or name goes unseen."""
    plain = json.loads(json.dumps(content))  # as it will be read: keys are texts, tuples lists
    return {**plain, CHECKSUM: checksum(plain)}


def unsealed(content: Any) -> dict[str, Any]:
    """What :func:`sealed` was given; raises ValueError if it is another, KeyError if there is no checksum."""
    if not isinstance(content, dict):
        raise ValueError("it holds no keys and values")
    rest = {key: value for key, value in content.items() if key != CHECKSUM}
    if content[CHECKSUM] != checksum(rest):
        raise ValueError(f"it is damaged or was changed: its content is not what was saved ({CHECKSUM})")
    return rest


def checksum(content: object) -> str:
    """SHA-256 over plain values, whatever the order of keys and the white space between them."""
    return sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


reader: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)
"""What reads plain values as a type; kept, as to make one takes a millisecond or two."""


def fitted(kind: type[T], content: Any) -> T:
    """Plain values as a type; raises ValueError that names the first that does not fit."""
    try:
        return reader(kind).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        reason = first["msg"][0].lower() + first["msg"][1:]
        raise ValueError(one_line(f"{where}: {reason}" if where else reason)) from None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{next(name for name in names if names.count(name) > 1)[:60]}' is in it twice")
    return content


# --- CSV ------------------------------------------------------------------------------------------

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def csv_cell(text: str) -> str:
    """Text that a spreadsheet would compute (``=1+1``) behind an apostrophe, which it takes as a sign for text."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def csv_text(cell: str) -> str:
    """What :func:`csv_cell` was given."""
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(_FORMULA) else cell


def csv_path(path: str) -> str:
    """A path that a spreadsheet would compute, written so that it does not, and is still found."""
    return f"./{path}" if path.startswith(_FORMULA) else path


# --- YAML -----------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML whose plain words are texts unless they are true, false, null or decimal numbers.

    YAML 1.1 takes ``off`` for false, ``010`` for 8, ``1_000`` for 1000, ``1:30`` for 90 and ``2026-01-01`` for a date.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping, each of whose keys is there once."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise yaml.YAMLError(f"'{key.value[:60]}' is in it twice (line {line})")
                seen.add(key.value)
        return node

    def get_single_node(self) -> yaml.Node | None:
        """The whole text, if it is not too much once aliases are followed."""
        node = super().get_single_node()
        if node is not None:
            weight, depth = _extent(node, {})
            if weight > MOST_NODES:
                raise yaml.YAMLError(f"it holds more than {MOST_NODES:,} values, each alias counted as what it repeats")
            if depth > MOST_DEPTH:
                raise yaml.YAMLError(f"it is nested more than {MOST_DEPTH} deep")
        return node


_TAG = "tag:yaml.org,2002:"
_Loader.yaml_implicit_resolvers = {}
for kind, pattern, first in (
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", "[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+.0123456789"),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", "<<", "<"),
):
    _Loader.add_implicit_resolver(_TAG + kind, re.compile(f"^({pattern})$"), list(first))


def parse_yaml(text: str) -> Any:
    """Plain values; raises ValueError for what is no YAML, a repeated key, and more than settings ever need."""
    if len(text) > MOST_YAML:
        raise ValueError(f"it is longer than {MOST_YAML:,} characters")
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(one_line(error)) from None


def read_yaml(file: Path) -> Any:
    """The same of a file; raises OSError too."""
    return parse_yaml(read_text(file, MOST_YAML))


def _extent(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """How many values a node stands for, and how deep they are nested."""
    if id(node) in known:
        if (extent := known[id(node)]) is None:
            raise yaml.YAMLError("an alias stands for what it is in")
        return extent
    known[id(node)] = None
    parts = [] if isinstance(node, yaml.ScalarNode) else node.value
    if isinstance(node, yaml.ScalarNode):
        check_text(node.value)
    inner = [_extent(part, known) for each in parts for part in (each if isinstance(each, tuple) else (each,))]
    extent = known[id(node)] = 1 + sum(weight for weight, _ in inner), 1 + max((d for _, d in inner), default=0)
    return extent


def check_text(text: str) -> None:
    """Raise ValueError for half a character (a lone surrogate) or a zero byte: no model or file system takes them."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{ascii(text)[:60]} has half a character in it (a lone surrogate)") from None
    if "\0" in text:
        raise ValueError(f"{ascii(text)[:60]} has a zero byte in it")
