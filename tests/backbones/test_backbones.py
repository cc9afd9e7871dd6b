"""Checkpoints of every supported format, with random weights, against the reference implementations."""

from __future__ import annotations

import copy
import gzip
import json
import re
import shutil
import sys
import warnings
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy, normalize
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizerFast,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.kit import SHARED
from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.convert import convert
from vlprompt.backbones.load import EMBEDDED, cpu_has, load_backbone
from vlprompt.backbones.tokenizer import load_clip_tokenizer
from vlprompt.backbones.towers import quick_gelu
from vlprompt.errors import BackboneError, DataError
from vlprompt.methods import find_method

GOLDEN = SHARED / "golden" / "backbone"
needs_shared = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs the shared golden backbone beside the repository")
TOLERANCE = 1e-6  # of normalised features; logits: times the scale
NAMES = [
    "cat",
    "forget-me-not",
    "Boeing 737-200",
    "猫",
    "кошка",
    "ruler (12 inch), seen from the side of a desk",
    "naïve",
]
TEMPLATE = "a photo of a {}."
STRINGS = [
    *NAMES,
    "",
    "   two  spaces\tand\na line  ",
    "it's they'll WE'VE I'm you'd isn't 'quoted'",
    "3.14159, 1,000,000 x2 a1b2",
    "!!! ??? ... --- #hash @at under_score a/b\\c <p>&amp;</p> $5 50%",
    "Ça décrit une forêt à l’été: œuvre, größe, İstanbul, ﬁne",
    "e\u0301 (two code points) é",
    "日本語の猫と 한국어 고양이 العربية हिन्दी ไทย",
    "😀 👩‍👩‍👧 ❤️ ½ ² ٣ Ⅻ",
    "a\u00a0b\u2003c\u200bd",
    "supercalifragilisticexpialidocious " * 3,
]

# ---------------------------------------------------------------- reference models, and writers of each format


@cache
def merges() -> tuple[str, ...]:
    """The first 5,848 merges of the embedded tokenizer; with all bytes, they make OpenAI's kind of vocabulary."""
    model = json.loads((EMBEDDED["mini"] / "tokenizer.json").read_text("utf-8"))["model"]
    return tuple(m if isinstance(m, str) else " ".join(m) for m in model["merges"][:5848])


def vocabulary(lines: tuple[str, ...]) -> dict[str, int]:
    """OpenAI's order of ids."""
    alphabet = list(bytes_to_unicode().values())
    ends = [a + "</w>" for a in alphabet]
    joined = [m.replace(" ", "") for m in lines]
    return {t: i for i, t in enumerate([*alphabet, *ends, *joined, "<|startoftext|>", "<|endoftext|>"])}


def write_tokenizer(folder: Path, form: str = "vocab.json", lines: tuple[str, ...] = ()) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = lines or merges()
    if form == "vocab.json":
        (folder / "vocab.json").write_text(json.dumps(vocabulary(lines)))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]), "utf-8")
    else:
        unused = ["not used"] * 3 if len(lines) > 40000 else []  # the real file goes on behind the merges in use
        with gzip.open(folder / "bpe_simple_vocab_16e6.txt.gz", "wt", encoding="utf-8") as file:
            file.write("\n".join(['"bpe_simple_vocab_16e6.txt#version: 0.2', *lines, *unused]))
    return folder


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter random, biases and LayerNorm too, and exact in fp16."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=generator) + ("norm" in name and name.endswith("weight")))
            p.copy_(p.half())
        model.logit_scale.fill_(4.60546875)  # e to this is 100.03
        if hasattr(model, "logit_bias"):
            model.logit_bias.fill_(-12.9296875)
    return model.eval()


@cache
def clip(act: str = "quick_gelu", heads: int = 2) -> CLIPModel:
    vocab = len(vocabulary(merges()))
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": heads}
    text = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": heads // 2}
    ids = {"vocab_size": vocab, "bos_token_id": vocab - 2, "eos_token_id": vocab - 1, "pad_token_id": vocab - 1}
    config = CLIPConfig(
        vision_config={**shape, "image_size": 32, "patch_size": 8, "hidden_act": act},
        text_config={**text, **ids, "max_position_embeddings": 40, "hidden_act": act},
        projection_dim=48,
    )
    return randomise(CLIPModel(config))


@cache
def siglip() -> SiglipModel:
    shape = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = SiglipConfig(
        vision_config={**shape, "image_size": 32, "patch_size": 8},
        text_config={**shape, "vocab_size": 300, "max_position_embeddings": 24, "num_hidden_layers": 3},
    )
    return randomise(SiglipModel(config))


def write_hf(folder: Path, model: CLIPModel | None = None, *, half: bool = False, shard: str = "1GB") -> Path:
    model = model or clip()
    (copy.deepcopy(model).half() if half else model).save_pretrained(folder, max_shard_size=shard)
    return write_tokenizer(folder)


