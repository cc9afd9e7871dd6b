"""OpenAI's names of tensors, which open_clip kept: vision transformers and ResNets; and SigLIP as open_clip has it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlprompt.backbones.convert import OPENAI_NUMBERS, State
from vlprompt.backbones.formats import Layout, Taker, Weights, pair
from vlprompt.backbones.towers import ImageConfig, TextConfig
from vlprompt.errors import BackboneError

HEAD_WIDTH = 64  # OpenAI's state dicts do not store the number of heads
RESNET_STRIDE = 32
TIMM_SIGLIP = {"base": (768, 12, 12, 3072), "large": (1024, 24, 16, 4096), "so400m": (1152, 27, 16, 4304),
               "giantopt": (1536, 40, 16, 6144)}  # fmt: skip
"""Width, layers, heads and MLP width of timm's ``vit_SIZE_patchN_siglip_RESOLUTION``."""
TIMM_SIGLIP_TANH = re.compile(r"vit_(base_patch32|large_patch16_siglip_512|so400m_patch16|giantopt)")
"""Those whose GELU is the tanh approximation; timm gives the others the exact one."""


def shows_openai(state: State) -> bool:
    """Whether a state dict is OpenAI's: theirs alone hold three numbers, and QuickGELU and heads of 64 go with them."""
    return all(name in state for name in OPENAI_NUMBERS)


def openai_layout(state: State) -> Layout:
    """A state dict of OpenAI's CLIP; the architecture is read off the shapes."""
    look = Taker(state)
    embed_dim = look("text_projection").shape[1]
    context_length, t_width = look("positional_embedding").shape
    tokens = len(look("visual.attnpool.positional_embedding" if _is_resnet(state) else "visual.positional_embedding"))
    side = round((tokens - 1) ** 0.5)
    if _is_resnet(state):
        stages = tuple(_count(state, f"visual.layer{n}") for n in (1, 2, 3, 4))
        width = len(look("visual.layer1.0.conv1.weight"))
        image = _resnet(side * RESNET_STRIDE, width, stages, embed_dim)
    else:
        width, _, _, patch = look("visual.conv1.weight").shape
        image = ImageConfig(
            image_size=side * patch,
            patch_size=patch,
            width=width,
            layers=_count(state, "visual.transformer.resblocks"),
            heads=width // HEAD_WIDTH,
            mlp_width=len(look("visual.transformer.resblocks.0.mlp.c_fc.weight")),
            embed_dim=embed_dim,
        )
    text = TextConfig(
        vocab_size=len(look("token_embedding.weight")),
        context_length=context_length,
        width=t_width,
        layers=_count(state, "transformer.resblocks"),
        heads=t_width // HEAD_WIDTH,
        mlp_width=len(look("transformer.resblocks.0.mlp.c_fc.weight")),
        embed_dim=embed_dim,
    )
    for name, found in zip(OPENAI_NUMBERS, (image.image_size, context_length, text.vocab_size), strict=True):
        if int(state[name]) != found:
            raise BackboneError(f"checkpoint says {name} = {int(state[name])}, and its tensors {found}")
    return Layout(image, text, partial(_weights, image, text))


def open_clip_layout(model: Mapping[str, Any]) -> Layout:
    """A model of open_clip by its ``model_cfg``, with CLIP's causal text tower or SigLIP's."""
    for key in ("embed_dim", "vision_cfg", "text_cfg"):
        if key not in model:
            raise BackboneError(f"open_clip model_cfg lacks '{key}'")
    v, t = model["vision_cfg"], model["text_cfg"]
    siglip = bool(t.get("no_causal_mask")) and str(v.get("timm_model_name")).find("_siglip_") > 0
    both = ("ls_init_value",) if siglip else ("ls_init_value", "act_kwargs", "norm_kwargs")
    _refuse("vision_cfg", v, ("attentional_pool", "no_ln_pre", "final_ln_after_pool", *both))
    _refuse("text_cfg", t, ("hf_model_name", "embed_cls", *(() if siglip else ("no_causal_mask", "proj_bias")), *both))
    _refuse("model_cfg", model, ("multimodal_cfg",))
    pool, activation = ("last", "gelu") if siglip else ("argmax", "quick_gelu" if model.get("quick_gelu") else "gelu")
    # "eos" comes with other tokenizers than CLIP's.
    _only("text_cfg", t, pool_type=pool, proj_type="linear")
    width = t.get("width", 512)
    text = TextConfig(
        vocab_size=t.get("vocab_size", 49408),
        context_length=t.get("context_length", 77),
        width=width,
        layers=t.get("layers", 12),
        heads=t.get("heads", 8),
        mlp_width=int(width * t.get("mlp_ratio", 4.0)),
        embed_dim=model["embed_dim"],
        activation=activation,
    )
    if siglip:
        return _siglip_layout(model, v, t, text)
    _refuse("vision_cfg", v, ("timm_model_name",))
    size = _square(v.get("image_size", 224))
    width, layers, head = v.get("width", 768), v.get("layers", 12), v.get("head_width", HEAD_WIDTH)
    if isinstance(layers, list | tuple):
        # open_clip gives a ResNet ReLU, whatever quick_gelu says of its text tower.
        return _layout(_resnet(size, width, tuple(layers), model["embed_dim"], head), text)
    _only("vision_cfg", v, pool_type="tok")
    image = ImageConfig(
        image_size=size,
        patch_size=_square(v.get("patch_size", 16)),
        width=width,
        layers=layers,
        heads=width // head,
        mlp_width=int(width * v.get("mlp_ratio", 4.0)),
        embed_dim=model["embed_dim"],
        activation=activation,
    )
    return _layout(image, text)


