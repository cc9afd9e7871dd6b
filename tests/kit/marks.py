"""Marks of tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from vlprompt.methods import METHODS

slow = pytest.mark.slow


def sweep(values: Iterable[Any], *fast: Any) -> list[Any]:
    """A test's parameters; all but those named are slow."""
    every = list(values)
    assert all(value in every for value in fast), "a fast one is not among them"
    return [
        value if value in fast else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=slow)
        for value in every
    ]


def image_sides() -> tuple[str, ...]:
    """Of the methods that do the same with an image the first: the others give other numbers on the same path."""
    parts = ("visual_prompts", "encode_images", "adapt", "logits", "predict", "image_dependent")
    firsts: dict[tuple[Any, ...], str] = {}
    for name in sorted(METHODS):
        firsts.setdefault(tuple(getattr(METHODS[name], part) for part in parts), name)
    return tuple(firsts.values())