def write_siglip(folder: Path) -> Path:
    """A SigLIP folder with a small lower-casing tokenizer whose end token is also its padding."""
    siglip().save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([TEMPLATE.format(n).lower() for n in NAMES], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": {"content": "</s>"}}))
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def openai_state(model: CLIPModel | None = None) -> dict[str, Tensor]:
    """A CLIPModel's tensors under the names of OpenAI's state dicts."""
    state = (model or clip()).state_dict()
    out = {
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T,
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "text_projection": state["text_projection.weight"].T,
        "logit_scale": state["logit_scale"],
    }
    parts = {"self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2"}
    parts |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for x in ("weight", "bias"):
        for ours, theirs in (("visual.ln_pre", "vision_model.pre_layrnorm"),
                             ("visual.ln_post", "vision_model.post_layernorm"),
                             ("ln_final", "text_model.final_layer_norm")):  # fmt: skip
            out[f"{ours}.{x}"] = state[f"{theirs}.{x}"]
        for ours, theirs, layers in (("visual.transformer", "vision_model", 3), ("transformer", "text_model", 2)):
            for i in range(layers):
                block, layer = f"{ours}.resblocks.{i}", f"{theirs}.encoder.layers.{i}"
                qkv = [state[f"{layer}.self_attn.{n}_proj.{x}"] for n in "qkv"]
                out[f"{block}.attn.in_proj_{x}"] = torch.cat(qkv)
                out |= {f"{block}.{o}.{x}": state[f"{layer}.{t}.{x}"] for t, o in parts.items()}
    return {k: v.detach().clone().contiguous() for k, v in out.items()}


def write_openai(folder: Path, state: dict[str, Tensor] | None = None) -> Path:
    """A file like OpenAI's, with the three numbers that are stored among its tensors."""
    numbers = {"input_resolution": 32, "context_length": 40, "vocab_size": len(vocabulary(merges()))}
    write_tokenizer(folder, "gz")
    save_file((state or openai_state()) | {k: torch.tensor(v) for k, v in numbers.items()}, folder / "clip.safetensors")
    return folder / "clip.safetensors"


OPEN_CLIP = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 128, "head_width": 32, "mlp_ratio": 2.0, "patch_size": 8},
    "text_cfg": {"context_length": 40, "vocab_size": 6362, "width": 64, "heads": 2, "layers": 2, "mlp_ratio": 2.5},
}
OPEN_CLIP_PREPROCESS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear"}


def changed(config: dict, path: str, value: object) -> dict:
    config = copy.deepcopy(config)
    *parents, key = path.split(".")
    inner = config
    for parent in parents:
        inner = inner[parent]
    inner[key] = value
    return config


def write_open_clip(
    folder: Path, config: dict = OPEN_CLIP, state: dict[str, Tensor] | None = None, preprocess: dict | None = None
) -> Path:
    write_tokenizer(folder)
    both = {"model_cfg": config, "preprocess_cfg": preprocess or {**OPEN_CLIP_PREPROCESS, "resize_mode": "squash"}}
    (folder / "open_clip_config.json").write_text(json.dumps(both))
    save_file(state or openai_state(clip("gelu", 4)), folder / "open_clip_model.safetensors")
    return folder


# ---------------------------------------------------------------------------------------------- comparisons


def images(n: int = 5, size: int = 32) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def pooled(output: object) -> Tensor:
    features = output if isinstance(output, Tensor) else output.pooler_output  # transformers 4 and 5
    return normalize(features.detach(), dim=-1)


def reference_ids(folder: Path, texts: list[str], length: int = 40) -> Tensor:
    tokenizer = CLIPTokenizerFast.from_pretrained(folder)
    return tokenizer(texts, padding="max_length", max_length=length, return_tensors="pt").input_ids


def close(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=0, atol=tolerance)


def check_parity(backbone: Backbone, model: CLIPModel | SiglipModel, ids: Tensor) -> None:
    """Features of images and of the classes' texts, and the logits of zero_shot, as the model computes them."""
    pixels = images(size=backbone.image_size)
    with torch.no_grad():
        v = pooled(model.get_image_features(pixel_values=pixels))
        t = pooled(model.get_text_features(input_ids=ids))
        logits = model(input_ids=ids, pixel_values=pixels).logits_per_image
    close(backbone.encode_images(pixels), v)
    close(backbone.encode_texts([TEMPLATE.format(n) for n in NAMES]), t)
    method = find_method("zero_shot")(backbone, NAMES, template=TEMPLATE)
    ours = method.logits(method.encode_images(pixels), method.class_features(NAMES))
    close(ours, logits, TOLERANCE * backbone.logit_scale)
    assert 99 < backbone.logit_scale < 101


def clip_ids(folder: Path) -> Tensor:
    return reference_ids(folder, [TEMPLATE.format(n) for n in NAMES])


def refused(*arguments: object, match: str) -> None:
    """One line that holds ``match``, literally."""
    with pytest.raises(BackboneError, match=re.escape(match)) as caught:
        load_backbone(*arguments)
    assert len(str(caught.value).splitlines()) == 1


