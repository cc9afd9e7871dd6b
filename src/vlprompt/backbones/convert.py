"""Weights from files: safetensors, and older ones without ever running the code that a pickle may hold."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from vlprompt.documents import MOST_JSON, parse_json, read_text
from vlprompt.errors import BackboneError, OutputError, one_line
from vlprompt.files import write_atomically

State = dict[str, Tensor]
NESTED = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts keep the weights."""
WRAPPERS = ("module.", "model.", "_orig_mod.")
"""What DistributedDataParallel, Lightning and torch.compile put before every name."""
OPENAI_NUMBERS = ("input_resolution", "context_length", "vocab_size")
"""Among the tensors of OpenAI's files alone: what shows that a state dict is theirs."""


def convert(file: Path, out: Path) -> int:
    """Write the tensors of a ``.bin`` or ``.pt`` state dict as safetensors; returns how many there are.

    Raises BackboneError if the file is a TorchScript archive, holds anything but tensors and plain values, or
    cannot be read; ``out`` is written whole or not at all.
    """
    if out.suffix != ".safetensors":
        raise BackboneError(f"{out} must end in .safetensors")
    if out.exists():
        raise BackboneError(f"{out} exists already")
    state = _read_pickle(file)
    write_atomically(out, save(state))
    return len(state)


def read_weights(file: Path) -> State:
    """All tensors of a file of any format, or of the parts that an ``….index.json`` lists, by their unwrapped names."""
    if file.name.endswith(".index.json"):
        state: State = {}
        for part in parts(file):
            state |= _read_file(file.parent / part)
    else:
        state = _read_file(file)
    return _unwrapped(state)


def parts(index: Path) -> list[str]:
    """The files that an index lists, beside it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(part, str) for part in weight_map.values()):
        raise BackboneError(f"cannot read {index}: it has no weight_map from tensors to files")
    return sorted({Path(part).name for part in weight_map.values()})


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; raises BackboneError naming the file."""
    try:
        content = parse_json(read_text(file, MOST_JSON).removeprefix("\ufeff"))
    except (ValueError, OSError) as error:
        raise BackboneError(f"cannot read {file}: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise BackboneError(f"cannot read {file}: it holds no JSON object")
    return content


def _read_file(file: Path) -> State:
    if file.suffix != ".safetensors":
        return _kept_beside(file)
    try:
        with safe_open(file, "pt") as content:
            origin = (content.metadata() or {}).get("converted_from")
        if origin and (older := file.with_name(Path(origin).name)).is_file():
            return _kept_beside(older)  # which may have changed since
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise BackboneError(f"cannot read {file}: {error}") from None


def _kept_beside(file: Path) -> State:
    """An older file's tensors, which are kept as safetensors beside it where that folder can be written."""
    kept = file.with_suffix(".safetensors")
    origin: dict[str, str] | None = None
    try:
        now = file.stat()
        source = {"converted_from": file.name, "bytes": str(now.st_size), "modified": str(now.st_mtime_ns)}
        if kept.exists():
            with safe_open(kept, "pt") as content:
                origin = content.metadata() or {}
            if source.items() <= origin.items():
                return load_file(kept)
    except (SafetensorError, OSError):
        return _read_pickle(file)
    state = _read_pickle(file)
    if origin is None or origin.get("converted_from") == file.name:  # another file of that name is left alone
        with suppress(OutputError):  # a read-only folder: the old file is read every time
            write_atomically(kept, save(state, source))
    return state


def _read_pickle(file: Path) -> State:
    if not file.is_file():
        raise BackboneError(f"checkpoint {file} does not exist")
    if _is_torchscript(file):
        raise BackboneError(
            f"{file} is a TorchScript archive, which is code: where you trust it, save its weights with "
            f"torch.save(torch.jit.load(FILE, 'cpu').state_dict(), 'weights.pt') and convert those"
        )
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError:
        raise BackboneError(f"{file} holds objects beside tensors and plain values: it is not read") from None
    except Exception as error:  # the reader raises almost anything on damaged bytes
        raise BackboneError(f"cannot read {file}: {one_line(error, 160)}") from None
    state = _tensors(content)
    if not state:
        raise BackboneError(f"{file} holds no tensors by name")
    return state


def _tensors(content: Any) -> State:
    while isinstance(content, Mapping) and (inner := next((k for k in NESTED if k in content), None)):
        content = content[inner]
    if not isinstance(content, Mapping):
        return {}
    state = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    numbers = {k: torch.tensor(v) for k, v in content.items() if k in OPENAI_NUMBERS and type(v) is int}
    state = _unwrapped(state) | numbers
    return {k: v.detach().clone().contiguous() for k, v in state.items()}  # safetensors refuses shared memory


def _unwrapped(state: State) -> State:
    """The same tensors without the prefixes that all names share and a wrapper has put there."""
    while state and (prefix := next((w for w in WRAPPERS if all(k.startswith(w) for k in state)), None)):
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def _is_torchscript(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.split("/")[1:2] == ["code"] or name.endswith("constants.pkl") for name in archive.namelist())
