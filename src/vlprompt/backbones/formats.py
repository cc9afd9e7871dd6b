"""Hugging Face's checkpoints mapped onto our towers, and what every format's mapping is made of.

A configuration gives a :class:`Layout` before any weights are there; an architecture that the towers do not cover is
refused by its name. The layout then reads the weights: our names for their tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlprompt.backbones.convert import State
from vlprompt.backbones.towers import ACTIVATIONS, ImageConfig, TextConfig
from vlprompt.errors import BackboneError, one_line


@dataclass(frozen=True)
class Weights:
    """A checkpoint in our names: two state dicts, the scale and bias of the logits."""

    image_state: State
    text_state: State
    logit_scale: float
    logit_bias: float = 0.0


@dataclass(frozen=True)
class Layout:
    """What a configuration says: both architectures, and how a state dict becomes their tensors."""

    image: ImageConfig
    text: TextConfig
    read: Callable[[State], Weights]


def hf_layout(config: Mapping[str, Any]) -> Layout:
    """Hugging Face ``CLIPModel`` or ``SiglipModel``, from ``config.json``."""
    kind = config.get("model_type")
    if kind not in ("clip", "siglip"):
        found = kind or (config.get("architectures") or ["nothing"])[0]
        raise BackboneError(f"unsupported architecture '{one_line(found, 60)}' (allowed: clip, siglip)")
    siglip = kind == "siglip"
    v, t = (_sub_config(config, key) for key in ("vision_config", "text_config"))
    if siglip and not v.get("vision_use_head", True):
        raise BackboneError("unsupported architecture 'siglip' without its pooling head")
    # transformers leaves out values equal to its defaults: ViT-B/32 for CLIP, ViT-B/16 for SigLIP.
    eps = 1e-6 if siglip else 1e-5
    act = "gelu_pytorch_tanh" if siglip else "quick_gelu"
    v_width, t_width = v.get("hidden_size", 768), t.get("hidden_size", 768 if siglip else 512)
    t_embed = (t.get("projection_size") or t_width) if siglip else config.get("projection_dim", 512)
    image = ImageConfig(
        image_size=v.get("image_size", 224),
        patch_size=v.get("patch_size", 16 if siglip else 32),
        width=v_width,
        layers=v.get("num_hidden_layers", 12),
        heads=v.get("num_attention_heads", 12),
        mlp_width=v.get("intermediate_size", 3072),
        embed_dim=v_width if siglip else t_embed,
        activation=_activation(v.get("hidden_act", act)),
        eps=v.get("layer_norm_eps", eps),
        pool="map" if siglip else "cls",
    )
    text = TextConfig(
        vocab_size=t.get("vocab_size", 32000 if siglip else 49408),
        context_length=t.get("max_position_embeddings", 64 if siglip else 77),
        width=t_width,
        layers=t.get("num_hidden_layers", 12),
        heads=t.get("num_attention_heads", 12 if siglip else 8),
        mlp_width=t.get("intermediate_size", 3072 if siglip else 2048),
        embed_dim=t_embed,
        activation=_activation(t.get("hidden_act", act)),
        eps=t.get("layer_norm_eps", eps),
        causal=not siglip,
    )
    return Layout(image, text, partial(_hf_weights, image, text))


def _hf_weights(image: ImageConfig, text: TextConfig, state: State) -> Weights:
    siglip, take = image.pool == "map", Taker(state)
    image_state = {
        "patches.weight": take("vision_model.embeddings.patch_embedding.weight"),
        "positions": take("vision_model.embeddings.position_embedding.weight"),
        **pair("ln_post", take, "vision_model.post_layernorm"),
        **_hf_blocks(take, "vision_model.encoder.layers", image.layers),
    }
    text_state = {
        "token_embedding.weight": take("text_model.embeddings.token_embedding.weight"),
        "positions": take("text_model.embeddings.position_embedding.weight"),
        **pair("ln_final", take, "text_model.final_layer_norm"),
        **_hf_blocks(take, "text_model.encoder.layers", text.layers),
    }
    if siglip:
        image_state |= {
            "patches.bias": take("vision_model.embeddings.patch_embedding.bias"),
            "head.probe": take("vision_model.head.probe"),
            "head.attention.in_proj_weight": take("vision_model.head.attention.in_proj_weight"),
            "head.attention.in_proj_bias": take("vision_model.head.attention.in_proj_bias"),
            **pair("head.attention.out_proj", take, "vision_model.head.attention.out_proj"),
            **pair("head.ln", take, "vision_model.head.layernorm"),
            **pair("head.fc_1", take, "vision_model.head.mlp.fc1"),
            **pair("head.fc_2", take, "vision_model.head.mlp.fc2"),
        }
        text_state |= pair("projection", take, "text_model.head")
    else:
        image_state |= {
            "class_token": take("vision_model.embeddings.class_embedding"),
            **pair("ln_pre", take, "vision_model.pre_layrnorm"),
            "projection.weight": take("visual_projection.weight"),
        }
        text_state["projection.weight"] = take("text_projection.weight")
    scale, bias = take("logit_scale"), take("logit_bias") if siglip else torch.zeros(())
    take.nothing_left(ignore=r"position_ids$")
    return Weights(image_state, text_state, scale.float().exp().item(), bias.float().item())


def _sub_config(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """One tower's settings; where older files have ``KEY_dict`` too, transformers lets that one win."""
    old = config.get(f"{key}_dict")
    return old if old is not None else config.get(key) or {}


class Taker:
    """Hands out tensors by name and knows which were never asked for."""

    def __init__(self, state: State) -> None:
        self.state, self.taken = state, set[str]()

    def __call__(self, name: str) -> Tensor:
        if name not in self.state:
            raise BackboneError(f"checkpoint lacks tensor '{name}'")
        self.taken.add(name)
        return self.state[name]

    def nothing_left(self, ignore: str) -> None:
        left = sorted(k for k in self.state.keys() - self.taken if not re.search(ignore, k))
        if left:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            raise BackboneError(f"checkpoint has tensors of another architecture: {', '.join(left[:3])}{more}")


def pair(ours: str, take: Taker, theirs: str) -> State:
    return {f"{ours}.{x}": take(f"{theirs}.{x}") for x in ("weight", "bias")}


def _hf_blocks(take: Taker, prefix: str, layers: int) -> State:
    state: State = {}
    for i in range(layers):
        theirs, ours = f"{prefix}.{i}", f"blocks.{i}"
        for x in ("weight", "bias"):
            parts = [take(f"{theirs}.self_attn.{n}_proj.{x}") for n in "qkv"]
            if len({part.shape for part in parts}) > 1:
                raise BackboneError(f"{theirs}.self_attn: {x}s of q_proj, k_proj and v_proj differ in shape")
            state[f"{ours}.qkv.{x}"] = torch.cat(parts)
        state |= pair(f"{ours}.out", take, f"{theirs}.self_attn.out_proj")
        state |= pair(f"{ours}.ln_1", take, f"{theirs}.layer_norm1")
        state |= pair(f"{ours}.ln_2", take, f"{theirs}.layer_norm2")
        state |= pair(f"{ours}.fc_1", take, f"{theirs}.mlp.fc1")
        state |= pair(f"{ours}.fc_2", take, f"{theirs}.mlp.fc2")
    return state


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise BackboneError(f"unsupported activation '{one_line(name, 60)}' (allowed: {', '.join(ACTIVATIONS)})")
    return name
