"""What a run trains one after the other, a stage for each task of its classes; and which methods a protocol can ask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from inspect import unwrap
from pathlib import Path

import torch

from vlprompt.backbones.backbone import Backbone
from vlprompt.bench.protocols import PROTOCOLS, Measurement, Run, seen
from vlprompt.config.schema import RunConfig
from vlprompt.errors import ConfigError
from vlprompt.methods import Can, Method
from vlprompt.methods.heads.common import Head
from vlprompt.training.evaluate import Evaluation, EvaluationImages, predict_logits, score


@dataclass(frozen=True)
class Stage:
    """A training, as ``vlprompt train`` makes it, and what is measured when it is done."""

    folder: Path
    config: RunConfig
    measurements: tuple[Measurement, ...]


def stages(run: Run, out: Path) -> list[Stage]:
    """The run itself; where its classes arrive in tasks, one of each task, in folders ``task_1``, ``task_2`` …"""
    folder, data = out.absolute() / run.folder, run.config.data
    if data.task is None:
        return [Stage(out / run.folder, run.config, run.measurements)]
    result = []
    for m in run.measurements:
        t, n = seen(m.classes) or (0, 0)
        config = replace(run.config, data=replace(data, task=f"{t}/{n}"))
        result.append(Stage(folder / f"task_{t}", config, (m,)))
    return result


def carried(config: RunConfig) -> bool:
    """Whether what a task learned is where the next one begins; otherwise the tasks' models answer side by side."""
    return Can.JOIN_CLASSES not in config.options.can


def side_by_side(methods: Sequence[Method], images: EvaluationImages, class_names: Sequence[str]) -> Evaluation:
    """Score models of some classes each among the classes of all, in this order."""
    heads = [method for method in methods if isinstance(method, Head)]
    for head in heads:
        head.join(heads)
    logits = torch.cat([predict_logits(method, images, method.class_names) for method in methods], 1)
    return score(logits, images.labels, class_names)


def check_method(run: Run, method: Method, backbone: Backbone) -> None:
    """Raise ConfigError, naming the method and why, if the protocol cannot ask it; ``method`` is one of two classes."""
    protocol, why = PROTOCOLS[run.protocol], ""
    if protocol.tasks is not None:
        why = _why_not_in_tasks(run.config, method, backbone)
    elif protocol.attacked:
        why = why_not_attacked(method)
    elif protocol.unlabelled:
        why = _why_not_without_labels(run.config, method)
    if why:
        raise ConfigError(f"{run.protocol} cannot ask row '{run.name}': method '{method.name}' {why}")


def _why_not_in_tasks(config: RunConfig, method: Method, backbone: Backbone) -> str:
    cls = type(method)
    if config.options.transductive:
        return "learns from images of all classes at once (allowed: method.setting=inductive, if it has that)"
    if Can.JOIN_CLASSES in config.options.can:
        return ""
    if not method.takes_new_classes:
        return (
            "learns pieces of each class that it does not keep apart: with the next task's classes they would be lost"
        )
    if cls.fit_features is not Method.fit_features or cls.finish is not Method.finish:
        return "fits what all its classes share to the images of all at once, and keeps no sums to add a task's to"
    more = cls(backbone, ("a", "b", "c"), config.options)
    two, three = ({name: tensor.shape for name, tensor in m.state_dict().items()} for m in (method, more))
    own = next((name for name in three if two.get(name) != three[name]), None)
    return f"learns '{own}' for each of its classes: the next task has other classes" if own else ""


def why_not_attacked(method: Method) -> str:
    """What hinders an attack on the pixels, in words; empty if nothing does."""
    size = method.backbone.image_size
    device = method.backbone.device
    image = torch.zeros(1, 3, size, size, device=device, requires_grad=True)
    logits = unwrap(type(method).predict)(method.to(device).eval(), image, method.class_names)
    return "" if logits.requires_grad else "has logits without a gradient by the image's pixels"


def _why_not_without_labels(config: RunConfig, method: Method) -> str:
    fits = type(method).fit_features is not Method.fit_features
    if method.trains and not config.taught and method.reads_labels:
        return "learns from labels (allowed: one that reads none, or a teacher in their place: teacher.backbone)"
    return "fits on labels (allowed: one that reads none)" if fits else ""
