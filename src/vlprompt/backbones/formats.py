"""Checkpoint formats mapped onto our towers: for each, the architecture it describes and its tensors renamed.

Every reader returns a :class:`Weights`. An architecture that the towers do not cover is refused by its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlprompt.backbones.towers import ACTIVATIONS, ImageConfig, TextConfig
from vlprompt.errors import BackboneError

State = dict[str, Tensor]
OPENAI_HEAD_WIDTH = 64  # OpenAI's state dicts do not store the number of heads


@dataclass(frozen=True)
class Weights:
    """A checkpoint in our names: two configurations, two state dicts, the scale and bias of the logits."""

    image: ImageConfig
    text: TextConfig
    image_state: State
    text_state: State
    logit_scale: float
    logit_bias: float = 0.0


def read_hf(config: Mapping[str, Any], state: State) -> Weights:
    """Hugging Face ``CLIPModel`` or ``SiglipModel``."""
    kind = config.get("model_type")
    if kind not in ("clip", "siglip"):
        found = kind or (config.get("architectures") or ["nothing"])[0]
        raise BackboneError(f"unsupported architecture '{found}' (allowed: clip, siglip)")
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
    take = _Taker(state)
    image_state = {
        "patches.weight": take("vision_model.embeddings.patch_embedding.weight"),
        "positions": take("vision_model.embeddings.position_embedding.weight"),
        **_pair("ln_post", take, "vision_model.post_layernorm"),
        **_hf_blocks(take, "vision_model.encoder.layers", image.layers),
    }
    text_state = {
        "token_embedding.weight": take("text_model.embeddings.token_embedding.weight"),
        "positions": take("text_model.embeddings.position_embedding.weight"),
        **_pair("ln_final", take, "text_model.final_layer_norm"),
        **_hf_blocks(take, "text_model.encoder.layers", text.layers),
    }
    if siglip:
        image_state |= {
            "patches.bias": take("vision_model.embeddings.patch_embedding.bias"),
            "head.probe": take("vision_model.head.probe"),
            "head.attention.in_proj_weight": take("vision_model.head.attention.in_proj_weight"),
            "head.attention.in_proj_bias": take("vision_model.head.attention.in_proj_bias"),
            **_pair("head.attention.out_proj", take, "vision_model.head.attention.out_proj"),
            **_pair("head.ln", take, "vision_model.head.layernorm"),
            **_pair("head.fc_1", take, "vision_model.head.mlp.fc1"),
            **_pair("head.fc_2", take, "vision_model.head.mlp.fc2"),
        }
        text_state |= _pair("projection", take, "text_model.head")
    else:
        image_state |= {
            "class_token": take("vision_model.embeddings.class_embedding"),
            **_pair("ln_pre", take, "vision_model.pre_layrnorm"),
            "projection.weight": take("visual_projection.weight"),
        }
        text_state["projection.weight"] = take("text_projection.weight")
    scale, bias = take("logit_scale"), take("logit_bias") if siglip else torch.zeros(())
    take.nothing_left(ignore=r"position_ids$")
    return Weights(image, text, image_state, text_state, scale.float().exp().item(), bias.float().item())


def _sub_config(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """One tower's settings; where older files have ``KEY_dict`` too, transformers lets that one win."""
    old = config.get(f"{key}_dict")
    return old if old is not None else config.get(key) or {}


def read_openai(state: State) -> Weights:
    """A state dict of OpenAI's CLIP (vision transformers); the architecture is read off the shapes."""
    state = {k: v for k, v in state.items() if k not in ("input_resolution", "context_length", "vocab_size")}
    look = _Taker(state)
    width, _, _, patch = look("visual.conv1.weight").shape
    side = round((len(look("visual.positional_embedding")) - 1) ** 0.5)
    context_length, t_width = look("positional_embedding").shape
    image = ImageConfig(
        image_size=side * patch,
        patch_size=patch,
        width=width,
        layers=_count(state, "visual.transformer.resblocks"),
        heads=width // OPENAI_HEAD_WIDTH,
        mlp_width=len(look("visual.transformer.resblocks.0.mlp.c_fc.weight")),
        embed_dim=look("visual.proj").shape[1],
    )
    text = TextConfig(
        vocab_size=len(look("token_embedding.weight")),
        context_length=context_length,
        width=t_width,
        layers=_count(state, "transformer.resblocks"),
        heads=t_width // OPENAI_HEAD_WIDTH,
        mlp_width=len(look("transformer.resblocks.0.mlp.c_fc.weight")),
        embed_dim=look("text_projection").shape[1],
    )
    return _openai_weights(image, text, state)


