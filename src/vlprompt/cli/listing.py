"""What ``vlprompt list`` shows."""

from __future__ import annotations

from typing import Any


def listing(what: str) -> list[dict[str, Any]]:
    """Rows about methods, backbones, data sets or protocols; the first column is the name."""
    if what == "methods":
        from vlprompt.config.presets import presets_of
        from vlprompt.methods import find_method, method_names

        return [
            {
                "name": name,
                "paper": m.paper,
                "year": m.year,
                "learns": m.learns,
                "needs": sorted(m.needs),
                "parity": m.parity,
                "presets": sorted(presets_of(m)),
            }
            for name, m in ((name, find_method(name)) for name in method_names())
        ]
    if what == "datasets":
        from vlprompt.data.known.table import DATASETS

        return [
            {
                "name": d.name,
                "title": d.title,
                "folder": d.folder,
                "classes": d.classes,
                "images": sum(d.sizes),
                "domain_of": d.domain_of,
                "template": d.template,
                "get": "drawn here" if d.make else "by hand" if d.by_hand else "vlprompt data get",
                "licence": d.licence,
            }
            for d in DATASETS.values()
        ]
    if what == "protocols":
        from vlprompt.bench.protocols import PROTOCOLS

        return [
            {
                "name": name,
                "shots": list(map(str, p.shots)),
                "preset": p.preset,
                "trained_on": p.trained_on,
                "measured_on": p.measured_on,
            }
            for name, p in PROTOCOLS.items()
        ]
    from vlprompt.backbones.lite0 import NAME as LITE0
    from vlprompt.backbones.load import EMBEDDED

    return [
        *({"name": name, "source": "embedded", "formats": "Hugging Face CLIP"} for name in EMBEDDED),
        {"name": "FOLDER", "source": "local", "formats": "Hugging Face CLIP or SigLIP; open_clip"},
        {
            "name": "FILE.safetensors",
            "source": "local",
            "formats": "OpenAI CLIP state dict, or any with its configuration beside it",
        },
        {"name": "OWNER/MODEL", "source": "hub", "formats": "Hugging Face CLIP or SigLIP; open_clip"},
        {"name": "open_clip:MODEL/TAG", "source": "open_clip", "formats": "vision transformers, ResNets"},
        {"name": LITE0, "source": "vlprompt[teacher]", "formats": "--teacher only"},
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as aligned columns."""
    head = list(rows[0])
    cells = [head, *([_cell(row[key]) for key in head] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def _cell(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "-"
    return ("yes" if value else "no") if isinstance(value, bool) else str(value) or "-"
