"""The errors a user can cause. The command line prints them as one line, without a traceback (exit code 2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from unicodedata import category

SHOWN = 5  # names that a message lists
KEPT = "\n\t\u200c\u200d"
"""Characters that do not print and mean no harm: joiners make letters and emoji."""


class VlpromptError(Exception):
    """Base of every error that bad input can cause."""


class DataError(VlpromptError):
    """Images, splits or class names that cannot be used."""


class BackboneError(VlpromptError):
    """A checkpoint that cannot be loaded, or that a method cannot work with."""


class ConfigError(VlpromptError):
    """A setting that does not exist or has a value out of range."""


class ArtefactError(VlpromptError):
    """A tuned model that cannot be read or does not fit its backbone."""


class OutputError(VlpromptError):
    """A file or folder that cannot be written: a full disk, a place that is read-only."""


class Interrupted(VlpromptError):
    """A run stopped by Ctrl-C after saving a checkpoint; says how to resume it (exit code 130)."""


def unknown(what: str, value: str, allowed: Iterable[str]) -> str:
    """One line for a name that does not exist: ``unknown method 'cop': did you mean 'coop'? (allowed: …)``."""
    names = sorted(allowed)
    near = get_close_matches(value, names, n=1, cutoff=0.5)
    guess = f": did you mean '{near[0]}'?" if near else ""
    return f"unknown {what} '{value}'{guess} (allowed: {', '.join(names)})"


def one_line(error: object, most: int | None = 200) -> str:
    """What another library says, in one line of at most so many characters."""
    return " ".join(str(error).split())[:most]


def printable(text: str) -> str:
    """The text with what a terminal would obey, or could not show, as ``\\x1b``: escape sequences, half characters."""
    return "".join(c if c.isprintable() or category(c) == "Zs" or c in KEPT else ascii(c)[1:-1] for c in text)


def memory_is_full(error: BaseException) -> bool:
    """Whether an error says that memory, a GPU's too, does not do."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or "DefaultCPUAllocator" in str(error)  # for which PyTorch has no type


def first_line(error: Exception) -> str:
    """The first line of what another library says at length; the kind of error if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def first_few(names: Sequence[str], separator: str = ", ") -> str:
    """The first five, and how many more there are: ``a, b, c, d, e and 7 more``."""
    more = len(names) - SHOWN
    return separator.join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