@pytest.fixture
def no_open_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)


# ------------------------------------------------------------------------------------------ Hugging Face CLIP


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("storage", [{}, {"shard": "100KB"}, {"half": True}], ids=["single", "sharded", "fp16"])
def test_hugging_face_clip(tmp_path: Path, act: str, storage: dict) -> None:
    folder = write_hf(tmp_path, clip(act), **storage)
    assert (folder / "model.safetensors").is_file() == ("shard" not in storage)
    check_parity(load_backbone(str(folder)), clip(act), clip_ids(folder))


def test_quick_gelu_keeps_its_scaled_argument_alone() -> None:
    torch.manual_seed(0)
    x = (5 * torch.randn(1000, dtype=torch.double)).requires_grad_()
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = quick_gelu(x)
    defined = x * torch.sigmoid(1.702 * x)
    assert torch.equal(y, defined)
    weights = torch.randn_like(x)
    slopes = [torch.autograd.grad((weights * out).sum(), x)[0] for out in (y, defined)]
    torch.testing.assert_close(*slopes, rtol=0, atol=1e-12)
    assert len(kept) == 1
    assert torch.equal(kept[0], 1.702 * x)


@pytest.mark.parametrize("legacy", [False, True])
def test_config_with_omitted_defaults(tmp_path: Path, legacy: bool) -> None:
    """Hub files leave out what equals transformers' defaults; old ones have ``text_config_dict``, which wins."""
    folder = write_hf(tmp_path)
    full = json.loads((folder / "config.json").read_text())
    defaults = CLIPConfig().to_dict()
    config = {"model_type": "clip", "projection_dim": full["projection_dim"]}
    for tower in ("vision_config", "text_config"):
        lean = {k: v for k, v in full[tower].items() if v != defaults[tower].get(k)}
        assert "hidden_act" not in lean
        config |= {f"{tower}_dict": lean, tower: {"hidden_size": 1}} if legacy else {tower: lean}
    (folder / "config.json").write_text(json.dumps(config))
    check_parity(load_backbone(str(folder)), clip(), clip_ids(folder))


# --------------------------------------------------------------------------------------- Hugging Face SigLIP


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_siglip(tmp_path_factory.mktemp("siglip"))


@pytest.mark.parametrize("name", ["lasp", "clip_lora"])
def test_blocks_of_siglip_are_entered(siglip_folder: Path, name: str) -> None:
    """There is no class token, which methods that change the blocks' weights do without."""
    backbone, cls = load_backbone(str(siglip_folder)), find_method(name)
    method = cls(backbone, ["cat", "dog"], cls.Config())
    images = torch.randn(2, 3, backbone.image_size, backbone.image_size)
    assert method.train().encode_images(images).requires_grad


def test_hugging_face_siglip(siglip_folder: Path) -> None:
    backbone = load_backbone(str(siglip_folder))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(siglip_folder / "tokenizer.json"), eos_token="</s>", pad_token="</s>"
    )
    texts = [TEMPLATE.format(n) for n in NAMES]
    ids = tokenizer(texts, padding="max_length", max_length=24, return_tensors="pt").input_ids
    assert backbone.tokenize(texts) == ids.tolist()
    assert backbone.logit_bias == pytest.approx(-12.93, abs=1e-3)
    check_parity(backbone, siglip(), ids)


@pytest.mark.parametrize("processor", ["preprocessor_config.json", "processor_config.json"])
def test_siglip_preprocessing(siglip_folder: Path, tmp_path: Path, processor: str) -> None:
    """Squashed, mean and std one half; a processor saved by transformers 5 nests the settings."""
    folder = shutil.copytree(siglip_folder, tmp_path / "copy")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings |= {"resample": 2}  # not the default: it must be read
    (folder / "preprocessor_config.json").unlink()
    nested = {"image_processor": settings, "processor_class": "SiglipProcessor"}
    (folder / processor).write_text(json.dumps(settings if processor.startswith("pre") else nested))
    preprocess = load_backbone(str(folder)).preprocess
    assert (preprocess.resize, preprocess.interpolation) == ("squash", "bilinear")
    assert preprocess.mean == preprocess.std == (0.5, 0.5, 0.5)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 70, 3), np.uint8)
    resized = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR)
    expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255
    close(preprocess(Image.fromarray(pixels)), (expected - 0.5) / 0.5)


def test_methods_on_siglip(siglip_folder: Path) -> None:
    """CoOp learns, and starts as zero_shot where it starts from the same words; image prompts are refused."""
    backbone = load_backbone(str(siglip_folder))
    names = ["cat", "ruler", "desk"]
    cls = find_method("coop")
    n = len(backbone.tokenizer.words("a photo of a"))
    coop = cls(backbone, names, cls.Config(n_ctx=n, init="a photo of a"), template=TEMPLATE)
    zero_shot = find_method("zero_shot")(backbone, names, template=TEMPLATE)
    close(coop.class_features(names).detach(), zero_shot.class_features(names))
    v = coop.encode_images(images(3))
    cross_entropy(coop.logits(v, coop.class_features(names)), torch.arange(3)).backward()
    assert coop.context.vectors.grad.abs().sum() > 0
    for method in ("vpt", "maple"):
        with pytest.raises(BackboneError, match=re.escape(f"backbone '{siglip_folder}' has no class token")) as caught:
            find_method(method)(backbone, names)
        assert len(str(caught.value).splitlines()) == 1


