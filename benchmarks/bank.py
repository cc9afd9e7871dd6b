"""What a region bank saves: distillation with an online teacher and from a bank, side by side in one process.

    python tools/bench_bank.py [STUDENT TEACHER] [--images 64] [--regions 50] [--epochs 3] [--json FILE]

STUDENT and TEACHER are what `load_backbone` takes, or `random:PATCH`, CLIP's ViT-B with patches of so many pixels (of
224) and random weights; without them mini + mini, random:32 + random:32 and random:32 + random:16 are measured. The
method is kdpl_coop. Pictures are random JPEGs of --size; epochs of both ways take turns, after one of each that does
not count. A run of --run-epochs epochs is reckoned from the median epoch; the bank's build is measured whole, but for
the loading of the towers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.load import load_backbone
from vlprompt.backbones.towers import ImageConfig, ImageTower, TextConfig, TextTower
from vlprompt.data.bank import Bank
from vlprompt.data.reading import ImageReader
from vlprompt.data.splits import Item, Split
from vlprompt.methods import find_method
from vlprompt.training.bank_build import bank_config, fill, towers_of
from vlprompt.training.config import build_config
from vlprompt.training.loop import Training, training_views
from vlprompt.training.teacher import Teacher

METHOD, TEMPLATE = "kdpl_coop", "a photo of a {}."
PAIRS = (("mini", "mini"), ("random:32", "random:32"), ("random:32", "random:16"))


def load(name: str, device: str) -> Backbone:
    """A backbone; ``random:PATCH`` has the sizes of CLIP's ViT-B, and mini's tokenizer."""
    if not name.startswith("random:"):
        return load_backbone(name, device)
    torch.manual_seed(0)
    mini = load_backbone("mini")
    vocabulary, context = mini.text_tower.config.vocab_size, mini.context_length
    image = ImageTower(ImageConfig(224, int(name.removeprefix("random:")), 768, 12, 12, 3072, 512))
    text = TextTower(TextConfig(vocabulary, context, 512, 12, 8, 2048, 512))
    for tower in (image, text):
        for p in tower.parameters():
            nn.init.normal_(p, std=0.02)
    preprocess = replace(mini.preprocess, image_size=224)
    return Backbone(name, image, text, mini.tokenizer, preprocess, 100.0).to(device)


def pictures(folder: Path, n: int, size: tuple[int, int], classes: int) -> Split:
    """n random JPEGs, smooth enough to be compressed as photographs are."""
    rng = np.random.default_rng(0)
    items = []
    for i in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
        items.append(Item(f"{i}.jpg", i % classes))
    return Split(folder, tuple(f"kind {c}" for c in range(classes)), tuple(items))


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what the work gave."""
    began = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def one_epoch(job: Training) -> None:
    """Train on to the end of the next epoch."""
    job.config = replace(job.config, epochs=job.epoch + 1)
    job.run()


def measure(pair: tuple[str, str], split: Split, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one pair."""
    student, teacher_backbone = (load(name, args.device) for name in pair)
    teacher = Teacher(teacher_backbone, split.class_names, TEMPLATE, student.logit_scale)
    given = {"regions": args.regions, "backbone": pair[0], "teacher.backbone": pair[1], "device": args.device}
    config = bank_config({"data.name": str(folder), **given})
    towers = towers_of(config, teacher, student)
    out = folder / f"bank-{pair[0]}-{pair[1]}".replace(":", "").replace("/", "_")
    with ImageReader(2, room=0) as reader:
        build, _ = timed(lambda: fill(out, towers, split, reader))
    run = build_config(METHOD, overrides={"data.batch_size": args.batch_size, "data.bank": str(out)})
    cls, jobs = find_method(METHOD), {}
    with ImageReader(2) as reader:
        for way in ("online", "bank"):
            torch.manual_seed(1)
            method = cls(student, split.class_names, cls.Config(), TEMPLATE).to(args.device)
            source = {"teacher": teacher} if way == "online" else {"bank": Bank(out)}
            views = training_views(
                method, split.paths("train"), split.labels("train"), run.data, run.seed, reader, **source
            )
            jobs[way] = Training(method, views, run.optim, run.train, teacher=source.get("teacher"))
        seconds: dict[str, list[float]] = {way: [] for way in jobs}
        for _ in range(1 + args.epochs):
            for way, job in jobs.items():
                seconds[way].append(timed(lambda job=job: one_epoch(job))[0])
    online_epoch, bank_epoch = (statistics.median(s[1:]) for s in seconds.values())
    saved, n = online_epoch - bank_epoch, args.run_epochs
    return {
        "student": pair[0],
        "teacher": pair[1],
        "online_epoch_s": online_epoch,
        "bank_epoch_s": bank_epoch,
        "epoch_ratio": online_epoch / bank_epoch,
        "build_s": build,
        "build_s_per_image": build / len(split.train),
        "run_ratio": n * online_epoch / (build + n * bank_epoch),
        "three_runs_ratio": 3 * n * online_epoch / (build + 3 * n * bank_epoch),
        "break_even_epochs": build / saved if saved > 0 else None,
        "break_even_runs": build / saved / n if saved > 0 else None,
        "bytes_per_image": Bank(out).settings.bytes_per_image,
        "epochs_s": seconds,
    }


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", nargs="*", metavar="STUDENT TEACHER")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--classes", type=int, default=16)
    parser.add_argument("--regions", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--run-epochs", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--size", default="320x240")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if len(args.pair) not in (0, 2):
        parser.error("give STUDENT and TEACHER, or neither")
    width, height = map(int, args.size.split("x"))
    rows = []
    with TemporaryDirectory() as folder:
        split = pictures(Path(folder), args.images, (width, height), args.classes)
        for pair in [tuple(args.pair)] if args.pair else PAIRS:
            rows.append(measure(pair, split, Path(folder), args))
            print(f"{pair[0]} + {pair[1]}: done", file=sys.stderr)
    device = torch.cuda.get_device_name() if args.device != "cpu" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{METHOD}, {args.images} images of {args.size}, {args.regions} regions each, batches of {args.batch_size}, "
        f"runs of {args.run_epochs} epochs; {device}; build in ms an image, epochs in s\n\n"
        "| student | teacher | build | online | bank | epoch | run with build | three runs | break-even |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    for r in rows:
        even = r["break_even_epochs"]
        shown = f"{even:.0f} epochs = {r['break_even_runs']:.1f} runs" if even else "never"
        print(
            f"| {r['student']} | {r['teacher']} | {1000 * r['build_s_per_image']:.0f} | {r['online_epoch_s']:.2f} | "
            f"{r['bank_epoch_s']:.2f} | {r['epoch_ratio']:.1f}× | {r['run_ratio']:.2f}× | "
            f"{r['three_runs_ratio']:.2f}× | {shown} |"
        )
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        args.json.write_text(json.dumps({"device": device, "settings": settings, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
