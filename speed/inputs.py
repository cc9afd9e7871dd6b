"""What is measured on (random towers of usual sizes, class names, pictures), where, and the figures' files."""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.load import load_backbone
from vlprompt.backbones.towers import ImageConfig, ImageTower, TextConfig, TextTower
from vlprompt.data.splits import Item, Split
from vlprompt.errors import BackboneError
from vlprompt.files import write_atomically
from vlprompt.training.run import environment

WORDS = ("golden retriever", "sea horse", "water lily", "anchor", "grand piano", "inline skate", "Boeing 737", "tree")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def names(n: int) -> list[str]:
    """Names of one to three words; some come again where many are asked for."""
    return [" ".join(WORDS[(i * 7 + j * 3) % len(WORDS)] for j in range(1 + i % 3)) for i in range(n)]


def load(name: str, device: str = "cpu", precision: str = "fp32") -> Backbone:
    """A backbone; ``random:PATCH`` has the sizes of CLIP's ViT-B, random weights, and mini's tokenizer."""
    if not name.startswith("random:"):
        return load_backbone(name).to(device, DTYPES[precision])
    patch = name.removeprefix("random:")
    if not patch.isdigit() or int(patch) not in range(1, 225):
        raise BackboneError(f"backbone '{name}': no patch size (allowed: random:1 to random:224, in pixels)")
    torch.manual_seed(0)
    mini = load_backbone("mini")
    image = ImageTower(ImageConfig(224, int(patch), 768, 12, 12, 3072, 512))
    text = TextTower(TextConfig(mini.text_tower.config.vocab_size, 77, 512, 12, 8, 2048, 512))
    for tower in (image, text):
        for p in tower.parameters():
            nn.init.normal_(p, std=0.02)
    preprocess = replace(mini.preprocess, image_size=224)
    return Backbone(name, image, text, mini.tokenizer, preprocess, 100.0).to(device, DTYPES[precision])


def pictures(folder: Path, n: int, size: tuple[int, int], classes: int) -> Split:
    """n random JPEGs of width × height, smooth enough to be compressed as photographs are."""
    rng = np.random.default_rng(0)
    items = []
    for i in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
        items.append(Item(f"{i}.jpg", i % classes))
    return Split(folder, tuple(f"kind {c}" for c in range(classes)), tuple(items))


def machine(backbone: Backbone) -> dict[str, Any]:
    """Software, device, and how busy the machine is."""
    known = {k: v for k, v in environment(backbone).items() if k != "backbone_fingerprint"}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {**known, "processor": processor(), "cores": os.cpu_count(), "load_average": load}


def write_figures(file: Path, result: dict[str, Any], args: argparse.Namespace) -> None:
    """The figures as JSON, with the options of the command that measured them."""
    settings = {k: v for k, v in vars(args).items() if k not in ("json", "root")}  # paths of this machine
    write_atomically(file, json.dumps({"settings": settings, **result}, indent=2) + "\n")


def processor() -> str:
    """The processor's name and architecture, as far as the system says."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    known = dict(line.split(":", 1) for line in lines if ":" in line)
    model = next((value.strip() for key, value in known.items() if key.strip() == "model name"), platform.processor())
    return f"{model} ({platform.machine()})"
