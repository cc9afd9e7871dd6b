"""What a backbone's name is: an id of the hub, a path, or a name of open_clip's or OpenAI's."""

from __future__ import annotations

from pathlib import Path

OPENAI = {
    "ViT-B/32": "openai/clip-vit-base-patch32",
    "ViT-B/16": "openai/clip-vit-base-patch16",
    "ViT-L/14": "openai/clip-vit-large-patch14",
    "ViT-L/14@336px": "openai/clip-vit-large-patch14-336",
    "RN50": "timm/resnet50_clip.openai",
    "RN101": "timm/resnet101_clip.openai",
    "RN50x4": "timm/resnet50x4_clip.openai",
    "RN50x16": "timm/resnet50x16_clip.openai",
    "RN50x64": "timm/resnet50x64_clip.openai",
}
"""Where the hub has what OpenAI's own package calls so."""


def hub_id(name: str) -> str | None:
    """The repository that a name stands for (``ViT-B/16``, ``hf-hub:owner/name``, ``owner/name``), if it is none of a
    path's own forms."""
    known = {key.lower(): repo for key, repo in OPENAI.items()}
    name = known.get(name.lower(), name.removeprefix("hf-hub:"))
    return name if may_be_hub_id(name) else None


def may_be_hub_id(name: str) -> bool:
    """Whether a name has the form of a repository ``owner/name``; a path may have it too."""
    return name.count("/") == 1 and not name.startswith((".", "~", "/"))


def is_hub_id(name: str) -> bool:
    """Whether it has that form, and is no path on this machine."""
    return may_be_hub_id(name) and not Path(name).exists()


def public_name(backbone: str) -> str:
    """A hub id as it is; of a path its last part, since the rest of it says something about one machine only."""
    if is_hub_id(backbone):
        return backbone
    prefix, _, rest = backbone.partition("/")
    if not prefix.startswith("open_clip:"):
        return Path(backbone).name
    return f"{prefix}/{Path(rest).name}"  # a tag, or one's own checkpoint