def _layout(image: ImageConfig, text: TextConfig) -> Layout:
    return Layout(image, text, lambda state: _weights(image, text, _text_at_top(state)))


def _refuse(side: str, config: Mapping[str, Any], foreign: tuple[str, ...]) -> None:
    for key in foreign:
        if config.get(key):
            raise BackboneError(f"unsupported architecture: open_clip {side} with {key} = {config[key]}")


def _only(side: str, config: Mapping[str, Any], **allowed: object) -> None:
    for key, value in allowed.items():
        if config.get(key, value) != value:
            raise BackboneError(f"unsupported architecture: open_clip {side} with {key} = {config[key]}")


def _square(size: Any) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) > 1:
        raise BackboneError(f"unsupported architecture: open_clip vision_cfg that is not square: {list(size)}")
    return sides.pop()


def _resnet(size: int, width: int, stages: tuple[int, ...], embed_dim: int, head: int = HEAD_WIDTH) -> ImageConfig:
    heads = width * RESNET_STRIDE // head
    return ImageConfig(size, RESNET_STRIDE, width, 0, heads, 0, embed_dim, pool="resnet", stages=stages)


def _siglip_layout(model: Mapping[str, Any], v: Mapping[str, Any], t: Mapping[str, Any], text: TextConfig) -> Layout:
    """timm's SigLIP image tower and open_clip's text tower beside it."""
    name, eps = v["timm_model_name"], {"eps": 1e-6}
    match = re.fullmatch(r"vit_([a-z0-9]+)_patch(\d+)_siglip_(\d+)", name)
    if not match or match[1] not in TIMM_SIGLIP:
        raise BackboneError(f"unsupported architecture: open_clip vision_cfg with timm_model_name = {name}")
    _only("vision_cfg", v, timm_pool="map", timm_proj="none")
    if t.get("act_kwargs") not in (None, {}, {"approximate": "tanh"}):
        raise BackboneError(f"unsupported architecture: open_clip text_cfg with act_kwargs = {t['act_kwargs']}")
    if t.get("norm_kwargs") != eps or not t.get("proj_bias") or model.get("quick_gelu"):
        raise BackboneError(f"unsupported architecture: open_clip text_cfg beside {name} that is not SigLIP's")
    if (clean := t.get("tokenizer_kwargs", {}).get("clean")) != "canonicalize":
        raise BackboneError(f"unsupported architecture: open_clip text_cfg with tokenizer_kwargs: clean = {clean}")
    width, layers, heads, mlp_width = TIMM_SIGLIP[match[1]]
    image = ImageConfig(
        image_size=_square(v.get("image_size", int(match[3]))),
        patch_size=int(match[2]),
        width=width,
        layers=layers,
        heads=heads,
        mlp_width=mlp_width,
        embed_dim=width,
        activation="gelu_pytorch_tanh" if TIMM_SIGLIP_TANH.match(name) else "gelu",
        eps=1e-6,
        pool="map",
    )
    activation = "gelu_pytorch_tanh" if t.get("act_kwargs") else "gelu"
    values = vars(text) | {"eps": 1e-6, "causal": False, "activation": activation}
    text = TextConfig(**values)
    return Layout(image, text, partial(_siglip_weights, image, text))


