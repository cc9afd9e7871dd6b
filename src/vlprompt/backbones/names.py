"""What a backbone's name is: an id of the hub, a path, or a name of open_clip's."""

from __future__ import annotations

from pathlib import Path


def may_be_hub_id(name: str) -> bool:
    """Whether a name has the form of a repository ``owner/name``; a path may have it too."""
    return name.count("/") == 1 and not name.startswith((".", "~", "/"))


def is_hub_id(name: str) -> bool:
    """Whether it has that form, and is no path on this machine."""
    return may_be_hub_id(name) and not Path(name).exists()


def public_name(backbone: str) -> str:
    """A hub id as it is; of a path its last part, since the rest of it says something about one machine only."""
    return backbone if is_hub_id(backbone) or backbone.startswith("open_clip:") else Path(backbone).name
