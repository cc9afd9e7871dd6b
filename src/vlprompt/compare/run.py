"""``vlprompt compare``: the methods worth trying on one's own images, within minutes, and the best of them trained."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vlprompt.artefact.artefact import CONFIG, FILES, write_calibration
from vlprompt.artefact.calibration import fit_calibration
from vlprompt.backbones.load import load_backbone
from vlprompt.bench.shared import SHARED
from vlprompt.compare.clock import Deadline
from vlprompt.compare.images import SeenOnce
from vlprompt.compare.page import page
from vlprompt.compare.plan import SHORTLIST, Candidate, Costs, Held, candidates, digest, hold_out, split_values
from vlprompt.compare.rows import LeftOut, Row, best_of, ranked, reason_for, row_of
from vlprompt.config.images import choose_images
from vlprompt.config.schema import RunConfig
from vlprompt.data.datasets import check_outside, load_dataset
from vlprompt.data.files import content_hash
from vlprompt.data.reading import ImageReader
from vlprompt.data.splits import Item, Split, write_split
from vlprompt.documents import read_sealed, write_sealed
from vlprompt.errors import ConfigError, Interrupted, VlpromptError
from vlprompt.files import held as locked
from vlprompt.files import write_atomically
from vlprompt.training.calibrate import COVERAGE, cross_validated
from vlprompt.training.evaluate import predict_logits
from vlprompt.training.run import Result, train

MINUTES = 10.0
LEAST = 1.0
"""Minutes below which nothing is begun."""
PLAN, RESULTS, PAGE = "plan.json", "compare.json", "compare.html"
SAME = "give the same command again"


@dataclass(frozen=True)
class Comparison:
    """What ``vlprompt compare`` found."""

    data: str
    backbone: str
    images: int
    """That the best method was trained on in the end."""
    held_out: str
    """How images were held out."""
    rows: tuple[Row, ...]
    """The best first."""
    left_out: tuple[LeftOut, ...]
    best: str
    reason: str
    run: str
    """Folder of the best model."""
    page: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        left = [vars(x) for x in self.left_out]
        return {**vars(self), "rows": [vars(row) for row in self.rows], "left_out": left}


def compare(
    data: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    split_file: str | os.PathLike[str] | None = None,
    methods: Sequence[str] = SHORTLIST,
    minutes: float = MINUTES,
    out: str | os.PathLike[str] | None = None,
    backbone: str = "mini",
    device: str = "cpu",
    precision: str = "fp32",
    shots: int | None = None,
    seed: int = 1,
    skip_bad: bool = False,
    say: Callable[[str], object] = lambda text: None,
) -> Comparison:
    """Try methods on held-out images, the cheap ones first, within ``minutes``, and train the best on all of them.

    ``data`` as ``load_dataset`` takes it. Held out are the val images, or stratified folds of the training images; test
    images are not touched. ``out`` (runs/DATA-compare) takes the best model, calibrated on the held-out images, a page
    and what a stopped comparison needs to go on where it was: the same call does so, with more minutes too. A method
    that fails is named with its reason, and the others go on. Raises ConfigError for unknown methods, too few minutes
    and a folder in use, DataError for data with too few images to hold some out.
    """
    if not minutes >= LEAST:
        raise ConfigError(f"minutes = {minutes:g} (allowed: {LEAST:g} or more)")
    if not methods:
        raise ConfigError("methods: there are none to compare")
    began = time.monotonic()
    settings = {
        "data.name": os.fspath(data), "data.root": None if root is None else os.fspath(root), "backbone": backbone,
        "train.device": device, "train.precision": precision, "seed": seed, "data.skip_bad": skip_bad,
    }  # fmt: skip
    tried = candidates(methods, settings)
    dataset = load_dataset(data, root, split_file)
    place = Path(out) if out is not None else Path("runs") / f"{dataset.name}-compare"
    check_outside(place, dataset)
    with ImageReader() as reader:
        split, _ = choose_images(tried[0].config, dataset, reader, say)
    if shots is not None:
        split = replace(split, train=split.few_shot(shots, seed).train)
    held = hold_out(dataset, split)
    loaded = load_backbone(backbone, device, precision)
    pixels = [content_hash(path) for part in ("train", "val") for path in split.paths(part)]
    plan = {"backbone": loaded.fingerprint, "precision": precision, "seed": seed}
    plan["images"] = digest([*split_values(split), pixels])
    with _folder(place, plan) as inside:
        costs = Costs(loaded, dataset.template, held)
        work = _Work(held, inside, began + 60 * minutes, costs, say)
        try:
            per_class = len(held.whole.train) / len(held.whole.class_names)
            tried = [candidate.with_views_for(per_class) for candidate in tried]
            for candidate in (c for c in tried if c.light):
                work.compare(candidate)
            for candidate in sorted((c for c in tried if not c.light), key=work.seconds_for):
                work.compare(candidate)
            if not work.rows:
                first = work.left_out[0]
                raise ConfigError(f"nothing could be compared: {first.method}: {first.reason}")
            work.retrain(place, split.test)
        except (KeyboardInterrupt, Interrupted):
            raise Interrupted(f"to continue: {SAME}") from None
        result = Comparison(
            data=dataset.name,
            backbone=loaded.name,
            images=len(held.whole.train),
            held_out=held.how,
            rows=tuple(ranked(work.rows)),
            left_out=tuple(work.left_out),
            best=best_of(work.rows).method,
            reason=reason_for(work.rows, {name: z.argmax(-1) == work.labels for name, z in work.logits.items()}),
            run=str(place),
            page=str(place / PAGE),
            seconds=time.monotonic() - began,
        )
        write_atomically(place / PAGE, page(result))
        write_atomically(place / RESULTS, json.dumps(result.to_dict(), indent=2, ensure_ascii=False))
        shutil.rmtree(inside / SHARED, ignore_errors=True)
    return result


@contextmanager
def _folder(out: Path, plan: dict[str, Any]) -> Iterator[Path]:
    """Where a comparison keeps what it has done, below ``out``; raises ConfigError if that is another one's."""
    inside = out / "candidates"
    file = inside / PLAN
    if not file.is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"output folder {out} is already in use, and holds no comparison: choose another")
        write_atomically(file, json.dumps(plan))
    elif _json(file) != plan:
        raise ConfigError(f"{out} holds a comparison of other images or settings: choose another folder, or remove it")
    with locked(inside) as ours:
        if not ours:
            raise ConfigError(f"output folder {out} is already in use: another process compares there")
        yield inside