# ------------------------------------------------------------------------------- OpenAI state dicts, tokenizers


def test_openai_state_dict(tmp_path: Path) -> None:
    backbone = load_backbone(str(write_openai(tmp_path)))
    check_parity(backbone, clip(), clip_ids(write_tokenizer(tmp_path / "reference")))
    assert backbone.image_tower.config.heads == 2
    assert backbone.preprocess.mean == pytest.approx((0.4814, 0.4578, 0.4082), abs=1e-4)


@pytest.mark.parametrize("form", ["vocab.json", "gz", "tokenizer.json"])
@pytest.mark.parametrize("source", ["mini", pytest.param("shared", marks=needs_shared)])
def test_token_ids(tmp_path: Path, source: str, form: str) -> None:
    """Ids of all forms of CLIP's tokenizer equal those of transformers, which puts the end token for the unknown."""
    lines, reference = merges(), tmp_path / "reference"
    if source == "shared":
        reference, lines = GOLDEN, tuple((GOLDEN / "merges.txt").read_text("utf-8").split("\n")[1:])
        lines = tuple(line for line in lines if line)
    else:
        write_tokenizer(reference)
    if form == "tokenizer.json":
        reference = reference if source == "shared" else EMBEDDED["mini"]
        (tmp_path / form).write_text((reference / form).read_text("utf-8"), "utf-8")
    else:
        write_tokenizer(tmp_path, form, lines)
    ours = load_clip_tokenizer(tmp_path, 200)
    theirs = CLIPTokenizerFast.from_pretrained(reference)
    assert ours.tokenizer.get_vocab_size() == len(theirs)
    assert source == "mini" or len(theirs) == 49408
    for text in STRINGS:
        (expected,) = theirs([text]).input_ids
        assert ours([text]) == [[*(i for i in expected[:-1] if i != theirs.eos_token_id), theirs.eos_token_id]], text