def _is_resnet(state: State) -> bool:
    return "visual.attnpool.c_proj.weight" in state


def _text_at_top(state: State) -> State:
    """Models built as CustomTextCLIP keep their text tower under ``text.``."""
    return {re.sub(r"^text\.", "", k): x for k, x in state.items()}


def _weights(image: ImageConfig, text: TextConfig, state: State) -> Weights:
    """Projections are stored transposed."""
    take = Taker(state)
    if image.stages:
        prefix = "visual."
        image_state = {k.removeprefix(prefix): take(k) for k in state if k.startswith(prefix) and _read_of_resnet(k)}
    else:
        image_state = {
            "patches.weight": take("visual.conv1.weight"),
            "class_token": take("visual.class_embedding"),
            "positions": take("visual.positional_embedding"),
            **pair("ln_pre", take, "visual.ln_pre"),
            **pair("ln_post", take, "visual.ln_post"),
            **_blocks(take, "visual.transformer.resblocks", image.layers),
            "projection.weight": take("visual.proj").T,
        }
    text_state = _text_state(take, text) | {"projection.weight": take("text_projection").T}
    return _finish(take, image_state, text_state, rf"attn_mask$|num_batches_tracked$|^({'|'.join(OPENAI_NUMBERS)})$")


def _read_of_resnet(name: str) -> bool:
    return not name.endswith("num_batches_tracked")


def _siglip_weights(image: ImageConfig, text: TextConfig, state: State) -> Weights:
    state = _text_at_top(state)
    take, trunk = Taker(state), "visual.trunk"
    blocks: State = {}
    for i in range(image.layers):
        names = {"ln_1": "norm1", "qkv": "attn.qkv", "out": "attn.proj", "ln_2": "norm2",
                 "fc_1": "mlp.fc1", "fc_2": "mlp.fc2"}  # fmt: skip
        for ours, theirs in names.items():
            blocks |= pair(f"blocks.{i}.{ours}", take, f"{trunk}.blocks.{i}.{theirs}")
    pool = f"{trunk}.attn_pool"
    image_state = {
        **pair("patches", take, f"{trunk}.patch_embed.proj"),
        "positions": take(f"{trunk}.pos_embed")[0],
        **blocks,
        **pair("ln_post", take, f"{trunk}.norm"),
        "head.probe": take(f"{pool}.latent"),
        **{
            f"head.attention.in_proj_{x}": torch.cat([take(f"{pool}.q.{x}"), take(f"{pool}.kv.{x}")])
            for x in ("weight", "bias")
        },
        **pair("head.attention.out_proj", take, f"{pool}.proj"),
        **pair("head.ln", take, f"{pool}.norm"),
        **pair("head.fc_1", take, f"{pool}.mlp.fc1"),
        **pair("head.fc_2", take, f"{pool}.mlp.fc2"),
    }
    text_state = _text_state(take, text) | pair("projection", take, "text_projection")
    return _finish(take, image_state, text_state, r"attn_mask$")


def _text_state(take: Taker, text: TextConfig) -> State:
    return {
        "token_embedding.weight": take("token_embedding.weight"),
        "positions": take("positional_embedding"),
        **pair("ln_final", take, "ln_final"),
        **_blocks(take, "transformer.resblocks", text.layers),
    }


def _finish(take: Taker, image_state: State, text_state: State, ignore: str) -> Weights:
    scale = take("logit_scale").float().exp().item()
    bias = take("logit_bias").float().item() if "logit_bias" in take.state else 0.0  # open_clip's sigmoid loss
    take.nothing_left(ignore)
    return Weights(image_state, text_state, scale, bias)


def _blocks(take: Taker, prefix: str, layers: int) -> State:
    state: State = {}
    for i in range(layers):
        theirs, ours = f"{prefix}.{i}", f"blocks.{i}"
        state |= {f"{ours}.qkv.{x}": take(f"{theirs}.attn.in_proj_{x}") for x in ("weight", "bias")}
        names = {"out": "attn.out_proj", "ln_1": "ln_1", "ln_2": "ln_2", "fc_1": "mlp.c_fc", "fc_2": "mlp.c_proj"}
        for own, their in names.items():
            state |= pair(f"{ours}.{own}", take, f"{theirs}.{their}")
    return state


def _count(state: dict[str, Tensor], prefix: str) -> int:
    pattern = re.compile(rf"^{re.escape(prefix)}\.(\d+)\.")
    return 1 + max((int(m[1]) for k in state if (m := pattern.match(k))), default=-1)
