"""A whole ``vlprompt train``, as a newcomer starts it: where the processor's time goes, from start-up to the last file.

Each run is a process of its own, on 160 photographs of ten classes unless told otherwise, with official settings.
Figures are computing time of all its threads, which other processes on the machine do not slow down much. Start-up ends
where the images are looked for; *towers* are forward and backward passes through blocks, patches and projections.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

METHODS = ("zero_shot", "linear_probe", "clap", "gda", "tip_adapter", "coop", "kgcoop", "maple", "promptsrc", "drople")
PARTS = (
    "start-up",
    "images",
    "steps: towers",
    "steps",
    "fit: towers",
    "fit",
    "evaluation: towers",
    "evaluation",
    "files",
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"methods; {', '.join(METHODS)} if none is given")
    parser.add_argument("--data", default="clothing-demo")
    parser.add_argument("--given", default="", help="more for vlprompt train: '--shots 16 --root DATA'")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each method, of which the median counts")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """One method after the other."""
    from speed.inputs import machine
    from vlprompt.backbones.load import load_backbone

    rows = []
    for method in args.methods or METHODS:
        runs = [one(method, args.data, args.given.split()) for _ in range(args.repeats)]
        rows.append({"method": method, **{key: statistics.median(r[key] for r in runs) for key in runs[0]}})
        print(f"{method}: {rows[-1]['cpu_s']:.1f} s", file=sys.stderr)
    return {"environment": machine(load_backbone("mini")), "rows": rows}


def one(method: str, data: str, given: list[str]) -> dict[str, float]:
    """Seconds of one run and of its parts; raises VlpromptError if it fails."""
    from vlprompt.errors import VlpromptError

    with TemporaryDirectory() as folder:
        file, out = Path(folder) / "seconds.json", str(Path(folder) / "run")
        command = [sys.executable, "-c", "from speed.job import watched; watched()", str(file)]
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        done = subprocess.run([*command, "train", method, data, "--out", out, *given], capture_output=True, text=True)
        wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise VlpromptError(f"{method} on {data}: {done.stderr.strip()[-500:]}")
        parts = json.loads(file.read_text())
    whole = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {"wall_s": wall, "cpu_s": whole, **parts, "other": whole - sum(parts.values())}


def table(result: dict[str, Any]) -> str:
    """A row for each method: seconds of the run, and its parts in percent."""
    lines = [f"| method | CPU, s | {' | '.join([*PARTS, 'other'])} |", f"|{'---|' * (len(PARTS) + 3)}"]
    for row in result["rows"]:
        shares = [f"{100 * row[part] / row['cpu_s']:.0f}" for part in (*PARTS, "other")]
        lines.append(f"| `{row['method']}` | {row['cpu_s']:.1f} | {' | '.join(shares)} |")
    return "\n".join(lines)


# --- within the run -------------------------------------------------------------------------------


class Watch(threading.local):
    """What this thread is at: seconds of its computing go to one part at a time, the innermost that was entered."""

    def __init__(self, seconds: defaultdict[str, float], lock: threading.Lock) -> None:
        self.seconds, self.lock = seconds, lock
        self.open: list[str] = []
        self.last = time.thread_time()
        self.gradient: float | None = None
        """When the gradient of a tower's output came, within a backward pass."""

    def lap(self) -> None:
        """Give what has passed to the part that is open."""
        now = time.thread_time()
        if self.open:
            with self.lock:
                self.seconds[self.open[-1]] += now - self.last
        self.last = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Within it, time is the part's; towers belong to the part that runs them."""
        self.lap()
        if name == "towers":
            around = self.open[-1] if self.open else "fit"
            name = around if around.endswith("towers") or around == "start-up" else f"{around}: towers"
        self.open.append(name)
        try:
            yield
        finally:
            self.lap()
            self.open.pop()

    def within(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The same function, every call of which is a part."""

        def call(*args: Any, **more: Any) -> Any:
            with self.part(name):
                out = function(*args, **more)
            if name == "towers" and out.requires_grad:
                out.register_hook(self.came)
            return out

        return call

    def came(self, gradient: Any) -> None:
        """From the first gradient of a tower's output on, a backward pass is the towers'."""
        if self.gradient is None:
            self.lap()
            self.gradient = self.last

    def backward(self, grad: Callable[..., Any]) -> Callable[..., Any]:
        """``torch.autograd.grad``, split in two."""

        def call(*args: Any, **more: Any) -> Any:
            self.gradient = None
            out = grad(*args, **more)
            if self.gradient is not None:
                self.open.append(f"{self.open[-1]}: towers")
                self.lap()
                self.open.pop()
            return out

        return call


def watched() -> None:
    """``vlprompt``, whose first argument is the file for the seconds of its parts."""
    file = Path(sys.argv.pop(1))
    import torch

    from vlprompt.__main__ import main  # first of all, as the command does it
    from vlprompt.backbones.towers import ImageTower, TextTower, Tower
    from vlprompt.data.reading import ImageReader
    from vlprompt.training import checkpoints, loop, run

    seconds = defaultdict(float, dict.fromkeys(PARTS, 0.0))
    watch = Watch(seconds, threading.Lock())
    for owner, attribute, name in (
        *((run, loads, "start-up") for loads in ("load_data", "load_backbone", "find_sources", "build", "describe")),
        *((run, fits, "fit") for fits in ("prepare", "fit_features", "finish")),
        (loop.Training, "run", "steps"),
        *((run, tells, "evaluation") for tells in ("predict_logits", "evaluate", "score", "calibrate_trained")),
        *((run, writes, "files") for writes in ("write_sealed", "save_artefact", "_describe", "image_notes")),
        (checkpoints.Keeper, "epoch", "files"),
        (Tower, "run", "towers"),
        (ImageTower, "embed", "towers"),
        (ImageTower, "read", "towers"),
        (TextTower, "read", "towers"),
    ):
        setattr(owner, attribute, watch.within(getattr(owner, attribute), name))
    torch.autograd.grad = watch.backward(torch.autograd.grad)
    ahead = ImageReader._ahead

    def read(reader: ImageReader, make: Callable[[Any], Any], batches: Any) -> Iterator[tuple]:
        def timed(x: Any) -> Any:
            with watch.part("images"):
                return make(x)

        yield from ahead(reader, timed, batches)

    ImageReader._ahead = read  # type: ignore[method-assign, assignment]
    train = run.train

    def whole(*args: Any, **more: Any) -> Any:
        seconds["start-up"] += time.process_time()
        return train(*args, **more)

    run.train = whole
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
    file.write_text(json.dumps(dict(seconds)))
