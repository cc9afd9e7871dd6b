"""Old checkpoints to safetensors, without ever running the code that a pickle may hold."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from vlprompt.errors import BackboneError, one_line
from vlprompt.files import write_atomically

NESTED = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts keep the weights."""


def convert(file: Path, out: Path) -> int:
    """Write the tensors of a ``.bin`` or ``.pt`` state dict as safetensors; returns how many there are.

    Raises BackboneError if the file is a TorchScript archive, holds anything but tensors and plain values, or
    cannot be read; ``out`` is written whole or not at all.
    """
    if out.suffix != ".safetensors":
        raise BackboneError(f"{out} must end in .safetensors")
    if out.exists():
        raise BackboneError(f"{out} exists already")
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
    write_atomically(out, save(state))
    return len(state)


def _tensors(content: Any) -> dict[str, Tensor]:
    while isinstance(content, Mapping) and (inner := next((k for k in NESTED if k in content), None)):
        content = content[inner]
    if not isinstance(content, Mapping):
        return {}
    tensors = {str(k).removeprefix("module."): v for k, v in content.items() if isinstance(v, Tensor)}
    return {k: v.detach().clone().contiguous() for k, v in tensors.items()}  # safetensors refuses shared memory


def _is_torchscript(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.split("/")[1:2] == ["code"] or name.endswith("constants.pkl") for name in archive.namelist())
