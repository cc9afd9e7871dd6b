"""What the open towers are for, written in a few lines on public pieces, against plain forwards in float64.

Representation tokens that join the image tower at a later block and are read beside the class token (MMRL, Guo and Gu,
CVPR 2025), class-dependent tokens at a middle text block (TCP, Yao et al., CVPR 2024), patch tokens (PLOT, Chen et al.,
ICLR 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from tests.kit.plain import plain_block, plain_image, plain_norm, same_with_gradients, small_backbone, write
from vlprompt.backbones.backbone import unit
from vlprompt.backbones.packing import pack
from vlprompt.backbones.towers import ImageTower, Prompts
from vlprompt.errors import ConfigError
from vlprompt.methods import Batch, Can, Method, MethodConfig
from vlprompt.methods.zero_shot import frozen_class_features
from vlprompt.prompting.text import TextContext, class_tokens, encode_classes, encode_in_parts

NAMES = ("dog", "sea horse", "forget-me-not", "cat")


def pictures(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 16, 16, dtype=torch.double, generator=torch.Generator().manual_seed(1))


# --- MMRL, the image side -------------------------------------------------------------------------


def mmrl(tower: ImageTower, images: Tensor, layers: Sequence[Tensor | None], projection: Tensor) -> Tensor:
    """Features of the class token and of the mean representation token, [B, 2, E]."""
    prompts, n = Prompts(layers), len(tower.positions)
    m = len(prompts.tokens[0])
    x = tower.run(tower.embed(images), prompts, rows=torch.tensor([0, *range(n, n + m)]))
    own = tower.ln_post(x[:, 1:]).mean(1) @ projection
    return torch.stack([tower.read(x)[:, 0], own], 1)


def plain_mmrl(tower: ImageTower, images: Tensor, layers: Sequence[Tensor | None], projection: Tensor) -> Tensor:
    """The same, one image at a time, every token through every block."""
    features = []
    for x in (plain_tokens(tower, image) for image in images):
        n = len(x)
        for block, layer in zip(tower.blocks, layers, strict=True):
            if layer is not None:
                x = torch.cat([x[:n], layer])
            x = plain_block(x, block, tower.config.heads, torch.zeros(len(x), len(x), dtype=x.dtype))
        x = plain_norm(x, tower.ln_post)
        features.append(torch.stack([tower.projection.weight @ x[0], x[n:].mean(0) @ projection]))
    return torch.stack(features)


def plain_tokens(tower: ImageTower, image: Tensor) -> Tensor:
    """Tokens of one image before the first block, [N, D]."""
    size = tower.config.patch_size
    patches = image.unfold(1, size, size).unfold(2, size, size).permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)
    x = torch.cat([tower.class_token[None], patches @ tower.patches.weight.flatten(1).T]) + tower.positions
    return plain_norm(x, tower.ln_pre)


@pytest.mark.parametrize("where", ["--R", "-RR", "-R-", "RRR", "R-R"])
def test_representation_tokens_join_at_a_later_block_and_are_read(where: str) -> None:
    """R are blocks with tokens of their own; at the others the tokens stay as the block before left them."""
    tower = small_backbone().image_tower
    torch.manual_seed(0)
    learned = [torch.randn(2, 24, dtype=torch.double, requires_grad=True) for _ in range(where.count("R"))]
    projection = torch.randn(24, 16, dtype=torch.double, requires_grad=True)
    tokens = iter(learned)
    layers = [next(tokens) if block == "R" else None for block in where]
    first_goes_through_ln_pre = [None if layers[0] is None else plain_norm(layers[0], tower.ln_pre), *layers[1:]]
    fast = mmrl(tower, pictures(), layers, projection)
    plain = plain_mmrl(tower, pictures(), first_goes_through_ln_pre, projection)
    assert fast.shape == (3, 2, 16)
    names = [*(f"layer {i}" for i in range(len(learned))), "projection"]
    same_with_gradients(fast, plain, dict(zip(names, [*learned, projection], strict=True)))


def test_blocks_without_tokens_are_the_frozen_tower() -> None:
    tower = small_backbone().image_tower
    for prompts in (Prompts([]), Prompts([None] * 3)):
        assert torch.equal(tower(pictures(), prompts), tower(pictures()))
    with pytest.raises(ConfigError, match=r"prompts for 4 blocks \(allowed: at most 3, the tower's\)"):
        tower(pictures(), Prompts([None] * 4))


def test_the_last_block_computes_only_the_rows_that_are_read() -> None:
    backbone, seen = small_backbone(), []
    image, text = backbone.image_tower, backbone.text_tower
    hooks = [
        t.blocks[-1].fc_1.register_forward_hook(lambda _, given, out: seen.append(out.shape)) for t in (image, text)
    ]
    image(pictures())
    x = image.run(image.embed(pictures()), rows=torch.tensor([3, 0]))
    texts = pack(backbone.tokenize(NAMES))
    text(texts)
    whole = text.run(text.embed(texts), text=texts)
    others = text.run(text.embed(texts), rows=texts.pooled - 1, text=texts)
    for hook in hooks:
        hook.remove()
    assert seen == [(3, 1, 48), (3, 2, 48), (1, len(NAMES), 48), *[(1, len(texts.tokens), 48)] * 2]
    assert torch.equal(others, whole[:, texts.pooled - 1]), "not taken for the pooled rows"
    torch.testing.assert_close(x, image.run(image.embed(pictures()))[:, [3, 0]], rtol=0, atol=1e-12)
    torch.testing.assert_close(text.read(whole[:, texts.pooled])[:, texts.order], text(texts), rtol=0, atol=1e-12)


# --- PLOT: patch tokens ---------------------------------------------------------------------------


def test_patches_are_the_plain_towers() -> None:
    tower, images = small_backbone().image_tower, pictures()
    fast = tower.read(tower.run(tower.embed(images)))  # [B, 1 + N, E]
    plain = []
    for image in images:
        x = plain_tokens(tower, image)
        for block in tower.blocks:
            x = plain_block(x, block, tower.config.heads, torch.zeros(len(x), len(x), dtype=x.dtype))
        plain.append(plain_norm(x, tower.ln_post) @ tower.projection.weight.T)
    torch.testing.assert_close(fast, torch.stack(plain), rtol=0, atol=1e-9)
    torch.testing.assert_close(fast[:, 0], plain_image(tower, images), rtol=0, atol=1e-9)


# --- TCP: class-dependent tokens at a middle text block -------------------------------------------


class TCP(Method):
    """A context, and at the second block tokens that two layers make of the frozen class features."""

    name, paper, year, learns = "tcp", "Yao et al., CVPR", 2024, "text context + class tokens"

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """Settings of tcp."""

        @property
        def can(self) -> Can:
            """Images are left alone."""
            return Can.USE_FROZEN_FEATURES | Can.SPLIT_BATCHES | Can.EXPORT_CLASSES

    def build(self) -> None:
        self.context = TextContext(self.backbone, 2, "a photo")
        d = self.backbone.text_tower.config.width
        self.net = nn.Sequential(nn.Linear(self.backbone.embed_dim, 4), nn.ReLU(), nn.Linear(4, 2 * d))

    def class_features(self, class_names: Sequence[str], image_features: Tensor | None = None) -> Tensor:
        own = self.net(frozen_class_features(self.backbone, class_names, [self.template])).unflatten(-1, (2, -1))
        texts = self.context.packed(self.backbone, class_names, share_prefix=False)
        return encode_classes(self.backbone.text_tower, Prompts([self.context.vectors, own]), texts)


def plain_tcp(method: TCP) -> Tensor:
    """Class features, one text at a time."""
    backbone, tower = method.backbone, method.backbone.text_tower
    own = method.net(frozen_class_features(backbone, NAMES, [method.template])).unflatten(-1, (2, -1))
    tokens, features = class_tokens(backbone, NAMES, 2, "a photo"), []
    for c, (ids, where) in enumerate(zip(tokens.ids, tokens.slots, strict=True)):
        x = (
            write(tower.token_embedding.weight[ids], where, method.context.vectors, "replace")
            + tower.positions[: len(ids)]
        )
        mask = torch.full((len(ids), len(ids)), -torch.inf, dtype=x.dtype).triu(1)
        for i, block in enumerate(tower.blocks):
            x = plain_block(write(x, where, own[c], "replace") if i == 1 else x, block, tower.config.heads, mask)
        features.append(tower.projection.weight @ plain_norm(x, tower.ln_final)[-1])
    return unit(torch.stack(features))


def tcp() -> TCP:
    torch.manual_seed(0)
    return TCP(small_backbone(), NAMES).double()


def test_class_dependent_tokens_at_a_middle_block_are_a_plain_forward() -> None:
    method = tcp()
    same_with_gradients(method.class_features(NAMES), plain_tcp(method), dict(method.named_parameters()))


def test_the_method_trains_a_step_and_predicts() -> None:
    method, images = tcp(), pictures(4)
    batch = Batch(images, torch.arange(4))
    optimizer = torch.optim.SGD(method.learned(), lr=0.01)
    before = method.losses(batch)["ce"]
    method.backward({"ce": before})
    assert all(p.grad is not None and p.grad.any() for p in method.learned())
    optimizer.step()
    assert method.losses(batch)["ce"] < before
    method.eval()
    v = method.backbone.encode_images(images)
    expected = method.backbone.logits(v, plain_tcp(method))
    for given in (images, v):
        torch.testing.assert_close(method.predict(given, NAMES), expected, rtol=0, atol=1e-7)
    alone = method.predict(images, NAMES[1:2])
    torch.testing.assert_close(alone, expected[:, 1:2], rtol=0, atol=1e-7)


def test_class_dependent_tokens_of_texts_that_share_theirs_are_refused() -> None:
    backbone = small_backbone()
    tokens, own = class_tokens(backbone, NAMES, 2, "a photo"), torch.randn(4, 2, 32, dtype=torch.double)
    prompts = Prompts([None, own])
    shared = pack(tokens.ids, tokens.slots)
    with pytest.raises(ConfigError, match=r"prompts \[4, 2, 32\] differ between texts that share theirs"):
        encode_classes(backbone.text_tower, prompts, shared)
    ways = [pack(tokens.ids, tokens.slots, class_specific=True), pack(tokens.ids, tokens.slots, share_prefix=False)]
    features = [encode_classes(backbone.text_tower, prompts, texts) for texts in ways]
    torch.testing.assert_close(*features, rtol=0, atol=1e-9)
    parts = [pack(tokens.ids[i : i + 3], tokens.slots[i : i + 3], class_specific=True) for i in (0, 3)]
    torch.testing.assert_close(encode_in_parts(backbone.text_tower, prompts, parts, 3), features[0], rtol=0, atol=1e-9)


def test_the_hook_comes_before_the_tokens_of_its_block() -> None:
    backbone, seen = small_backbone(), []
    context = TextContext(backbone, 2, depth=3).double()
    texts = context.packed(backbone, NAMES, share_prefix=False)

    def hook(i: int, x: Tensor) -> Tensor:
        seen.append(i)
        return x.index_fill(1, texts.slots, torch.nan) if i else x

    edited = backbone.text_tower(texts, context.prompts(), None, hook)
    assert torch.equal(edited, backbone.text_tower(texts, context.prompts())), "what is replaced may be anything"
    assert seen == [0, 1, 2]
