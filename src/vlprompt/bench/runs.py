"""One run of a bench: trained or resumed, then measured; its figures lie in its folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Required, TypeVar, cast

from annotated_types import Ge, Le
from pydantic import ConfigDict
from typing_extensions import TypedDict

import vlprompt
from vlprompt.artefact.artefact import FILES, load_artefact
from vlprompt.bank.manifest import read_manifest
from vlprompt.bench.protocols import (
    PROTOCOLS,
    Measurement,
    Run,
    backbone_name,
    fingerprint,
    result_settings,
)
from vlprompt.bench.shared import SHARED, SharedImages, decoded_once
from vlprompt.config.images import run_split
from vlprompt.config.schema import RunConfig
from vlprompt.data.datasets import LoadedDataset, load_dataset
from vlprompt.data.reading import ImageReader, readable
from vlprompt.data.splits import Split, find_classes, in_order, read_split
from vlprompt.documents import MOST_JSON, fitted, parse_json, read_sealed, read_text, unsealed, write_sealed
from vlprompt.errors import ConfigError, DataError, one_line
from vlprompt.methods import Method, find_method
from vlprompt.prompting.prior import read_prior
from vlprompt.training.evaluate import Evaluation, evaluate
from vlprompt.training.run import Environment, Result, saved_config, train

FORMAT_VERSION = 2
"""2 added a checksum; version 1, of before any release, is refused."""
FIGURES = "figures.json"
GROUPS = ("many", "medium", "few")
_OF_TRAINING = ("epochs", "train_accuracy", "val_accuracy", "trainable_parameters", "seconds")

T = TypeVar("T")
Percent = Annotated[float, Ge(0), Le(100 + 1e-9)]
Number = Annotated[float, Ge(0)]


class Measured(TypedDict, total=False):
    """What was measured on some images; where the method cannot be asked, there are none and no figures."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    data: Required[str]
    classes: Required[str]
    split: Required[str]
    n: Required[Annotated[int, Ge(0)]]
    code: str
    seconds: Number
    images_fingerprint: str
    accuracy: Percent
    macro_accuracy: Percent
    calibration_error: Number
    per_class: dict[str, Percent]
    confusion: list[tuple[int, int, int]]
    class_names: list[str]
    groups: dict[str, dict[str, Annotated[int | float, Ge(0)]]]


