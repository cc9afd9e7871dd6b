"""The methods, one file each; importing this package registers them."""

from vlprompt.methods import (  # noqa: F401
    cocoop,
    coop,
    dpl,
    drople,
    fdbpl,
    ivlp,
    kdpl,
    kgcoop,
    linear_probe,
    maple,
    prograd,
    promptsrc,
    vpt,
    zero_shot,
)
from vlprompt.methods.base import METHODS, Batch, Method, MethodConfig, find_method, register

__all__ = ["METHODS", "Batch", "Method", "MethodConfig", "find_method", "register"]
