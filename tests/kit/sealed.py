"""Files of ours that carry a checksum, changed as somebody would who knows of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlprompt.documents import CHECKSUM, sealed


def read(file: Path) -> dict[str, Any]:
    """What such a file holds, without its checksum."""
    content = json.loads(file.read_text("utf-8"))
    del content[CHECKSUM]
    return content


def write(file: Path, content: dict[str, Any]) -> None:
    """Write it with its checksum."""
    file.write_text(json.dumps(sealed(content)), encoding="utf-8")


def change(file: Path, **changes: Any) -> None:
    """Give keys at the top other values."""
    write(file, read(file) | changes)