class Figures(TypedDict, total=False):
    """What ``figures.json`` holds, besides its checksum."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    format_version: Required[int]
    protocol: Required[str]
    data: Required[str]
    name: Required[str]
    method: Required[str]
    backbone: Required[str]
    shots: Required[int]
    seed: Required[int]
    settings: Required[str]
    code: Required[str]
    measured: Required[list[Measured]]
    epochs: int
    train_accuracy: Percent
    val_accuracy: Percent | None
    trainable_parameters: Annotated[int, Ge(0)]
    seconds: Number
    weights: dict[str, str]


Load = Callable[[str, str | None, str | None], LoadedDataset]
"""``load_dataset``, or one that remembers."""


@lru_cache(1)
def code_version() -> str:
    """The version, and eight hexadecimal digits that change with any file of the package."""
    place = Path(vlprompt.__file__).parent
    files = sorted(place.rglob("*.py"), key=lambda file: file.relative_to(place).as_posix())
    content = sha256(b"".join(sha256(file.read_bytes()).digest() for file in files))
    return f"{vlprompt.__version__}+{content.hexdigest()[:8]}"


def do_run(run: Run, out: Path) -> dict[str, Any]:
    """Train a run, or resume it, and measure what is not measured yet; returns the content of its figures.json.

    Raises what :func:`vlprompt.training.run.train` raises, and DataError for data that cannot be measured.
    """
    folder, config, load = out / run.folder, run.config, cache(load_dataset)
    figures = read_figures(folder) or {
        "format_version": FORMAT_VERSION,
        "protocol": run.protocol,
        "data": run.data,
        "name": run.name,
        "method": find_method(config.method).name,
        "backbone": backbone_name(config.backbone),
        "shots": config.data.shots,
        "seed": config.seed,
        "settings": fingerprint(config),
        "code": code_version(),
        "measured": [],
    }
    method: Method | None = None
    if not _trained(folder):
        begun = (folder / "config.yaml").exists()
        images_of = partial(SharedImages, folder=out / SHARED)
        method, _ = train(config, folder, resume=begun, decode=decoded_once(out / SHARED), images_of=images_of)
    figures |= {key: getattr(_read(folder / "metrics.json", Result), key) for key in _OF_TRAINING}
    environment = _read(folder / "environment.json", Environment)
    known = {model: environment.get(f"{model}_fingerprint") for model in ("backbone", "teacher")}
    figures["weights"] = {model: value for model, value in known.items() if value}
    done = set(map(_key, figures["measured"]))
    for measurement in (m for m in run.measurements if m.key not in done):
        if method is None:
            method = load_artefact(folder, config.backbone, config.train.device, config.train.precision)
            if config.data.prior:
                method.take_prior(read_prior(Path(config.data.prior)))
        began = time.monotonic()
        method.take_template(measured_dataset(config, measurement, load).template)
        split = measured_split(config, measurement, load)
        score = measure(method.eval(), config, split, measurement.split, out / SHARED)
        measured: dict[str, Any] = {**measurement.to_dict(), "code": code_version()}
        measured["seconds"] = time.monotonic() - began
        measured["images_fingerprint"] = images_fingerprint(split, measurement.split)
        figures["measured"].append(measured | (described(score, PROTOCOLS[run.protocol].groups) if score else {"n": 0}))
        write_sealed(folder / FIGURES, figures)
    return figures


def told(run: Run, figures: Mapping[str, Any]) -> str:
    """What was measured of a run, in a line."""
    names = ((m, m["classes"] if m["data"] == run.data else m["data"]) for m in figures["measured"])
    return ", ".join(f"{name} {m['accuracy']:.2f} %" if m["n"] else f"{name} –" for m, name in names)


def measured_dataset(config: RunConfig, measurement: Measurement, load: Load = load_dataset) -> LoadedDataset:
    """The data set that a run is measured on; split file and template are of the one that it is trained on."""
    if measurement.data != config.data.name:
        return load(measurement.data, config.data.root, None)
    dataset = load(measurement.data, config.data.root, config.data.split_file)
    return replace(dataset, template=config.data.template or dataset.template)


def measured_split(config: RunConfig, measurement: Measurement, load: Load = load_dataset) -> Split:
    """The classes and images that a run is measured on; raises DataError if there are none."""
    data, dataset = config.data, measured_dataset(config, measurement, load)
    split = dataset.split.subset(measurement.classes)
    if data.val_fraction and not split.val and measurement.split == "val":
        split = split.with_val(data.val_fraction)
    if not split.items(measurement.split):
        raise DataError(f"data set '{dataset.name}' has no {measurement.split} images of {measurement.classes} classes")
    return split


def images_fingerprint(split: Split, part: str) -> str:
    """Twelve hexadecimal digits that stand for a part's images by name, their labels, and the class names."""
    content = json.dumps([split.class_names, [(item.path, item.label) for item in in_order(split.items(part))]])
    return sha256(content.encode()).hexdigest()[:12]


def measure(method: Method, config: RunConfig, split: Split, part: str, shared_folder: Path) -> Evaluation | None:
    """Score a tuned model; None where it cannot be asked about other classes than its own (a linear probe)."""
    if not method.takes_new_classes and None in find_classes(split.class_names, method.class_names):
        return None
    items, paths = split.items(part), split.paths(part)
    how = config.data.workers, method.white, config.data.max_pixels
    kept = _readable(tuple(paths), *how) if config.data.skip_bad else range(len(paths))
    with ImageReader(config.data.workers, room=0, white=method.white, max_pixels=config.data.max_pixels) as reader:
        labels = [items[i].label for i in kept]
        images = SharedImages([paths[i] for i in kept], labels, reader, folder=shared_folder)
        return evaluate(method, images, split.class_names)


@lru_cache(32)
def _readable(paths: tuple[Path, ...], workers: int, white: float | None, max_pixels: int | None) -> Sequence[int]:
    """Which images can be decoded: all are, so once for the runs of a process."""
    with ImageReader(workers, room=0, white=white, max_pixels=max_pixels) as reader:
        return readable(paths, reader, True, lambda text: None)


def described(score: Evaluation, groups: bool) -> dict[str, Any]:
    """A measurement's figures as JSON values; with ``groups`` those of many, medium and few training images too."""
    figures = {**score.to_dict(), "macro_accuracy": score.macro_accuracy, "confusion": score.confusion}
    figures["class_names"] = figures.pop("classes")
    return figures | ({"groups": group_figures(score.confusion, len(score.classes))} if groups else {})


