"""CLIP-LoRA (Zanella and Ben Ayed, CVPR workshops 2024): low-rank updates of the attention of both towers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Lt
from pydantic import AfterValidator
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import dropout

from vlprompt.backbones.backbone import unit
from vlprompt.backbones.packing import PackedText, pack
from vlprompt.backbones.towers import Tower
from vlprompt.methods.base import Can, Count, Method, MethodConfig
from vlprompt.methods.registry import register
from vlprompt.methods.zero_shot import frozen_class_features
from vlprompt.prompting.text import check_known, fill
from vlprompt.prompting.visual import check_blocks

SCALE = 100.0
MATRICES = "qkvo"


def _check_matrices(text: str) -> str:
    if not text or sorted(text) != [m for m in sorted(MATRICES) if m in text]:
        raise ValueError("some of the letters q, k, v and o, each once")
    return text


class LoRA(nn.Module):
    """ΔW = α / √r · B A of some matrices of some blocks' self-attention: ``a`` [L, P, r, D], ``b`` [L, P, D, r]."""

    def __init__(self, tower: Tower, config: CLIPLoRA.Config) -> None:
        super().__init__()
        width, n = tower.config.width, tower.config.layers
        self.blocks, self.matrices, self.p = chosen_blocks(config.position, n), config.matrices, config.dropout
        self.scale = config.alpha / math.sqrt(config.r)
        shape = len(self.blocks), len(self.matrices)
        self.a = nn.Parameter(torch.empty(*shape, config.r, width).uniform_(-(width**-0.5), width**-0.5))
        self.b = nn.Parameter(torch.zeros(*shape, width, config.r))

    def weights(self, tower: Tower) -> dict[str, Tensor]:
        """The adapted weights by name, for ``functional_call``; the tower itself stays as it is."""
        adapted = {}
        for i, delta in zip(self.blocks, self.scale * self.b @ self.a, strict=True):
            of = dict(zip(self.matrices, delta, strict=True))
            zero = torch.zeros_like(delta[0])
            for name, d in (
                ("qkv", torch.cat([of.get(m, zero) for m in "qkv"])),
                ("out", of.get("o", zero)),
            ):
                weight = tower.get_parameter(f"blocks.{i}.{name}.weight")
                adapted[f"blocks.{i}.{name}.weight"] = (weight + d).to(weight.dtype)
        return adapted

    @contextmanager
    def beside(self, tower: Tower) -> Iterator[None]:
        """Add the updates to what the matrices give, with a dropout mask of its own in front of each A."""

        def add(of: dict[str, tuple[Tensor, Tensor]], parts: str) -> Any:
            def hook(module: nn.Module, given: tuple[Tensor], result: Tensor) -> Tensor:
                x = given[0].to(self.a.dtype)
                zero = torch.zeros_like(x)
                each = [self.scale * dropout(x, self.p) @ of[m][0].T @ of[m][1].T if m in of else zero for m in parts]
                return result + torch.cat(each, -1).to(result.dtype)

            return hook

        handles = []
        for i, a, b in zip(self.blocks, self.a, self.b, strict=True):
            block, of = tower.blocks[i], dict(zip(self.matrices, zip(a, b, strict=True), strict=True))
            handles.append(block.get_submodule("qkv").register_forward_hook(add(of, "qkv")))
            handles.append(block.get_submodule("out").register_forward_hook(add(of, "o")))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@register("clip_lora")
