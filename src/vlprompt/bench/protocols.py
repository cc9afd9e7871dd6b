"""The protocols, each as data: what is trained, and what is measured then; and the runs that one of them asks for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from vlprompt.bench.rows import Rows, backbone_name, data_name, row_name
from vlprompt.config.schema import RunConfig, build_config, config_of
from vlprompt.config.teacher import teacher_name
from vlprompt.data.known.table import DATASETS, find_dataset
from vlprompt.data.splits import Classes
from vlprompt.errors import ConfigError, unknown
from vlprompt.methods import find_method
from vlprompt.training.attack import Attack, find_attack


@dataclass(frozen=True)
class Protocol:
    """Which runs, and which measurements of each."""

    about: str
    """What it asks, in a sentence."""
    trained_on: str
    """In words, as the next."""
    measured_on: str
    train: Classes = "all"
    """The classes that are trained on."""
    measured: tuple[Classes, ...] = ("all",)
    """The classes of the same data set that are measured."""
    targets: Literal["none", "others", "domains"] = "none"
    """Data sets that are measured beside the one that was trained on: the other ones given, or its domains."""
    shots: tuple[int, ...] = (16,)
    """Training images a class: a run each."""
    preset: str | None = None
    """The methods' preset for it, if they have one; ``PRESET-NAME`` of a data set and ``PRESET-N`` of N shots first."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of all its runs."""
    groups: bool = False
    """Whether the classes are also measured in three groups, of many, medium and few training images."""
    tasks: int | None = None
    """Tasks that the classes arrive in, unless asked otherwise; after each, all classes seen so far are measured."""
    attacked: bool = False
    """Whether the images that are measured are also measured under an attack."""
    unlabelled: bool = False
    """Whether no label of a training image may be read."""
    note: str = ""
    """What its figures are, and whose definition that is."""


LONGEST = 200
"""Bytes of a row's name, which names a folder: systems allow 255."""

