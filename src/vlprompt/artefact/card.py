"""The model card: what a tuned model is, for people."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape

from vlprompt.backbones.names import is_hub_id, public_name
from vlprompt.methods import Method
from vlprompt.version import __version__

SHOWN = 20  # class names


def model_card(method: Method, about: Mapping[str, str]) -> str:
    """A README with the head that the hub reads; ``about`` gives further rows of its table."""
    backbone, names = method.backbone, method.class_names
    shown = ", ".join(names[:SHOWN]) + (f", … ({len(names)} in all)" if len(names) > SHOWN else "")
    rows = {
        "method": f"{method.name} ({method.paper} {method.year}), which learns {method.learns}",
        "classes": shown,
        "template": f"`{method.template}`",
        **about,
        "backbone": f"`{public_name(backbone.name)}`",
        "backbone's licence": backbone.licence or "not stated by its checkpoint",
        "backbone's fingerprint": f"`{backbone.fingerprint}`",
    }
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items())
    if method.takes_new_classes:
        other = "Other classes need no training: add `--class-names` or `class_names=[…]`."
    else:
        other = "It knows these classes and no others."
    return f"""---
library_name: vlprompt
pipeline_tag: image-classification
tags: [prompt-learning, {method.name}]{_base_model(backbone.name)}
---

# {_cell(f"{method.name} on {public_name(backbone.name)}")}

{(method.__doc__ or method.name).strip().splitlines()[0]}
Tuned with vlprompt {__version__}. The backbone's weights are not in this folder: they are loaded from where
they are published, under their own licence, and checked against the fingerprint.

| | |
|---|---|
{table}

`FOLDER` is this folder, or the name of its repository on the hub. {other}

```
vlprompt predict FOLDER image.jpg
```

```python
from vlprompt import PromptedModel

PromptedModel.from_pretrained("FOLDER").predict(["image.jpg"]).names
```
"""


def _cell(value: str) -> str:
    return _plain(" ".join(value.split())).replace("|", "\\|")


def _plain(text: str) -> str:
    """Text that says what it says: no HTML, links or pictures of Markdown, but for what is between backticks."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if i % 2 else re.sub(r"([\\`*_\[\]])", r"\\\1", escape(part, quote=False)) for i, part in enumerate(parts)
    )


def _base_model(backbone: str) -> str:
    return f"\nbase_model: {backbone}" if is_hub_id(backbone) else ""
