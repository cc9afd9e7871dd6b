"""Fixtures of the bench's tests."""

from pathlib import Path

import pytest

from tests.kit.pictures import make_pictures


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """4 training, no val and 2 test pictures of three classes, of one test alone."""
    return make_pictures(tmp_path / "photos", held_out="test")