PROTOCOLS: dict[str, Protocol] = {
    "base-to-novel": Protocol(
        "Do prompts tuned on half of the classes serve the other half?",
        "the first half of the classes", "both halves, each among its own classes",
        train="base", measured=("base", "novel"), preset="base-to-novel",
    ),
    "few-shot": Protocol(
        "How much do a few images a class bring?", "all classes", "all classes", shots=(1, 2, 4, 8, 16),
        preset="few-shot",
    ),
    "cross-dataset": Protocol(
        "Do prompts tuned on one data set serve others?", "all classes of the first data set given",
        "that one and all others given", targets="others", preset="cross-dataset"
    ),
    "domain-generalization": Protocol(
        "Do prompts tuned on one data set serve its classes in another look?",
        "all classes of the first data set given",
        "that one and its domains (those of `imagenet` and `openmoji` are known; otherwise the others given)",
        targets="domains", preset="cross-dataset",
    ),
    "long-tail": Protocol(
        "What becomes of classes with few images where others have many?",
        "all classes, the first with all shots, the last with a tenth, exponentially fewer in between (`imbalance=10`)",
        "all classes, and three groups of them", preset="long-tail", settings={"data.imbalance": 10.0}, groups=True,
        note="many, medium and few are the thirds of the classes by number of training images; “–”: no test image is "
        "of a class in that third.",
    ),
    "class-incremental": Protocol(
        "What is left of earlier classes where classes arrive in tasks, and no image comes back?",
        "the classes in `--tasks` groups (5), one after the other", "after each, all classes seen so far, together",
        preset="base-to-novel", tasks=5,
        note="last: accuracy on all classes after the last task; average: the mean over tasks of the accuracy on the "
        "classes seen so far (average incremental accuracy: iCaRL, Rebuffi et al., CVPR 2017). Training reads the "
        "images of a task's own classes alone; prompts go on from the task before, heads with a row for each class "
        "keep the rows that earlier tasks fitted. “-memory”: what is kept holds features of earlier training images.",
    ),
    "robustness": Protocol(
        "How much accuracy is left where images are attacked?", "all classes",
        "all classes, as they are and under an attack (`--eps`, `--steps`)", preset="few-shot", attacked=True,
        note="clean: accuracy on the images as they are; the others: robust accuracy, the share of images that are "
        "told right as they are and under the attack (projected gradient descent: Madry et al., ICLR 2018).",
    ),
    "unlabelled": Protocol(
        "How much do training images bring without their labels?", "images of all classes, without labels",
        "all classes", unlabelled=True,
        note="Training reads no labels; with shots, labels decide which images there are, as in KDPL (Mistretta et "
        "al., ECCV 2024).",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """Images that a tuned model is scored on."""

    data: str
    """As given: a known data set's name, a folder or a CSV file."""
    classes: str
    """base, novel or all; seen-t-of-T, those of the first t of T tasks; or pgd-EPS-STEPS: all, attacked."""
    split: str
    """"test" or "val"."""

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells a run's measurements apart: data set as tables print it, classes, split."""
        return data_name(self.data), self.classes, self.split

    @property
    def half(self) -> Classes:
        """base or novel; all where it is neither."""
        return self.classes if self.classes in ("base", "novel") else "all"  # type: ignore[return-value]

    def to_dict(self) -> dict[str, str]:
        """The key as it is written."""
        return dict(zip(("data", "classes", "split"), self.key, strict=True))


def seen(classes: str) -> tuple[int, int] | None:
    """t and T of seen-t-of-T; None for other classes, and where there cannot be such a task."""
    found = re.fullmatch(r"seen-(\d{1,9})-of-(\d{1,9})", classes)
    t, n = (int(found[1]), int(found[2])) if found else (0, 0)
    return (t, n) if n > 1 and 1 <= t <= n else None


def attack_of(classes: str) -> Attack | None:
    """The attack of pgd-EPS-STEPS; None where images are as they are, and where there cannot be such an attack."""
    found = re.fullmatch(r"(pgd)-(\d+/?\d*)-(\d{1,9})", classes)
    try:
        return find_attack(found[1], found[2], int(found[3])) if found else None
    except ConfigError:
        return None


@dataclass(frozen=True)
class Run:
    """One training run of a protocol, and what is measured of it."""

    protocol: str
    name: str
    """The row of the tables that it belongs to: the method's name, or one with settings of its own."""
    config: RunConfig
    measurements: tuple[Measurement, ...]

    @property
    def data(self) -> str:
        """The data set that it is trained on, as tables print it."""
        return data_name(self.config.data.name)

    @property
    def folder(self) -> Path:
        """Below the bench folder."""
        backbone, shots, seed = backbone_name(self.config.backbone), self.config.data.shots, self.config.seed
        return Path(self.protocol, self.data, self.name, backbone, f"shots_{shots}", f"seed_{seed}")

    def __str__(self) -> str:
        return f"{self.data} {self.name}, {self.config.data.shots} shots, seed {self.config.seed}"

    def to_json(self) -> str:
        """In a line, for another process."""
        return json.dumps([self.protocol, self.name, self.config.to_dict(), list(map(astuple, self.measurements))])

    @staticmethod
    def from_json(text: str) -> Run:
        """What :meth:`to_json` gave."""
        protocol, name, config, measurements = json.loads(text)
        return Run(protocol, name, config_of(config), tuple(Measurement(*m) for m in measurements))


@dataclass(frozen=True)
class Asked:
    """What ``vlprompt bench`` is asked for."""

    protocol: str
    rows: Rows
    data: Sequence[str]
    seeds: Sequence[int]
    shots: Sequence[int] = ()
    """The protocol's if none are given."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of all runs; a row's own come before them."""
    teacher: str | None = None
    """For the methods that learn from one."""
    split: str = "test"
    tasks: int | None = None
    """Of class-incremental; its own number if none is given."""
    eps: str | None = None
    """Of robustness, as the next: how far an attack may change a pixel, and in how many steps."""
    steps: int | None = None


def plan(asked: Asked) -> list[Run]:
    """The runs, data set by data set, method by method.

    Raises ConfigError before anything is run: for a protocol, method, preset or setting that does not exist, for
    settings that the protocol decides or does not know, for two runs in one folder or two data sets in one column of
    the tables, for a method that lacks its teacher, and where no target data sets are known.
    """
    if asked.protocol not in PROTOCOLS:
        raise ConfigError(unknown("protocol", asked.protocol, PROTOCOLS))
    protocol = PROTOCOLS[asked.protocol]
    for what, values in (("methods", asked.rows), ("data", asked.data), ("seeds", asked.seeds)):
        if not values:
            raise ConfigError(f"{what}: there must be at least one")
    for name in asked.rows:
        if not name or Path(name).name != name or name.startswith(".") or len(name.encode()) > LONGEST:
            raise ConfigError(f"row '{name[:60]}' is no name of a folder")
    classes = _measured(asked, protocol)
    sources, targets = _sources(asked.protocol, protocol, asked.data)
    runs: dict[Path, Run] = {}
    for data in sources:
        measured = [(data, c) for c in classes] + [(target, "all") for target in targets]
        named = [(data_name(name), c) for name, c in measured]
        if twice := [name for name, _ in named if named.count((name, "all")) > 1]:
            raise ConfigError(f"data: two data sets would be '{twice[0]}' in the tables: each is given once")
        measurements = tuple(Measurement(name, c, asked.split) for name, c in measured)
        for name, (method, settings) in asked.rows.items():
            for shots in asked.shots or protocol.shots:
                for seed in asked.seeds:
                    config = _configure(asked, protocol, method, settings, data, shots, seed)
                    run = Run(asked.protocol, row_name(name, config), config, measurements)
                    if run.folder in runs:
                        raise ConfigError(f"two runs would be {run.folder}: data sets, seeds and shots are given once")
                    runs[run.folder] = run
    return list(runs.values())


def unused(asked: Asked) -> list[str]:
    """A line for what is given and no row uses."""
    learns = any("teacher_probabilities" in find_method(method).needs for method, _ in asked.rows.values())
    return [f"teacher {asked.teacher} is not used: no row learns from one"] if asked.teacher and not learns else []


def _measured(asked: Asked, protocol: Protocol) -> Sequence[str]:
    """What is measured of the data set that is trained on; raises ConfigError for what the protocol does not know."""
    given = {"tasks": protocol.tasks is not None, "eps": protocol.attacked, "steps": protocol.attacked}
    for key in (key for key, known in given.items() if not known and getattr(asked, key) is not None):
        with_it = "class-incremental" if key == "tasks" else "robustness"
        raise ConfigError(f"{key} = {getattr(asked, key)}: it is of {with_it}, not of {asked.protocol}")
    if protocol.tasks is not None:
        n = _tasks(asked)
        return [f"seen-{t}-of-{n}" for t in range(1, n + 1)]
    if protocol.attacked:
        attack = find_attack("pgd", asked.eps, asked.steps)
        assert attack
        return [*protocol.measured, f"pgd-{Fraction((asked.eps or '1/255').strip())}-{attack.steps}"]
    return protocol.measured


def _tasks(asked: Asked) -> int:
    n = PROTOCOLS[asked.protocol].tasks if asked.tasks is None else asked.tasks
    if n is None or n < 2:
        raise ConfigError(f"tasks = {n} (allowed: 2 or more, up to the number of classes)")
    return n


def _sources(name: str, protocol: Protocol, data: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """The data sets that are trained on, and those that each run is measured on beside its own."""
    if protocol.targets == "none":
        return data, ()
    source, targets = data[0], data[1:]
    if protocol.targets == "domains" and not targets and (dataset := find_dataset(source)):
        targets = [d.name for d in DATASETS.values() if d.domain_of == dataset.name]
    if not targets:
        known = sorted({d.domain_of for d in DATASETS.values() if d.domain_of})
        hint = f" (known without: those of {', '.join(known)})" if protocol.targets == "domains" else ""
        raise ConfigError(f"data: {name} needs the data sets to test on after {source}{hint}")
    return [source], targets


def _configure(
    asked: Asked, protocol: Protocol, method: str, own: Mapping[str, Any], data: str, shots: int, seed: int
) -> RunConfig:
    cls, own = find_method(method), dict(own)
    closest = (f"{protocol.preset}-{data_name(data)}", f"{protocol.preset}-{shots}", protocol.preset)
    preset = own.pop("preset", next((p for p in closest if p in cls.presets), None))
    decided = {"data.name": data, "data.classes": protocol.train, "data.shots": shots, "seed": seed}
    decided |= {"data.task": None if protocol.tasks is None else f"1/{_tasks(asked)}"}
    decided |= {"train.warm_start": None} if protocol.tasks is not None else {}
    decided |= {"train.select": "last", "data.balanced": False} if protocol.unlabelled else {}
    taught = {"teacher.backbone": asked.teacher} if asked.teacher and "teacher_probabilities" in cls.needs else {}
    given = {**protocol.settings, **taught, **asked.settings, **own}
    if build_config(method, preset, overrides={**given, "data.classes": "all"}).options.transductive:
        decided["data.classes"] = "all"
    config = build_config(method, preset, overrides={**decided, **given})
    flat = config.flat()
    for key, value in decided.items():
        if flat[key] != value:
            raise ConfigError(f"{key} = {flat[key]}: the protocol and what is asked of bench decide it ({value})")
    teacher_name(config)
    return config


def take_shard(runs: Sequence[Run], shard: str | None) -> list[Run]:
    """The ``i``-th of ``n`` equal shares of the runs, for ``shard`` = "i/n"; raises ConfigError for what is none."""
    if shard is None:
        return list(runs)
    i, n = map(int, found.groups()) if (found := re.fullmatch(r"(\d+)/(\d+)", shard)) else (0, 0)
    if not 1 <= i <= n:
        raise ConfigError(f"shard = {shard} (allowed: i/n, from 1/n to n/n)")
    return list(runs[i - 1 :: n])
