"""``load_backbone``: the embedded model, a folder or file in any supported format, or a hub id."""

from __future__ import annotations

import os
import warnings
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

import torch

from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.convert import OPENAI_NUMBERS, State, parts, read_json, read_weights
from vlprompt.backbones.formats import Layout, hf_layout
from vlprompt.backbones.hub import BESIDE, HF_CONFIG, OPEN_CLIP_CONFIG, Found, choose, download, list_files
from vlprompt.backbones.lite0 import NAME as LITE0
from vlprompt.backbones.names import OPENAI, hub_id
from vlprompt.backbones.openai import open_clip_layout, openai_layout, shows_openai
from vlprompt.backbones.processors import hf_preprocess, open_clip_preprocess
from vlprompt.backbones.resnet import ResNetTower
from vlprompt.backbones.tokenizer import FILES as TOKENIZER_FILES
from vlprompt.backbones.tokenizer import TextTokenizer, load_clip_tokenizer, load_siglip_tokenizer
from vlprompt.backbones.towers import ImageTower, TextTower
from vlprompt.data.images import Preprocess
from vlprompt.errors import BackboneError, first_line, one_line, unknown

EMBEDDED = {"mini": Path(__file__).parent / "mini"}
"""Backbones that come with the package."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

MOST = {"width": 100_000, "mlp_width": 1_000_000, "embed_dim": 100_000, "heads": 10_000, "layers": 1000,
        "image_size": 10_000, "patch_size": 10_000, "vocab_size": 10_000_000, "context_length": 100_000}  # fmt: skip
"""What a configuration may say; beyond that it is damaged."""
CLIP_VOCAB_SIZE = 49408
CLIP_TOKENIZER_SOURCE = "openai/clip-vit-base-patch32"  # the vocabulary is the same for all of OpenAI's models


def whole_name(name: str) -> str:
    """A backbone's name, by which it is found from any folder: of a path the whole of it."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name not in (*EMBEDDED, LITE0) and path.exists() else name


def load_backbone(
    name: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    precision: str = "fp32",
) -> Backbone:
    """Load a frozen vision-language model.

    ``name`` is ``mini`` (embedded), a folder or a ``.safetensors`` file, a hub id such as
    ``openai/clip-vit-base-patch16`` (or ``ViT-B/16``, ``hf-hub:OWNER/MODEL``), or ``open_clip:MODEL/TAG``, where one's
    own checkpoint may be the TAG. Folders are Hugging Face CLIP or SigLIP, or open_clip's (``open_clip_config.json``);
    a file is an OpenAI state dict, or has its configuration beside it.

    Raises BackboneError if nothing is found there, if the architecture is not supported, or if tensors are
    missing, left over or of another shape. Warns of a precision that the processor has no instructions for.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise BackboneError(f"a backbone is loaded by its name or path: {repr(name)[:60]} is neither")
    if precision not in DTYPES:
        raise BackboneError(f"unknown precision '{precision}' (allowed: {', '.join(DTYPES)})")
    check_device(device)
    name = os.fspath(name)
    path = EMBEDDED.get(name, Path(name).expanduser())
    if name.startswith("open_clip:"):
        backbone = _from_open_clip_library(name)
    elif path.is_dir():
        backbone = _from_folder(name, path)
    elif path.is_file():
        backbone = _from_file(name, path)
    elif repo := hub_id(name):
        backbone = _from_hub(repo)
    elif name == LITE0:
        raise BackboneError(f"'{name}' is a classifier without a text tower: it can teach (--teacher), and no more")
    else:
        near = get_close_matches(name, [*EMBEDDED, LITE0, *OPENAI], n=1, cutoff=0.5)
        guess = f": did you mean '{near[0]}'?" if near else ""
        raise BackboneError(
            f"no backbone '{name}'{guess} (allowed: {', '.join(EMBEDDED)}, a folder or .safetensors file, "
            "a hub id like openai/clip-vit-base-patch16, or open_clip:MODEL/TAG)"
        )
    try:
        backbone = backbone.to(device, DTYPES[precision])
    except (RuntimeError, AssertionError) as error:
        raise BackboneError(f"cannot use device '{device}': {first_line(error)}") from None
    if torch.device(device).type == "cpu" and not cpu_has(precision):
        warnings.warn(
            f"this processor has no instructions for {precision}: it takes several times as long as fp32 here",
            stacklevel=2,
        )
    return backbone


def cpu_has(precision: str) -> bool:
    """Whether the CPU multiplies matrices of it with instructions of its own, or PyTorch does not say."""
    return precision == "fp32" or getattr(torch.ops.mkldnn, f"_is_mkldnn_{precision}_supported", lambda: True)()


def check_device(device: torch.device | str) -> None:
    """Raise BackboneError for PyTorch's ``meta``, on which nothing is computed."""
    if str(device).startswith("meta"):
        raise BackboneError(f"cannot use device '{device}' (allowed: cpu, cuda or cuda:N)")