# ---------------------------------------------------------------------------------------------------- open_clip


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("custom_text", [False, True])
def test_open_clip_folder(tmp_path: Path, quick_gelu: bool, custom_text: bool) -> None:
    model = clip("quick_gelu" if quick_gelu else "gelu", 4)
    state, config = openai_state(model), copy.deepcopy(OPEN_CLIP)
    config |= {"quick_gelu": True} if quick_gelu else {}
    if custom_text:
        config |= {"custom_text": True}
        text = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
        state = {f"text.{k}" if k.startswith(text) else k: v for k, v in state.items()}
    folder = write_open_clip(tmp_path, config, state)
    backbone = load_backbone(str(folder))
    check_parity(backbone, model, clip_ids(folder))
    p = backbone.preprocess
    assert (p.mean, p.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert (p.resize, p.interpolation) == ("squash", "bilinear")


def test_open_clip_sigmoid_bias(tmp_path: Path) -> None:
    state = openai_state(clip("gelu", 4)) | {"logit_bias": torch.tensor([-10.0])}
    state["logit_scale"] = state["logit_scale"].reshape(1)
    folder = write_open_clip(tmp_path, {**OPEN_CLIP, "init_logit_bias": -10}, state)
    assert load_backbone(str(folder)).logit_bias == -10


def test_folder_with_both_configurations(tmp_path: Path) -> None:
    """Hub repositories often have both; the one whose safetensors are there is read."""
    folder = write_hf(write_open_clip(tmp_path), clip())
    assert load_backbone(str(folder)).image_tower.config.heads == 4  # open_clip's
    (folder / "open_clip_model.safetensors").rename(folder / "open_clip_pytorch_model.safetensors")
    assert load_backbone(str(folder)).image_tower.config.heads == 4
    (folder / "open_clip_pytorch_model.safetensors").unlink()
    assert load_backbone(str(folder)).image_tower.config.heads == 2  # transformers'


@pytest.fixture
def open_clip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """A stand-in with the functions of open_clip that are used, and its behaviour towards QuickGELU."""
    tags = {
        "tiny": {"openai": {"quick_gelu": True}, "laion": {"mean": (0,) * 3}},
        "tiny-quickgelu": {"openai": {"quick_gelu": True}},
    }
    tags["tower"] = {"timm": {"mean": (0,) * 3}}
    configs = {"tiny": OPEN_CLIP, "tiny-quickgelu": {**OPEN_CLIP, "quick_gelu": True}}
    configs["tower"] = changed(OPEN_CLIP, "vision_cfg.timm_model_name", "vit_base_mci_224")
    module = ModuleType("open_clip")
    module.__file__ = str(write_tokenizer(tmp_path / "open_clip", "gz") / "__init__.py")
    module.__spec__ = ModuleSpec("open_clip", None, origin=module.__file__)
    module.list_models = lambda: list(configs)
    module.get_model_config = lambda name: copy.deepcopy(configs[name])
    module.get_pretrained_cfg = lambda model, tag: tags[model].get(tag, {})
    module.list_pretrained_tags_by_model = lambda model: list(tags[model])

    def create_model(model_name: str, pretrained: str | None = None, force_quick_gelu: bool = False) -> object:
        if pretrained == "laion" and module.offline:
            raise RuntimeError("Failed to download weights for tag 'laion': no network\nmore lines")
        quick = configs[model_name].get("quick_gelu", False) or force_quick_gelu
        assert quick == (pretrained == "openai"), "open_clip warns of a QuickGELU mismatch"
        state = openai_state(clip("quick_gelu" if quick else "gelu", 4))
        return SimpleNamespace(state_dict=lambda: state)

    module.create_model, module.offline = create_model, False
    module.get_model_preprocess_cfg = lambda model: {**OPEN_CLIP_PREPROCESS, "size": 32, "resize_mode": "shortest"}
    monkeypatch.setitem(sys.modules, "open_clip", module)
    monkeypatch.setattr("vlprompt.backbones.load.CLIP_VOCAB_SIZE", len(vocabulary(merges())))
    return module


@pytest.mark.parametrize(
    ("name", "act"), [("tiny/laion", "gelu"), ("tiny/openai", "quick_gelu"), ("tiny-quickgelu/openai", "quick_gelu")]
)
def test_open_clip_library(open_clip: ModuleType, tmp_path: Path, name: str, act: str) -> None:
    """The activation is that of the weights, also where the model's name lacks "-quickgelu"."""
    backbone = load_backbone(f"open_clip:{name}")
    check_parity(backbone, clip(act, 4), clip_ids(write_tokenizer(tmp_path / "reference")))
    assert backbone.preprocess.resize == "shortest"


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("tiny", "unknown open_clip model 'open_clip:tiny' (written open_clip:MODEL/TAG)"),
        ("big/laion", "unknown open_clip model 'open_clip:big/laion'"),
        (
            "tiny/laon",
            "unknown open_clip tag of tiny: 'laon': did you mean 'laion'? (allowed: laion, openai)",
        ),
        ("tiny/laion", "open_clip cannot load 'open_clip:tiny/laion': Failed to download"),
        ("tower/timm", "open_clip vision_cfg with timm_model_name = vit_base_mci_224"),
    ],
)
def test_open_clip_library_errors(open_clip: ModuleType, name: str, match: str) -> None:
    open_clip.offline = True
    refused(f"open_clip:{name}", match=match)


def test_open_clip_library_with_another_tokenizer(open_clip: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlprompt.backbones.load.CLIP_VOCAB_SIZE", 49408)
    refused("open_clip:tiny/laion", match="open_clip:tiny/laion has 6362 tokens (allowed: CLIP's 49408)")


def test_open_clip_absent(no_open_clip: None) -> None:
    refused("open_clip:ViT-B-32/openai", match="needs open_clip: pip install 'vlprompt[open_clip]'")


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        ("vision_cfg.timm_model_name", "vit_base_mci_224", "vision_cfg with timm_model_name = vit_base_mci_224"),
        ("vision_cfg.layers", [3, 4, 6, 3], 'does not fit its own configuration: Missing key(s) in state_dict: "bn1'),
        ("vision_cfg.pool_type", "avg", "vision_cfg with pool_type = avg"),
        ("vision_cfg.ls_init_value", 1e-4, "vision_cfg with ls_init_value = 0.0001"),
        ("vision_cfg.norm_kwargs", {"eps": 1e-6}, "vision_cfg with norm_kwargs = {'eps': 1e-06}"),
        ("text_cfg.act_kwargs", {"approximate": "tanh"}, "text_cfg with act_kwargs"),
        ("text_cfg.hf_model_name", "roberta-base", "text_cfg with hf_model_name = roberta-base"),
        ("text_cfg.pool_type", "eos", "text_cfg with pool_type = eos"),
        ("text_cfg.proj_type", "none", "text_cfg with proj_type = none"),
        ("text_cfg.no_causal_mask", True, "text_cfg with no_causal_mask = True"),
        ("multimodal_cfg", {"width": 64}, "model_cfg with multimodal_cfg"),
        ("text_cfg.width", 96, "does not fit its own configuration: size mismatch for positions"),
    ],
)
def test_open_clip_architectures_refused(tmp_path: Path, path: str, value: object, match: str) -> None:
    refused(str(write_open_clip(tmp_path, changed(OPEN_CLIP, path, value))), match=match)


