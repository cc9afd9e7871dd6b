"""CLIP's ResNets, and SigLIP in open_clip's layout; what else open_clip takes from timm is refused by name."""

from __future__ import annotations

import copy
import json
import shutil
import string
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipModel

from tests.backbones.test_backbones import (
    NAMES,
    OPEN_CLIP,
    TEMPLATE,
    changed,
    check_parity,
    openai_state,
    randomise,
    refused,
    write_open_clip,
    write_openai,
    write_siglip,
)
from tests.kit.command import vlprompt
from tests.kit.pictures import draw
from vlprompt.backbones import openai
from vlprompt.backbones.backbone import Backbone, unit
from vlprompt.backbones.load import load_backbone
from vlprompt.errors import BackboneError
from vlprompt.methods import Can, find_method, method_names
from vlprompt.training.explain import relevance

# ---------------------------------------------------------------------------------------------------- ResNets

STAGES, WIDTH, SIDE = (2, 1, 1, 2), 16, 64
RESNET = {**OPEN_CLIP, "quick_gelu": True}
RESNET["vision_cfg"] = {"image_size": SIDE, "layers": list(STAGES), "width": WIDTH, "patch_size": None}
RESNET["text_cfg"] = {**OPEN_CLIP["text_cfg"], "heads": 1}
RECORDED = [
    [-0.216272, -0.0027086, -0.0680061, -0.0226561, 0.1290312, 0.0283102, 0.0188369, -0.0213693],
    [-0.1808171, 0.0008923, -0.0306682, -0.0136501, 0.1856698, 0.0530822, 0.0736423, 0.0401249],
]
"""The first eight features, normalised, that open_clip 3.3.0 gives the two images under the weights below, in
float64."""


def waves(shape: tuple[int, ...], n: int) -> Tensor:
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(i * 1.7 + n * 0.31 + (i * i) % 11).reshape(shape)


