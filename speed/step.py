"""One training step of methods: the plain path, the default, with frozen features from a bank, with towers in bf16.

The ways take turns in one process, on the same views; the first round does not count, unless --cold says so. Each peak
of CPU memory is that of a process of its own. Data is measured by itself: pictures of 500 × 375 pixels to one batch, in
the calling thread, decoded each time (plain) or once (default); training reads them in threads beside the steps.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast
from unittest.mock import patch

import torch
from torch.nn.functional import normalize

from speed.inputs import load, machine, names, pictures
from speed.parts import Clock, Parts, matmul_rate
from speed.plain import plain
from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.towers import ImageConfig, TextConfig
from vlprompt.config.schema import build_config
from vlprompt.data.batches import Batch, TrainingViews
from vlprompt.data.reading import ImageReader
from vlprompt.errors import ConfigError, VlpromptError, unknown
from vlprompt.methods import Can, Method, find_method
from vlprompt.methods.templates import IMAGENET_TEMPLATES
from vlprompt.methods.zero_shot import frozen_class_features
from vlprompt.training.loop import EpochLog, Training
from vlprompt.training.watchers import EachEpoch

METHODS = ("coop", "cocoop", "kgcoop", "maple", "promptsrc", "drople", "fdbpl_coop", "dpl")
EQUAL_WAYS = ("plain", "default", "bank")
WAYS = (*EQUAL_WAYS, "bf16")
PICTURE = (500, 375)
SHOTS = 16


@dataclass(frozen=True)
class Work:
    """One method's step in one way."""

    method: str
    way: str
    backbone: str
    classes: int
    batch_size: int | None = None
    device: str = "cpu"
    precision: str = "fp32"
    settings: tuple[tuple[str, Any], ...] = ()