def _from_hub(name: str) -> Backbone:
    """Only one form of the weights is fetched, and not before its configuration is known to be one of ours."""
    files = list_files(name)
    if files is None:
        return _from_folder(name, download(name, [], local=True))
    found = choose(files, name)
    small = [file for file in found.described_by if file in files]
    folder = download(name, small)
    _preprocess(folder, found, _layout(folder, found))
    weights = parts(folder / found.weights) if found.weights.endswith(".index.json") else [found.weights]
    return _from_folder(name, download(name, [*small, *(f for f in BESIDE if f in files), *weights]), found)


def _from_folder(name: str, folder: Path, found: Found | None = None) -> Backbone:
    found = found or choose([file.name for file in folder.iterdir()], str(folder))
    layout = _layout(folder, found)
    preprocess, tokenizer = _preprocess(folder, found, layout), _tokenizer(folder, found, layout)
    return _assemble(name, layout, read_weights(folder / found.weights), preprocess, tokenizer, _licence(folder))


def _layout(folder: Path, found: Found) -> Layout:
    file = folder / found.config
    config = read_json(file)
    try:
        layout = open_clip_layout(config.get("model_cfg", {})) if found.of_open_clip else hf_layout(config)
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise BackboneError(f"cannot read {file}: {one_line(error)}") from None
    without = ("layers", "mlp_width") if layout.image.stages else ()  # a ResNet has neither
    for tower in (layout.image, layout.text):
        for name, value in vars(tower).items():
            most, least = MOST.get(name), 0 if name in without else 1
            if most and not (type(value) is int and least <= value <= most):
                raise BackboneError(f"cannot read {file}: {name} = {one_line(value, 60)} (allowed: {least} to {most})")
        if tower.width % tower.heads:
            raise BackboneError(f"cannot read {file}: width = {tower.width} is no multiple of {tower.heads} heads")
    return layout


def _preprocess(folder: Path, found: Found, layout: Layout) -> Preprocess:
    size = layout.image.image_size
    if found.of_open_clip:
        return open_clip_preprocess(size, read_json(folder / found.config).get("preprocess_cfg", {}))
    return hf_preprocess(folder, size, siglip=layout.image.pool == "map")


def _tokenizer(folder: Path, found: Found, layout: Layout) -> TextTokenizer:
    if layout.text.causal:
        return _clip_tokenizer(folder, layout)
    return load_siglip_tokenizer(folder, layout.text.context_length, canonical=found.of_open_clip)


