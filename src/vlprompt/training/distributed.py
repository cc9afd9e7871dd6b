"""Several processes, as ``torchrun`` and ``accelerate launch`` start them: who am I, and sums over all of us.

Each process computes its piece of every batch; the gradients of the prompts are summed, so that all processes
take the same step. Prompts are tiny: one sum a step, no wrapper around the method.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from vlprompt.errors import ConfigError, one_line

PATIENCE = timedelta(hours=12)
"""How long processes wait for one another: the first looks at all images alone, a million of them take hours."""


@dataclass(frozen=True)
class Processes:
    """This process among those that train together; by default there are no others."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    """What this process computes on."""

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype by their sums over the processes, in one exchange."""
        if self.size == 1:
            return
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(part.view_as(t))

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process goes through before the others, which then find what it made or downloaded."""
        if not self.first:
            self.wait()
        try:
            yield
        finally:
            if self.first:
                self.wait()


@contextmanager
def join_processes(device: str) -> Iterator[Processes]:
    """Join the processes that the environment (RANK, WORLD_SIZE, LOCAL_RANK) tells of, and leave them at the end.

    With ``device`` "cuda" each process takes the GPU of its local rank. Raises ConfigError if that does not exist,
    if one GPU is asked for by number, or if the others cannot be reached.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Processes(device=device)
        return
    if device.startswith("cuda"):
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if device != "cuda":
            raise ConfigError(f"train.device = {device}: {size} processes take one GPU each, write cuda")
        if local >= torch.cuda.device_count():
            raise ConfigError(f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}")
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    ours = not dist.is_initialized()
    if ours:
        try:
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=PATIENCE)
        except (ValueError, RuntimeError) as error:  # variables that are missing, or a process that never came
            reason = one_line(error)
            raise ConfigError(f"cannot join the {size} processes that WORLD_SIZE tells of: {reason}") from None
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), device)
    finally:
        if ours:
            dist.destroy_process_group()
