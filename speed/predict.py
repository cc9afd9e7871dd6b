"""Images a second among C classes, by batch: a tuned model with kept class features, transformers' CLIP, and ONNX.

All take the same weights and run in turn in one process. transformers keeps its text features. From decoded pictures
each of these two resizes in its own way; from the pixels that the tower reads, ONNX files in fp32 and in 8 bits
(onnxruntime, as many threads as torch has) take part. The figure is the median of ratios of times.
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
from vlprompt.artefact.export import onnx_model, quantised
from vlprompt.backbones.backbone import unit
from vlprompt.backbones.load import EMBEDDED, load_backbone
from vlprompt.errors import BackboneError

SIZE = 500, 375
RATIOS = {"ours": "transformers", "onnx": "ours", "int8": "ours"}
"""Whose rate is divided by whose."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("backbones", nargs="*", default=["mini", "random:16"], help="mini, a folder, or random:PATCH")
    parser.add_argument("--method", default="coop")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--batches", default="1,8,64", help="images at once, with commas between")
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
            from transformers import CLIPModel

            clip = CLIPModel.from_pretrained(str(folder), dtype=torch.float32).eval()
            sessions = onnx_sessions(model)
            for n in map(int, args.batches.split(",")):
                row = {"backbone": name, "classes": args.classes, "batch": n}
                rows.append({**row, **measure(model, clip, sessions, n, args)})
    return {"environment": environment, "rows": rows}


def onnx_sessions(model: PromptedModel) -> dict[str, Any]:
    """The model as ONNX files have it, in fp32 and with weights in 8 bits, in as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    content = onnx_model(model.method, model.class_names)
    files = {"onnx": content, "int8": quantised(content)}
    return {way: onnxruntime.InferenceSession(file, options) for way, file in files.items()}


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


def measure(
    model: PromptedModel, clip: Any, sessions: dict[str, Any], n: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Times of all ways for n images at once, in turns, after a call that is not counted."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    backbone, class_names = model.backbone, model.class_names
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": backbone.image_size},
        crop_size={"height": backbone.image_size, "width": backbone.image_size},
    )
    with torch.no_grad():
        t = model.method.class_features(class_names)
    rng = np.random.default_rng(0)
    coarse = [Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)) for _ in range(n)]
    pictures = [picture.resize(SIZE, Image.Resampling.BICUBIC) for picture in coarse]
    pixels = torch.stack([backbone.preprocess(picture) for picture in pictures])

    @torch.no_grad()
    def theirs(pixels: Tensor) -> Tensor:
        features = clip.get_image_features(pixel_values=pixels)
        v = unit(getattr(features, "pooler_output", features))
        return (clip.logit_scale.exp() * v @ t.T).softmax(-1)

    def by_onnx(session: Any) -> Tensor:
        return torch.from_numpy(session.run(["probabilities"], {"images": pixels.numpy()})[0])

    calls: dict[str, dict[str, Callable[[], Any]]] = {
        "picture": {
            "ours": lambda: model.predict(pictures),
            "transformers": lambda: theirs(processor(pictures, return_tensors="pt")["pixel_values"]),
        },
        "pixels": {
            "ours": lambda: model.method.predict(pixels, class_names).softmax(-1),
            "transformers": lambda: theirs(pixels),
            "onnx": lambda: by_onnx(sessions["onnx"]),
            "int8": lambda: by_onnx(sessions["int8"]),
        },
    }
    answers = {way: call() for way, call in calls["pixels"].items()}
    apart = {way: (p - answers["ours"]).abs().max().item() for way, p in answers.items() if way != "ours"}
    if (worst := max(apart["transformers"], apart["onnx"])) > 1e-3:
        raise BackboneError(f"the answers differ by {worst:.2g}: this is no fair comparison")
    clock, result = Clock(backbone.device, args.clock == "cpu"), {}
    for start, ways in calls.items():
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for i in range(args.rounds + 1):
            for way, call in ways.items():
                took = clock.seconds(call)
                if i:
                    seconds[way].append(took)
        result[start] = {
            "median_s": {way: statistics.median(s) for way, s in seconds.items()},
            "ratio": {fast: spread(seconds[slow], seconds[fast]) for fast, slow in RATIOS.items() if fast in ways},
        }
    return {"differ_by": apart, **result}


def spread(slow: list[float], fast: list[float]) -> dict[str, Any]:
    """How many times as fast: the median over rounds, and their middle half."""
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    quarter = len(ratios) // 4
    return {"median": statistics.median(ratios), "half": [ratios[quarter], ratios[-1 - quarter]]}


def table(result: dict[str, Any]) -> str:
    """A line for each backbone, batch and start."""
    ratios = [f"{fast} ÷ {slow}" for fast, slow in RATIOS.items()]
    lines = [f"| backbone | batch | from | {' | '.join(['ours, images/s', *ratios])} |", f"|{'---|' * 7}"]
    for r in result["rows"]:
        for start in ("picture", "pixels"):
            cells = [r["backbone"], r["batch"], start, f"{r['batch'] / r[start]['median_s']['ours']:.3g}"]
            for way in RATIOS:
                known = r[start]["ratio"].get(way)
                low, high = known["half"] if known else (0, 0)
                cells.append(f"{known['median']:.2f} ({low:.2f}–{high:.2f})" if known else "–")
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)
