"""The optimiser is torch.optim's to the last bit, without the compiler that torch.optim imports."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.kit import TINY, command
from tests.kit.marks import sweep
from vlprompt.config.schema import OptimConfig
from vlprompt.training.schedule import Optimizer

SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
KINDS = [
    (SGD, {"momentum": 0.9, "weight_decay": 5e-4}),
    (SGD, {"momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}),
    (SGD, {"momentum": 0.5, "weight_decay": 0.0}),
    (SGD, {"momentum": 0.0, "weight_decay": 5e-4}),
    (SGD, {"momentum": 0.0, "weight_decay": 0.0}),
    (ADAM, {"weight_decay": 5e-4}),
    (ADAM, {"weight_decay": 0.0, "eps": 1e-4}),
    (ADAMW, {"weight_decay": 5e-5}),
    (ADAMW, {"weight_decay": 0.01, "eps": 1e-4}),
    (ADAMW, {"weight_decay": 0.0}),
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


class Both:
    """The same parameters under both, which get the same gradients and rates."""

    def __init__(self, kind: type[torch.optim.Optimizer], settings: dict, device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = (3, 5), (7,), (), (2, 4, 8), (6,)
        start = [torch.randn(shape, generator=generator, dtype=dtype).to(device) for shape in shapes]
        start[1][0] = -0.0
        (self.own, own), (self.theirs, theirs) = (_groups(start) for _ in range(2))
        self.config = OptimConfig(name=kind.__name__.lower(), lr=0.1, **settings)
        self.optimizer = Optimizer(own, self.config)
        self.reference = kind(theirs, lr=0.1, **settings)
        self.generator = generator

    def step(self, number: int) -> None:
        """A gradient of the first parameter comes late, the last never has one, one is missing in between."""
        for i, (p, q) in enumerate(zip(self.own, self.theirs, strict=True)):
            scale = 10.0 ** (number - 3)
            g = scale * torch.randn(p.shape, generator=self.generator, dtype=p.dtype)
            g.view(-1)[0] = -0.0
            missing = (i == 0 and number < 2) or i == 4 or (i == 3 and number == 3)
            p.grad, q.grad = (None, None) if missing else (g.to(p.device), g.to(p.device))
        for groups in (self.optimizer.param_groups, self.reference.param_groups):
            for group in groups:
                group["lr"] = group["share"] * 0.1 / (number + 1)
        self.optimizer.step()
        self.reference.step()

    def check(self) -> None:
        for p, q in zip(self.own, self.theirs, strict=True):
            assert torch.equal(_bits(p), _bits(q))
        state = self.reference.state_dict()["state"]
        there = {f"{i}.{k}": v for i, values in state.items() for k, v in values.items() if v is not None}
        own = self.optimizer.tensors()
        assert own.keys() == there.keys()
        for name, tensor in own.items():
            assert (tensor.dtype, tensor.device) == (there[name].dtype, there[name].device), name
            assert torch.equal(_bits(tensor), _bits(there[name])), name


def _groups(start: list[torch.Tensor]) -> tuple[list[nn.Parameter], list[dict]]:
    params = [nn.Parameter(t.clone()) for t in start]
    groups = [{"params": params[:2], "share": 1.0}, {"params": params[2:], "share": 0.25}]
    return params, [{**group, "lr": 0.1} for group in groups]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kind", "settings"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_are_those_of_torch(kind, settings, device, dtype):
    both = Both(kind, settings, device, dtype)
    for number in range(6):
        both.step(number)
        both.check()


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_it_goes_on_from_the_state_that_torch_saved(kind, settings):
    both = Both(kind, settings, "cpu", torch.float32)
    for number in range(3):
        both.step(number)
    state = both.reference.state_dict()["state"]
    both.optimizer = Optimizer(both.optimizer.param_groups, both.config)
    both.optimizer.load_tensors(
        {f"{i}.{k}": v.clone() for i, d in state.items() for k, v in d.items() if v is not None}
    )
    for number in range(3, 6):
        both.step(number)
        both.check()


def test_state_of_other_parameters_is_refused():
    both = Both(SGD, {"momentum": 0.9}, "cpu", torch.float32)
    with pytest.raises(KeyError):
        both.optimizer.load_tensors({"5.momentum_buffer": torch.zeros(3)})


@pytest.mark.parametrize("method", sweep(["coop", "drople"], "drople"))
def test_training_does_not_import_the_compiler(method, photos, tmp_path):
    run = f"""
import sys
from vlprompt.__main__ import main
sys.argv = ["vlprompt", "train", "{method}", {str(photos)!r}, "--backbone", {str(TINY)!r}, "--epochs", "1",
            "--out", {str(tmp_path / "run")!r}]
try:
    main()
except SystemExit as done:
    assert not done.code, done.code
found = sorted(m for m in sys.modules if m.split(".")[:2] in (["torch", "_dynamo"], ["torch", "_inductor"]))
assert not found, found
"""
    done = command.python("-c", run)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "metrics.json").is_file()
