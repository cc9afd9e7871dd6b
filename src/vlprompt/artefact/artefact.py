"""The artefact: a tuned model as a small folder that reloads elsewhere, without the training data.

``prompts.safetensors`` holds what inference needs, ``config.json`` how to read it, ``README.md`` tells people.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, NotRequired

import torch
from annotated_types import Gt, Lt
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from typing_extensions import TypedDict  # pydantic's, before Python 3.12

from vlprompt.artefact.calibration import Calibration
from vlprompt.artefact.card import model_card
from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.load import load_backbone, whole_name
from vlprompt.backbones.names import public_name
from vlprompt.data.splits import MOST_CLASSES
from vlprompt.documents import MOST_JSON, check_text, fitted, parse_json, read_text, reader, unsealed, write_sealed
from vlprompt.errors import ArtefactError, BackboneError, ConfigError, OutputError, one_line, unknown
from vlprompt.files import is_unfinished, write_atomically
from vlprompt.methods import Method, find_method, method_names
from vlprompt.methods.base import TeacherEntry, Template
from vlprompt.methods.registry import GROUP, file_of
from vlprompt.version import __version__

FORMAT_VERSION = 3
"""2 added ``about`` and ``prompts`` (checksum and shapes), 3 a checksum over all of it; versions 1 and 2, of before any
release, are refused."""

PROMPTS, CONFIG, CARD = "prompts.safetensors", "config.json", "README.md"
FILES = (CONFIG, PROMPTS, CARD)


class FileEntry(TypedDict):
    """A method's file."""

    path: str
    sha256: str


class PromptsEntry(TypedDict):
    """``prompts.safetensors``."""

    sha256: str
    shapes: dict[str, list[int]]


class BackboneEntry(TypedDict):
    """The backbone, which is no part of the artefact."""

    name: str
    fingerprint: str
    licence: NotRequired[str | None]


class ArtefactConfig(TypedDict):
    """What ``config.json`` holds, besides its checksum."""

    format_version: int
    vlprompt_version: str
    method: str
    method_file: NotRequired[FileEntry]
    settings: dict[str, Any]
    class_names: list[str]
    template: str
    white: NotRequired[Annotated[float, Gt(0), Lt(float("inf"))]]
    descriptions: NotRequired[dict[str, list[str]]]
    backbone: BackboneEntry
    teacher: NotRequired[TeacherEntry]
    prompts: PromptsEntry
    about: dict[str, str]
    calibration: NotRequired[dict[str, Any]]


def save_artefact(
    method: Method,
    folder: Path,
    about: Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
    *,
    public: bool = False,
) -> None:
    """Write a tuned model into ``folder``; ``about`` (data, options, metrics) goes into its model card.

    A backbone or teacher in a folder is noted with its whole path, or where the model is for others (``public``) by
    name alone. Whenever the process is killed, the folder holds the model before or the new one, whole. Raises
    OutputError for a folder that has such files and is no tuned model.
    """
    before = (folder / CONFIG).read_bytes() if (folder / CONFIG).is_file() else b""  # a damaged one may be replaced
    tuned = (folder / PROMPTS).exists() and (b'"format_version"' in before or not before.rstrip().endswith(b"}"))
    if not tuned and (other := [name for name in FILES if (folder / name).exists()]):
        raise OutputError(f"cannot write {folder / other[0]}: it is there already, and is no tuned model's")
    backbone, named = method.backbone, public_name if public else whole_name
    state = {k: v.detach().float().cpu().contiguous() for k, v in method.inference_state().items()}
    if lost := _unsaved(method, state):
        warnings.warn(f"'{method.name}' is saved without its {', '.join(lost)}: no parameter, no buffer", stacklevel=2)
    prompts = save(state)
    about = {key: str(value) for key, value in (about or {}).items()}
    config = {
        "format_version": FORMAT_VERSION,
        "vlprompt_version": __version__,
        "method": method.name,
        **_method_file(method),
        "settings": asdict(method.config),
        "class_names": list(method.class_names),
        "template": method.template,
        **({} if method.white is None else {"white": method.white}),
        **_descriptions(method),
        "backbone": {
            "name": named(backbone.name),
            "fingerprint": backbone.fingerprint,
            "licence": backbone.licence,
        },
        **({} if (t := method.teacher) is None else {"teacher": {**t, "name": named(t["name"])}}),
        "prompts": {"sha256": sha256(prompts).hexdigest(), "shapes": {k: list(v.shape) for k, v in state.items()}},
        "about": about,
        **({"calibration": calibration.to_dict()} if calibration else {}),
    }
    # config.json speaks of the model before until it is replaced: that one's prompts stay beside the new till then.
    if (folder / PROMPTS).is_file() and (folder / CONFIG).is_file():
        replaced = (folder / PROMPTS).read_bytes()
        write_atomically(_aside(folder, sha256(replaced).hexdigest()), replaced)
    write_atomically(folder / PROMPTS, prompts)
    write_sealed(folder / CONFIG, config, indent=2)
    write_atomically(folder / CARD, model_card(method, about))
    for left in folder.glob(".*"):  # the prompts aside, and what killed processes were writing
        ours = any(left.name.lstrip(".").startswith(f"{name}.") for name in FILES)
        if ours and (is_unfinished(left) or re.fullmatch(rf"\.{PROMPTS}\.[0-9a-f]{{64}}", left.name)):
            left.unlink(missing_ok=True)