def resnet_shapes() -> dict[str, tuple[int, ...]]:
    """As open_clip's ModifiedResNet has them."""
    half, out, embed = WIDTH // 2, 32 * WIDTH, OPEN_CLIP["embed_dim"]
    shapes: dict[str, tuple[int, ...]] = {"attnpool.positional_embedding": ((SIDE // 32) ** 2 + 1, out)}
    for name in "qkvc":
        rows = embed if name == "c" else out
        shapes |= {f"attnpool.{name}_proj.weight": (rows, out), f"attnpool.{name}_proj.bias": (rows,)}

    def convolution(prefix: str, n: str, norm: str, after: int, before: int, kernel: int) -> None:
        shapes[f"{prefix}{n}.weight"] = (after, before, kernel, kernel)
        shapes.update({f"{prefix}{norm}.{x}": (after,) for x in ("weight", "bias", "running_mean", "running_var")})

    for n, after, before in ((1, half, 3), (2, half, half), (3, WIDTH, half)):
        convolution("", f"conv{n}", f"bn{n}", after, before, 3)
    before = WIDTH
    for stage, blocks in enumerate(STAGES):
        width = WIDTH * 2**stage
        for i in range(blocks):
            prefix = f"layer{stage + 1}.{i}."
            convolution(prefix, "conv1", "bn1", width, before, 1)
            convolution(prefix, "conv2", "bn2", width, width, 3)
            convolution(prefix, "conv3", "bn3", 4 * width, width, 1)
            if not i:
                convolution(f"{prefix}downsample.", "0", "1", 4 * width, before, 1)
            before = 4 * width
    return shapes


def resnet_state() -> dict[str, Tensor]:
    """Weights by a formula, and the text tower of the small CLIP."""
    state: dict[str, Tensor] = {}
    for n, (name, shape) in enumerate(sorted((f"visual.{k}", v) for k, v in resnet_shapes().items())):
        w = waves(shape, n)
        if name.endswith("running_var"):
            w = 0.75 + 0.5 * w.abs()
        elif w.ndim == 1:
            w = 0.3 * w + name.endswith("weight")
        else:
            w = 0.02 * w if "positional" in name else 1.6 * w / w[0].numel() ** 0.5
        state[name] = w
        if name.endswith("running_var"):
            state[name.replace("running_var", "num_batches_tracked")] = torch.tensor(7)
    return state | {k: v for k, v in openai_state().items() if not k.startswith("visual.")}


def two_images() -> Tensor:
    ramp = torch.linspace(-2, 2, 3 * SIDE * SIDE, dtype=torch.float64)
    return torch.stack([waves((3, SIDE, SIDE), 5), ramp.reshape(3, SIDE, SIDE)])


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    state = {k: v.float() if v.is_floating_point() else v for k, v in resnet_state().items()}
    return load_backbone(write_open_clip(tmp_path_factory.mktemp("resnet"), RESNET, state))


def test_resnet_features_are_those_of_open_clip(resnet: Backbone) -> None:
    backbone = load_backbone(resnet.name).to(dtype=torch.float64)
    features = backbone.encode_images(two_images())[:, :8]
    torch.testing.assert_close(features, torch.tensor(RECORDED, dtype=torch.float64), rtol=0, atol=1e-6)
    assert resnet.encode_texts([TEMPLATE.format(n) for n in NAMES[:2]]).shape == (2, resnet.embed_dim)
    assert resnet.image_size == SIDE


def test_resnet_of_openai(resnet: Backbone, tmp_path: Path) -> None:
    """The same model as a state dict of OpenAI's, whose three numbers show that it is theirs."""
    file = write_openai(tmp_path, {k: v.float() for k, v in resnet_state().items()})
    refused(str(file), match="checkpoint says input_resolution = 32, and its tensors 64")
    state = {k: v.float() for k, v in resnet_state().items()} | {"input_resolution": torch.tensor(SIDE)}
    save_file(load_file(file) | state, file)
    backbone = load_backbone(file)
    # Where weights lie in memory decides how some processors round: copies lie alike.
    ours, theirs = (copy.deepcopy(b).encode_images(two_images()) for b in (backbone, resnet))
    assert torch.equal(ours, theirs)
    assert backbone.image_tower.config == resnet.image_tower.config


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_resnet_in_low_precision(resnet: Backbone, tmp_path: Path, precision: str) -> None:
    state = {k: v.float() if v.is_floating_point() else v for k, v in resnet_state().items()}
    low = load_backbone(write_open_clip(tmp_path, RESNET, state), precision=precision)
    assert low.fingerprint == resnet.fingerprint
    both = low.encode_images(two_images()), resnet.encode_images(two_images())
    assert (both[0] * both[1]).sum(-1).min() > 0.999


@pytest.mark.parametrize("name", method_names())
def test_methods_on_a_resnet(resnet: Backbone, name: str) -> None:
    """Those that do not enter the tower work; the others say in one line why they do not."""
    names, cls = ["cat", "ruler", "desk"], find_method(name)
    config = cls.Config(**{f.name: 1 for f in fields(cls.Config) if f.name.startswith("depth") or f.name == "layer"})
    reads_places = name == "plot"  # what the tower makes of each place, which it need not enter for
    if not reads_places and not config.can & (Can.USE_FROZEN_FEATURES | Can.USE_POOLED_FEATURES):
        with pytest.raises(BackboneError) as caught:
            cls(resnet, names, config)
        no_token = f"backbone '{resnet.name}' has no class token: it serves text-only methods for now"
        assert str(caught.value) == no_token
        return
    method = cls(resnet, names, config, template=TEMPLATE)
    v = method.encode_images(two_images().float())
    if not reads_places:
        torch.testing.assert_close(v, resnet.encode_images(two_images().float()), rtol=0, atol=1e-6)
    if name.startswith("tip_adapter"):
        method.fit_features(resnet.encode_images(two_images().float()), torch.arange(2))
    if method.learned():
        t = method.class_features(names, v)
        cross_entropy(method.logits(method.adapt(v), t), torch.arange(2)).backward()
        gradients = [p.grad for p in method.learned() if p.grad is not None]
        assert all(g.isfinite().all() for g in gradients)
        assert any(g.abs().sum() > 0 for g in gradients)


def test_a_resnet_has_nothing_to_enter(resnet: Backbone, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="the image tower is a ResNet, without tokens"):
        resnet.image_tower.embed(two_images())
    draw(tmp_path / "a.png")
    for name in ("cat", "desk"):
        draw(tmp_path / "data" / name / "1.png")
        draw(tmp_path / "data" / name / "2.png")
    done = vlprompt("train", "zero_shot", tmp_path / "data", "--backbone", resnet.name, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    done = vlprompt("explain", tmp_path / "run", tmp_path / "a.png", "--out", tmp_path / "a-out.png", "--json")
    assert done.code == 0, done.err
    told, (side, _) = json.loads(done.out), json.loads(done.out)["patches"]
    assert told["contribution"] is None
    assert len(told["relevance"]) == side**2


def test_relevance_of_a_resnet(resnet: Backbone) -> None:
    """Gradient × activation of the last feature map, by finite differences along each place's activations."""
    backbone = copy.deepcopy(resnet).to(dtype=torch.double)
    method, image = find_method("zero_shot")(backbone, ("cat", "desk")).eval(), two_images()[0].double()
    tower = backbone.image_tower
    found = relevance(method, image, class_index=0)
    last, seen = getattr(tower, f"layer{len(tower.config.stages)}"), list[torch.Tensor]()
    with torch.no_grad():
        hook = last.register_forward_hook(lambda layer, given, out: seen.append(out))
        method.predict(image[None], method.class_names)
        hook.remove()
        (x,), t = seen, method.class_features(method.class_names)
        logit = [backbone.logits(unit(tower.attnpool(x * (1 + s * mask))), t)[0, 0].item()
                 for mask in torch.eye(x[0, 0].numel(), dtype=x.dtype).view(-1, 1, 1, *x.shape[2:])
                 for s in (1e-4, -1e-4)]  # fmt: skip
    slopes = torch.tensor([(up - down) / 2e-4 for up, down in zip(logit[::2], logit[1::2], strict=True)]).clamp(min=0)
    expected = slopes / slopes.sum()
    torch.testing.assert_close(found.map.flatten(), expected, rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------- SigLIP in open_clip's layout


@cache
def siglip(act: str, text_act: str) -> SiglipModel:
    shape = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**shape, "vocab_size": 300, "max_position_embeddings": 24, "num_hidden_layers": 3}
    vision = {**shape, "image_size": 32, "patch_size": 8, "hidden_act": act}
    config = SiglipConfig(vision_config=vision, text_config={**text, "hidden_act": text_act})
    return randomise(SiglipModel(config))


def siglip_config(name: str, text_act: str) -> dict:
    text = {
        "context_length": 24, "vocab_size": 300, "width": 48, "heads": 4, "layers": 3, "mlp_ratio": 80 / 48,
        "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6},
        "hf_tokenizer_name": "timm/ViT-B-16-SigLIP", "tokenizer_kwargs": {"clean": "canonicalize"},
    }  # fmt: skip
    text |= {"act_kwargs": {"approximate": "tanh"}} if text_act == "gelu_pytorch_tanh" else {}
    vision = {"image_size": 32, "timm_model_name": name, "timm_model_pretrained": False}
    vision |= {"timm_pool": "map", "timm_proj": "none"}
    return {"embed_dim": 48, "custom_text": True, "init_logit_bias": -10, "vision_cfg": vision, "text_cfg": text}


def siglip_state(model: SiglipModel) -> dict[str, Tensor]:
    """A SiglipModel's tensors under timm's and open_clip's names."""
    state = model.state_dict()
    v, t, trunk, pool = "vision_model", "text_model", "visual.trunk", "visual.trunk.attn_pool"
    q, kv = state[f"{v}.head.attention.in_proj_weight"].split([48, 96])
    q_bias, kv_bias = state[f"{v}.head.attention.in_proj_bias"].split([48, 96])
    out = {
        f"{trunk}.pos_embed": state[f"{v}.embeddings.position_embedding.weight"][None],
        f"{pool}.latent": state[f"{v}.head.probe"],
        f"{pool}.q.weight": q, f"{pool}.q.bias": q_bias, f"{pool}.kv.weight": kv, f"{pool}.kv.bias": kv_bias,
        "text.token_embedding.weight": state[f"{t}.embeddings.token_embedding.weight"],
        "text.positional_embedding": state[f"{t}.embeddings.position_embedding.weight"],
        "logit_scale": state["logit_scale"], "logit_bias": state["logit_bias"],
    }  # fmt: skip
    pairs = {
        f"{trunk}.patch_embed.proj": f"{v}.embeddings.patch_embedding", f"{trunk}.norm": f"{v}.post_layernorm",
        f"{pool}.proj": f"{v}.head.attention.out_proj", f"{pool}.norm": f"{v}.head.layernorm",
        f"{pool}.mlp.fc1": f"{v}.head.mlp.fc1", f"{pool}.mlp.fc2": f"{v}.head.mlp.fc2",
        "text.ln_final": f"{t}.final_layer_norm", "text.text_projection": f"{t}.head",
    }  # fmt: skip
    for side, layers, block in ((v, 2, f"{trunk}.blocks"), (t, 3, "text.transformer.resblocks")):
        for i in range(layers):
            theirs, ours, image = f"{side}.encoder.layers.{i}", f"{block}.{i}", side == v
            names = (("norm1", "ln_1"), ("norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"))
            sources = ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")
            pairs |= {f"{ours}.{own[not image]}": f"{theirs}.{s}" for own, s in zip(names, sources, strict=True)}
            pairs[f"{ours}.attn.{'proj' if image else 'out_proj'}"] = f"{theirs}.self_attn.out_proj"
            for x in ("weight", "bias"):
                qkv = torch.cat([state[f"{theirs}.self_attn.{n}_proj.{x}"] for n in "qkv"])
                out[f"{ours}.attn.{f'qkv.{x}' if image else f'in_proj_{x}'}"] = qkv
    out |= {f"{ours}.{x}": state[f"{theirs}.{x}"] for ours, theirs in pairs.items() for x in ("weight", "bias")}
    return {k: x.detach().clone().contiguous() for k, x in out.items()}


def write_open_clip_siglip(folder: Path, config: dict, model: SiglipModel, tokenizer: Path) -> Path:
    write_open_clip(folder, config, siglip_state(model), {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def siglip_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_siglip(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in ("base", "giantopt"):
        monkeypatch.setitem(openai.TIMM_SIGLIP, size, (48, 2, 4, 80))


@pytest.mark.parametrize(
    ("name", "act"), [("vit_base_patch8_siglip_32", "gelu"), ("vit_giantopt_patch8_siglip_32", "gelu_pytorch_tanh")]
)
@pytest.mark.parametrize("text_act", ["gelu", "gelu_pytorch_tanh"])
def test_open_clip_siglip(tmp_path: Path, siglip_tokenizer: Path, name: str, act: str, text_act: str) -> None:
    """Which GELU the image tower has goes by timm's name, the text tower's by its configuration."""
    model, config = siglip(act, text_act), siglip_config(name, text_act)
    backbone = load_backbone(write_open_clip_siglip(tmp_path, config, model, siglip_tokenizer))
    tokens = {"eos_token": "</s>", "pad_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), **tokens)
    no_punctuation = str.maketrans("", "", string.punctuation)
    texts = [TEMPLATE.format(n).translate(no_punctuation).lower() for n in NAMES]
    ids = tokenizer(texts, padding="max_length", max_length=24, return_tensors="pt").input_ids
    check_parity(backbone, model, ids)


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        (
            "vision_cfg.timm_model_name",
            "vit_base_patch16_siglip_gap_224",
            "timm_model_name = vit_base_patch16_siglip_gap",
        ),
        ("vision_cfg.timm_model_name", "vit_huge_patch16_siglip_224", "timm_model_name = vit_huge_patch16_siglip_224"),
        ("vision_cfg.timm_pool", "avg", "vision_cfg with timm_pool = avg"),
        ("vision_cfg.timm_proj", "linear", "vision_cfg with timm_proj = linear"),
        ("text_cfg.act_kwargs", {"approximate": "x"}, "text_cfg with act_kwargs = {'approximate': 'x'}"),
        ("text_cfg.norm_kwargs", {"eps": 1e-5}, "text_cfg beside vit_base_patch8_siglip_32 that is not SigLIP's"),
        ("text_cfg.proj_bias", False, "text_cfg beside vit_base_patch8_siglip_32 that is not SigLIP's"),
        ("text_cfg.pool_type", "argmax", "text_cfg with pool_type = argmax"),
        ("text_cfg.tokenizer_kwargs", {"clean": "whitespace"}, "tokenizer_kwargs: clean = whitespace"),
        ("text_cfg.no_causal_mask", False, "text_cfg with"),
    ],
)
def test_open_clip_siglip_refused(tmp_path: Path, path: str, value: object, match: str) -> None:
    config = changed(siglip_config("vit_base_patch8_siglip_32", "gelu"), path, value)
    refused(str(write_open_clip(tmp_path, config)), match=match)


EVA = {"timm_model_name": "eva02_base_patch16_clip_224", "timm_pool": "token", "timm_proj": None, "image_size": 224}


@pytest.mark.parametrize(
    "name",
    ["eva02_base_patch16_clip_224", "eva_giant_patch14_224", "convnext_base", "vit_relpos_medium_patch16_cls_224"],
)
def test_other_towers_of_timm_are_refused_by_name(tmp_path: Path, name: str) -> None:
    """EVA02 turns its queries and gates its MLPs, which our blocks do not."""
    config = copy.deepcopy(OPEN_CLIP) | {"vision_cfg": {**EVA, "timm_model_name": name}, "custom_text": True}
    refused(str(write_open_clip(tmp_path, config)), match=f"open_clip vision_cfg with timm_model_name = {name}")
