"""What following ``vlprompt compare`` costs: test accuracy of what it recommends, against the best in hindsight.

    python tools/regret.py run --root DATA --out runs/regret --minutes 10   # writes docs/results/regret.csv
    python tools/regret.py page                                             # docs/compare.md; --check changes nothing

Of each data set and seed it compares on the 16 images a class that ``tools/which.py`` draws, without val images. The
runs of that table (``--figures``) say what each method would have brought: they have the same images and settings, so
that nothing is trained twice. DATA as there.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pages import REPOSITORY, write_changed
from pages import table as markdown
from which import BACKBONE, PAGE, SHOTS, arguments, marked, read_csv, read_table, say, source, without_val, write_csv

from vlprompt.artefact.artefact import load_artefact
from vlprompt.bench.results import Row
from vlprompt.bench.rows import fingerprint
from vlprompt.compare.plan import SHORTLIST, candidates
from vlprompt.compare.run import RESULTS, compare
from vlprompt.data.datasets import load_dataset
from vlprompt.data.reading import ImageReader
from vlprompt.errors import ConfigError, DataError, VlpromptError
from vlprompt.training.evaluate import EvaluationImages, evaluate

REGRET = REPOSITORY / "docs" / "results" / "regret.csv"
COMMAND = "python tools/regret.py run --root DATA --out runs/regret"


@dataclass(frozen=True)
class Regret:
    """A comparison; accuracies in percent."""

    data: str
    seed: int
    minutes: float
    methods: str
    recommended: str
    held_out: float
    """Accuracy of what was recommended on the images held out."""
    test: float
    """Accuracy of the model that was left, on test images."""
    row: float
    """The same of the bench's run of this method: equal, if the settings are."""
    best: str
    best_test: float
    """Of the bench's runs of all the methods."""
    regret: float
    """``best_test`` − ``test``."""
    left_out: str
    """Methods that were not compared, for want of time or as they failed."""
    other_settings: str
    """Methods whose run in the bench has other settings than ``compare`` gives them."""


def do_regret(
    data: Sequence[str], root: Path, out: Path, figures: Path, methods: Sequence[str], minutes: float,
    seeds: Sequence[int], file: Path,
) -> None:  # fmt: skip
    """Compare what is not compared yet, and write what that costs."""
    known = {(row.data, row.seed, row.name): row for row in read_table(figures)}
    places = [(name, seed) for name in data for seed in seeds]
    if lacking := [(*place, m) for place in places for m in methods if (*place, m) not in known]:
        raise DataError(f"{figures} has no run of {', '.join(map(str, lacking[0]))} (data set, seed, method)")
    found = []
    for name, seed in places:
        place = out / name / f"seed_{seed}" / f"minutes_{minutes:g}"
        rows = {m: known[name, seed, m] for m in methods}
        found.append(regret_of(name, root, place, without_val(name, root, out), rows, minutes, seed))
        say(f"{name}, seed {seed}: {found[-1].recommended}, regret {found[-1].regret:.2f}")
        write_csv(file, found, Regret)


def regret_of(
    data: str, root: Path, place: Path, split_file: Path, rows: dict[str, Row], minutes: float, seed: int
) -> Regret:
    """Compare the methods of these runs, if that is not done in ``place``."""
    where = source(data, root)
    if not (place / RESULTS).is_file():
        shutil.rmtree(place, ignore_errors=True)  # what was stopped would go on with all its minutes
        compare(
            where, root=root, split_file=split_file, methods=list(rows), minutes=minutes, out=place, shots=SHOTS,
            seed=seed, backbone=BACKBONE, say=say,
        )  # fmt: skip
    told = json.loads((place / RESULTS).read_text("utf-8"))
    left_out, compared = ([line["method"] for line in told[key]] for key in ("left_out", "rows"))
    if {*left_out, *compared} != set(rows):
        raise ConfigError(f"{place} compared other methods ({', '.join([*compared, *left_out])}): remove it")
    split = load_dataset(where, root, split_file).split
    with ImageReader(room=0) as reader:
        images = EvaluationImages(split.paths("test"), split.labels("test"), reader)
        test = evaluate(load_artefact(place), images, split.class_names).accuracy
    accuracy = {name: row.accuracy for name, row in rows.items() if row.accuracy is not None}
    best = max(accuracy, key=lambda name: accuracy[name])
    settings = {"data.name": where, "data.split_file": str(split_file), "data.shots": SHOTS, "backbone": BACKBONE}
    others = [c.name for c in candidates(list(rows), settings) if fingerprint(c.config) != rows[c.name].settings]
    return Regret(
        data=data,
        seed=seed,
        minutes=minutes,
        methods=" ".join(rows),
        recommended=told["best"],
        held_out=told["rows"][0]["accuracy"],
        test=test,
        row=accuracy[told["best"]],
        best=best,
        best_test=accuracy[best],
        regret=accuracy[best] - test,
        left_out=" ".join(left_out),
        other_settings=" ".join(others),
    )


def table(found: Sequence[Regret], rows: Iterable[Row]) -> str:
    """In Markdown; and what always taking the same method would cost, by the same figures."""
    head = ["data set", "seed", "recommended", "held out, %", "test, %", "best in hindsight", "its test, %", "regret"]
    lines = [
        [
            r.data, str(r.seed), f"`{r.recommended}`", f"{r.held_out:.1f}", f"{r.test:.1f}", f"`{r.best}`",
            f"{r.best_test:.1f}", f"{r.regret:.1f}", ", ".join(f"`{name}`" for name in r.left_out.split()),
        ]
        for r in found
    ]  # fmt: skip
    accuracy = {(row.data, row.seed, row.name): row.accuracy or 0.0 for row in rows}
    always = {
        m: statistics.mean(r.best_test - accuracy[r.data, r.seed, m] for r in found) for m in found[0].methods.split()
    }
    least = min(always, key=lambda m: always[m])
    regrets = [r.regret for r in found]
    text = (
        f"On average {statistics.mean(regrets):.2f} points are lost over {len(found)} comparisons of "
        f"{found[0].minutes:g} minutes, {max(regrets):.2f} at most. Who always takes one method loses at least "
        f"{always[least]:.2f} on average: with `{least}`, which only hindsight names."
    )
    if others := sorted({m for r in found for m in r.other_settings.split()}):
        text += f" The runs of {', '.join(f'`{m}`' for m in others)} have other settings than `compare` gives."
    return f"{markdown([*head, 'left out'], lines)}\n\n{text}"


def main() -> int:
    """Read the arguments and do what they say."""
    parser, runs = arguments(__doc__, "compare, and measure what that costs")
    runs.add_argument("--methods", type=lambda text: text.split(","), default=list(SHORTLIST))
    runs.add_argument("--minutes", type=float, default=10.0)
    runs.add_argument("--csv", type=Path, default=REGRET)
    given = parser.parse_args()
    try:
        if given.command == "run":
            do_regret(
                given.data, given.root, given.out, given.figures, given.methods, given.minutes, given.seeds, given.csv
            )
            return 0
        if not (found := read_csv(REGRET, Regret)):
            raise DataError(f"there is no {REGRET}: {COMMAND}")
        content = table(found, read_table(given.figures))
        return write_changed({PAGE: marked(PAGE.read_text("utf-8"), "regret", content)}, given.check)
    except VlpromptError as error:
        say(f"error: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
