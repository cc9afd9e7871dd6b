"""What training the image tower and training the text tower share: one step, its processes, its saved state."""

from __future__ import annotations

import copy
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save
from torch import Tensor, nn

from vlprompt.files import write_atomically

EPS = 1e-5
"""Of layer norms while towers are trained."""
SHOWN = 50
"""Steps between lines, and that a printed loss is the mean of."""


def processes() -> tuple[int, int, torch.device]:
    """Rank, number of processes and device of this one, as ``torch.distributed.run`` set them up."""
    gpu = torch.cuda.is_available()
    rank, world = 0, 1
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if gpu else "gloo")
        rank, world = dist.get_rank(), dist.get_world_size()
    if not gpu and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    return rank, world, torch.device("cuda", rank) if gpu else torch.device("cpu")


class Training:
    """A tower trained with Muon in bfloat16, its master weights in float32; other parameters with AdamW.

    Args:
        tower: its blocks' matrices go to Muon.
        rest: what is trained beside it, in float32 throughout; of it ``decayed`` are drawn to zero.
        settings: ``learning_rate``, ``weight_decay``, ``warmup`` (steps), ``cooldown`` (share of ``total``).
        total: steps.
    """

    def __init__(
        self, tower: nn.Module, rest: nn.Module | None, settings: Mapping[str, Any], total: int, decayed: str = ""
    ) -> None:
        self.tower, self.rest, self.settings, self.total = tower, rest, settings, total
        self.low = copy.deepcopy(tower).to(torch.bfloat16)
        self.step = 0
        matrices = [p for name, p in tower.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
        others = [p for name, p in tower.named_parameters() if not (name.startswith("blocks.") and p.ndim == 2)]
        beside = dict(rest.named_parameters()) if rest is not None else {}
        drawn = [beside.pop(decayed)] if decayed else []
        rate = settings["learning_rate"]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=rate, weight_decay=settings["weight_decay"], adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(
                [
                    {"params": [*others, *beside.values()], "weight_decay": 0.01},
                    {"params": drawn, "weight_decay": 1.0},
                ],
                lr=rate,
                betas=(0.9, 0.98),
            ),
        ]

    def rate(self) -> float:
        """Share of the learning rate: a short warm-up, constant, then linearly to nothing."""
        cooldown = max(1.0, self.settings["cooldown"] * self.total)
        return min(1.0, (self.step + 1) / self.settings["warmup"], (self.total - self.step) / cooldown)

    def train_step(self, loss_of: Callable[[Any], Tensor]) -> float:
        """One step on this process's part of the batch; ``loss_of`` is given the tower in bfloat16."""
        params: list[Tensor] = list(self.tower.parameters())
        low: list[Tensor] = list(self.low.parameters())
        with torch.no_grad():
            torch._foreach_copy_(low, params)
        self.low.zero_grad()
        beside: list[Tensor] = list(self.rest.parameters()) if self.rest is not None else []
        for p in beside:
            p.grad = None
        loss = loss_of(self.low)
        loss.backward()
        for p, q in zip(params, low, strict=True):
            p.grad = None if q.grad is None else q.grad.float()
        _average([p for p in [*params, *beside] if p.grad is not None])
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.settings["learning_rate"] * self.rate()
            optimizer.step()
        self.step += 1
        return loss.item()

    def run(
        self,
        batch: Callable[[int], Callable[[Any], Tensor]],
        file: Path,
        save_every: int,
        samples: int,
        validate: Callable[[], object],
        first: bool,
    ) -> None:
        """Steps until ``total``, from where ``file`` ends if it is there.

        Args:
            batch: the loss of the batch of a step, as :meth:`train_step` wants it.
            file: where the state goes every ``save_every`` steps, and what ``validate`` finds is printed.
            samples: in a batch of all processes, for the speed.
            first: whether this process prints and saves.
        """
        if file.exists():
            self.load(file)
        losses: list[float] = []
        began, start = time.time(), self.step
        while self.step < self.total:
            losses.append(self.train_step(batch(self.step)))
            if not first:
                continue
            done = self.step == self.total
            if self.step % SHOWN == 0 or done:
                recent, speed = losses[-SHOWN:], samples * (self.step - start) / (time.time() - began)
                shown = f"loss {sum(recent) / len(recent):.3f} {speed:.0f} samples/s"
                print(f"step {self.step}/{self.total} {shown}", flush=True)
            if self.step % save_every == 0 or done:
                self.save(file)
                print(f"step {self.step} {validate()}", flush=True)

    def save(self, file: Path) -> None:
        """All tensors by name, the optimisers' included, in one file."""
        out = {f"tower.{k}": v for k, v in self.tower.state_dict().items()}
        if self.rest is not None:
            out |= {f"rest.{k}": v for k, v in self.rest.state_dict().items()}
        for i, optimizer in enumerate(self.optimizers):
            for j, values in optimizer.state_dict()["state"].items():
                out |= {f"optimizer.{i}.{j}.{k}": torch.as_tensor(v) for k, v in values.items()}
        out["step"] = torch.tensor(self.step)
        write_atomically(file, save({k: v.detach().cpu().clone().contiguous() for k, v in out.items()}))

    def load(self, file: Path) -> None:
        """Go on from a saved state."""
        state = load_file(file)
        self.tower.load_state_dict(part(state, "tower"))
        if self.rest is not None:
            self.rest.load_state_dict(part(state, "rest"))
        for i, optimizer in enumerate(self.optimizers):
            saved: dict[int, dict[str, Tensor]] = {}
            for key, value in part(state, f"optimizer.{i}").items():
                j, name = key.split(".")
                saved.setdefault(int(j), {})[name] = value
            optimizer.load_state_dict({"state": saved, "param_groups": optimizer.state_dict()["param_groups"]})
        self.step = int(state["step"])


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix.``, without it."""
    return {k.removeprefix(prefix + "."): v for k, v in state.items() if k.startswith(prefix + ".")}


def scaled(state: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """A text tower's weights with a residual stream ``factor`` times as large.

    Everything that is added to it is scaled; layer norms divide it out again if their epsilon (``EPS`` in training)
    goes with the factor's square.
    """
    added = re.compile(r"token_embedding\.weight|positions|blocks\.\d+\.(out|fc_2)\.(weight|bias)")
    return {name: factor * v if added.fullmatch(name) else v for name, v in state.items()}


def noise(*shape: int) -> Tensor:
    """Random weights [out, in] that keep the scale of what they are applied to."""
    return torch.randn(shape) * shape[-1] ** -0.5


def draw_by_weight(ends: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n indices at random; ``ends`` are the cumulative weights, in float64."""
    at = torch.rand(n, generator=generator, dtype=torch.float64) * ends[-1]
    return torch.searchsorted(ends, at, right=True).clamp(max=len(ends) - 1)


def _average(parameters: list[Tensor]) -> None:
    """The gradients' mean over the processes."""
    if dist.is_initialized():
        flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for p, mean in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = mean.view_as(p)
