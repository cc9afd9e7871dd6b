"""A method's presets: the official ones that it names itself, and ``mini`` for small backbones."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import yaml

from vlprompt.backbones.load import EMBEDDED
from vlprompt.methods import Method

MINI = "mini"
FILE = EMBEDDED[MINI] / "presets.yaml"
"""The presets ``mini``, by method; each is flat keys of the run configuration."""


def presets_of(method: type[Method]) -> dict[str, Mapping[str, Any]]:
    """What ``--preset`` may name for a method: flat keys and values, by name."""
    own = _small_backbones().get(method.name)
    return {**method.presets, **({MINI: own} if own else {})}


@cache
def _small_backbones() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(FILE.read_text("utf-8"))
