"""Distillation with an online teacher and from a region bank: epochs, the build, and where they break even.

STUDENT and TEACHER are what `load_backbone` takes, or `random:PATCH`, CLIP's ViT-B with patches of so many pixels (of
224) and random weights; without them mini + mini, random:32 + random:32 and random:32 + random:16 are measured. The
online method is kdpl_coop, as is the one from the bank unless --method says otherwise. Pictures are random JPEGs of
--size; epochs of both ways take turns, after one of each that does not count. A run of --run-epochs epochs is
calculated from the median epoch; the bank's build is measured whole, but for the loading of the towers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from speed.inputs import load, machine, pictures
from speed.parts import Clock
from vlprompt.bank.build import fill
from vlprompt.bank.config import bank_config
from vlprompt.bank.records import Bank
from vlprompt.bank.towers import towers_of
from vlprompt.config.schema import build_config
from vlprompt.config.teacher import Teacher
from vlprompt.data.reading import ImageReader
from vlprompt.data.splits import Split
from vlprompt.errors import ConfigError
from vlprompt.methods import find_method
from vlprompt.training.loop import Training
from vlprompt.training.prepare import Sources, prepare

ONLINE, TEMPLATE = "kdpl_coop", "a photo of a {}."
PAIRS = (("mini", "mini"), ("random:32", "random:32"), ("random:32", "random:16"))


def one_epoch(job: Training) -> None:
    """Train on to the end of the next epoch."""
    job.config = replace(job.config, epochs=job.epoch + 1)
    job.run()


def measure(pair: tuple[str, str], split: Split, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one pair."""
    clock = Clock(torch.device(args.device))
    student, teacher_backbone = (load(name, args.device) for name in pair)
    teacher = Teacher(teacher_backbone, split.class_names, TEMPLATE, student.logit_scale)
    given = {"regions": args.regions, "backbone": pair[0], "teacher.backbone": pair[1], "device": args.device}
    config = bank_config({"data.name": str(folder), **given})
    towers = towers_of(config, teacher, student)
    out = folder / f"bank-{pair[0]}-{pair[1]}".replace(":", "").replace("/", "_")
    with ImageReader(2, room=0) as reader:
        build = clock.seconds(lambda: fill(out, towers, split, reader))
    jobs = {}
    with ImageReader(2) as reader:
        for way, name in (("online", ONLINE), ("bank", args.method)):
            run = build_config(name, overrides={"data.batch_size": args.batch_size, "data.bank": str(out)})
            torch.manual_seed(1)
            method = find_method(name)(student, split.class_names, run.options, TEMPLATE).to(args.device)
            asked, bank = (teacher, None) if way == "online" else (None, Bank(out))
            sources = Sources(asked, bank, split.class_names)
            job = prepare(run, sources, method, split.paths("train"), split.labels("train"), run.seed, reader)
            assert job is not None
            jobs[way] = job
        seconds: dict[str, list[float]] = {way: [] for way in jobs}
        for _ in range(1 + args.epochs):
            for way, job in jobs.items():
                seconds[way].append(clock.seconds(lambda job=job: one_epoch(job)))  # type: ignore[misc]
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


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("pair", nargs="*", metavar="STUDENT TEACHER")
    parser.add_argument("--method", default=ONLINE, help="what is trained from the bank; fdbpl_coop does a pass more")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--classes", type=int, default=16)
    parser.add_argument("--regions", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--run-epochs", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--size", default="320x240")
    parser.add_argument("--device", default="cpu")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the pairs one after the other."""
    if len(args.pair) not in (0, 2):
        raise ConfigError("give STUDENT and TEACHER, or neither")
    width, height = map(int, args.size.split("x"))
    rows = []
    with TemporaryDirectory() as folder:
        split = pictures(Path(folder), args.images, (width, height), args.classes)
        for pair in [tuple(args.pair)] if args.pair else PAIRS:
            rows.append(measure(pair, split, Path(folder), args))
            print(f"{pair[0]} + {pair[1]}: done", file=sys.stderr)
    methods = ONLINE if args.method == ONLINE else f"{ONLINE} online, {args.method} from the bank"
    about = (
        f"{methods}, {args.images} images of {args.size}, {args.regions} regions each, {args.classes} classes, "
        f"batches of {args.batch_size}, runs of {args.run_epochs} epochs; build in ms an image, epochs in s"
    )
    return {"about": about, "environment": machine(load("mini", args.device)), "rows": rows}


def table(result: dict[str, Any]) -> str:
    """A row for each pair."""
    lines = [
        f"{result['about']}\n",
        "| student | teacher | build | online | bank | epoch | run with build | three runs | break-even |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        even = r["break_even_epochs"]
        shown = f"{even:.0f} epochs = {r['break_even_runs']:.1f} runs" if even else "never"
        lines.append(
            f"| {r['student']} | {r['teacher']} | {1000 * r['build_s_per_image']:.0f} | {r['online_epoch_s']:.2f} | "
            f"{r['bank_epoch_s']:.2f} | {r['epoch_ratio']:.1f}× | {r['run_ratio']:.2f}× | "
            f"{r['three_runs_ratio']:.2f}× | {shown} |"
        )
    return "\n".join(lines)
