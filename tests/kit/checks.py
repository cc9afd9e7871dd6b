"""What several tests check in the same way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vlprompt.errors import DataError


def fails(match: str):
    """A DataError of one line that says this."""
    return pytest.raises(DataError, match=rf"(?s)\A(?!.*\n).*{match}")


def tree(folder: Path) -> dict[str, bytes | None]:
    """What a folder holds, all the way down: files with their content, folders with None."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def flipped(content: bytes, seed: int) -> bytes:
    """The content with one bit changed, at random."""
    at = int(torch.randint(8 * len(content), (1,), generator=torch.Generator().manual_seed(seed)))
    return content[: at // 8] + bytes([content[at // 8] ^ (1 << at % 8)]) + content[at // 8 + 1 :]
