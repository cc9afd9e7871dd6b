"""Marks of tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

slow = pytest.mark.slow


def sweep(values: Iterable[Any], *fast: Any) -> list[Any]:
    """A test's parameters; all but those named are slow."""
    every = list(values)
    assert all(value in every for value in fast), "a fast one is not among them"
    return [
        value if value in fast else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=slow)
        for value in every
    ]
