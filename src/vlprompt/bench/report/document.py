"""A page that needs no other file and no network, in the look of the report."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path


def document(title: str, body: Sequence[str], style: str = "") -> str:
    """The whole page; ``style`` is CSS beside the report's."""
    common = Path(__file__).with_name("report.css").read_text("utf-8")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>\n{common}{style}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )
