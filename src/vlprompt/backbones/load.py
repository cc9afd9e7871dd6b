"""``load_backbone``: the embedded model, a folder or file in any supported format, or a hub id."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.formats import State, Weights, read_hf, read_open_clip, read_openai
from vlprompt.backbones.lite0 import NAME as LITE0
from vlprompt.backbones.names import may_be_hub_id
from vlprompt.backbones.tokenizer import FILES as TOKENIZER_FILES
from vlprompt.backbones.tokenizer import TextTokenizer, load_clip_tokenizer, load_siglip_tokenizer
from vlprompt.backbones.towers import ImageTower, TextTower
from vlprompt.data.images import Preprocess
from vlprompt.errors import BackboneError, first_line, unknown

EMBEDDED = {"mini": Path(__file__).parent / "mini"}
"""Backbones that come with the package."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP_VOCAB_SIZE = 49408
CLIP_TOKENIZER_SOURCE = "openai/clip-vit-base-patch32"  # the vocabulary is the same for all of OpenAI's models
OPEN_CLIP_STEMS = ("open_clip_model", "open_clip_pytorch_model")
HUB_FILES = ["*.json", "*.safetensors", "merges.txt", "README.md"]


def load_backbone(
    name: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    precision: str = "fp32",
) -> Backbone:
    """Load a frozen vision-language model.

    ``name`` is ``mini`` (embedded), a folder or a ``.safetensors`` file, a hub
    id such as ``openai/clip-vit-base-patch16``, or ``open_clip:MODEL/TAG``. Folders are Hugging Face CLIP or SigLIP, or
    open_clip's (``open_clip_config.json``); a file is an OpenAI state dict.

    Raises BackboneError if nothing is found there, if the architecture is not supported, or if tensors are
    missing, left over or of another shape.
    """
    if precision not in DTYPES:
        raise BackboneError(f"unknown precision '{precision}' (allowed: {', '.join(DTYPES)})")
    name = os.fspath(name)
    path = EMBEDDED.get(name, Path(name).expanduser())
    if name.startswith("open_clip:"):
        backbone = _from_open_clip_library(name)
    elif path.is_dir():
        backbone = _from_folder(name, path)
    elif path.is_file():
        backbone = _from_file(name, path)
    elif may_be_hub_id(name):
        backbone = _from_folder(name, _download(name, HUB_FILES))
    elif name == LITE0:
        raise BackboneError(f"'{name}' is a classifier without a text tower: it can teach (--teacher), and no more")
    else:
        near = get_close_matches(name, [*EMBEDDED, LITE0], n=1, cutoff=0.5)
        guess = f": did you mean '{near[0]}'?" if near else ""
        raise BackboneError(
            f"no backbone '{name}'{guess} (allowed: {', '.join(EMBEDDED)}, a folder or .safetensors file, "
            "a hub id like openai/clip-vit-base-patch16, or open_clip:MODEL/TAG)"
        )
    try:
        return backbone.to(device, DTYPES[precision])
    except (RuntimeError, AssertionError) as error:
        raise BackboneError(f"cannot use device '{device}': {first_line(error)}") from None


def _from_folder(name: str, folder: Path) -> Backbone:
    # Many repositories hold both configurations, but safetensors of one of them only.
    stem = next((s for s in OPEN_CLIP_STEMS if (folder / f"{s}.safetensors").is_file()), None)
    if (folder / "open_clip_config.json").is_file() and (stem or not (folder / "config.json").is_file()):
        config = _read_json(folder / "open_clip_config.json")
        weights = read_open_clip(config.get("model_cfg", {}), _read_state(folder, stem or OPEN_CLIP_STEMS[0]))
        preprocess = _open_clip_preprocess(weights, config.get("preprocess_cfg", {}))
        return _assemble(name, weights, preprocess, _clip_tokenizer(folder, weights), _licence(folder))
    if (folder / "config.json").is_file():
        config = _read_json(folder / "config.json")
        weights = read_hf(config, _read_state(folder, "model"))
        preprocess = _hf_preprocess(folder, weights)
        reader = load_clip_tokenizer if weights.text.causal else load_siglip_tokenizer
        return _assemble(name, weights, preprocess, reader(folder, weights.text.context_length), _licence(folder))
    raise BackboneError(f"no backbone in {folder}: needs config.json or open_clip_config.json")


def _from_file(name: str, file: Path) -> Backbone:
    state = _read_safetensors(file)
    if "visual.conv1.weight" not in state or "visual.proj" not in state:
        kind = "a CLIP ResNet" if "visual.attnpool.c_proj.weight" in state else "no OpenAI CLIP state dict"
        raise BackboneError(f"unsupported architecture: {file} is {kind} (allowed: vision transformers)")
    weights = read_openai(state)
    size = weights.image.image_size
    return _assemble(name, weights, Preprocess(size, CLIP_MEAN, CLIP_STD), _clip_tokenizer(file.parent, weights))


def _from_open_clip_library(name: str) -> Backbone:
    """``open_clip:MODEL/TAG``: the library fetches the weights, our towers run them."""
    model_name, _, tag = name.removeprefix("open_clip:").partition("/")
    if find_spec("open_clip") is None:
        raise BackboneError(f"'{name}' needs open_clip: pip install 'vlprompt[open_clip]'")
    try:
        import open_clip
    except ImportError as error:
        raise BackboneError(f"'{name}' needs open_clip, which cannot be imported: {error}") from None

    if not tag or model_name not in open_clip.list_models():
        raise BackboneError(f"unknown open_clip model '{name}' (written open_clip:MODEL/TAG)")
    trained = open_clip.get_pretrained_cfg(model_name, tag)
    if not trained:
        tags = open_clip.list_pretrained_tags_by_model(model_name)
        raise BackboneError(unknown(f"open_clip tag of {model_name}:", tag, tags))
    config = open_clip.get_model_config(model_name)
    # open_clip takes the activation from the model's name and only warns where the weights had another one.
    quick_gelu = bool(config.get("quick_gelu") or trained.get("quick_gelu") or tag == "openai")
    try:
        model = open_clip.create_model(model_name, pretrained=tag, force_quick_gelu=quick_gelu)
    except Exception as error:  # downloads fail in many ways
        raise BackboneError(f"open_clip cannot load '{name}': {first_line(error)}") from None
    weights = read_open_clip({**config, "quick_gelu": quick_gelu}, model.state_dict())
    if weights.text.vocab_size != CLIP_VOCAB_SIZE:
        raise BackboneError(
            f"unsupported architecture: {name} has {weights.text.vocab_size} tokens (allowed: CLIP's {CLIP_VOCAB_SIZE})"
        )
    preprocess = _open_clip_preprocess(weights, open_clip.get_model_preprocess_cfg(model))
    return _assemble(name, weights, preprocess, _clip_tokenizer(Path(open_clip.__file__).parent, weights))


def _assemble(
    name: str, weights: Weights, preprocess: Preprocess, tokenizer: TextTokenizer, licence: str | None = None
) -> Backbone:
    with torch.device("meta"):  # no time spent on initial values that the checkpoint overwrites
        image_tower, text_tower = ImageTower(weights.image), TextTower(weights.text)
    for tower, state in ((image_tower, weights.image_state), (text_tower, weights.text_state)):
        try:
            tower.load_state_dict({k: v.float().contiguous() for k, v in state.items()}, assign=True)
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise BackboneError(f"checkpoint '{name}' does not fit its own configuration: {reason}") from None
    if (last := max((*tokenizer.start, *tokenizer.end), default=0)) >= weights.text.vocab_size:
        raise BackboneError(
            f"the tokenizer of '{name}' has token id {last}; its text tower knows {weights.text.vocab_size} tokens"
        )
    return Backbone(
        name, image_tower, text_tower, tokenizer, preprocess, weights.logit_scale, weights.logit_bias, licence
    )


def _hf_preprocess(folder: Path, weights: Weights) -> Preprocess:
    """From ``preprocessor_config.json``; without one, what CLIP (or SigLIP) was trained with.

    A processor saved by transformers 5 writes the same settings into ``processor_config.json``.
    """
    clip = weights.image.pool == "cls"
    file, whole = folder / "preprocessor_config.json", folder / "processor_config.json"
    settings = _read_json(file) if file.is_file() else {}
    if not settings and whole.is_file():
        file, settings = whole, _read_json(whole).get("image_processor", {})
    resample = settings.get("resample", 3)
    if resample not in (2, 3):
        raise BackboneError(f"{file}: resample = {resample} (allowed: 2 bilinear, 3 bicubic)")
    return Preprocess(
        weights.image.image_size,
        tuple(settings.get("image_mean", CLIP_MEAN if clip else (0.5,) * 3)),
        tuple(settings.get("image_std", CLIP_STD if clip else (0.5,) * 3)),
        resize="shortest" if settings.get("do_center_crop", clip) else "squash",
        interpolation="bicubic" if resample == 3 else "bilinear",
    )


def _open_clip_preprocess(weights: Weights, settings: Mapping[str, Any]) -> Preprocess:
    resize = settings.get("resize_mode", "shortest")
    if resize not in ("shortest", "squash"):
        raise BackboneError(f"unsupported open_clip resize_mode '{resize}'")
    return Preprocess(
        weights.image.image_size,
        tuple(settings.get("mean", CLIP_MEAN)),
        tuple(settings.get("std", CLIP_STD)),
        resize=resize,
        interpolation=settings.get("interpolation", "bicubic"),
    )


def _clip_tokenizer(folder: Path, weights: Weights) -> TextTokenizer:
    """The tokenizer beside the weights; else, for CLIP's own vocabulary, open_clip's copy or the hub's."""
    if any((folder / f).is_file() for f in TOKENIZER_FILES):
        return load_clip_tokenizer(folder, weights.text.context_length)
    missing = (
        f"no tokenizer beside the weights in {folder} (put tokenizer.json, vocab.json + merges.txt or "
        f"{TOKENIZER_FILES[-1]} there)"
    )
    if weights.text.vocab_size != CLIP_VOCAB_SIZE:
        raise BackboneError(f"{missing}; its {weights.text.vocab_size} tokens are not CLIP's {CLIP_VOCAB_SIZE}")
    if (spec := find_spec("open_clip")) and spec.origin and (Path(spec.origin).parent / TOKENIZER_FILES[-1]).is_file():
        return load_clip_tokenizer(Path(spec.origin).parent, weights.text.context_length)
    try:
        place = _download(CLIP_TOKENIZER_SOURCE, ["tokenizer.json"])
    except BackboneError as error:
        raise BackboneError(f"{missing}; {error}") from None
    return load_clip_tokenizer(place, weights.text.context_length)


def _download(repo: str, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=files))
    except Exception as error:  # the library lets errors of several network libraries through
        raise BackboneError(f"cannot fetch '{repo}' from the hub: {first_line(error)}") from None


def _read_state(folder: Path, stem: str) -> State:
    """All tensors of a folder, in one file or in shards."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return _read_safetensors(single)
    if index.is_file():
        state: State = {}
        for part in sorted(set(_read_json(index).get("weight_map", {}).values())):
            state |= _read_safetensors(folder / Path(part).name)
        return state
    old = next(folder.glob("*.bin"), None)
    file = old or "pytorch_model.bin"
    fetch = "" if old else f" (if its weights come as {file}, fetch that too)"
    raise BackboneError(
        f"no {stem}.safetensors in {folder}: convert older weights first{fetch}: vlprompt convert {file} {single}"
    )


def _read_safetensors(file: Path) -> State:
    if file.suffix != ".safetensors":
        raise BackboneError(
            f"{file} is not a .safetensors file: convert it first: "
            f"vlprompt convert {file} {file.with_suffix('.safetensors')}"
        )
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise BackboneError(f"cannot read {file}: {error}") from None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise BackboneError(f"cannot read {file}: {error}") from None


def _licence(folder: Path) -> str | None:
    """The licence that the model card's head names."""
    card = folder / "README.md"
    lines = card.read_text("utf-8", errors="replace").splitlines() if card.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines[:40] if line.startswith("license:")), None)
