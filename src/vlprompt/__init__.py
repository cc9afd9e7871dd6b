"""vlprompt: adapt a frozen vision-language model to your classes by learning a few prompt tokens.

The names in ``_HOME`` are imported when they are first used: ``import vlprompt`` alone imports nothing else, so that
the command line sees to Ctrl-C before anything takes time.
"""

from __future__ import annotations

from vlprompt.version import __version__ as __version__

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vlprompt.api import PromptedModel, build_method, evaluate, fit
    from vlprompt.backbones.load import load_backbone
    from vlprompt.data.datasets import load_dataset
    from vlprompt.errors import VlpromptError
    from vlprompt.sklearn import PromptClassifier

__all__ = [
    "PromptClassifier",
    "PromptedModel",
    "VlpromptError",
    "build_method",
    "compare",
    "evaluate",
    "fit",
    "load_backbone",
    "load_dataset",
]

_HOME = {
    "PromptClassifier": "vlprompt.sklearn",
    "PromptedModel": "vlprompt.api",
    "VlpromptError": "vlprompt.errors",
    "build_method": "vlprompt.api",
    "compare": "vlprompt.compare",
    "evaluate": "vlprompt.api",
    "fit": "vlprompt.api",
    "load_backbone": "vlprompt.backbones.load",
    "load_dataset": "vlprompt.data.datasets",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vlprompt' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
