"""Which method is best on one's own images: ``vlprompt.compare(data)``."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlprompt.compare.run import Comparison


def compare(*given: Any, **more: Any) -> Comparison:
    """See :func:`vlprompt.compare.run.compare`, which imports PyTorch."""
    from vlprompt.compare.run import compare as run

    return run(*given, **more)


class _Folder(ModuleType):
    """The folder has the function's name: once it is imported, ``vlprompt.compare`` is the folder."""

    def __call__(self, *given: Any, **more: Any) -> Comparison:
        return compare(*given, **more)


sys.modules[__name__].__class__ = _Folder