def read_open_clip(model: Mapping[str, Any], state: State) -> Weights:
    """A state dict of open_clip with its ``model_cfg``; vision transformers with a causal text tower."""
    for key in ("embed_dim", "vision_cfg", "text_cfg"):
        if key not in model:
            raise BackboneError(f"open_clip model_cfg lacks '{key}'")
    v, t = model["vision_cfg"], model["text_cfg"]
    both = ("ls_init_value", "act_kwargs", "norm_kwargs")
    for side, cfg, foreign in (
        ("vision_cfg", v, ("timm_model_name", "attentional_pool", "no_ln_pre", "final_ln_after_pool", *both)),
        ("text_cfg", t, ("hf_model_name", "embed_cls", "no_causal_mask", "proj_bias", *both)),
        ("model_cfg", model, ("multimodal_cfg",)),
    ):
        for key in foreign:
            if cfg.get(key):
                raise BackboneError(f"unsupported architecture: open_clip {side} with {key} = {cfg[key]}")
    if not isinstance(v.get("layers", 12), int):
        raise BackboneError(f"unsupported architecture: open_clip ResNet with layers = {v['layers']} (allowed: ViT)")
    for side, key, cfg, allowed in (
        ("vision_cfg", "pool_type", v, ("tok",)),
        ("text_cfg", "pool_type", t, ("argmax",)),  # "eos" comes with other tokenizers than CLIP's
        ("text_cfg", "proj_type", t, ("linear",)),
    ):
        if cfg.get(key, allowed[0]) not in allowed:
            raise BackboneError(f"unsupported architecture: open_clip {side} with {key} = {cfg[key]}")
    size = v.get("image_size", 224)
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    width, t_width = v.get("width", 768), t.get("width", 512)
    image = ImageConfig(
        image_size=size if isinstance(size, int) else size[0],
        patch_size=v.get("patch_size", 16),
        width=width,
        layers=v.get("layers", 12),
        heads=width // v.get("head_width", 64),
        mlp_width=int(width * v.get("mlp_ratio", 4.0)),
        embed_dim=model["embed_dim"],
        activation=activation,
    )
    text = TextConfig(
        vocab_size=t.get("vocab_size", 49408),
        context_length=t.get("context_length", 77),
        width=t_width,
        layers=t.get("layers", 12),
        heads=t.get("heads", 8),
        mlp_width=int(t_width * t.get("mlp_ratio", 4.0)),
        embed_dim=model["embed_dim"],
        activation=activation,
    )
    # Models built as CustomTextCLIP keep their text tower under "text.".
    return _openai_weights(image, text, {re.sub(r"^text\.", "", k): x for k, x in state.items()})


def _openai_weights(image: ImageConfig, text: TextConfig, state: State) -> Weights:
    """OpenAI's names, which open_clip kept; its projections are stored transposed."""
    take = _Taker(state)
    image_state = {
        "patches.weight": take("visual.conv1.weight"),
        "class_token": take("visual.class_embedding"),
        "positions": take("visual.positional_embedding"),
        **_pair("ln_pre", take, "visual.ln_pre"),
        **_pair("ln_post", take, "visual.ln_post"),
        **_openai_blocks(take, "visual.transformer.resblocks", image.layers),
        "projection.weight": take("visual.proj").T,
    }
    text_state = {
        "token_embedding.weight": take("token_embedding.weight"),
        "positions": take("positional_embedding"),
        **_pair("ln_final", take, "ln_final"),
        **_openai_blocks(take, "transformer.resblocks", text.layers),
        "projection.weight": take("text_projection").T,
    }
    scale = take("logit_scale").float().exp().item()
    bias = take("logit_bias").float().item() if "logit_bias" in state else 0.0  # open_clip's sigmoid loss
    take.nothing_left(ignore=r"attn_mask$")
    return Weights(image, text, image_state, text_state, scale, bias)


class _Taker:
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


def _pair(ours: str, take: _Taker, theirs: str) -> State:
    return {f"{ours}.{x}": take(f"{theirs}.{x}") for x in ("weight", "bias")}


def _hf_blocks(take: _Taker, prefix: str, layers: int) -> State:
    state: State = {}
    for i in range(layers):
        theirs, ours = f"{prefix}.{i}", f"blocks.{i}"
        for x in ("weight", "bias"):
            parts = [take(f"{theirs}.self_attn.{n}_proj.{x}") for n in "qkv"]
            if len({part.shape for part in parts}) > 1:
                raise BackboneError(f"{theirs}.self_attn: {x}s of q_proj, k_proj and v_proj differ in shape")
            state[f"{ours}.qkv.{x}"] = torch.cat(parts)
        state |= _pair(f"{ours}.out", take, f"{theirs}.self_attn.out_proj")
        state |= _pair(f"{ours}.ln_1", take, f"{theirs}.layer_norm1")
        state |= _pair(f"{ours}.ln_2", take, f"{theirs}.layer_norm2")
        state |= _pair(f"{ours}.fc_1", take, f"{theirs}.mlp.fc1")
        state |= _pair(f"{ours}.fc_2", take, f"{theirs}.mlp.fc2")
    return state


def _openai_blocks(take: _Taker, prefix: str, layers: int) -> State:
    state: State = {}
    for i in range(layers):
        theirs, ours = f"{prefix}.{i}", f"blocks.{i}"
        for x in ("weight", "bias"):
            state[f"{ours}.qkv.{x}"] = take(f"{theirs}.attn.in_proj_{x}")
        state |= _pair(f"{ours}.out", take, f"{theirs}.attn.out_proj")
        state |= _pair(f"{ours}.ln_1", take, f"{theirs}.ln_1")
        state |= _pair(f"{ours}.ln_2", take, f"{theirs}.ln_2")
        state |= _pair(f"{ours}.fc_1", take, f"{theirs}.mlp.c_fc")
        state |= _pair(f"{ours}.fc_2", take, f"{theirs}.mlp.c_proj")
    return state


def _count(state: State, prefix: str) -> int:
    pattern = re.compile(rf"^{re.escape(prefix)}\.(\d+)\.")
    return 1 + max((int(m[1]) for k in state if (m := pattern.match(k))), default=-1)


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise BackboneError(f"unsupported activation '{name}' (allowed: {', '.join(ACTIVATIONS)})")
    return name
