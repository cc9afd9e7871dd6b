"""The base-to-novel table of docs/results.md: train on base classes, measure base and novel classes, per seed.

    python tools/base_to_novel.py caltech101 --root DATA --methods zero_shot coop --seeds 1 2 3 --out runs/caltech101

Runs `vlprompt train` and `vlprompt evaluate` and nothing else; finished runs are kept, so it resumes. Prints a
Markdown table: mean ± standard deviation over seeds, HM of the mean base and the mean novel accuracy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from vlprompt.training.evaluate import harmonic_mean


def vlprompt(*arguments: str) -> dict:
    """The JSON object that a `vlprompt` command prints; None where it refuses."""
    done = subprocess.run([sys.executable, "-m", "vlprompt", *arguments, "--json"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"vlprompt {' '.join(arguments)}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def run(method: str, seed: int, args: argparse.Namespace) -> dict[str, float | None]:
    """Accuracy on base and novel classes of one method and seed, in percent."""
    folder = args.out / method / f"seed_{seed}"
    finished = folder / "base_to_novel.json"
    if finished.exists():
        return json.loads(finished.read_text())
    where = ["--root", str(args.root)] if args.root else []
    options = ["--shots", str(args.shots), "--seed", str(seed), "--classes", "base", "--backbone", args.backbone]
    trained = vlprompt("train", method, args.data, *where, *options, *args.set, "--out", str(folder))
    scores: dict[str, float | None] = {"seconds": trained["seconds"]}
    for classes in ("base", "novel"):
        if classes == "novel" and method == "linear_probe":
            scores[classes] = None  # it knows no other classes
            continue
        scores[classes] = vlprompt("evaluate", str(folder), args.data, *where, "--classes", classes)["accuracy"]
    finished.write_text(json.dumps(scores))
    print(method, seed, scores, file=sys.stderr, flush=True)
    return scores


def row(method: str, scores: list[dict[str, float | None]]) -> str:
    """A line of the table."""
    base, novel = ([s[c] for s in scores if s[c] is not None] for c in ("base", "novel"))
    cells = [
        f"{statistics.mean(x):.2f} ± {statistics.stdev(x) if len(x) > 1 else 0:.2f}" if x else "–"
        for x in (base, novel)
    ]
    hm = f"{harmonic_mean(statistics.mean(base), statistics.mean(novel)):.2f}" if novel else "–"
    return f"| {method} | {cells[0]} | {cells[1]} | {hm} | {statistics.mean(s['seconds'] for s in scores):.0f} |"


def main() -> None:
    """Read the arguments, run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--methods", nargs="+", default=["zero_shot", "linear_probe", "coop", "maple", "promptsrc"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--backbone", default="mini")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    print("| method | base | novel | HM | seconds to train |\n|---|---|---|---|---|")
    for method in args.methods:
        print(row(method, [run(method, seed, args) for seed in args.seeds]), flush=True)


if __name__ == "__main__":
    main()