def load_artefact(
    folder: Path,
    backbone: str | Backbone | None = None,
    device: str = "cpu",
    precision: str = "fp32",
    *,
    files: bool = True,
) -> Method:
    """Read a tuned model; ``backbone`` says where its backbone lies if not where it was, or is the loaded one.

    A loaded backbone stays where it is, in its precision. A method that lies in a file of its own is read from there,
    unless ``files`` is false; a warning tells if the file has changed since.

    Raises ArtefactError if the folder is no artefact, comes from a newer version, holds other tensors than were
    saved, does not fit the method, or was tuned on another backbone.
    """
    config = read_artefact_config(folder)
    try:
        cls = _find_method(config, folder, files)
        options = reader(cls.Config).validate_python(config["settings"])
        if extra := set(config["settings"]) - set(asdict(options)):  # pydantic passes them over
            raise ConfigError(unknown(f"setting of {cls.name}", min(extra), asdict(options)))
        class_names, template = _class_names(config["class_names"]), fitted(Template, config["template"])
        state = read_prompts(folder, config["prompts"])
        loaded = _load_backbone(backbone, config["backbone"], folder, device, precision)
        method = cls(loaded, class_names, options, template)
        method.white = config.get("white")
        method.descriptions, method.teacher = config.get("descriptions"), config.get("teacher")
    except (KeyError, TypeError, ValueError, SafetensorError, OSError, ConfigError) as error:
        raise _unreadable_error(folder, error) from None
    try:
        method.load_inference_state(state)
    except (RuntimeError, KeyError) as error:
        reason = one_line(error)
        raise ArtefactError(f"{PROMPTS} in {folder} does not fit {cls.name}: {reason}") from None
    return method.to(loaded.device).eval().requires_grad_(False)


def read_artefact_config(folder: Path) -> ArtefactConfig:
    """What ``config.json`` says; raises ArtefactError if it is not there, not what was saved, or of another version."""
    file = folder / CONFIG
    if not file.is_file():
        raise ArtefactError(f"no tuned model in {folder}: it has no {CONFIG} (was the run finished?)")
    try:
        content = parse_json(read_text(file, MOST_JSON))
        version = content["format_version"]
        newer, older = version > FORMAT_VERSION, version < FORMAT_VERSION
        if not newer and not older:
            return fitted(ArtefactConfig, unsealed(content))
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise _unreadable_error(folder, error) from None
    if older:
        raise ArtefactError(f"{folder} has format_version {version}, of before 0.1: it has no checksums; tune it again")
    raise ArtefactError(f"{folder} has format_version {version}; this vlprompt reads up to {FORMAT_VERSION}: update it")


def load_calibration(folder: Path) -> Calibration | None:
    """What a tuned model's probabilities are calibrated by; None if they are not."""
    values = read_artefact_config(folder).get("calibration")
    try:
        return None if values is None else Calibration.from_dict(values)
    except (TypeError, ValueError) as error:
        raise _unreadable_error(folder, error) from None


def write_calibration(folder: Path, calibration: Calibration) -> None:
    """Put a calibration into a tuned model's folder, over an earlier one."""
    config = {**read_artefact_config(folder), "calibration": calibration.to_dict()}
    write_sealed(folder / CONFIG, config, indent=2)


def _unsaved(method: Method, state: Mapping[str, Tensor]) -> list[str]:
    """Plain tensors and numbers of a method of one's own that are others than when it was built."""

    def plain(of: Method) -> dict[str, Tensor]:
        found = {k: torch.as_tensor(v) for k, v in vars(of).items() if isinstance(v, Tensor | float)}
        return {k: v for k, v in found.items() if k not in state and not hasattr(Method, k)}

    if type(method).__module__.startswith("vlprompt.") or not (now := plain(method)):
        return []
    with torch.random.fork_rng(devices=[]):
        built = plain(type(method)(method.backbone, method.class_names, method.config, method.template))
    return [k for k in now if k not in built or not torch.equal(now[k], built[k].to(now[k]))]


