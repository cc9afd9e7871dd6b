"""One image among C classes: a tuned model with kept class features, and transformers' CLIP with kept text features.

Both take the same weights and run in turn in one process, from a decoded picture (with the resizing that each has) and
from the pixels that the tower reads; the figure is the median ratio of times.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from speed.inputs import machine
from speed.parts import Clock
from vlprompt.api import PromptedModel, build_method
from vlprompt.backbones.backbone import unit
from vlprompt.backbones.load import EMBEDDED, load_backbone
from vlprompt.errors import BackboneError

SIZE = 500, 375


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("backbones", nargs="*", default=["mini", "random:16"], help="mini, a folder, or random:PATCH")
    parser.add_argument("--method", default="coop")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure each backbone."""
    rows, environment = [], {}
    for name in args.backbones:
        with folder_of(name) as folder:
            torch.manual_seed(1)
            class_names = tuple(f"kind {i}" for i in range(args.classes))
            model = PromptedModel(build_method(args.method, load_backbone(str(folder)), class_names))
            environment = machine(model.backbone)
            rows.append({"backbone": name, "classes": args.classes, **measure(model, folder, args)})
    return {"environment": environment, "rows": rows}


@contextmanager
def folder_of(name: str) -> Iterator[Path]:
    """A backbone in transformers' format; ``random:PATCH`` has the sizes of CLIP's ViT-B, and mini's tokenizer."""
    if not name.startswith("random:"):
        yield EMBEDDED.get(name, Path(name))
        return
    from transformers import CLIPConfig, CLIPModel

    patch = name.removeprefix("random:")
    if not patch.isdigit() or int(patch) not in range(1, 225):
        raise BackboneError(f"backbone '{name}': no patch size (allowed: random:1 to random:224, in pixels)")
    mini = load_backbone("mini")
    (start,), (end,) = mini.tokenizer.start, mini.tokenizer.end
    text = {"vocab_size": mini.text_tower.config.vocab_size, "bos_token_id": start, "eos_token_id": end}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config={"patch_size": int(patch)}))
    with TemporaryDirectory() as made:
        clip.save_pretrained(made)
        copyfile(EMBEDDED["mini"] / "tokenizer.json", Path(made) / "tokenizer.json")
        yield Path(made)


def measure(model: PromptedModel, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Times of both ways, in turns, after a call that is not counted."""
    from transformers import CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    backbone, class_names = model.backbone, model.class_names
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": backbone.image_size},
        crop_size={"height": backbone.image_size, "width": backbone.image_size},
    )
    clip = CLIPModel.from_pretrained(str(folder), dtype=torch.float32).eval()
    with torch.no_grad():
        t = model.method.class_features(class_names)
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    picture = coarse.resize(SIZE, Image.Resampling.BICUBIC)
    pixels = backbone.preprocess(picture)[None]

    @torch.no_grad()
    def theirs(pixels: Tensor) -> Tensor:
        features = clip.get_image_features(pixel_values=pixels)
        v = unit(getattr(features, "pooler_output", features))
        return (clip.logit_scale.exp() * v @ t.T).softmax(-1)

    ways: dict[str, dict[str, Callable[[], Any]]] = {
        "picture": {
            "ours": lambda: model.predict([picture]),
            "transformers": lambda: theirs(processor([picture], return_tensors="pt")["pixel_values"]),
        },
        "pixels": {
            "ours": lambda: model.method.predict(pixels, class_names).softmax(-1),
            "transformers": lambda: theirs(pixels),
        },
    }
    ours, other = (way() for way in ways["pixels"].values())
    if (apart := (ours - other).abs().max().item()) > 1e-3:
        raise BackboneError(f"the two answers differ by {apart:.2g}: this is no fair comparison")
    clock, result = Clock(backbone.device, args.clock == "cpu"), {}
    for start, both in ways.items():
        seconds: dict[str, list[float]] = {way: [] for way in both}
        for i in range(args.rounds + 1):
            for way, call in both.items():
                took = clock.seconds(call)
                if i:
                    seconds[way].append(took)
        ratios = sorted(a / b for a, b in zip(seconds["ours"], seconds["transformers"], strict=True))
        quarter = len(ratios) // 4
        result[start] = {
            "median_s": {way: statistics.median(s) for way, s in seconds.items()},
            "ratio": {"median": statistics.median(ratios), "half": [ratios[quarter], ratios[-1 - quarter]]},
        }
    return {"differ_by": apart, **result}


def table(result: dict[str, Any]) -> str:
    """A line for each row."""
    lines = [
        "| backbone | classes | from | ours, ms | transformers, ms | ours ÷ transformers |",
        "|---|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        for start in ("picture", "pixels"):
            took, ratio = r[start]["median_s"], r[start]["ratio"]
            low, high = ratio["half"]
            lines.append(
                f"| {r['backbone']} | {r['classes']} | {start} | {1000 * took['ours']:.1f} | "
                f"{1000 * took['transformers']:.1f} | {ratio['median']:.2f} ({low:.2f}–{high:.2f}) |"
            )
    return "\n".join(lines)
