"""A language model's prior about classes: its last decoder layer, with keys and values of questions about each class.

One safetensors file holds both, so that neither training nor a tuned model needs the language model. The layer is of
Llama's form (RMS norms, rotary positions, grouped keys, gated MLP), and is computed here.

Shapes: C classes, Q questions, P prompt tokens, T tokens of a question, W the language model's width, d a head's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu
from torch.nn.utils.rnn import pad_sequence

from vlprompt.data.descriptions import missing_names
from vlprompt.data.splits import folded
from vlprompt.documents import parse_json, sealed, unsealed
from vlprompt.errors import DataError, one_line
from vlprompt.files import write_atomically

FORMAT_VERSION = 1
NORM_1, NORM_2, NORM = "input_layernorm.weight", "post_attention_layernorm.weight", "norm.weight"
Q, K, V, O = (f"self_attn.{x}_proj.weight" for x in "qkvo")  # noqa: E741
MLP = GATE, UP, DOWN = tuple(f"mlp.{x}_proj.weight" for x in ("gate", "up", "down"))
FREQUENCIES = "inv_freq"
NEEDED = (NORM_1, NORM_2, NORM, Q, K, V, O, *MLP, FREQUENCIES)
BIASES = tuple(name.replace("weight", "bias") for name in (Q, K, V, O, *MLP))
"""Which Llama itself has none of, and Qwen 2 has."""


class Past(NamedTuple):
    """What the layer has seen before its input: rotated keys and values [C, G, T, d], and how many are not padding."""

    keys: Tensor
    values: Tensor
    lengths: Tensor  # [C]


def decode(x: Tensor, layer: Mapping[str, Tensor], past: Past, eps: float, scaling: float) -> Tensor:
    """What a decoder layer and the model's last norm make of tokens [1 or C, P, W] behind C pasts: [C, P, W].

    ``scaling`` is what the model's rotary positions are multiplied by (1 but for YaRN and its like).
    """
    h, d, n = _rms_norm(x, layer[NORM_1], eps), past.keys.shape[-1], x.shape[-2]
    q, k, v = (_linear(h, layer, name).unflatten(-1, (-1, d)).transpose(-3, -2) for name in (Q, K, V))
    positions = past.lengths[:, None] + torch.arange(n, device=x.device)
    angles = positions[:, None, :, None] * torch.cat([layer[FREQUENCIES]] * 2)
    cos, sin = (scaling * angles.cos()).to(x.dtype), (scaling * angles.sin()).to(x.dtype)
    q, k = (y * cos + torch.cat([-y[..., d // 2 :], y[..., : d // 2]], -1) * sin for y in (q, k))
    keys = torch.cat([past.keys, k], 2)
    values = torch.cat([past.values, v.expand(len(k), -1, -1, -1)], 2)
    known = torch.arange(past.keys.shape[2], device=x.device) < past.lengths[:, None]
    causal = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
    mask = torch.cat([known[:, None].expand(-1, n, -1), causal.expand(len(known), -1, -1)], -1)[:, None]
    repeats = q.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)
    a = scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    x = x + _linear(a.transpose(1, 2).flatten(2), layer, O)
    h = _rms_norm(x, layer[NORM_2], eps)
    x = x + _linear(silu(_linear(h, layer, GATE)) * _linear(h, layer, UP), layer, DOWN)
    return _rms_norm(x, layer[NORM], eps)


def _linear(x: Tensor, layer: Mapping[str, Tensor], name: str) -> Tensor:
    return linear(x, layer[name], layer.get(name.replace("weight", "bias")))


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


@dataclass
class Prior:
    """What a prior's file holds; pasts are read from it when they are asked for."""

    file: Path
    model: str
    """The language model's name."""
    questions: tuple[str, ...]
    class_names: tuple[str, ...]
    layer: dict[str, Tensor]
    """Frozen tensors by their names in the model."""
    eps: float
    scaling: float
    fingerprint: str
    """SHA-256 over the layer and the questions: priors of one fingerprint speak of their classes alike."""
    checksums: tuple[str, ...] = ()
    """Of each class's past."""
    _layers: dict[Any, dict[str, Tensor]] = field(default_factory=dict, repr=False)
    _pasts: dict[Any, tuple[Past, ...]] = field(default_factory=dict, repr=False)

    @property
    def width(self) -> int:
        """W"""
        return len(self.layer[NORM])

    def layer_for(self, x: Tensor) -> dict[str, Tensor]:
        """The frozen tensors where x is, in its dtype."""
        key = x.device, x.dtype
        if key not in self._layers:
            self._layers = {key: {name: t.to(*key) for name, t in self.layer.items()}}
        return self._layers[key]

    def lacks(self, class_names: Sequence[str]) -> list[str]:
        """Those of the classes that nothing was asked about."""
        known = set(map(folded, self.class_names))
        return [name for name in class_names if folded(name) not in known]

    def pasts(self, class_names: Sequence[str], device: torch.device) -> tuple[Past, ...]:
        """Of each question; the last list's are kept. Raises DataError for classes that were not asked about."""
        key = tuple(class_names), device
        if key not in self._pasts:
            if missing := self.lacks(class_names):
                raise DataError(f"prior {self.file} has no questions about {missing_names(missing, self.class_names)}")
            place = {folded(name): i for i, name in enumerate(self.class_names)}
            try:
                with safe_open(self.file, "pt") as f:
                    found = [
                        Past(*(f.get_tensor(f"past.{place[folded(name)]}.{what}").clone() for what in Past._fields))
                        for name in class_names
                    ]
                for name, past in zip(class_names, found, strict=True):
                    if tensors_checksum(past._asdict()) != self.checksums[place[folded(name)]]:
                        raise ValueError(f"it is damaged: what it has of '{name}' is not what was saved")
            except (SafetensorError, OSError, ValueError) as error:
                raise DataError(f"cannot read prior {self.file}: {one_line(error)}") from None
            keys, values = (
                pad_sequence([x[i].permute(2, 0, 1, 3) for x in found], True).permute(2, 0, 3, 1, 4) for i in (0, 1)
            )  # [Q, C, G, T, d], padded at the end
            lengths = torch.stack([x[2] for x in found], 1)
            parts = zip(*(x.to(device) for x in (keys, values, lengths)), strict=True)
            self._pasts = {key: tuple(Past(*part) for part in parts)}
        return self._pasts[key]


