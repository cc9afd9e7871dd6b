"""The artefact: a tuned model as a small folder that reloads elsewhere, without the training data.

``prompts.safetensors`` holds what inference needs, ``config.json`` how to read it, ``README.md`` tells people.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save

import vlprompt
from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.load import load_backbone
from vlprompt.errors import ArtefactError, ConfigError
from vlprompt.files import write_atomically
from vlprompt.methods import Method, find_method

FORMAT_VERSION = 1


def save_artefact(method: Method, folder: Path, about: dict[str, Any] | None = None) -> None:
    """Write a tuned model into ``folder``; ``about`` (data, settings, metrics) goes into its model card."""
    backbone = method.backbone
    config = {
        "format_version": FORMAT_VERSION,
        "vlprompt_version": vlprompt.__version__,
        "method": method.name,
        "settings": asdict(method.config),
        "class_names": list(method.class_names),
        "template": method.template,
        "backbone": {"name": backbone.name, "fingerprint": backbone.fingerprint, "licence": backbone.licence},
    }
    state = {k: v.detach().float().cpu().contiguous() for k, v in method.inference_state().items()}
    write_atomically(folder / "prompts.safetensors", save(state))
    write_atomically(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False))
    write_atomically(folder / "README.md", _card(method, about or {}))


def load_artefact(folder: Path, backbone: str | None = None, device: str = "cpu", precision: str = "fp32") -> Method:
    """Read a tuned model; ``backbone`` says where its backbone lies if not where it was.

    Raises ArtefactError if the folder is no artefact, comes from a newer version, does not fit the method, or was
    tuned on another backbone.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ArtefactError(f"no tuned model in {folder}: it has no config.json (was the run finished?)")
    try:
        config = json.loads(file.read_text("utf-8"))
        version = config["format_version"]
        if version > FORMAT_VERSION:
            raise ArtefactError(
                f"{folder} has format_version {version}; this vlprompt reads up to {FORMAT_VERSION}: update it"
            )
        cls = find_method(config["method"])
        settings = TypeAdapter(cls.Config).validate_python(config["settings"])
        state = load_file(folder / "prompts.safetensors")
        loaded = load_backbone(backbone or config["backbone"]["name"], device, precision)  # type: ignore[arg-type]
        _check_backbone(loaded, config["backbone"], folder)
        method = cls(loaded, config["class_names"], settings, config["template"])
    except (KeyError, TypeError, ValueError, ValidationError, SafetensorError, OSError, ConfigError) as error:
        reason = f"no {error} in config.json" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
        raise ArtefactError(f"cannot read the tuned model in {folder}: {reason}") from None
    try:
        method.load_inference_state(state)
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ArtefactError(f"prompts.safetensors in {folder} does not fit {cls.name}: {reason}") from None
    return method.to(device).eval().requires_grad_(False)


def _check_backbone(backbone: Backbone, expected: dict[str, Any], folder: Path) -> None:
    if backbone.fingerprint != expected["fingerprint"]:
        raise ArtefactError(
            f"{folder} was tuned on backbone '{expected['name']}' ({expected['fingerprint'][:12]}…), "
            f"but '{backbone.name}' has other weights ({backbone.fingerprint[:12]}…)"
        )


def _card(method: Method, about: dict[str, Any]) -> str:
    backbone, names = method.backbone, method.class_names
    shown = ", ".join(names[:20]) + (f", … ({len(names)} in all)" if len(names) > 20 else "")
    rows = "\n".join(f"| {key} | {value} |" for key, value in about.items())
    other = f'Other classes: add `--class-names "{",".join(names[:2])},…"`.'
    licence = backbone.licence or "not stated by its checkpoint"
    return f"""---
library_name: vlprompt
tags: [prompt-learning, {method.name}]
---

# {method.name} on {backbone.name}

{(method.__doc__ or "").splitlines()[0]}
Tuned with vlprompt {vlprompt.__version__}; needs the backbone `{backbone.name}` (licence: {licence}).

| | |
|---|---|
| classes | {shown} |
{rows}

```
vlprompt predict FOLDER image.jpg
```
`FOLDER` is this folder. {other if method.takes_new_classes else "It knows these classes and no others."}
"""
