"""The methods, one file each; importing this package registers them."""

from vlprompt.data.batches import Batch
from vlprompt.methods import (  # noqa: F401
    apt,
    bayesian,
    cocoop,
    comma,
    coop,
    coprompt,
    dpl,
    drople,
    fap,
    fdbpl,
    heads,
    ivlp,
    kdpl,
    kgcoop,
    lasp,
    linear_probe,
    maple,
    mmrl,
    plot,
    pouf,
    prograd,
    promptkd,
    promptot,
    promptsrc,
    tcp,
    vpt,
    zero_shot,
)
from vlprompt.methods.base import Can, Method, MethodConfig, Output
from vlprompt.methods.registry import METHODS, find_method, method_names, register

__all__ = [
    "METHODS",
    "Batch",
    "Can",
    "Method",
    "MethodConfig",
    "Output",
    "find_method",
    "method_names",
    "register",
]