def group_figures(confusion: Sequence[Sequence[int]], n_classes: int) -> dict[str, dict[str, float]]:
    """Accuracy (percent) of the thirds of the class list, whose first class has most training images in a long tail.

    A group without images is left out.
    """
    seen, right = [0] * n_classes, [0] * n_classes
    for c, predicted, n in confusion:
        seen[c] += n
        right[c] += n * (c == predicted)
    figures = {}
    for g, group in enumerate(GROUPS):
        classes = [c for c in range(n_classes) if 3 * c // n_classes == g and seen[c]]
        if n := sum(seen[c] for c in classes):
            macro = 100 * sum(right[c] / seen[c] for c in classes) / len(classes)
            figures[group] = {"n": n, "accuracy": 100 * sum(right[c] for c in classes) / n, "macro_accuracy": macro}
    return figures


def read_figures(folder: Path) -> dict[str, Any] | None:
    """A run's figures; None if there are none yet. Raises DataError if they are not what was saved."""
    file = folder / FIGURES
    if not file.is_file():
        return None
    try:
        content = parse_json(read_text(file, MOST_JSON))
        version = content.get("format_version") if isinstance(content, dict) else None
        if version == FORMAT_VERSION:
            return cast("dict[str, Any]", fitted(Figures, unsealed(content)))
    except (KeyError, OSError, ValueError) as error:
        raise _unreadable_error(file, error) from None
    known = isinstance(version, int) and version > FORMAT_VERSION
    advice = f"this vlprompt reads up to {FORMAT_VERSION}: update it" if known else "remove it, and repeat the bench"
    raise DataError(f"{file} has format_version {str(version)[:40]}; {advice}")


def finished(run: Run, out: Path) -> bool:
    """Whether a run is trained, and everything that is asked of it measured."""
    figures = read_figures(out / run.folder)
    done = set(map(_key, figures["measured"])) if figures and _trained(out / run.folder) else set()
    return done >= {m.key for m in run.measurements}


def check_same(run: Run, out: Path, load: Load = load_dataset) -> None:
    """Raise ConfigError if the run in the folder has other settings or data than are asked for now.

    Images count by name, label and class name, not by their pixels; where a run left out unreadable ones, those that it
    was trained on are not compared. A region bank counts by its settings. Runs that are not trained yet compare their
    images themselves when they are resumed.
    """
    folder, data = out / run.folder, run.config.data
    if not (folder / "config.yaml").is_file():
        return
    advice = "choose another folder, or remove it"
    environment = _read(folder / "environment.json", Environment) if (folder / "environment.json").is_file() else {}
    saved = saved_config(folder)
    before, now = result_settings(saved), result_settings(run.config.placed())
    if "method file" in before and "method_fingerprint" in environment:
        before["method file"] = environment["method_fingerprint"]
    before["seed"], now["seed"] = saved.seed, run.config.seed
    if differ := [f"{k} = {before.get(k)}, now {now.get(k)}" for k in before | now if before.get(k) != now.get(k)]:
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise ConfigError(f"{folder} holds results from other settings ({'; '.join(differ[:3])}{more}): {advice}")
    if not _trained(folder):
        return
    if not _read(folder / "metrics.json", Result).skipped and (folder / "split.json").is_file():
        split = run_split(run.config, load(data.name, data.root, data.split_file))
        then = read_split(folder / "split.json", split.root)
        if (then.class_names, then.train, then.val) != (split.class_names, split.train, split.val):
            raise ConfigError(f"{folder} was trained on other images than {run.data} has now: {advice}")
    bank = environment.get("bank_fingerprint")
    if bank and data.bank and bank != read_manifest(Path(data.bank).expanduser()).settings.fingerprint:
        raise ConfigError(f"{folder} was trained on another region bank than {data.bank}: {advice}")
    known = {_key(m): m["images_fingerprint"] for m in (read_figures(folder) or {"measured": []})["measured"]}
    for m in run.measurements:
        if m.key in known and known[m.key] != images_fingerprint(measured_split(run.config, m, load), m.split):
            raise ConfigError(f"{folder} was measured on other images than {m.key[0]} has now: {advice}")


def _trained(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("metrics.json", *FILES))


def _key(measured: Mapping[str, Any]) -> tuple[str, str, str]:
    return measured["data"], measured["classes"], measured["split"]


def _unreadable_error(file: Path, error: Exception) -> DataError:
    return DataError(f"cannot read {file}: {f'it has no {error}' if isinstance(error, KeyError) else one_line(error)}")


def _read(file: Path, kind: type[T]) -> T:
    """What a run has written beside its figures."""
    try:
        return read_sealed(file, kind)
    except (KeyError, OSError, ValueError) as error:
        raise _unreadable_error(file, error) from None
