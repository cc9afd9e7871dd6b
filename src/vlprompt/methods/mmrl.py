"""MMRL: multi-modal representation learning (Guo and Gu, CVPR 2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le, MinLen
from torch import Tensor, nn

from vlprompt.backbones.backbone import unit
from vlprompt.data.batches import Batch
from vlprompt.errors import ConfigError
from vlprompt.methods.base import Can, Count, Listed, Method, MethodConfig, Output, Weight
from vlprompt.methods.registry import register
from vlprompt.methods.zero_shot import frozen_class_features
from vlprompt.prompting.text import INIT_STD, JoiningTexts
from vlprompt.prompting.visual import check_image_prompts

DATA_SETS = (
    "imagenet caltech101 oxford_pets stanford_cars oxford_flowers food101 fgvc_aircraft sun397 dtd eurosat ucf101"
)
WEIGHTS = (0.5, 0.5, 0.2, 7.0, 4.0, 5.0, 6.0, 6.0, 6.0, 0.01, 3.0)  # official w, by data set
BY_DATA_SET: dict[str, dict[str, Any]] = {n: {"method.w": w} for n, w in zip(DATA_SETS.split(), WEIGHTS, strict=True)}
LARGE = {"data.batch_size": 32}
BY_DATA_SET["imagenet"] |= {**LARGE, "train.epochs": 5}
BY_DATA_SET["eurosat"] |= {"method.width": 2048}


@register("mmrl")
class MMRL(Method):
    """Tokens of one learned space, mapped into both towers from a later block on, with an image feature of their own.

    Image features are two: the class token's (main) and the mean token's under a projection of its own (rep). Loss:
    α·CE(main) + (1 − α)·CE(rep) + w·(1 − cos(v, v0)) + w·(1 − cos(t, t0)). Classes that it was tuned on are scored by
    α·main + (1 − α)·rep, others by main. Official settings: 5 tokens of width 512, blocks 6 to 12, α 0.7, w by data
    set, AdamW 0.001, batch 4, 10 epochs, crops of half the image on (yunncheng's MMRL, ``vit_b16``). The scale of
    logits is the constant 100, not the backbone's.
    """

    paper, year, learns = "Guo and Gu, CVPR", 2025, "representation tokens for both towers"
    needs = frozenset({"frozen_image_features"})
    official = {
        "optim.name": "adamw",
        "optim.lr": 0.001,
        "optim.warmup_epochs": 1,
        "data.batch_size": 4,
        "data.min_scale": 0.5,
        "train.epochs": 10,
    }
    presets = {
        "cross-dataset": {**LARGE, "optim.warmup_epochs": 0, "train.epochs": 1, "method.w": 0.2},
        "few-shot": {**LARGE, "train.epochs": 50, "method.w": 0.5},
        **{f"base-to-novel-{name}": own for name, own in BY_DATA_SET.items()},
        **{f"few-shot-{name}": {**LARGE, "train.epochs": 50, **own} for name, own in BY_DATA_SET.items()},
    }

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """Options of mmrl."""

        n_tokens: Count = 5
        """Learned tokens of the representation space."""
        width: Count = 512
        """Width of that space."""
        layers: Annotated[tuple[Count, ...], Listed, MinLen(1)] = (6, 7, 8, 9, 10, 11, 12)
        """Blocks, from 1, before which tokens join or replace those of the block before; in both towers."""
        alpha: Annotated[float, Ge(0), Le(1)] = 0.7
        """Share of the class token's logits; the rest is that of the representation tokens."""
        w: Weight = 1.0
        """Weight of the distances to the frozen class and image features."""
        scale: Annotated[float, Gt(0)] | None = 100.0
        """What cosines are multiplied by; the backbone's own if not given."""

        @property
        def can(self) -> Can:
            """Its texts grow inside the tower, and are encoded whole."""
            return Can.SPLIT_BATCHES | Can.REPLAY_STEPS | Can.DROP_ATTENTION

    def build(self) -> None:
        """Create the tokens, a map of them for each tower and block, and the projection of what images make of them."""
        c, backbone, image, text = self.config, self.backbone, self.backbone.image_tower, self.backbone.text_tower
        check_image_prompts(backbone, 1)
        blocks = min(image.config.layers, text.config.layers)
        if max(c.layers) > blocks or list(c.layers) != sorted(set(c.layers)):
            raise ConfigError(f"method.layers = {list(c.layers)} (allowed: rising numbers from 1 to {blocks})")
        self.tokens = nn.Parameter(INIT_STD * torch.randn(c.n_tokens, c.width))
        # Officially the maps of all blocks start as copies of one.
        each = {name: nn.Linear(c.width, t.config.width) for name, t in (("image", image), ("text", text))}
        self.maps = nn.ModuleDict({k: nn.ModuleList(deepcopy(m) for _ in c.layers) for k, m in each.items()})
        own = image.projection.get_parameter("weight").detach().T.cpu()  # [D, E]
        self.projection = nn.Parameter(own.to(torch.promote_types(own.dtype, torch.float32)).clone())
        self.texts = JoiningTexts(backbone, c.n_tokens)

    def layer_tokens(self, tower: str) -> dict[int, Tensor]:
        """Tokens [M, D] of the image or text tower by block, from 0."""
        folded = self._buffers.get(f"{tower}_tokens")
        maps: Any = () if folded is not None else self.maps[tower]
        each = [to_tower(self.tokens) for to_tower in maps] if folded is None else folded
        return {layer - 1: own for layer, own in zip(self.config.layers, each, strict=True)}

    def inference_state(self) -> dict[str, Tensor]:
        """The mapped tokens of both towers, [layers, M, D], and the projection."""
        folded = {f"{name}_tokens": torch.stack([*self.layer_tokens(name).values()]) for name in ("image", "text")}
        return {name: x.detach() for name, x in (folded | {"projection": self.projection}).items()}

    def load_inference_state(self, state: Mapping[str, Tensor]) -> None:
        """Mapped tokens; what maps them is gone."""
        folded = self.inference_state()  # its shapes; the values are the state's
        del self.tokens, self.maps, folded["projection"]
        for name, x in folded.items():
            self.register_buffer(name, torch.zeros_like(x))
        self.load_state_dict(state)

    def encode_images(self, images: Tensor) -> Tensor:
        """Normalised features of the class token and of the representation tokens: [B, 2, E]."""
        tower, tokens = self.backbone.image_tower, self.layer_tokens("image")
        n = len(tower.positions)

        def join(i: int, x: Tensor) -> Tensor:
            return torch.cat([x[:, :n], tokens[i].to(x.dtype).expand(x.shape[0], -1, -1)], 1) if i in tokens else x

        rows = torch.arange(n - 1, n + self.config.n_tokens, device=self.backbone.device)
        rows = rows * (rows >= n)  # the class token's, and theirs
        x = tower.ln_post(tower.run(tower.embed(images.to(rows.device)), before_block=join, rows=rows))
        rep = x[:, 1:].mean(1).to(self.projection.dtype) @ self.projection
        return unit(torch.stack([tower.projection(x[:, 0]).to(rep.dtype), rep], 1))

    def class_features(self, class_names: Sequence[str], image_features: Tensor | None = None) -> Tensor:
        """[C, E], the same for every image."""
        return self.texts.encode(class_names, self.template, self.layer_tokens("text"))

    def branches(self, image_features: Tensor, class_features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, C] of the class token and of the representation tokens."""
        scale = self.config.scale or self.backbone.logit_scale
        main, rep = (scale * image_features @ class_features.T).unbind(1)
        return main, rep

    def logits(self, image_features: Tensor, class_features: Tensor) -> Tensor:
        """Both branches, as classes that it was tuned on are scored: [B, C]."""
        main, rep = self.branches(image_features, class_features)
        return self.config.alpha * main + (1 - self.config.alpha) * rep

    @torch.no_grad()
    def predict(self, x: Tensor, class_names: Sequence[str]) -> Tensor:
        """[B, C]; a class that it was not tuned on is scored by the class token alone."""
        if x.ndim == 2:  # which is refused
            return super().predict(x, class_names)
        v, t = self.encode_images(x), self.kept_class_features(tuple(class_names))
        tuned = torch.tensor([name in self.class_names for name in class_names], device=v.device)
        return torch.where(tuned, self.logits(v, t), self.branches(v, t)[0])

    def supervision(self, out: Output, batch: Batch) -> dict[str, Tensor]:
        """That of each branch by its share."""
        alpha, branches = self.config.alpha, self.branches(out.v, out.t)
        main, rep = (super(MMRL, self).supervision(replace(out, logits=x), batch) for x in branches)
        return {k: alpha * x for k, x in main.items()} | {f"{k}_rep": (1 - alpha) * x for k, x in rep.items()}

    def regularisers(self, out: Output, batch: Batch) -> dict[str, Tensor]:
        """The distances of the class token's features and of the class features to the frozen ones."""
        v0 = batch.frozen_image_features
        assert v0 is not None
        t0 = frozen_class_features(self.backbone, self.class_names, [self.template])[batch.compared]
        return {
            "image": self.config.w * (1 - (out.v[:, 0] * v0).sum(-1).mean()),
            "text": self.config.w * (1 - (out.t * t0).sum(-1).mean()),
        }