def test_open_clip_config_without_model(tmp_path: Path) -> None:
    refused(str(write_open_clip(tmp_path, {"vision_cfg": {}})), match="open_clip model_cfg lacks 'embed_dim'")
    refused(
        str(write_open_clip(tmp_path, preprocess={"resize_mode": "longest"})), match="open_clip resize_mode 'longest'"
    )


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("model_type", "align", "unsupported architecture 'align' (allowed: clip, siglip)"),
        ("model_type", None, "unsupported architecture 'CLIPModel' (allowed: clip, siglip)"),
        ("vision_config.hidden_act", "selu", "unsupported activation 'selu' (allowed: quick_gelu, gelu"),
        ("vision_config.num_hidden_layers", 4, "lacks tensor 'vision_model.encoder.layers.3.self_attn.q_proj.weight'"),
        ("text_config.num_hidden_layers", 1, "'text_model.encoder.layers.1"),
        ("vision_config.patch_size", 16, "size mismatch for positions"),
        ("text_config.vocab_size", 6000, "size mismatch for token_embedding.weight"),
    ],
)
def test_hugging_face_configurations_refused(tmp_path: Path, key: str, value: object, match: str) -> None:
    file = write_hf(tmp_path) / "config.json"
    match = match.replace("'text_model", "tensors of another architecture: text_model")
    file.write_text(json.dumps(changed(json.loads(file.read_text()), key, value)))
    refused(str(tmp_path), match=match)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        ({"text_projection.weight": None}, "checkpoint lacks tensor 'text_projection.weight'"),
        ({"a.b": 1, "c": 1}, "checkpoint has tensors of another architecture: a.b, c"),
        (dict.fromkeys("vwxyz", 1), "checkpoint has tensors of another architecture: v, w, x and 2 more"),
        ({"visual_projection.weight": (48, 127)}, "size mismatch for projection.weight"),
        (
            {"text_model.encoder.layers.0.self_attn.k_proj.weight": (64, 63)},
            "text_model.encoder.layers.0.self_attn: weights of q_proj, k_proj and v_proj differ in shape",
        ),
    ],
)
def test_tensors_refused(tmp_path: Path, edit: dict, match: str) -> None:
    file = write_hf(tmp_path) / "model.safetensors"
    state = load_file(file) | {k: torch.zeros(shape) for k, shape in edit.items() if shape}
    save_file({k: v for k, v in state.items() if edit.get(k, 1)}, file)
    refused(str(tmp_path), match=match)


