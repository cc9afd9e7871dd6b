"""What ``vlprompt bank build`` is told, checked as a whole."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt

from vlprompt.bank.regions import Crops
from vlprompt.config.schema import DataConfig, Many, TeacherConfig, checked
from vlprompt.errors import ConfigError


@dataclass(frozen=True)
class BankConfig:
    """What ``vlprompt bank build`` is told."""

    data: DataConfig
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    crops: Crops = field(default_factory=Crops)
    backbone: str | None = None
    """Student whose frozen features are kept, given as --backbone of train; none are kept if not given."""
    seed: Annotated[int, Ge(0), Lt(2**63)] = 1
    """Which images, where there are few shots."""
    regions: Many = 500
    """R, regions of each image."""
    top_k: Many = 10
    """Classes of each region whose probabilities are kept."""
    features: Literal["fp32", "fp16"] = "fp32"
    """fp32 or fp16, in which the student's features are kept."""
    batch_size: Many = 50
    """Regions that the towers read at once."""
    device: str = "cpu"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the towers."""
    part: tuple[int, int] = (1, 1)
    """(i, n): the i-th of n builds that share the work."""


def bank_config(values: Mapping[str, Any]) -> BankConfig:
    """Check a build's settings, given by flat keys; raises ConfigError that lists every value out of range."""
    problems: list[str] = []
    sections: dict[str, type] = {"data": DataConfig, "teacher": TeacherConfig, "crops": Crops}
    nested: dict[str, dict[str, Any]] = {section: {} for section in ("", *sections)}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        nested[section][name] = value
    whole = {section: checked(cls, nested[section], f"{section}.", problems) for section, cls in sections.items()}
    config = checked(BankConfig, nested[""] | {k: v for k, v in whole.items() if v is not None}, "", problems)
    if (crops := whole["crops"]) and crops.min_scale > crops.max_scale:
        problems.append(f"crops.min_scale = {crops.min_scale} (allowed: at most max_scale = {crops.max_scale})")
    top, teacher = nested[""], nested["teacher"]
    if not teacher.get("backbone"):
        of_a_teacher = {f"teacher.{key}": value for key, value in teacher.items()}
        of_a_teacher |= {key: value for key, value in top.items() if key == "top_k"}
        problems += [f"{key} = {value}: there is no teacher (--teacher)" for key, value in of_a_teacher.items()]
    if "features" in top and not top.get("backbone"):
        problems.append(f"features = {top['features']}: there is no student whose features to keep (--backbone)")
    if not (teacher.get("backbone") or top.get("backbone")):
        problems.append("a bank keeps a teacher's labels, a student's features, or both: give --teacher or --backbone")
    if problems:
        raise ConfigError("; ".join(problems))
    return config


def parse_part(text: str) -> tuple[int, int]:
    """(I, N) of "I/N"; raises ConfigError for anything else."""
    i, n = (int(x) for x in text.split("/")) if re.fullmatch(r"[0-9]+/[0-9]+", text) else (0, 0)
    if not 1 <= i <= n:
        raise ConfigError(f"part = {text} (allowed: I/N with I from 1 to N)")
    return i, n