class OneBatch:
    """The same views in every step, an epoch each."""

    seed = 1

    def __init__(self, views: Batch) -> None:
        self.views, self.images_per_batch = views, len(views.labels)

    def __len__(self) -> int:
        """One batch in an epoch."""
        return 1

    def epoch(self, epoch: int, start: int = 0, shard: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """The batch."""
        yield self.views


@contextmanager
def computed(work: Work, backbone: Backbone) -> Iterator[None]:
    """The towers run as the way says; an ensemble's frozen features, made once in a run, are those of one template."""
    with ExitStack() as stack:
        if work.way == "plain":
            stack.enter_context(plain(backbone, longest=work.method == "drople"))
        stack.enter_context(patch("vlprompt.methods.promptsrc.IMAGENET_TEMPLATES", IMAGENET_TEMPLATES[:1]))
        yield


def reads_bank(method: Method) -> bool:
    """Whether frozen image features from a bank spare the method anything."""
    return "frozen_image_features" in method.needs or Can.USE_FROZEN_FEATURES in method.config.can


def training(work: Work, backbone: Backbone) -> Training:
    """The method, ready to train; to be called, and to run, within :func:`computed`."""
    cls = find_method(work.method)
    given = {"data.batch_size": work.batch_size} if work.batch_size else {}
    config = build_config(work.method, overrides={**given, **dict(work.settings)})
    class_names, n, size = names(work.classes), config.data.batch_size, backbone.image_size
    torch.manual_seed(1)
    method = cls(backbone, class_names, config.options).to(backbone.device)
    # Made once in a run, before the steps that are measured.
    frozen_class_features(backbone, class_names, [method.template])
    frozen_class_features(backbone, class_names, IMAGENET_TEMPLATES[:1], "raw")
    random = torch.Generator().manual_seed(2)
    images, second = torch.randn(2, n, 3, size, size, generator=random)
    features = normalize(torch.randn(n, backbone.embed_dim, generator=random), dim=-1)
    taught = (3 * torch.randn(n, work.classes, generator=random)).softmax(-1)
    bank, reads_images = work.way == "bank", config.reads_pixels or work.way != "bank"
    # Where the official views never change, neither do their frozen features; plain computes them in every step.
    constant = config.data.views == "center" and work.way != "plain"
    if constant:
        features = backbone.encode_images(images)
    views = Batch(
        images if reads_images else None,
        torch.arange(n) % work.classes,
        frozen_image_features=features if bank or constant else None,
        teacher_probabilities=taught if "teacher_probabilities" in method.needs else None,
        second_view=second if method.patch_size else None,
    )
    return Training(method, cast(Any, OneBatch(views)), config.optim, config.train)


def one_step(job: Training) -> float:
    """Train for one step; returns the loss."""
    logs: list[EpochLog] = []
    job.config = replace(job.config, epochs=job.epoch + 1)
    job.run([EachEpoch(logs.append)])
    return sum(logs[0].losses.values())


def ways_of(method: str, backbone: Backbone, asked: tuple[str, ...]) -> list[str]:
    """The ways asked for, without the bank where it spares the method nothing."""
    with computed(Work(method, "default", backbone.name, 2), backbone):
        reads = reads_bank(find_method(method)(backbone, names(2)))
    return [way for way in asked if way != "bank" or reads]


def peak_memory(work: Work) -> dict[str, float]:
    """Bytes of CPU memory that one step needs at most, in a new process, and what it held before the step."""
    return in_new_process(_peak_memory, work, torch.get_num_threads())


def in_new_process(measure: Callable[..., Any], work: Work, *more: Any) -> Any:
    """What ``measure`` gives for the work there; raises VlpromptError if the process dies (memory full?)."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure, work, *more).result()
        except BrokenProcessPool:
            raise VlpromptError(
                f"the process of {work.method}, {work.way}, {work.classes} classes died: was memory full?"
            ) from None


def _peak_memory(work: Work, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    backbone = load(work.backbone, work.device, work.precision)
    with computed(work, backbone):
        job = training(work, backbone)
        before = resident("VmRSS")
        one_step(job)
    return {"before": before, "peak": resident("VmHWM")}


def resident(key: str) -> float:
    """Bytes of memory of this process: now (VmRSS), or at most so far (VmHWM); not a number where no one says."""
    file = Path("/proc/self/status")
    found = re.search(rf"^{key}:\s+(\d+) kB$", file.read_text() if file.is_file() else "", re.MULTILINE)
    return 1024 * float(found[1]) if found else float("nan")


def data_seconds(method: Method, way: str, batch_size: int, folder: Path, clock: Clock) -> float:
    """What making one batch of views takes, in the calling thread, in the second epoch."""
    if way == "bank" and Can.USE_FROZEN_FEATURES in method.config.can:
        return 0.0  # features and labels are read from a memory-mapped file
    split = pictures(folder, batch_size, PICTURE, 1)
    with ImageReader(0, room=0 if way == "plain" else None) as reader:
        labels, preprocess = split.labels("train"), method.backbone.preprocess
        views = TrainingViews(
            split.paths("train"),
            labels,
            preprocess,
            batch_size,
            1,
            reader=reader,
            patch_size=method.patch_size,
            center=build_config(method.name).data.views == "center",
        )
        list(views.epoch(0))
        return clock.seconds(lambda: list(views.epoch(1)))


def measure(
    work: Work,
    ways: tuple[str, ...],
    backbone: Backbone,
    repeats: int,
    clock: Clock,
    memory: bool = True,
    cold: bool = False,
) -> dict[str, Any]:
    """All figures of one method; ``work.way`` does not matter."""
    works = {way: replace(work, way=way) for way in ways_of(work.method, backbone, ways)}
    backbones = dict.fromkeys(works, backbone)
    if "bf16" in works:
        works["bf16"] = replace(works["bf16"], precision="bf16")
        backbones["bf16"] = load(work.backbone, work.device, "bf16")
    jobs: dict[str, Training] = {}
    for way, each in works.items():
        with computed(each, backbones[way]):
            jobs[way] = training(each, backbones[way])
    rows: dict[str, dict[str, Any]] = {way: {} for way in works}
    parts: dict[str, list[Parts]] = {way: [] for way in works}
    configs: dict[str, ImageConfig | TextConfig]
    configs = {"image": backbone.image_tower.config, "text": backbone.text_tower.config}
    seconds: dict[str, list[float]] = {way: [] for way in works}
    rates: dict[str, list[float]] = {name: [] for name in configs}
    peaks = dict.fromkeys(works, 0.0)
    for _ in range(repeats + (not cold)):
        for way, each in works.items():
            now = Parts(clock)
            if clock.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(clock.device)
            with computed(each, backbones[way]), now.watching(jobs[way], way != "plain"):
                began = clock()
                loss = one_step(jobs[way])
                seconds[way].append(clock() - began)
            rows[way].setdefault("loss", loss)
            parts[way].append(now)
            if clock.device.type == "cuda":
                peaks[way] = max(peaks[way], torch.cuda.max_memory_allocated(clock.device))
        for name, config in configs.items():
            if at_once := max(p[0].rows[name] for p in parts.values()):
                rates[name].append(matmul_rate(config, at_once, clock, backbone.dtype))
    if not cold:
        for way in works:
            seconds[way], parts[way] = seconds[way][1:], parts[way][1:]
    batch_size = jobs["default" if "default" in jobs else ways[0]].views.images_per_batch
    rate = {name: statistics.median(r) for name, r in rates.items() if r}
    with TemporaryDirectory() as folder:
        for way in works:
            timed = parts[way]
            split = {name: statistics.median(p.seconds[name] for p in timed) for name in timed[0].seconds}
            step = statistics.median(seconds[way])
            rows[way] |= {
                "step_s": step,
                "steps_s": seconds[way],
                "split_s": {**split, "rest": step - sum(split.values())},
                "data_s": data_seconds(jobs[way].method, way, batch_size, Path(folder), clock),
                "flops": timed[0].flops,
                "epoch_s": step * max(SHOTS * work.classes // batch_size, 1),
                "share_of_matmul_rate": {
                    name: timed[0].flops[name] / split[name] / rate[name]
                    for name in rate
                    if split[name] and backbones[way] is backbone  # whose precision the rate is of
                },
            }
            if clock.device.type == "cuda":
                rows[way]["memory"] = {"peak": peaks[way]}
            elif memory:
                rows[way]["memory"] = peak_memory(works[way])
    ratios = {
        way: [a / b for a, b in zip(seconds["plain"], seconds[way], strict=True)]
        for way in works
        if "plain" in works and way != "plain"
    }
    return {
        "method": work.method,
        "backbone": work.backbone,
        "classes": work.classes,
        "batch_size": batch_size,
        "matmul_rate": rate,
        "ratios": {way: {"median": statistics.median(r), "range": [min(r), max(r)]} for way, r in ratios.items()},
        "ways": rows,
    }


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"methods; {', '.join(METHODS)} if none is given")
    parser.add_argument("--backbone", default="mini", help="mini, another backbone, or random:32, random:16 (ViT-B)")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--batch-size", type=int, help="the official one of each method if not given")
    parser.add_argument("--ways", default=",".join(EQUAL_WAYS), help=f"which of {','.join(WAYS)}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="count the first round too, where steps take long")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peaks of CPU memory")
    hardware(parser)


def hardware(parser: argparse.ArgumentParser) -> None:
    """Options that several commands share."""
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu counts the process's own computing, which other processes on the machine do not slow down",
    )


def chosen_ways(asked: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """The ways named with commas; raises ConfigError for one that is not allowed."""
    ways = tuple(asked.split(","))
    for way in ways:
        if way not in allowed:
            raise ConfigError(unknown("way", way, allowed))
    return ways


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the methods one after the other."""
    ways = chosen_ways(args.ways, WAYS)
    if args.clock == "cpu" and args.device != "cpu":
        raise ConfigError(f"--clock cpu counts the processor's work (--device {args.device})")
    backbone = load(args.backbone, args.device, args.precision)
    clock, rows = Clock(torch.device(args.device), args.clock == "cpu"), []
    for method in args.methods or METHODS:
        work = Work(method, "", args.backbone, args.classes, args.batch_size, args.device, args.precision)
        rows.append(measure(work, ways, backbone, args.repeats, clock, not args.no_memory, args.cold))
        print(f"{method}: done", file=sys.stderr)
    return {"environment": machine(backbone), "rows": rows}


def table(result: dict[str, Any]) -> str:
    """A row for each method and way; times in ms, memory in GB."""
    lines = [
        "| method | batch | way | step, ms | plain ÷ it | of the texts | image | text | rest | optimiser | data | "
        "epoch, s | % of matmul rate: image, text | peak, GB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        texts = row["ways"].get("plain", {}).get("split_s", {}).get("text")
        for way, r in row["ways"].items():
            parts = [f"{1000 * r['split_s'][part]:.1f}" for part in ("image", "text", "rest", "optimiser")]
            ratio, shares = row["ratios"].get(way), r["share_of_matmul_rate"]
            low, high = ratio["range"] if ratio else (0, 0)
            spread = f" ({low:.1f}–{high:.1f})" if low < high else ""
            cells = [
                *(row["method"], row["batch_size"], way, f"{1000 * r['step_s']:.1f}"),
                f"{ratio['median']:.1f}{spread}" if ratio else "",
                f"{texts / r['split_s']['text']:.1f}" if ratio and r["split_s"]["text"] else "",
                *parts,
                f"{1000 * r['data_s']:.1f}",
                f"{r['epoch_s']:.1f}",
                ", ".join(f"{100 * shares[name]:.0f}" if name in shares else "–" for name in ("image", "text")),
                f"{r['memory']['peak'] / 1e9:.2f}" if "memory" in r else "–",
            ]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)