def test_siglip_without_head_refused(siglip_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(siglip_folder, tmp_path / "copy")
    config = changed(json.loads((folder / "config.json").read_text()), "vision_config.vision_use_head", False)
    (folder / "config.json").write_text(json.dumps(config))
    refused(str(folder), match="unsupported architecture 'siglip' without its pooling head")


@pytest.mark.parametrize(
    ("remove", "add", "match"),
    [
        ("visual.proj", "visual.attnpool.c_proj.weight", "lacks tensor 'visual.attnpool.positional_embedding'"),
        ("visual.conv1.weight", "x", "checkpoint lacks tensor 'visual.conv1.weight'"),
        ("token_embedding.weight", None, "checkpoint lacks tensor 'token_embedding.weight'"),
        ("ln_final.bias", None, "checkpoint lacks tensor 'ln_final.bias'"),
        (None, "visual.extra", "checkpoint has tensors of another architecture: visual.extra"),
    ],
)
def test_openai_files_refused(tmp_path: Path, remove: str | None, add: str | None, match: str) -> None:
    state = {k: v for k, v in openai_state().items() if k != remove} | ({add: torch.zeros(1)} if add else {})
    refused(str(write_openai(tmp_path, state)), match=match)


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    file = write_hf(tmp_path) / "model.safetensors"
    content = file.read_bytes()
    for part in (content[:-100], content[:50], b""):
        file.write_bytes(part)
        refused(str(tmp_path), match=f"cannot read {file}: ")
    file.rename(tmp_path / "model.pt")
    refused(str(tmp_path), match=f"no model.safetensors in {tmp_path}: convert older weights first")
    refused(str(tmp_path / "model.pt"), match="model.pt is not a .safetensors file: convert it first: vlprompt convert")
    write_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    refused(str(tmp_path), match=f"cannot read {tmp_path / 'config.json'}: ")
    (tmp_path / "config.json").unlink()
    refused(str(tmp_path), match=f"no backbone in {tmp_path}: needs config.json or open_clip_config.json")


def test_missing_shard(tmp_path: Path) -> None:
    write_hf(tmp_path, shard="100KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[0]
    shard.unlink()
    refused(str(tmp_path), match=f"cannot read {shard}: ")


def test_names_and_precision() -> None:
    refused("nothing", match="no backbone 'nothing' (allowed: mini, a folder or .safetensors file,")
    refused("mini", "cpu", "fp8", match="unknown precision 'fp8' (allowed: fp32, bf16, fp16)")
    refused("mini", "cpu:nowhere", match="cannot use device 'cpu:nowhere': ")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_precision_that_the_processor_lacks(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlprompt.backbones.load.cpu_has", lambda asked: asked != precision)
    with pytest.warns(UserWarning, match=f"^this processor has no instructions for {precision}: it takes several"):
        load_backbone("mini", precision=precision)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_backbone("mini")
        monkeypatch.setattr("vlprompt.backbones.load.cpu_has", lambda asked: True)
        load_backbone("mini", precision=precision)


def test_what_the_processor_has() -> None:
    assert cpu_has("fp32")
    assert cpu_has("bf16") == torch.ops.mkldnn._is_mkldnn_bf16_supported()


def test_a_classifier_is_no_backbone() -> None:
    refused("efficientnet-lite0", match="'efficientnet-lite0' is a classifier without a text tower: it can teach")


def test_hub_offline() -> None:
    import huggingface_hub.constants

    if not huggingface_hub.constants.HF_HUB_OFFLINE:
        pytest.skip("would use the network: HF_HUB_OFFLINE=0 is set")
    refused("nobody/no-such-model", match="cannot fetch 'nobody/no-such-model' from the hub: ")


def test_tokenizer_errors(tmp_path: Path, no_open_clip: None) -> None:
    folder = write_open_clip(tmp_path)
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()
    missing = f"no tokenizer beside the weights in {folder} (put tokenizer.json, vocab.json + merges.txt or bpe_simple"
    refused(str(folder), match=missing)
    refused(str(folder), match="its 6362 tokens are not CLIP's 49408")
    Tokenizer(models.BPE()).save(str(folder / "tokenizer.json"))
    refused(str(folder), match="has no <|startoftext|> and <|endoftext|>: not a CLIP tokenizer")
    (folder / "tokenizer.json").write_text("{}")
    refused(str(folder), match=f"cannot read {folder / 'tokenizer.json'}: ")
    (folder / "tokenizer.json").unlink()
    write_tokenizer(folder, lines=(*merges(), "zz zz"))
    refused(str(folder), match="has token id 6362; its text tower knows 6362 tokens")


# --------------------------------------------------------------------------------- properties of a loaded backbone


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_mini_is_frozen(precision: str) -> None:
    backbone = load_backbone("mini", precision=precision)
    assert backbone.image_size == 64
    assert backbone.fingerprint == load_backbone("mini").fingerprint
    for tower in (backbone.image_tower, backbone.text_tower):
        assert not any(m.training for m in tower.modules())
        for p in tower.parameters():
            assert not p.requires_grad
            assert p.dtype == backbone.dtype


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 1.5e-2), ("fp16", 2e-3)])
def test_low_precision(tmp_path: Path, precision: str, tolerance: float) -> None:
    """Features within a few roundings of fp32's; prompts stay fp32 and so do their gradients."""
    folder = write_hf(tmp_path)
    full, low = load_backbone(str(folder)), load_backbone(str(folder), precision=precision)
    close(low.encode_images(images()), full.encode_images(images()), tolerance)
    close(low.encode_texts(NAMES), full.encode_texts(NAMES), tolerance)
    assert low.encode_texts(NAMES).dtype == low.encode_images(images()).dtype == torch.float32
    for name, settings in (("coop", {"n_ctx": 4}), ("maple", {"depth": 2})):
        cls, features = find_method(name), []
        for backbone in (full, low):
            torch.manual_seed(0)
            method = cls(backbone, NAMES[:3], cls.Config(**settings))
            v, t = method.encode_images(images(3)), method.class_features(NAMES[:3])
            cross_entropy(method.logits(v, t), torch.arange(3)).backward()
            features.append(torch.cat([v, t]).detach())
            for p in method.parameters():
                assert p.dtype == p.grad.dtype == torch.float32
                assert p.grad.isfinite().all()
                assert p.grad.abs().sum() > 0
        close(features[1], features[0], tolerance)


def test_fingerprint(tmp_path: Path) -> None:
    """The same for the same weights in other formats and precisions; another for one changed weight."""
    stored = load_backbone(str(write_hf(tmp_path / "half", half=True))).fingerprint
    assert load_backbone(str(write_openai(tmp_path / "openai")), precision="bf16").fingerprint == stored
    state = openai_state()
    state["logit_scale"].fill_(2.6592)  # not exact in fp16
    half = {k: v.half() for k, v in state.items()}
    scaled = [load_backbone(str(write_openai(tmp_path / x, s))).fingerprint for x, s in (("s", state), ("h", half))]
    assert scaled[0] == scaled[1] != stored
    state = openai_state()
    state["ln_final.bias"][5] += 0.01
    assert load_backbone(str(write_openai(tmp_path / "changed", state))).fingerprint != stored
    config = write_hf(tmp_path / "gelu") / "config.json"
    config.write_text(json.dumps(changed(json.loads(config.read_text()), "text_config.hidden_act", "gelu")))
    assert load_backbone(str(tmp_path / "gelu")).fingerprint != stored


