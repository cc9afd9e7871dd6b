"""A row of the tables: a method and settings by name, as folders say them, and what its runs have in common."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from vlprompt.backbones.names import hub_id
from vlprompt.config.schema import RunConfig
from vlprompt.data.known.table import find_dataset
from vlprompt.documents import read_yaml
from vlprompt.errors import ConfigError, one_line, unknown
from vlprompt.methods import Can, find_method
from vlprompt.methods.heads.common import Head
from vlprompt.methods.registry import file_fingerprint

Rows = Mapping[str, tuple[str, Mapping[str, Any]]]
"""Names, each with a method (its name or file) and settings."""
MARKS = ("-transductive", "-memory")
"""What ``row_name`` adds, in this order."""


def row_name(name: str, config: RunConfig) -> str:
    """A row as tables print it: it says so where a method learns from images of the classes that it is tested on, and
    where it keeps features of the images of earlier tasks.
    """
    cls = find_method(config.method)
    joined = config.data.task is not None and Can.JOIN_CLASSES in config.options.can
    keeps = joined and issubclass(cls, Head) and cls.remembers
    marks = zip(MARKS, (config.options.transductive, keeps), strict=True)
    return name + "".join(mark for mark, there in marks if there and mark not in name)


def unmarked(name: str) -> str:
    """The row that was given, of its name in tables."""
    for mark in reversed(MARKS):
        name = name.removesuffix(mark)
    return name


def rows_of_methods(methods: Sequence[str]) -> Rows:
    """A row for each method, a name or a file, with its registered name; raises ConfigError if two have the same."""
    rows: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for method in methods:
        name = find_method(method).name
        if name in rows:
            raise ConfigError(f"methods: {rows[name][0]} and {method} are both called '{name}'")
        rows[name] = method, {}
    return rows


def read_rows(file: Path) -> Rows:
    """Named settings from a YAML file, to compare more than methods with their defaults::

        method: dpl                  # of rows that name no other
        set: {carry: add}            # settings of the rows of this method
        rows:
          exact: {instance_to_prompt: exact}
          small: {preset: mini}        # in place of the protocol's
          frozen: {method: zero_shot}

    Raises ConfigError for a file that cannot be read or has another form.
    """
    try:
        content = read_yaml(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read rows from {file}: {one_line(error)}") from None
    if not isinstance(content, dict) or not isinstance(content.get("rows"), dict) or not content["rows"]:
        raise ConfigError(f"{file} must hold rows: names with settings")
    if strange := set(content) - {"method", "set", "rows"}:
        raise ConfigError(f"{file}: {unknown('key', min(map(str, strange)), ('method', 'set', 'rows'))}")
    if not isinstance(content.get("set") or {}, dict):
        raise ConfigError(f"{file}: set = {content['set']} (allowed: settings, {{key: value}})")
    rows: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for name, settings in content["rows"].items():
        if not isinstance(settings or {}, dict):
            raise ConfigError(f"{file}: row '{name}' must hold settings: {{key: value}}")
        own = dict(settings or {})
        method = own.pop("method", content.get("method"))
        if method is None:
            raise ConfigError(f"{file}: row '{name}' names no method")
        for key, value in (("method", method), ("preset", own.get("preset"))):
            if not isinstance(value, str | None):
                raise ConfigError(f"{file}: row '{name}': {key} = {value} (allowed: a name)")
        common = content.get("set") or {} if content.get("method") in (None, method) else {}
        if not isinstance(common.get("preset"), str | None):
            raise ConfigError(f"{file}: set: preset = {common['preset']} (allowed: a name)")
        rows[str(name)] = method, common | own
    return rows


def data_name(data: str) -> str:
    """A data set as folders and tables name it."""
    dataset = find_dataset(data)
    return dataset.name if dataset else Path(os.path.realpath(os.path.expanduser(data))).name.removesuffix(".csv")


def backbone_name(backbone: str) -> str:
    """A backbone as folders and tables name it: of a local one, the last part of its path."""
    path = Path(backbone).expanduser()
    name = path.resolve().name.removesuffix(".safetensors") if path.exists() else hub_id(backbone) or backbone
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "backbone"


_NOT_THE_RESULT = (
    "data.root", "data.workers", "data.max_pixels", "train.device", "train.graphs", "train.report_to", "seed"
)  # fmt: skip


def result_settings(config: RunConfig) -> dict[str, Any]:
    """Every setting that decides a result, flat, except the seed: what runs that are averaged must have in common.

    Data, backbones, banks and split files are there by name, wherever they lie; a method's file by what is in it.
    """
    data, teacher = config.data, config.teacher.backbone

    def last_part(path: str | None) -> str | None:
        return path and Path(path).expanduser().resolve().name

    data = replace(data, name=data_name(data.name), split_file=last_part(data.split_file), bank=last_part(data.bank))
    data = replace(data, descriptions=last_part(data.descriptions), prior=last_part(data.prior))
    named = replace(
        config, method=find_method(config.method).name, backbone=backbone_name(config.backbone), data=data,
        teacher=replace(config.teacher, backbone=teacher and backbone_name(teacher)),
    )  # fmt: skip
    own = file_fingerprint(config.method)
    return {k: v for k, v in named.flat().items() if k not in _NOT_THE_RESULT} | ({"method file": own} if own else {})


def fingerprint(config: RunConfig) -> str:
    """Twelve hexadecimal digits that stand for :func:`result_settings`."""
    return sha256(json.dumps(result_settings(config), sort_keys=True).encode()).hexdigest()[:12]
