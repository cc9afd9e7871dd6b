"""Golden vectors: where they lie, how they are read, our parameters' official names, and how near is near."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.kit import SHARED, TINY
from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.load import load_backbone
from vlprompt.methods import METHODS, Method

FOLDERS = {
    "reduced": TINY.parent / "cases",
    "full": Path(os.environ.get("VLPROMPT_GOLDEN", SHARED / "golden" / "cases")),
}

FAMILY = ("bayesian", "comma", "lasp", "mmrl", "tcp")
"""Folders of cases that tests/methods/test_family_golden.py checks."""
TAUGHT = ("fdbpl", "kdpl", "promptkd")
"""Folders of cases with a teacher, which the reduced set lacks."""

OFFICIAL_NAMES = [  # official name → (our parameter, index into it)
    (r"prompt_learner\.ctx", "context.vectors", None),
    (r"prompt_learner_generic\.ctx", "negative.vectors", None),
    (r"image_encoder\.VPT", "visual.vectors", "0"),
    (r"image_encoder\.transformer\.resblocks\.(\d+)\.VPT_shallow", "visual.vectors", "{0}"),
    (r"text_encoder\.transformer\.resblocks\.(\d+)\.VPT_shallow", "context.deep", "{0} - 1"),
    (r"prompt_learner\.meta_net\.linear1\.(\w+)", "meta_net.0.{0}", None),
    (r"prompt_learner\.meta_net\.linear2\.(\w+)", "meta_net.2.{0}", None),
    (r"prompt_learner\.proj\.(\w+)", "coupled.projections.0.{0}", None),
    (r"VPT_image_trans\.conv1\.(\d)\.(\w+)", "projection.{0}.{1}", None),
    (r"adapter_(\w+)\.fc\.(\d)\.weight", "{0}_adapter.{1}.weight", None),
    (r"prompt_learner\.compound_prompts_image\.(\d+)", "coupled.deep", "{0}"),
    (r"prompt_learner\.compound_prompts_text\.(\d+)", "context.deep", "{0}"),
    (r"prompt_learner\.compound_prompt_projections\.(\d+)\.(\w+)", "coupled.projections.{0+1}.{1}", None),
]


@dataclass(frozen=True)
class Case:
    """One golden case: its description, its tensors, and the folder of the whole set."""

    file: Path

    @property
    def info(self) -> dict:
        return json.loads(self.file.read_text())

    @property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.file.with_suffix(".safetensors"))

    @property
    def folder(self) -> str:
        """The official method, by which cases are found; a case may have any name."""
        return self.file.parent.name

    @property
    def method(self) -> str:
        """Our name of the case's method (`zeroshot` is `zero_shot`, `kdpl/vpt_a…` is `kdpl_vpt`)."""
        on_student = (f"{self.folder}_{part}" for part in self.file.stem.split("_"))
        plain = (m for m in METHODS if m.replace("_", "") == self.folder.replace("_", ""))
        return next((m for m in on_student if m in METHODS), next(plain, self.folder))

    @property
    def backbone(self) -> Backbone:
        return _backbone(self.file.parents[2] / "backbone")

    @property
    def teacher(self) -> Backbone | None:
        """The teacher, which the reduced set lacks."""
        folder = self.file.parents[2] / "teacher"
        return _backbone(folder) if folder.is_dir() else None


class Hyper(Mapping[str, Any]):
    """A case's hyper-parameters by lower-case name; whoever feeds a case to a method reads every one of them."""

    def __init__(self, case: Case) -> None:
        self._values = {key.lower(): value for key, value in (case.info.get("hyper") or {}).items()}
        self.unread = set(self._values)

    def __getitem__(self, key: str) -> Any:
        self.unread.discard(key)
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def told(self, *keys: str) -> None:
        """These only describe what is always so, or what the official code ignores."""
        self.unread -= set(keys)

    @property
    def words(self) -> str | None:
        """The initial words, as the official configurations write them."""
        return self.get("ctx_init") or None

    def context(self, n_ctx: int | None = None, words: str = "ctx_init") -> dict[str, Any]:
        """CoOp's context, which is as long as its words, if there are any, whatever ``n_ctx`` says."""
        n_ctx, words = self.get("n_ctx", n_ctx), self.get(words)
        return {"n_ctx": len(words.replace("_", " ").split(" ")) if words else n_ctx, "init": words}

    @property
    def class_specific(self) -> bool:
        """Words begin a context that is one for all classes, whatever this says."""
        return bool(self.get("class_specific", self.get("csc"))) and not self.words


