"""The plain path of the speed measurements and the default give the same losses and gradients, in float64."""

from __future__ import annotations

import pytest
import torch

from speed.plain import plain
from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.towers import Block
from vlprompt.methods import Batch, find_method

NAMES = ("cat", "sea horse", "dog", "forget-me-not", "a dog of the sea")
COMPARED = {
    "coop": {},
    "cocoop": {},
    "kgcoop": {},
    "maple": {},
    "promptsrc": {},
    "drople": {},
    "fdbpl_coop": {"pcd": "hinge"},
    "fdbpl_promptsrc": {},
    "dpl": {},
}


def batch(backbone: Backbone, n: int = 3) -> Batch:
    torch.manual_seed(1)
    images, second = torch.randn(2, n, 3, backbone.image_size, backbone.image_size, dtype=torch.double)
    taught = torch.randn(n, len(NAMES), dtype=torch.double).softmax(-1)
    return Batch(images, torch.arange(n), backbone.encode_images(images), taught, second)


def step(name: str, backbone: Backbone) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """The loss terms and the gradients of one training step, under a method's own dropout."""
    cls, given = find_method(name), batch(backbone)
    torch.manual_seed(2)
    method = cls(backbone, NAMES, cls.Config(**COMPARED[name])).double().train()
    losses = method.losses(given)
    return losses, method.gradients(losses)["total"]


@pytest.mark.parametrize("name", COMPARED)
def test_plain_equals_default(name: str, double: Backbone) -> None:
    losses, gradients = step(name, double)
    with plain(double, longest=name == "drople"):
        plain_losses, plain_gradients = step(name, double)
    assert any(g.abs().max() > 1e-6 for g in gradients)
    torch.testing.assert_close(plain_losses, losses, rtol=0, atol=1e-9)
    torch.testing.assert_close(plain_gradients, gradients, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["coop", "cocoop", "drople", "dpl"])
def test_plain_computes_every_position(name: str, double: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text blocks see every class at full length (DroPLe: of the longest), and the last one asks for all of them."""
    seen: list[torch.Size] = []
    with plain(double, longest=name == "drople"):
        whole = Block.forward

        def forward(block, x, attention, rows=None):
            out = whole(block, x, attention)  # all rows, before those that are read are picked
            if block in set(double.text_tower.blocks):
                seen.append(out.shape)
            return out if rows is None else out[:, rows]

        step(name, double)  # the features of frozen texts are remembered
        monkeypatch.setattr(Block, "forward", forward)
        step(name, double)
        monkeypatch.undo()
    longest = max(len(ids) for ids in double.tokenize([f"a photo of a {name}" for name in NAMES]))
    length = longest if name == "drople" else double.context_length
    passes = 3 if name == "cocoop" else 1
    assert seen == [torch.Size([1, len(NAMES) * length, double.text_tower.config.width])] * 12 * passes