@dataclass
class _Work:
    """A comparison under way."""

    held: Held
    place: Path
    deadline: float
    costs: Costs
    say: Callable[[str], object]
    rows: list[Row] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    logits: dict[str, Tensor] = field(default_factory=dict)
    """Of the images held out, in the order of the folds, by method."""
    retraining: dict[str, float] = field(default_factory=dict)
    """Seconds that training on all images is going to take, by method."""
    candidates: dict[str, Candidate] = field(default_factory=dict)
    stop_at: float = 0.0
    """When the method at hand is stopped, so that there is time to train the best."""

    def __post_init__(self) -> None:
        self.images = partial(SeenOnce, seen={}, folder=self.place / SHARED)

    @property
    def labels(self) -> Tensor:
        """Of the images held out."""
        return torch.tensor([label for fold in self.held.folds for label in fold.labels("val")])

    def compare(self, candidate: Candidate) -> None:
        """Train and measure a method on every fold, if there is time for it."""
        name, folds = candidate.name, self.held.folds
        files = [self._result(candidate, fold) for fold in folds]
        missing = sum(not file.is_file() for file in files)
        try:
            if missing:
                cost = self.costs.of(candidate)
                needed = cost.compared * missing / len(files)
                reserve = max([cost.retrained, *(self.retraining[best_of(self.rows).method] for _ in self.rows[:1])])
                left = max(self.deadline - time.monotonic(), 0)
                if needed + reserve > left:
                    self._leave_out(
                        name,
                        f"about {needed:.0f} s, and {reserve:.0f} s to train the best: {left:.0f} s are left",
                        needed,
                    )
                    return
                self.say(f"{name}: about {needed:.0f} s")
                self.stop_at = self.deadline - reserve
            found = [self._fold(candidate, k, file) for k, file in enumerate(files)]
        except Interrupted:
            raise
        except VlpromptError as error:
            self._leave_out(name, str(error))
            return
        if missing:
            self.costs.seen(candidate)
        logits = torch.cat([z for z, _ in found])
        calibrated, _, _ = cross_validated(logits, self.labels, COVERAGE)
        seconds = sum(about["seconds"] for _, about in found) / len(found)
        about = found[0][1]
        row = row_of(
            name, candidate.preset, logits, calibrated, self.labels, self.held.whole.class_names, seconds,
            about["size"], about["new_names"],
        )  # fmt: skip
        self.rows.append(row)
        self.logits[name], self.candidates[name] = logits, candidate
        self.retraining[name] = (
            cost.retrained if missing else seconds * len(self.held.whole.train) / len(folds[0].train)
        )
        self.say(f"{name}: {row.accuracy:.1f} ± {row.standard_error:.1f} % in {seconds:.0f} s")

    def seconds_for(self, candidate: Candidate) -> float:
        """What comparing it will take, as far as that can be told."""
        try:
            known = all(self._result(candidate, fold).is_file() for fold in self.held.folds)
            return 0.0 if known else self.costs.of(candidate).compared
        except VlpromptError:  # it will say so when its turn comes
            return math.inf

    def _leave_out(self, method: str, reason: str, needs: float | None = None) -> None:
        self.left_out.append(LeftOut(method, reason, needs))
        self.say(f"{method} is left out: {reason}")

    def _result(self, candidate: Candidate, fold: Split) -> Path:
        """Where a method's logits of a fold are kept: another setting, method's file or image is another one."""
        return self.place / f"{candidate.name}-{digest([*candidate.settings, split_values(fold)])}.safetensors"

    def _fold(self, candidate: Candidate, k: int, file: Path) -> tuple[Tensor, dict[str, Any]]:
        """Logits of a fold's held-out images [n, C], and what was measured: from the file, or by training."""
        if known := _read(file):
            return known
        fold, folder = self.held.folds[k], file.with_suffix("")
        split_file = self.place / f"fold-{k + 1}.json"
        # The images held out are measured, and no method chooses anything on them.
        write_split(replace(fold, val=()), split_file)
        config = _with_split(candidate.config, split_file)
        began = time.monotonic()
        watchers = [Deadline(self.stop_at)]
        method, _ = train(config, folder, watchers, resume=_begun(folder), images_of=self.images)
        seconds = time.monotonic() - began
        with ImageReader(room=0, white=method.white) as reader:
            images = self.images(fold.paths("val"), fold.labels("val"), reader)
            logits = predict_logits(method, images, fold.class_names).float().contiguous()
        size = sum((folder / name).stat().st_size for name in FILES)
        about = {"seconds": seconds, "size": size, "new_names": method.takes_new_classes}
        write_atomically(file, save({"logits": logits}, {"about": json.dumps(about)}))
        shutil.rmtree(folder)
        return logits, about

    def retrain(self, out: Path, test: tuple[Item, ...]) -> None:
        """Train the best method on all images, calibrated on those held out, and put the run into ``out``.

        ``test`` images are not looked at; the run's split names them for those who ask it.
        """
        best = best_of(self.rows).method
        candidate, whole = self.candidates[best], self.held.whole
        model = digest([*candidate.settings, split_values(whole)])
        folder, split_file, stamp = self.place / f"best-{model}", self.place / "all.json", self.place / "best.json"
        if (out / CONFIG).is_file() and _json(stamp) == model:
            return
        self.say(f"{best} is trained on all {len(whole.train)} images")
        write_split(replace(whole, test=test), split_file)
        train(_with_split(candidate.config, split_file), folder, resume=_begun(folder), images_of=self.images)
        if int(torch.bincount(self.labels).max()) > 1:
            write_calibration(folder, fit_calibration(self.logits[best], self.labels)[0])
        metrics = replace(read_sealed(folder / "metrics.json", Result), run=str(out))
        write_sealed(folder / "metrics.json", vars(metrics), indent=2)
        # Without its configuration a folder is no tuned model: it goes first and comes last.
        (out / CONFIG).unlink(missing_ok=True)
        for path in sorted(folder.iterdir(), key=lambda path: path.name == CONFIG):
            target = out / path.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)
        folder.rmdir()
        write_atomically(stamp, json.dumps(model))


def _with_split(config: RunConfig, split_file: Path) -> RunConfig:
    return replace(config, data=replace(config.data, split_file=str(split_file)))


def _begun(folder: Path) -> bool:
    """Whether a run can be resumed there; what was stopped before it began is taken away."""
    if (folder / "config.yaml").is_file():
        return True
    if folder.exists():
        shutil.rmtree(folder)
    return False


def _json(file: Path) -> Any:
    """What a file of a comparison holds; None if it cannot be read."""
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _read(file: Path) -> tuple[Tensor, dict[str, Any]] | None:
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as f:
            return f.get_tensor("logits").clone(), json.loads(f.metadata()["about"])
    except (SafetensorError, KeyError, TypeError, ValueError):
        return None