def fingerprint(layer: Mapping[str, Tensor], questions: Sequence[str], eps: float, scaling: float) -> str:
    """SHA-256 over what decides a prior, but for its classes."""
    return sha256(json.dumps([list(questions), eps, scaling, tensors_checksum(layer)]).encode()).hexdigest()


def tensors_checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over tensors and their names."""
    digest = sha256()
    for name in sorted(tensors):
        tensor = tensors[name].cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_prior(prior: Prior, pasts: Sequence[Past]) -> None:
    """Write a prior's file, with the pasts of its classes in their order: keys and values [Q, G, T, d], lengths [Q]."""
    tensors = {f"layer.{name}": t.cpu().contiguous() for name, t in prior.layer.items()}
    for i, past in enumerate(pasts):
        tensors |= {f"past.{i}.{what}": t.cpu().contiguous() for what, t in past._asdict().items()}
    known = ("model", "questions", "class_names", "eps", "scaling", "fingerprint")
    numbers = {"format_version": FORMAT_VERSION} | {key: getattr(prior, key) for key in known}
    numbers["checksums"] = [tensors_checksum(past._asdict()) for past in pasts]
    write_atomically(prior.file, save(tensors, {"prior": json.dumps(sealed(numbers))}))


def read_prior(file: Path) -> Prior:
    """Read what ``vlprompt describe`` wrote; raises DataError for what is no such file, or is not what was written."""
    file = file.expanduser()
    try:
        with safe_open(file, "pt") as f:
            written = (f.metadata() or {}).get("prior")
            if written is None:
                raise ValueError("it is none that `vlprompt describe` wrote")
            about = unsealed(parse_json(written))
            if about["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format_version {about['format_version']} (allowed: {FORMAT_VERSION})")
            keys = [key for key in f.keys() if key.startswith("layer.")]  # noqa: SIM118
            layer = {key.removeprefix("layer."): f.get_tensor(key).clone() for key in keys}
        if about["fingerprint"] != fingerprint(layer, about["questions"], about["eps"], about["scaling"]):
            raise ValueError("it is damaged: its layer is not what was saved")
        names, marks = tuple(about["class_names"]), tuple(about["checksums"])
        questions, eps, scaling = tuple(about["questions"]), about["eps"], about["scaling"]
        return Prior(file, about["model"], questions, names, layer, eps, scaling, about["fingerprint"], marks)
    except KeyError as error:
        raise DataError(f"cannot read prior {file}: it has no {error}") from None
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise DataError(f"cannot read prior {file}: {one_line(error)}") from None
