"""The protocols, each as data: what is trained, and what is measured then; and the runs that one of them asks for."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from vlprompt.backbones.names import hub_id
from vlprompt.config.schema import RunConfig, build_config, config_of
from vlprompt.config.teacher import teacher_name
from vlprompt.data.known.table import DATASETS, find_dataset
from vlprompt.data.splits import Classes
from vlprompt.documents import read_yaml
from vlprompt.errors import ConfigError, one_line, unknown
from vlprompt.methods import find_method
from vlprompt.methods.registry import file_fingerprint


@dataclass(frozen=True)
class Protocol:
    """Which runs, and which measurements of each."""

    about: str
    """What it asks, in a sentence."""
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


LONGEST = 200
"""Bytes of a row's name, which names a folder: systems allow 255."""

PROTOCOLS: dict[str, Protocol] = {
    "base-to-novel": Protocol(
        "Do prompts tuned on half of the classes serve the other half?", train="base", measured=("base", "novel"),
        preset="base-to-novel",
    ),
    "few-shot": Protocol(
        "How much do a few images a class bring?", shots=(1, 2, 4, 8, 16), preset="few-shot",
    ),
    "cross-dataset": Protocol(
        "Do prompts tuned on one data set serve others?", targets="others", preset="cross-dataset"
    ),
    "domain-generalization": Protocol(
        "Do prompts tuned on one data set serve its classes in another look?", targets="domains",
        preset="cross-dataset",
    ),
    "long-tail": Protocol(
        "What becomes of classes with few images where others have many?", preset="long-tail",
        settings={"data.imbalance": 10.0}, groups=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """Images that a tuned model is scored on."""

    data: str
    """As given: a known data set's name, a folder or a CSV file."""
    classes: Classes
    split: str
    """"test" or "val"."""

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells a run's measurements apart: data set as tables print it, classes, split."""
        return data_name(self.data), self.classes, self.split

    def to_dict(self) -> dict[str, str]:
        """The key as it is written."""
        return dict(zip(("data", "classes", "split"), self.key, strict=True))


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


Rows = Mapping[str, tuple[str, Mapping[str, Any]]]
"""Names, each with a method (its name or file) and settings."""


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


def plan(asked: Asked) -> list[Run]:
    """The runs, data set by data set, method by method.

    Raises ConfigError before anything is run: for a protocol, method, preset or setting that does not exist, for
    settings that the protocol decides, for two runs in one folder or two data sets in one column of the tables, for a
    method that lacks its teacher, and where no target data sets are known.
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
    sources, targets = _sources(asked.protocol, protocol, asked.data)
    runs: dict[Path, Run] = {}
    for data in sources:
        measured = [(data, classes) for classes in protocol.measured] + [(target, "all") for target in targets]
        named = [(data_name(name), classes) for name, classes in measured]
        if twice := [name for name, _ in named if named.count((name, "all")) > 1]:
            raise ConfigError(f"data: two data sets would be '{twice[0]}' in the tables: each is given once")
        measurements = tuple(Measurement(name, classes, asked.split) for name, classes in measured)
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


def row_name(name: str, config: RunConfig) -> str:
    """A row as tables print it: it says so where a method learns from images of the classes that it is tested on."""
    mark = "-transductive"
    return name + mark if config.options.transductive and mark not in name else name


def rows_of_methods(methods: Sequence[str]) -> Rows:
    """A row for each method, a name or a file, with its registered name; raises ConfigError if two have the same."""
    rows: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for method in methods:
        name = find_method(method).name
        if name in rows:
            raise ConfigError(f"methods: {rows[name][0]} and {method} are both called '{name}'")
        rows[name] = method, {}
    return rows


def read_rows(file: Path) -> Rows:
    """Named settings from a YAML file, to compare more than methods with their defaults::

        method: dpl                  # of rows that name no other
        set: {carry: add}            # settings of the rows of this method
        rows:
          exact: {instance_to_prompt: exact}
          small: {preset: mini}        # in place of the protocol's
          frozen: {method: zero_shot}

    Raises ConfigError for a file that cannot be read or has another form.
    """
    try:
        content = read_yaml(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read rows from {file}: {one_line(error)}") from None
    if not isinstance(content, dict) or not isinstance(content.get("rows"), dict) or not content["rows"]:
        raise ConfigError(f"{file} must hold rows: names with settings")
    if strange := set(content) - {"method", "set", "rows"}:
        raise ConfigError(f"{file}: {unknown('key', min(map(str, strange)), ('method', 'set', 'rows'))}")
    rows: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for name, settings in content["rows"].items():
        if not isinstance(settings or {}, dict):
            raise ConfigError(f"{file}: row '{name}' must hold settings: {{key: value}}")
        own = dict(settings or {})
        method = own.pop("method", content.get("method"))
        if method is None:
            raise ConfigError(f"{file}: row '{name}' names no method")
        common = content.get("set") or {} if content.get("method") in (None, method) else {}
        rows[str(name)] = method, common | own
    return rows


def take_shard(runs: Sequence[Run], shard: str | None) -> list[Run]:
    """The ``i``-th of ``n`` equal shares of the runs, for ``shard`` = "i/n"; raises ConfigError for what is none."""
    if shard is None:
        return list(runs)
    i, n = map(int, found.groups()) if (found := re.fullmatch(r"(\d+)/(\d+)", shard)) else (0, 0)
    if not 1 <= i <= n:
        raise ConfigError(f"shard = {shard} (allowed: i/n, from 1/n to n/n)")
    return list(runs[i - 1 :: n])


def data_name(data: str) -> str:
    """A data set as folders and tables name it."""
    dataset = find_dataset(data)
    return dataset.name if dataset else Path(os.path.realpath(os.path.expanduser(data))).name.removesuffix(".csv")


def backbone_name(backbone: str) -> str:
    """A backbone as folders and tables name it: of a local one, the last part of its path."""
    path = Path(backbone).expanduser()
    name = path.resolve().name.removesuffix(".safetensors") if path.exists() else hub_id(backbone) or backbone
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "backbone"


_NOT_THE_RESULT = (
    "data.root", "data.workers", "data.max_pixels", "train.device", "train.graphs", "train.report_to", "seed"
)  # fmt: skip


def result_settings(config: RunConfig) -> dict[str, Any]:
    """Every setting that decides a result, flat, except the seed: what runs that are averaged must have in common.

    Data, backbones, banks and split files are there by name, wherever they lie; a method's file by what is in it.
    """
    data, teacher = config.data, config.teacher.backbone

    def last_part(path: str | None) -> str | None:
        return path and Path(path).expanduser().resolve().name

    data = replace(data, name=data_name(data.name), split_file=last_part(data.split_file), bank=last_part(data.bank))
    data = replace(data, descriptions=last_part(data.descriptions), prior=last_part(data.prior))
    named = replace(
        config, method=find_method(config.method).name, backbone=backbone_name(config.backbone), data=data,
        teacher=replace(config.teacher, backbone=teacher and backbone_name(teacher)),
    )  # fmt: skip
    own = file_fingerprint(config.method)
    return {k: v for k, v in named.flat().items() if k not in _NOT_THE_RESULT} | ({"method file": own} if own else {})


def fingerprint(config: RunConfig) -> str:
    """Twelve hexadecimal digits that stand for :func:`result_settings`."""
    return sha256(json.dumps(result_settings(config), sort_keys=True).encode()).hexdigest()[:12]
