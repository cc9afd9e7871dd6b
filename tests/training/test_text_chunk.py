"""Texts encoded in parts, each computed again in the backward pass: the same step, and fewer states kept."""

from __future__ import annotations

import pytest
import torch

from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.towers import Block
from vlprompt.config.schema import OptimConfig, TrainConfig
from vlprompt.errors import ConfigError
from vlprompt.methods import METHODS, Batch, Method, find_method
from vlprompt.training.loop import Training

NAMES = ("cat", "sea horse", "dog", "forget-me-not", "a dog of the sea")
ENCODES = {
    "coop": {},
    "coop, class-specific": {"class_specific": True},
    "coop, in front": {"position": "front"},
    "cocoop": {},
    "prograd": {},
    "maple": {},
    "fdbpl_coop": {},
    "kdpl_coop": {},
}


def make(backbone: Backbone, case: str, text_chunk: int | None) -> Method:
    cls = find_method(case.partition(",")[0])
    torch.manual_seed(2)
    method = cls(backbone, NAMES, cls.Config(**ENCODES[case])).double()
    method.text_chunk = text_chunk
    return method


def batch(backbone: Backbone, n: int = 3, classes: int | None = None) -> Batch:
    torch.manual_seed(1)
    images = torch.randn(n, 3, backbone.image_size, backbone.image_size, dtype=torch.double)
    taught = torch.randn(n, len(NAMES), dtype=torch.double).softmax(-1)
    return Batch(images, torch.arange(n), backbone.encode_images(images), taught).comparing(classes)


@pytest.mark.parametrize("case", ENCODES)
def test_a_step_in_parts_is_the_step(case: str, double: Backbone) -> None:
    given = batch(double, classes=3 if case == "kdpl_coop" else None)
    whole, parts = make(double, case, None), make(double, case, 2)
    losses, of_parts = whole.losses(given), parts.losses(given)
    torch.testing.assert_close(of_parts, losses, rtol=0, atol=1e-9)
    gradients, same = whole.gradients(losses), parts.gradients(of_parts)
    assert any(g.abs().max() > 1e-6 for group in gradients.values() for g in group)
    torch.testing.assert_close(same, gradients, rtol=0, atol=1e-9)


def test_no_more_than_one_part_is_computed_at_once(double: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    method, sizes, kept = make(double, "coop", 2), [], []
    blocks, forward = set(double.text_tower.blocks), Block.forward

    def counted(block, x, *more):
        if block in blocks:
            sizes.append(x.shape[1])
        return forward(block, x, *more)

    monkeypatch.setattr(Block, "forward", counted)
    parts = [len(text.tokens) for text in method.context.packed_parts(double, NAMES, 2)]
    assert len(parts) == 3
    assert max(parts) < len(method.context.packed(double, NAMES).tokens)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        features = method.class_features(NAMES)
    assert max(kept) <= max(features.numel(), method.context.vectors.numel())  # states of the texts are not kept
    assert sizes == [n for n in parts for _ in blocks]
    features.sum().backward()
    assert sorted(sizes) == sorted([n for n in parts for _ in blocks] * 2)


@pytest.mark.parametrize("name", ["drople", "dpl"])
def test_methods_that_read_all_texts_refuse(name: str, tiny: Backbone) -> None:
    class OneBatch:
        images_per_batch, seed = 2, 1

    method = METHODS[name](tiny, NAMES)
    with pytest.raises(ConfigError, match=rf"^train\.text_chunk: method '{name}' encodes the texts of all classes"):
        Training(method, OneBatch(), OptimConfig(), TrainConfig(text_chunk=2))


def test_the_setting_reaches_the_method(tiny: Backbone) -> None:
    class OneBatch:
        images_per_batch, seed = 2, 1

    method = METHODS["coop"](tiny, NAMES)
    Training(method, OneBatch(), OptimConfig(), TrainConfig(text_chunk=2))
    assert method.text_chunk == 2
