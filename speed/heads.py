"""Heads on frozen features: seconds of one pass of the frozen tower over all images, and of each fit after it.

Each head is trained as ``vlprompt train`` does it, with official settings. The tower sees each image once, whole, and
that stands for all views that a head asks for: what a fit takes does not depend on what they show. A head with V views
takes V passes, which heads share. Figures are computing time, decoding and the evaluation of epochs included.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from torch import Tensor

from speed.inputs import machine
from speed.job import Watch
from vlprompt.backbones.backbone import unit
from vlprompt.backbones.load import load_backbone
from vlprompt.config.schema import build_config
from vlprompt.methods import Method
from vlprompt.training import loop
from vlprompt.training import run as runs
from vlprompt.training.evaluate import Crop, EvaluationImages

METHODS = (
    "linear_probe", "ss_text", "ss_text_plus", "tip_adapter", "tip_adapter_f", "gda", "zs_lp", "clap", "lp_plus_plus",
    "task_res", "clip_adapter", "prolip",
)  # fmt: skip


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"heads; {', '.join(METHODS)} if none is given")
    parser.add_argument("--data", default="caltech101")
    parser.add_argument("--root", help="folder of the data sets")
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--backbone", default="mini")


class Seen(EvaluationImages):
    """Images that the tower sees once, for all heads and all views."""

    kept: dict[tuple, Tensor] = {}
    passes: list[dict[str, float]] = []
    watch = Watch(defaultdict(float), threading.Lock())

    def pooled(self, method: Method) -> Tensor:
        """What the tower makes of whole images, [n, D]."""
        key = tuple(self.images)
        if key not in self.kept:
            with self.watch.part("pass"):
                began = time.process_time()
                self.kept[key] = super().pooled(method)
                self.passes.append({"images": len(key), "seconds": time.process_time() - began})
        return self.kept[key]

    def frozen(self, method: Method) -> Tensor:
        """The same, projected and normalised, [n, E]."""
        return unit(method.backbone.project(self.pooled(method)))

    def random_view(self, method: Method, k: int, crop: Crop) -> Tensor:
        """The same again."""
        return self.pooled(method)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """One head after the other."""
    rows, watch = [], Seen.watch
    with (
        patch.object(runs, "fit_features", watch.within(runs.fit_features, "fit")),
        patch.object(runs, "finish", watch.within(runs.finish, "fit")),
        patch.object(loop.Training, "run", watch.within(loop.Training.run, "fit")),
        TemporaryDirectory() as folder,
    ):
        for name in args.methods or METHODS:
            given = {
                "data.name": args.data,
                "data.root": args.root,
                "data.shots": args.shots,
                "backbone": args.backbone,
            }
            config = build_config(name, overrides={k: v for k, v in given.items() if v is not None})
            watch.seconds.clear()
            method, result = runs.train(config, Path(folder) / name, images_of=Seen)
            views = config.data.views if isinstance(config.data.views, int) else 1
            row = {"method": name, "classes": len(method.class_names), "views": views, "epochs": result.epochs}
            rows.append({**row, "fit_s": watch.seconds["fit"]})
            print(f"{name}: {rows[-1]['fit_s']:.1f} s", file=sys.stderr)
    return {"environment": machine(load_backbone(args.backbone)), "passes": Seen.passes, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """The pass, and a row for each head."""
    of = [f"{p['images']} images {p['seconds']:.1f} s" for p in result["passes"]]
    lines = [f"One pass: {', '.join(of)}.", "", "| head | classes | views | epochs | fit, s |", "|---|---|---|---|---|"]
    for r in result["rows"]:
        lines.append(f"| `{r['method']}` | {r['classes']} | {r['views']} | {r['epochs']} | {r['fit_s']:.2f} |")
    return "\n".join(lines)
