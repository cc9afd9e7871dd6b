"""Write the trained towers as a backbone: CLIP in Hugging Face format, in fp16.

    python tools/mini/export.py tools/mini/photos.yaml --out pretraining/aligned --to src/vlprompt/backbones/mini

Reads ``OUT/image.safetensors``, ``OUT/text.safetensors`` and ``OUT/tokenizer.json``, and with ``--data`` the table of
the pictures' sources. The card (``README.md``) that is in the folder stays; ``evaluate.py`` writes its figures.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from image import STATE as IMAGE_STATE
from safetensors.torch import load_file, save
from steps import EPS, part, scaled
from text import STATE as TEXT_STATE
from tokenizers import Tokenizer
from torch import Tensor

from vlprompt.backbones.processors import CLIP_MEAN, CLIP_STD
from vlprompt.backbones.tokenizer import EOS, SOS
from vlprompt.files import write_atomically

BLOCK = {
    "out": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "fc_1": "mlp.fc1",
    "fc_2": "mlp.fc2",
}
TOWER = {
    "image": {
        "patches.weight": "vision_model.embeddings.patch_embedding.weight",
        "class_token": "vision_model.embeddings.class_embedding",
        "positions": "vision_model.embeddings.position_embedding.weight",
        "ln_pre": "vision_model.pre_layrnorm",
        "ln_post": "vision_model.post_layernorm",
        "projection.weight": "visual_projection.weight",
        "blocks": "vision_model.encoder.layers",
    },
    "text": {
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positions": "text_model.embeddings.position_embedding.weight",
        "ln_final": "text_model.final_layer_norm",
        "projection.weight": "text_projection.weight",
        "blocks": "text_model.encoder.layers",
    },
}


SPREAD = 0.02
"""Of token embeddings in CLIP, and of the noise that learned tokens start from in every official code."""


def rescaled(state: dict[str, Tensor], spread: float = SPREAD) -> tuple[dict[str, Tensor], float]:
    """The text tower with token embeddings of another spread, and the factor; it says the same about every text.

    Without this, official learning rates would hardly move a learned token of ``mini``.
    """
    factor = spread / state["token_embedding.weight"].std().item()
    return scaled(state, factor), factor


def hugging_face(state: dict[str, Tensor], tower: str) -> dict[str, Tensor]:
    """A tower's weights under the names of ``CLIPModel``."""
    names = TOWER[tower]
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.startswith("blocks."):
            _, i, layer, kind = name.split(".")
            prefix = f"{names['blocks']}.{i}"
            if layer == "qkv":
                for which, third in zip("qkv", value.chunk(3), strict=True):
                    out[f"{prefix}.self_attn.{which}_proj.{kind}"] = third
            else:
                out[f"{prefix}.{BLOCK[layer]}.{kind}"] = value
        elif name in names:
            out[names[name]] = value
        else:
            layer, kind = name.rsplit(".", 1)
            out[f"{names[layer]}.{kind}"] = value
    return out


def config_of(settings: dict[str, Any], vocabulary: dict[str, int], factor: float) -> dict[str, Any]:
    """``config.json`` of a ``CLIPModel`` whose text tower was rescaled by ``factor``."""
    image, text = settings["image"], settings["text"]

    def sizes(tower: dict[str, Any], factor: float = 1.0) -> dict[str, Any]:
        return {
            "hidden_size": tower["width"],
            "num_hidden_layers": tower["layers"],
            "num_attention_heads": tower["heads"],
            "intermediate_size": tower["mlp_width"],
            "hidden_act": tower["activation"],
            "layer_norm_eps": EPS * factor**2,
            "projection_dim": image["embed_dim"],
        }

    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "dtype": "float16",
        "projection_dim": image["embed_dim"],
        "vision_config": {
            "model_type": "clip_vision_model",
            "image_size": image["image_size"],
            "patch_size": image["patch_size"],
            "num_channels": 3,
            **sizes(image),
        },
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": len(vocabulary),
            "max_position_embeddings": text["context_length"],
            "bos_token_id": vocabulary[SOS],
            "eos_token_id": vocabulary[EOS],
            "pad_token_id": vocabulary[EOS],
            **sizes(text, factor),
        },
    }


def preprocessing_of(size: int) -> dict[str, Any]:
    """``preprocessor_config.json``, as CLIP's with another size."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }


def export(settings: dict[str, Any], out: Path, to: Path) -> int:
    """Write the backbone; returns the bytes of its weights."""
    image, text = load_file(out / IMAGE_STATE), load_file(out / TEXT_STATE)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    words, factor = rescaled(part(text, "tower"))
    weights = hugging_face(part(image, "tower"), "image") | hugging_face(words, "text")
    weights["logit_scale"] = part(image, "rest")["log_scale"]
    content = save({name: value.to(torch.float16).contiguous() for name, value in weights.items()}, {"format": "pt"})
    for name, values in (
        ("config.json", config_of(settings, tokenizer.get_vocab(), factor)),
        ("preprocessor_config.json", preprocessing_of(settings["image"]["image_size"])),
    ):
        write_atomically(to / name, json.dumps(values, indent=1) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        write_atomically(to / name, (out / name).read_bytes())
    write_atomically(to / "model.safetensors", content)
    return len(content)


def main() -> None:
    """Read and write."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("settings", type=Path, help="a file such as tools/mini/photos.yaml")
    parser.add_argument("--out", type=Path, required=True, help="folder of the towers' states and the tokenizer")
    parser.add_argument("--data", type=Path, help="folder that data.py wrote, for the table of sources")
    parser.add_argument("--to", type=Path, required=True, help="folder of the backbone")
    options = parser.parse_args()
    size = export(yaml.safe_load(options.settings.read_text(encoding="utf-8")), options.out, options.to)
    if options.data:
        write_atomically(options.to / "sources.tsv", (options.data / "sources.tsv").read_bytes())
    print(f"{options.to}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
