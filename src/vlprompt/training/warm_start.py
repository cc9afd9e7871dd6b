"""Training that begins with the prompts of an earlier run."""

from __future__ import annotations

from dataclasses import asdict

from torch import Tensor

from vlprompt.artefact.artefact import read_artefact_config, read_prompts
from vlprompt.artefact.hub import find_model
from vlprompt.data.splits import find_classes
from vlprompt.errors import ConfigError
from vlprompt.methods import Method
from vlprompt.training.checkpoints import checkpoint_file, read_method_state


def start_from(method: Method, name: str) -> None:
    """Give a method what a tuned model (a run, an artefact, a hub id) has learned; tensors must be the same by name and
    shape, of whatever method.

    A run's last checkpoint is read where the tuned model leaves out what only training needs (MaPLe's maps). Raises
    ConfigError, naming tensor and settings that differ, if it does not fit or was tuned on another backbone, and
    ArtefactError for what is no tuned model.
    """
    what = f"train.warm_start = {name}"
    folder = find_model(name)
    saved = read_artefact_config(folder)
    if saved["backbone"]["fingerprint"] != method.backbone.fingerprint:
        raise ConfigError(
            f"{what}: it was tuned on '{saved['backbone']['name']}', and this is '{method.backbone.name}'"
        )
    state, own = read_prompts(folder, saved["prompts"]), method.state_dict()
    if set(state) != set(own) and checkpoint_file(folder).is_file():
        state = read_method_state(folder)
    state |= {key: own[key] for key in method.of_its_classes}
    if not method.takes_new_classes and find_classes(method.class_names, saved["class_names"]) != [
        *range(len(saved["class_names"]))
    ]:
        raise ConfigError(f"{what}: it has prompts for each of its own classes, and these are others")
    if difference := _difference(state, own):
        mine = asdict(method.config)
        keys = [k for k, v in saved["settings"].items() if k in mine and mine[k] != v]
        other = "; ".join(f"method.{k} = {saved['settings'][k]} there, {mine[k]} here" for k in keys)
        there = f" of method '{saved['method']}'" if saved["method"] != method.name else ""
        raise ConfigError(f"{what}{there}: {difference}" + (f" ({other})" if other else ""))
    method.load_state_dict(state)


def _difference(state: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    """What keeps tensors from fitting a method, in words; empty if nothing does."""
    for key in sorted({*state, *own}):
        if key not in own:
            return f"it has '{key}', which is not learned here"
        if key not in state:
            return f"it has no '{key}'"
        if state[key].shape != own[key].shape:
            return f"its '{key}' is {list(state[key].shape)}, and here {list(own[key].shape)}"
    return ""
