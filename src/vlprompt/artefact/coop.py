"""CoOp's and CoCoOp's own checkpoints, ``prompt_learner/model.pth.tar-N``, as tuned models of ours; weights only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor

from vlprompt.artefact.artefact import save_artefact
from vlprompt.backbones.backbone import Backbone
from vlprompt.errors import ArtefactError, one_line
from vlprompt.methods import Method, find_method
from vlprompt.prompting.text import Position, class_tokens

NAME = re.compile(r".+\.pth\.tar(-\d+)?")
META_NET = {f"meta_net.linear{i}.{k}": f"meta_net.{j}.{k}" for i, j in ((1, 0), (2, 2)) for k in ("weight", "bias")}
"""CoCoOp's names of the meta-net's tensors, and ours."""
IGNORED = re.compile(r"torch\.optim\..+|dassl\.optim\..+|collections\.defaultdict|builtins\.dict")
"""Classes of the optimiser and the schedule, which lie beside the weights; nothing of them is imported or run."""


class _Ignored:
    """Stands in for an object of a class that is not read."""

    def __setstate__(self, state: object) -> None:
        """Nothing of it is kept."""


def _plain_dict(*given: object) -> dict:
    """Stands in for the kinds of dict that the optimiser keeps its state in: the reader fills plain ones only."""
    return {}


def import_prompts(file: Path, out: Path, backbone: Backbone, class_names: Sequence[str], position: Position) -> Method:
    """Write a checkpoint's prompts as the tuned model ``out``, a new folder; returns the method, coop or cocoop.

    The file says neither backbone nor class names, nor where the class name stands (``position``); but it holds the
    token embeddings of its classes' texts, which must be those of ``backbone`` and ``class_names``. Raises
    ArtefactError if they are not, for files of other methods, and for what cannot be read as weights alone.
    """
    if out.exists():
        raise ArtefactError(f"{out} exists already")
    state = _read(file)
    context, prefix, suffix = (state.pop(k, None) for k in ("ctx", "token_prefix", "token_suffix"))
    meta = {META_NET[k]: state.pop(k).float() for k in META_NET if k in state}
    if context is None or context.ndim not in (2, 3) or state:
        found = f"it holds '{min(state)}'" if state else "it holds no 'ctx'"
        raise ArtefactError(f"{file} is no prompt learner of CoOp or CoCoOp: {found}")
    width = backbone.text_tower.config.width
    if context.shape[-1] != width:
        raise ArtefactError(f"{file} was trained on tokens of width {context.shape[-1]}; '{backbone.name}' has {width}")
    counts = {len(t) for t in (context if context.ndim == 3 else None, prefix, suffix) if t is not None}
    if wrong := sorted(counts - {len(class_names)}):
        raise ArtefactError(f"{file} was trained on {wrong[0]} classes, and {len(class_names)} class names are given")
    n_ctx, cls = context.shape[-2], find_method("cocoop" if meta else "coop")
    if suffix is None and context.ndim == 3:
        raise ArtefactError(f"{file} holds no 'token_suffix': nothing in it says which context is which class's")
    if suffix is not None:
        _check_texts(file, suffix, backbone, class_names, n_ctx)
    own = {} if meta else {"class_specific": context.ndim == 3, "position": position}
    method = cls(backbone, class_names, cls.Config(n_ctx=n_ctx, init=None, **own))  # type: ignore[call-arg]
    try:
        method.load_state_dict({"context.vectors": context.float(), **meta})
    except RuntimeError as error:
        raise ArtefactError(f"{file} does not fit {cls.name}: {one_line(error)}") from None
    save_artefact(method, out, {"imported from": file.name})
    return method


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of its state dict; objects of the optimiser beside them are passed over, any others refused."""
    if not file.is_file():
        raise ArtefactError(f"checkpoint {file} does not exist")
    serial = torch.serialization
    try:
        named = is_zipfile(file) and hasattr(serial, "get_unsafe_globals_in_checkpoint")  # PyTorch 2.6
        found = serial.get_unsafe_globals_in_checkpoint(file) if named else []
        stand_ins: list[Any] = [
            (type("Ignored", (_Ignored,), {}) if ".optim." in name else _plain_dict, name)
            for name in found
            if IGNORED.fullmatch(name)
        ]
        with serial.safe_globals(stand_ins) if stand_ins else nullcontext():
            content = torch.load(file, map_location="cpu", weights_only=True)
        state = dict(content["state_dict"])
    except Exception as error:  # the reader raises almost anything on damaged bytes
        raise ArtefactError(f"cannot read {file} as weights alone: {_reason(error)}") from None
    if strange := [k for k, v in state.items() if not isinstance(v, Tensor) or not v.isfinite().all()]:
        raise ArtefactError(f"{file}: '{strange[0]}' is no tensor of finite numbers")
    return state


def _reason(error: Exception) -> str:
    """What the reader says, without its advice to read the file as code."""
    return one_line(str(error).rpartition("WeightsUnpickler error:")[2].partition("Please use")[0], 160)


def _check_texts(file: Path, suffix: Tensor, backbone: Backbone, class_names: Sequence[str], n_ctx: int) -> None:
    """Raise ArtefactError unless the embeddings behind the context, [C, N, D], are those of the class names."""
    embedding = backbone.text_tower.token_embedding.weight.detach().float().cpu()
    tokens = class_tokens(backbone, class_names, n_ctx)
    start = len(backbone.tokenizer.start) + n_ctx
    for name, ids, rows in zip(class_names, tokens.ids, suffix.float(), strict=True):
        own = embedding[ids[start:]]
        if len(own) > len(rows) or not torch.allclose(own, rows[: len(own)], rtol=1e-2, atol=1e-4):  # fp16 in the file
            raise ArtefactError(
                f"{file} was trained on other texts than '{name}' gives on '{backbone.name}': other class names, or "
                "in another order, or another backbone"
            )