@cache
def _backbone(folder: Path) -> Backbone:
    return load_backbone(str(folder))


def find_cases(only: Sequence[str] | None = None) -> list:
    """Every case of both folders, as pytest parameters; of some methods, or of all that are not the family's."""
    import pytest

    from tests.kit.marks import slow

    def marks(file: Path) -> tuple[pytest.MarkDecorator, ...]:
        """The whole set has teachers of its own; its other cases are the reduced set's, in a larger vocabulary."""
        twice = (FOLDERS["reduced"] / file.parent.name / file.name).is_file() and file.parent.name not in TAUGHT
        return (slow,) if twice and FOLDERS["full"] in file.parents else ()

    return [
        pytest.param(Case(file), id=f"{where}-{file.parent.name}-{file.stem}", marks=marks(file))
        for where, folder in FOLDERS.items()
        for file in sorted(folder.glob("*/*.json"))
        if (file.parent.name in only if only is not None else file.parent.name not in FAMILY)
    ]


def our_parameter(method: Method, official: str) -> tuple[str, int | None]:
    """Our parameter for an official name, and the index into it."""
    for pattern, ours, index in OFFICIAL_NAMES:
        if found := re.fullmatch(pattern, official):
            groups = found.groups()
            ours = ours.replace("{0+1}", str(int(groups[0]) + 1) if groups and groups[0].isdigit() else "")
            if index is None:
                return ours.format(*groups), None
            first, *minus = index.format(*groups).split(" - ")
            return ours, int(first) - sum(map(int, minus))
    raise KeyError(f"{method.name}: official parameter {official} is not mapped")


def view(method: Method, official: str, gradient: bool = False) -> Tensor:
    """The part of our parameter (or its gradient) that an official name stands for."""
    name, index = our_parameter(method, official)
    parameter = dict(method.named_parameters())[name]
    tensor = parameter.grad if gradient else parameter
    return tensor if index is None else tensor[index]


def load_official(method: Method, tensors: Mapping[str, Tensor], prefix: str) -> set[str]:
    """Set parameters from ``prefix``NAME tensors; returns the official names. Every parameter must be covered.

    An official parameter of no tokens is none of ours.
    """
    names = {k.removeprefix(prefix) for k, tensor in tensors.items() if k.startswith(prefix) and tensor.numel()}
    covered = sum(tensors[prefix + n].numel() for n in names)
    assert covered == sum(p.numel() for p in method.parameters()), "a parameter has no official counterpart"
    with torch.no_grad():
        for name in names:
            view(method, name).copy_(tensors[prefix + name])
    return names


class Gold(dict[str, Tensor]):
    """A case's tensors; what it leaves out is not asked for."""

    compared = 0

    def compare(self, key: str, ours: Tensor, noise: float = 0.0, scale: float | None = None) -> None:
        """:func:`close`, if the case has the tensor."""
        if key in self:
            close(key, ours, self[key], noise, scale)
            self.compared += 1


def close(name: str, ours: Tensor, golden: Tensor, noise: float = 0.0, scale: float | None = None) -> None:
    """Within max(1e-5 · max|x|, 5 × noise); ``noise`` is absolute, or relative to ``scale``."""
    assert golden.numel(), f"{name}: nothing to compare"
    reach = golden.abs().max().item()
    tolerance = max(1e-5 * reach, 5 * noise * (1 if scale is None else scale))
    assert ours.shape == golden.shape, f"{name}: shape {tuple(ours.shape)}, official {tuple(golden.shape)}"
    error = (ours.detach().double() - golden.double()).abs().max().item()
    assert error <= tolerance, f"{name}: off by {error:.3g}, allowed {tolerance:.3g}"