def test_texts_are_a_list() -> None:
    backbone = load_backbone("mini")
    with pytest.raises(DataError, match=r"^texts are a list: put the one text into brackets, \['cat'\]$"):
        backbone.encode_texts("cat")
    assert backbone.encode_texts([]).shape == (0, backbone.embed_dim)


def test_texts_are_remembered() -> None:
    backbone, calls = load_backbone("mini"), []
    backbone.text_tower.register_forward_hook(lambda *_: calls.append(1))
    first = backbone.encode_texts(["cat", "dog", "cat"])
    assert len(calls) == 1
    assert torch.equal(first[0], first[2])
    assert torch.equal(backbone.encode_texts(["dog", "cat"]), first[[1, 0]])
    assert len(calls) == 1
    backbone.encode_texts(["dog", "bird"])
    assert len(calls) == 2


def test_too_long_text_names_the_class() -> None:
    backbone = load_backbone("mini")
    with pytest.raises(DataError, match=r"text of class 'tree tree .*…' has \d+ tokens; .* at most 32"):
        backbone.encode_texts(["tree " * 60])
    assert backbone.encode_texts([" ".join(["tree"] * 30)]).shape == (1, backbone.embed_dim)


def test_licence_comes_from_the_model_card(tmp_path: Path) -> None:
    folder = write_hf(tmp_path)
    assert load_backbone(str(folder)).licence is None
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [x]\n---\n# Model\n")
    assert load_backbone(str(folder)).licence == "mit"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-3), ("bf16", 3e-2), ("fp16", 4e-3)])
def test_cuda(precision: str, tolerance: float) -> None:
    """As on the CPU (PyTorch lets convolutions use TF32 in fp32); prompts there get fp32 gradients."""
    cpu, cuda = load_backbone("mini"), load_backbone("mini", "cuda", precision)
    assert cuda.device.type == "cuda"
    v = cuda.encode_images(images(size=64))
    close(v.cpu(), cpu.encode_images(images(size=64)), tolerance)
    close(cuda.encode_texts(["cat", "dog"]).cpu(), cpu.encode_texts(["cat", "dog"]), tolerance)
    coop = find_method("coop")(cuda, ["cat", "dog"]).to("cuda")
    cross_entropy(coop.logits(v, coop.class_features(["cat", "dog"])), torch.ones(5).long().cuda()).backward()
    assert coop.context.vectors.grad.dtype == torch.float32
    assert coop.context.vectors.grad.abs().sum() > 0


# ------------------------------------------------------------------------------------------ the golden backbone


@needs_shared
def test_golden_backbone() -> None:
    """The real vocabulary: ids and features of the class names in the golden cases, as transformers has them."""
    names: dict[str, None] = {}
    for file in sorted((SHARED / "golden" / "cases").glob("*/*.json")):
        info = json.loads(file.read_text("utf-8"))
        names |= dict.fromkeys([*(info.get("classnames") or ()), *(info.get("novel_classnames") or ())])
    texts = [TEMPLATE.format(n.replace("_", " ")) for n in names]
    assert len(texts) > 5
    backbone, model = load_backbone(str(GOLDEN)), CLIPModel.from_pretrained(GOLDEN, dtype=torch.float32).eval()
    ids = reference_ids(GOLDEN, texts, 77)
    end = backbone.tokenizer.end[0]
    assert backbone.tokenize(texts) == [row[: row.index(end) + 1] for row in ids.tolist()]
    close(backbone.encode_texts(texts), pooled(model.get_text_features(input_ids=ids)))
    close(backbone.encode_images(images()), pooled(model.get_image_features(pixel_values=images())))


# ------------------------------------------------------------------------------------------- converting old files


class Payload:
    """An object whose unpickling would run code."""

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return Path.touch, (Path("code-ran"),)


def test_convert_writes_the_tensors(tmp_path: Path) -> None:
    weight = torch.randn(3, 2)
    torch.save({"epoch": 3, "state_dict": {"module.a": weight, "module.b": weight.T, "n": 1}}, tmp_path / "old.pt")
    assert convert(tmp_path / "old.pt", tmp_path / "new" / "model.safetensors") == 2
    state = load_file(tmp_path / "new" / "model.safetensors")
    assert torch.equal(state["a"], weight)
    assert torch.equal(state["b"], weight.T)


def test_convert_refuses_anything_but_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), "script.pt")
    torch.save({"w": Payload()}, "object.pt")
    torch.save([1, 2], "list.pt")
    Path("damaged.pt").write_text("hi")
    for file, reason in {
        "script.pt": "is a TorchScript archive",
        "object.pt": "holds objects beside tensors",
        "list.pt": "holds no tensors by name",
        "damaged.pt": "cannot read damaged.pt",
        "absent.pt": "absent.pt does not exist",
    }.items():
        with pytest.raises(BackboneError, match=reason) as caught:
            convert(Path(file), Path("out.safetensors"))
        assert "\n" not in str(caught.value)
    assert not Path("out.safetensors").exists()
    assert not Path("code-ran").exists()