def _method_file(method: Method) -> dict[str, Any]:
    """The file that the method was loaded from, if it is no package's."""
    file = file_of(type(method))
    return {"method_file": {"path": str(file[0]), "sha256": file[1]}} if file else {}


def _descriptions(method: Method) -> dict[str, Any]:
    """The class descriptions that the tuned model reads."""
    if method.descriptions is None or not method.keeps_descriptions:
        return {}
    return {"descriptions": {name: list(texts) for name, texts in method.descriptions.items()}}


def _class_names(names: Sequence[str]) -> tuple[str, ...]:
    if not 1 <= len(names) <= MOST_CLASSES:
        raise ValueError(f"class_names: {len(names)} of them (allowed: 1 to {MOST_CLASSES:,})")
    for name in names:
        check_text(name)
    return tuple(names)


def _find_method(config: ArtefactConfig, folder: Path, files: bool) -> type[Method]:
    name, source = config["method"], config.get("method_file")
    if source is None:
        return find_method(name)
    file = Path(source["path"])
    cls = find_method(name) if name in method_names() else None
    if not cls or (files and (known := file_of(cls)) and known[0] == file):  # else installed, or loaded from elsewhere
        if not files or not file.is_file():
            raise ArtefactError(
                f"{folder} was tuned with method '{name}' of file {file}, which is "
                f"{'not run for a downloaded model' if not files else 'not there'}: load it first with "
                f'find_method("…/{file.name}"), or install it under the entry point group {GROUP}'
            )
        cls = find_method(str(file))
    if (now := file_of(cls)) and now[1] != source["sha256"]:
        warnings.warn(f"{now[0]} has changed since {folder} was tuned with it", stacklevel=3)
    return cls


def _unreadable_error(folder: Path, error: Exception) -> ArtefactError:
    reason = f"no {error} in {CONFIG}" if isinstance(error, KeyError) else one_line(error)
    return ArtefactError(f"cannot read the tuned model in {folder}: {reason}")


def _aside(folder: Path, digest: str) -> Path:
    """Where the prompts with this checksum are while a model is replaced."""
    return folder / f".{PROMPTS}.{digest}"


def read_prompts(folder: Path, expected: PromptsEntry) -> dict[str, Tensor]:
    """The tensors, if they are the ones that were saved."""
    content, aside = (folder / PROMPTS).read_bytes(), _aside(folder, expected["sha256"])
    if sha256(content).hexdigest() != expected["sha256"] and aside.is_file():
        content = aside.read_bytes()
    if sha256(content).hexdigest() == expected["sha256"]:
        state = load(content)
        if bad := sorted(k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()):
            raise ValueError(f"tensor '{bad[0]}' of {PROMPTS} is not finite")
        return state
    raise ValueError(f"{PROMPTS} is not the file that was saved: {_difference(content, expected['shapes'])}")


def _difference(content: bytes, shapes: Mapping[str, list[int]]) -> str:
    try:
        found = {name: list(tensor.shape) for name, tensor in load(content).items()}
    except (SafetensorError, ValueError) as error:
        return f"it is damaged ({one_line(error, 100)})"
    for name in sorted({*shapes, *found}):
        if name not in found:
            return f"tensor '{name}' is missing"
        if name not in shapes:
            return f"tensor '{name}' was added"
        if shapes[name] != found[name]:
            return f"tensor '{name}' is {found[name]} and was {shapes[name]}"
    return f"its content has changed (its sha256 is not the one in {CONFIG})"


def _load_backbone(
    given: str | Backbone | None, expected: BackboneEntry, folder: Path, device: str, precision: str
) -> Backbone:
    try:
        if not isinstance(given, Backbone):
            given = load_backbone(given or expected["name"], device, precision)
    except BackboneError as error:
        if given:
            raise
        advice = "say where it lies with --backbone (in Python: backbone=)"
        raise ArtefactError(f"{folder} was tuned on backbone '{expected['name']}': {error}; {advice}") from None
    if given.fingerprint != expected["fingerprint"]:
        raise ArtefactError(
            f"{folder} was tuned on backbone '{expected['name']}' ({expected['fingerprint'][:12]}…), "
            f"but '{given.name}' has other weights ({given.fingerprint[:12]}…)"
        )
    return given