def _from_file(name: str, file: Path) -> Backbone:
    if file.suffix != ".safetensors":
        raise BackboneError(
            f"{file} is not a .safetensors file: convert it first: "
            f"vlprompt convert {file} {file.with_suffix('.safetensors')}"
        )
    state = read_weights(file)
    if shows_openai(state):
        layout = openai_layout(state)
        preprocess = open_clip_preprocess(layout.image.image_size, {})
        return _assemble(name, layout, state, preprocess, _clip_tokenizer(file.parent, layout))
    hugging_face = any(key.startswith("vision_model.") for key in state)
    config = HF_CONFIG if hugging_face else OPEN_CLIP_CONFIG
    if (file.parent / config).is_file():
        return _from_folder(name, file.parent, Found(config, file.name))
    if not hugging_face and not any(key.startswith("visual.") for key in state):
        raise BackboneError(f"unsupported architecture: {file} is no CLIP state dict")
    advice = "" if hugging_face else f", or name its model: open_clip:MODEL/{file}"
    raise BackboneError(
        f"{file} does not say its architecture (heads and activation), and is not OpenAI's, which holds "
        f"{', '.join(OPENAI_NUMBERS)}: put its {config} beside it{advice}"
    )


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
        raise BackboneError(
            f"unknown open_clip model '{name}' (written open_clip:MODEL/TAG); "
            "the TAG may be a file, one's own checkpoint"
        )
    config, file = open_clip.get_model_config(model_name), Path(tag).expanduser()
    trained = open_clip.get_pretrained_cfg(model_name, tag)
    if not trained and not file.is_file():
        if file.suffix in (".pt", ".pth", ".bin", ".ckpt", ".safetensors"):
            raise BackboneError(f"checkpoint {file} does not exist")
        tags = open_clip.list_pretrained_tags_by_model(model_name)
        raise BackboneError(unknown(f"open_clip tag of {model_name}:", tag, tags))
    # open_clip takes the activation from the model's name and only warns where the weights had another one.
    quick_gelu = bool(config.get("quick_gelu") or trained.get("quick_gelu") or tag == "openai")
    layout = open_clip_layout({**config, "quick_gelu": quick_gelu})
    if layout.text.vocab_size != CLIP_VOCAB_SIZE:
        raise BackboneError(
            f"unsupported architecture: {name} has {layout.text.vocab_size} tokens (allowed: CLIP's {CLIP_VOCAB_SIZE})"
        )
    if trained:
        try:
            model = open_clip.create_model(model_name, pretrained=tag, force_quick_gelu=quick_gelu)
        except Exception as error:  # downloads fail in many ways
            raise BackboneError(f"open_clip cannot load '{name}': {first_line(error)}") from None
        state, settings = model.state_dict(), open_clip.get_model_preprocess_cfg(model)
    else:
        state, settings = read_weights(file), {}
        name = f"open_clip:{model_name}/{file.resolve()}"
    preprocess = open_clip_preprocess(layout.image.image_size, settings)
    tokenizer = _clip_tokenizer(Path(open_clip.__file__).parent, layout)
    return _assemble(name, layout, state, preprocess, tokenizer)


def _assemble(
    name: str,
    layout: Layout,
    state: State,
    preprocess: Preprocess,
    tokenizer: TextTokenizer,
    licence: str | None = None,
) -> Backbone:
    weights = layout.read(state)
    with torch.device("meta"):  # no time spent on initial values that the checkpoint overwrites
        image_tower = ResNetTower(layout.image) if layout.image.stages else ImageTower(layout.image)
        text_tower = TextTower(layout.text)
    for tower, own in ((image_tower, weights.image_state), (text_tower, weights.text_state)):
        try:
            tower.load_state_dict({k: v.float().contiguous() for k, v in own.items()}, assign=True)
        except RuntimeError as error:
            reason = one_line(str(error).splitlines()[1])
            raise BackboneError(f"checkpoint '{name}' does not fit its own configuration: {reason}") from None
    if (last := max((*tokenizer.start, *tokenizer.end), default=0)) >= layout.text.vocab_size:
        raise BackboneError(
            f"the tokenizer of '{name}' has token id {last}; its text tower knows {layout.text.vocab_size} tokens"
        )
    return Backbone(
        name, image_tower, text_tower, tokenizer, preprocess, weights.logit_scale, weights.logit_bias, licence
    )


def _clip_tokenizer(folder: Path, layout: Layout) -> TextTokenizer:
    """The tokenizer beside the weights; else, for CLIP's own vocabulary, open_clip's copy or the hub's."""
    if any((folder / f).is_file() for f in TOKENIZER_FILES):
        return load_clip_tokenizer(folder, layout.text.context_length)
    missing = (
        f"no tokenizer beside the weights in {folder} (put tokenizer.json, vocab.json + merges.txt or "
        f"{TOKENIZER_FILES[-1]} there)"
    )
    if layout.text.vocab_size != CLIP_VOCAB_SIZE:
        raise BackboneError(f"{missing}; its {layout.text.vocab_size} tokens are not CLIP's {CLIP_VOCAB_SIZE}")
    if (spec := find_spec("open_clip")) and spec.origin and (Path(spec.origin).parent / TOKENIZER_FILES[-1]).is_file():
        return load_clip_tokenizer(Path(spec.origin).parent, layout.text.context_length)
    try:
        place = download(CLIP_TOKENIZER_SOURCE, ["tokenizer.json"])
    except BackboneError as error:
        raise BackboneError(f"{missing}; {error}") from None
    return load_clip_tokenizer(place, layout.text.context_length)


def _licence(folder: Path) -> str | None:
    """The licence that the model card's head names."""
    card = folder / "README.md"
    lines = card.read_text("utf-8", errors="replace").splitlines() if card.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines[:40] if line.startswith("license:")), None)