class CLIPLoRA(Method):
    """LoRA in both towers; logits = 100 · v · t whatever the backbone's scale, texts encoded anew in every step.

    Official code: MaxZanella/CLIP-LoRA. It takes 500 steps of 32 images for each shot, whatever the number of classes:
    160 epochs are as many with 100 classes. The last step is kept; validation images are not used.
    The cosine is cut off at the least rate, 1e-6, instead of scaled to end there.
    """

    paper, year, learns = "Zanella and Ben Ayed, CVPR workshops", 2024, "low-rank updates of both towers' attention"
    learns_prompts = False
    official = {
        "data.batch_size": 32,
        "optim.name": "adamw",
        "optim.lr": 2e-4,
        "optim.min_lr": 1e-6,
        "optim.weight_decay": 0.01,
        "optim.warmup_epochs": 0,
        "optim.every_step": True,
        "train.epochs": 160,
    }

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """Options of clip_lora."""

        encoder: Literal["both", "vision", "text"] = "both"
        """Towers that are adapted."""
        position: Literal["all", "bottom", "mid", "up", "half-bottom", "half-up", "top1", "top2", "top3"] = "all"
        """Blocks that are adapted: all, a third, a half, or the last ones."""
        matrices: Annotated[str, AfterValidator(_check_matrices)] = "qkv"
        """Which of queries, keys, values and output projection."""
        r: Count = 2
        """Rank."""
        alpha: float = 1.0
        """Numerator of the factor alpha / √r."""
        dropout: Annotated[float, Ge(0), Lt(1)] = 0.25
        """Share of each A's inputs that a training step leaves out."""

        @property
        def can(self) -> Can:
            """Its loss is a mean over images, and its steps run the towers."""
            return Can.SPLIT_BATCHES | Can.DROP_ATTENTION

    def build(self) -> None:
        """The adapters, which change nothing yet; raises BackboneError where there are no blocks to adapt."""
        b, encoder = self.backbone, self.config.encoder
        if encoder != "text":
            check_blocks(b)
        self.visual = LoRA(b.image_tower, self.config) if encoder != "text" else None
        self.textual = LoRA(b.text_tower, self.config) if encoder != "vision" else None

    def encode_images(self, images: Tensor) -> Tensor:
        """[B, E]"""
        tower, lora, images = self.backbone.image_tower, self.visual, images.to(self.backbone.device)
        if lora is None:
            return super().encode_images(images)
        if not self.training:
            return unit(functional_call(tower, lora.weights(tower), (images,)))
        with lora.beside(tower):  # all rows: the last block computes chosen ones past the modules that are hooked
            x = tower.run(tower.embed(images))
        return unit(tower.read(x if tower.class_token is None else x[:, :1])[:, 0])

    def class_features(self, class_names: Sequence[str], image_features: Tensor | None = None) -> Tensor:
        """[C, E], of any class names."""
        tower, lora = self.backbone.text_tower, self.textual
        if lora is None:
            return frozen_class_features(self.backbone, class_names, [self.template])
        text = self._packed(tuple(class_names), share_prefix=not (self.training and lora.p))
        if not self.training:
            return unit(functional_call(tower, lora.weights(tower), (text,))[0])
        with lora.beside(tower):
            x = tower.run(tower.embed(text), text=text)
        return unit(tower.read(x[:, text.pooled])[0, text.order])

    def _packed(self, class_names: tuple[str, ...], share_prefix: bool) -> PackedText:
        """The classes' texts; with dropout none shares its first tokens with others."""
        check_known(self.backbone, class_names)
        ids, causal = self.backbone.tokenize(fill(self.template, class_names)), self.backbone.text_tower.config.causal
        return pack(ids, causal=causal, share_prefix=share_prefix).to(self.backbone.device)

    def logits(self, image_features: Tensor, class_features: Tensor) -> Tensor:
        """100 · v · tᵀ."""
        return SCALE * image_features @ class_features.T


def chosen_blocks(position: str, n: int) -> range:
    """The blocks of n that a word stands for."""
    if position.startswith("top"):
        return range(max(n - int(position[3:]), 0), n)
    third, half = n // 3, n // 2
    ends = {"all": (0, n), "bottom": (0, third), "mid": (third, 2 * third), "up": (2 * third, n)}
    return range(*({**ends, "half-bottom": (0, half), "half-up": (half, n)}[position]))
