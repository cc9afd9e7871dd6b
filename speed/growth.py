"""Time and memory of a step as classes, images and regions grow, and where memory is full.

Each size is one step in a new process (CPU: after one of two classes and one image; GPU: the second step counts).
Peaks are fitted by a straight line, and what it says beyond the sizes measured is marked as extrapolated. The bank's
bytes are what its records take; its build is one frozen pass of the image tower for each region.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from speed.inputs import load, machine
from speed.parts import Clock
from speed.step import (
    EQUAL_WAYS,
    METHODS,
    Work,
    chosen_ways,
    computed,
    hardware,
    in_new_process,
    one_step,
    resident,
    training,
    ways_of,
)
from vlprompt.backbones.backbone import Backbone
from vlprompt.bank.manifest import BankSettings, Features, Labels
from vlprompt.errors import ConfigError, unknown

MEMORIES = (8, 24, 80)
"""Sizes of memory that are asked about, in GB."""
AXES = ("classes", "images", "regions")


@dataclass(frozen=True)
class Point:
    """One measured step: seconds, and bytes at most."""

    size: int
    seconds: float
    peak: float


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="coop if none is given")
    parser.add_argument("--backbone", default="mini", help="mini, another backbone, or random:32, random:16 (ViT-B)")
    parser.add_argument("--along", default=",".join(AXES), help="which of classes,images,regions")
    parser.add_argument("--classes", type=numbers, default=(50, 100, 200, 500, 1000), metavar="N,N,…")
    parser.add_argument("--images", type=numbers, default=(1, 4, 8, 16, 32), metavar="N,N,…")
    parser.add_argument("--regions", type=numbers, default=(5, 50, 500), metavar="N,N,…")
    parser.add_argument("--ways", default="plain,default", help=f"which of {','.join(EQUAL_WAYS)}")
    parser.add_argument("--text-chunk", type=int, help="measure the default with train.text_chunk at this too")
    parser.add_argument("--plain-most", type=int, default=1000, help="the plain way is not measured for more classes")
    hardware(parser)


def numbers(text: str) -> tuple[int, ...]:
    """``1,2,3``; argparse names what is not."""
    return tuple(int(part) for part in text.split(","))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all that is asked for."""
    along = args.along.split(",")
    for axis in along:
        if axis not in AXES:
            raise ConfigError(unknown("--along", axis, AXES))
    ways = chosen_ways(args.ways, EQUAL_WAYS)
    backbone = load(args.backbone, args.device, args.precision)
    rows: list[dict[str, Any]] = []
    for method in args.methods or METHODS[:1]:
        works = [
            Work(method, way, args.backbone, 0, 1, args.device, args.precision)
            for way in ways_of(method, backbone, ways)
        ]
        if args.text_chunk:
            chunk = (("train.text_chunk", args.text_chunk),)
            works.append(Work(method, "default", args.backbone, 0, 1, args.device, args.precision, chunk))
        for work in works:
            way = work.way + "".join(f", {key.rpartition('.')[2]}={value}" for key, value in work.settings)
            for axis, sizes in (("classes", args.classes), ("images", args.images)):
                if axis not in along:
                    continue
                of_sizes = [
                    replace(work, classes=n) if axis == "classes" else replace(work, classes=10, batch_size=n)
                    for n in sizes
                    if axis == "images" or way != "plain" or n <= args.plain_most
                ]
                points = [in_a_process(each, axis, args.clock == "cpu") for each in of_sizes]
                rows.append({"method": method, "way": way, "along": axis, **fitted(points, sizes)})
                print(f"{method}, {way}, {axis}: done", file=sys.stderr)
    banks = [bank_of(n, backbone, args) for n in args.regions] if "regions" in along else []
    return {"environment": machine(backbone), "backbone": args.backbone, "rows": rows, "banks": banks}


def in_a_process(work: Work, axis: str, cpu_clock: bool) -> Point:
    """One step of this size."""
    size = work.classes if axis == "classes" else work.batch_size or 0
    return Point(size, *in_new_process(_measured, work, cpu_clock, torch.get_num_threads()))


def _measured(work: Work, cpu_clock: bool, threads: int) -> tuple[float, float]:
    torch.set_num_threads(threads)
    backbone = load(work.backbone, work.device, work.precision)
    clock = Clock(torch.device(work.device), cpu_clock)
    gpu = clock.device.type == "cuda"
    first = work if gpu else replace(work, classes=2, batch_size=1)
    with computed(first, backbone):
        one_step(training(first, backbone))
    with computed(work, backbone):
        job = training(work, backbone)
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = clock.seconds(lambda: one_step(job))
    return seconds, torch.cuda.max_memory_allocated() if gpu else resident("VmHWM")


def fitted(points: list[Point], sizes: tuple[int, ...]) -> dict[str, Any]:
    """The points, straight lines through them, the other sizes by these lines, and the largest size for each memory."""
    x = np.array([p.size for p in points], float)
    time, memory = (
        np.polyfit(x, [getattr(p, key) for p in points], 1) if len(points) > 1 else np.full(2, np.nan)
        for key in ("seconds", "peak")
    )
    known = {p.size for p in points}
    beyond = [Point(n, float(np.polyval(time, n)), float(np.polyval(memory, n))) for n in sizes if n not in known]
    largest = {
        f"{gb} GB": {"size": int((gb * 1e9 - memory[1]) / memory[0]), "extrapolated": gb * 1e9 > points[-1].peak}
        for gb in MEMORIES
        if memory[0] > 0
    }
    return {
        "measured": [vars(p) for p in points],
        "extrapolated": [vars(p) for p in beyond],
        "seconds_each": float(time[0]),
        "bytes_each": float(memory[0]),
        "largest": largest,
    }


def bank_of(regions: int, backbone: Backbone, args: argparse.Namespace) -> dict[str, Any]:
    """A bank's size on disk and the time to build it, for each image: with top-10 labels and features in fp16."""
    clock, n = Clock(backbone.device, args.clock == "cpu"), 8
    images = torch.randn(n, 3, backbone.image_size, backbone.image_size, device=backbone.device)
    backbone.encode_images(images[:1])
    labels = Labels("teacher", "", "{}", 100.0, ("a",) * 100, 10)
    settings = BankSettings(regions, teacher=labels, features=Features("student", "", backbone.embed_dim, "fp16"))
    seconds = clock.seconds(lambda: backbone.encode_images(images)) / n
    return {"regions": regions, "bytes_per_image": settings.bytes_per_image, "seconds_per_image": regions * seconds}


def table(result: dict[str, Any]) -> str:
    """Time and peak memory by size; what was not measured is marked with ~."""
    lines = [
        f"{result['backbone']}; ~ is extrapolated; seconds / GB at the peak\n",
        "| method | way | along | sizes | most in 8, 24, 80 GB |",
        "|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        cells = [(p, "") for p in r["measured"]] + [(p, "~") for p in r["extrapolated"]]
        shown = "; ".join(f"{p['size']}: {m}{p['seconds']:.2f} / {m}{p['peak'] / 1e9:.2f}" for p, m in cells)
        most = ", ".join(f"{'~' * v['extrapolated']}{v['size']}" for v in r["largest"].values())
        lines.append(f"| {r['method']} | {r['way']} | {r['along']} | {shown} | {most} |")
    if result["banks"]:
        lines += ["\n| regions | bank, kB an image | one tower's build, s an image |", "|---|---|---|"]
        lines += [
            f"| {b['regions']} | {b['bytes_per_image'] / 1e3:.1f} | {b['seconds_per_image']:.2f} |"
            for b in result["banks"]
        ]
    return "\n".join(lines)
