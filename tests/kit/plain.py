"""Prompted features written out plainly, in float64, for comparison with the fast computation.

One text at a time, padded to the whole context length, every token through every block under an explicit mask,
learned tokens written into the sequence, the feature read at the end token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import torch
from hypothesis import settings
from torch import Tensor, nn

from tests.kit import TINY
from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.processors import CLIP_MEAN, CLIP_STD
from vlprompt.backbones.tokenizer import TextTokenizer, load_clip_tokenizer
from vlprompt.backbones.towers import Block, ImageConfig, ImageTower, TextConfig, TextTower
from vlprompt.data.images import Preprocess
from vlprompt.prompting.text import TextContext

TOLERANCE = 1e-9
LAYERS = 3
N_IMAGES = 3

ODD_NAMES = (
    "forget-me-not",
    "pot_plant",
    "_x",
    "Boeing 737-200",
    "C++",
    "St. Bernard",
    "dog's",
    "犬",
    "クロネコ",
    "серый волк",
    "كلب",
    "ελιά",
    "ô café",
    "🐶",
    "👩🏽‍🚀 in space",
    "7",
)

quick = settings(derandomize=True, deadline=None, max_examples=200)


@cache
def small_backbone(causal: bool = True, pool: str = "cls") -> Backbone:
    """A random float64 backbone of three layers: CLIP-like, or with a bidirectional text tower as in SigLIP."""
    tokenizer = load_clip_tokenizer(TINY, 77)  # it knows every byte
    if not causal:
        tokenizer = replace(tokenizer, start=(), pad=7)
    width = {"layers": LAYERS, "heads": 2, "mlp_width": 48, "embed_dim": 16}
    torch.manual_seed(0)
    image = ImageTower(ImageConfig(image_size=16, patch_size=4, width=24, pool=pool, **width))
    vocab_size = tokenizer.tokenizer.get_vocab_size()
    text = TextTower(TextConfig(vocab_size, tokenizer.context_length, width=32, causal=causal, **width))
    for tower in (image.double(), text.double()):
        for module in tower.modules():
            for name, parameter in module.named_parameters(recurse=False):
                spread = 0.3 if parameter.ndim == 1 else 2 * parameter.shape[-1] ** -0.5
                nn.init.normal_(parameter, float(isinstance(module, nn.LayerNorm) and name == "weight"), spread)
    return Backbone("small", image, text, tokenizer, Preprocess(16, CLIP_MEAN, CLIP_STD), 100.0)


# The plain computation


def plain_norm(x: Tensor, ln: nn.LayerNorm) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + ln.eps).sqrt() * ln.weight + ln.bias


def plain_block(x: Tensor, block: Block, heads: int, mask: Tensor, weigh: Callable = Tensor.softmax) -> Tensor:
    """x [N, D] → [N, D]; ``mask`` [N, N] is 0 where a token is seen and −∞ where not; ``weigh`` gives its weights."""
    q, k, v = (plain_norm(x, block.ln_1) @ block.qkv.weight.T + block.qkv.bias).chunk(3, -1)
    outputs = []
    for qh, kh, vh in zip(*(t.chunk(heads, -1) for t in (q, k, v)), strict=True):
        outputs.append(weigh(qh @ kh.T / qh.shape[-1] ** 0.5 + mask, -1) @ vh)
    x = x + torch.cat(outputs, -1) @ block.out.weight.T + block.out.bias
    h = plain_norm(x, block.ln_2) @ block.fc_1.weight.T + block.fc_1.bias
    return x + h * torch.sigmoid(1.702 * h) @ block.fc_2.weight.T + block.fc_2.bias


def write(x: Tensor, where: Sequence[int], values: Tensor, mode: str) -> Tensor:
    """x [N, D] with token m of ``values`` [M, D] at (or added to) row ``where[m]``."""
    rows = list(x)
    for row, value in zip(where, values, strict=True):
        rows[row] = rows[row] + value if mode == "add" else value
    return torch.stack(rows)


def plain_text(
    tower: TextTower, ids: Sequence[int], where: Sequence[int], prompts: Sequence[Tensor], mode: str, pad: int
) -> Tensor:
    """Feature [E] of one text, not normalised; ``prompts``: [M, D] for each layer, which stand at ``where``."""
    c = tower.config
    n = c.context_length
    x = tower.token_embedding.weight[[*ids, *[pad] * (n - len(ids))]]
    mask = torch.full((n, n), -torch.inf, dtype=x.dtype).triu(1) if c.causal else torch.zeros(n, n, dtype=x.dtype)
    x = (write(x, where, prompts[0], "replace") if prompts else x) + tower.positions
    for i, block in enumerate(tower.blocks):
        if 0 < i < len(prompts):
            x = write(x, where, prompts[i], mode)
        x = plain_block(x, block, c.heads, mask)
    pooled = plain_norm(x, tower.ln_final)[len(ids) - 1 if c.causal else n - 1]
    feature = tower.projection.weight @ pooled
    return feature if tower.projection.bias is None else feature + tower.projection.bias


def plain_layout(tokenizer: TextTokenizer, name: str, n_ctx: int, words: str | None, position: str) -> list[int]:
    """Token ids of a class's text, where −1 − m stands for the learned token m."""
    frozen = tokenizer.words(words or "")[n_ctx:]
    spelled = name.replace("_", " ")
    n_name = len(tokenizer.words(spelled))
    sentence = tokenizer.words(f"x {spelled}.")[1:]  # as in a sentence: a name's last sign may join the full stop
    label, stop = sentence[:n_name], sentence[n_name:]
    context = [-1 - m for m in range(n_ctx)] + frozen
    before = {"end": len(context), "middle": n_ctx // 2, "front": 0}[position]
    text = context[:before] + label + context[before:] + stop
    return [*tokenizer.start, *text, *tokenizer.end]


def plain_classes(
    backbone: Backbone,
    names: Sequence[str],
    context: TextContext,
    bias: Tensor | None = None,
) -> Tensor:
    """Class features, [C, E] or [B, C, E], of every class and image by itself."""
    tokenizer = backbone.tokenizer
    images = [None] if bias is None else list(bias)
    features = []
    for b in images:
        for c, name in enumerate(names):
            ids = plain_layout(tokenizer, name, context.n_ctx, context.words, context.position)
            where = [ids.index(-1 - m) for m in range(context.n_ctx)]
            first = context.vectors[c] if context.class_specific else context.vectors
            prompts = [first if b is None else first + b, *(() if context.deep is None else context.deep)]
            ids = [max(i, 0) for i in ids]
            pad = 0 if tokenizer.pad is None else tokenizer.pad
            features.append(plain_text(backbone.text_tower, ids, where, prompts, context.mode, pad))
    stacked = torch.stack(features).unflatten(0, (len(images), len(names)))
    stacked = stacked[0] if bias is None else stacked
    return stacked / stacked.norm(dim=-1, keepdim=True)


def plain_image(tower: ImageTower, images: Tensor, prompts: Sequence[Tensor] = (), mode: str = "replace") -> Tensor:
    """Features [B, E] of images, one at a time, not normalised; the prompts stand behind the patches."""
    c = tower.config
    side = range(0, c.image_size, c.patch_size)
    features = []
    for image in images:
        patches = [image[:, i : i + c.patch_size, j : j + c.patch_size].flatten() for i in side for j in side]
        x = torch.stack(patches) @ tower.patches.weight.flatten(1).T
        x = torch.cat([tower.class_token[None], x]) + tower.positions
        where = range(len(x), len(x) + len(prompts[0])) if prompts else ()
        x = plain_norm(torch.cat([x, *prompts[:1]]), tower.ln_pre)
        mask = torch.zeros(len(x), len(x), dtype=x.dtype)
        for i, block in enumerate(tower.blocks):
            if 0 < i < len(prompts):
                x = write(x, where, prompts[i], mode)
            x = plain_block(x, block, c.heads, mask)
        features.append(tower.projection.weight @ plain_norm(x, tower.ln_post)[0])
    return torch.stack(features)


def same(what: str, fast: Tensor, plain: Tensor) -> None:
    """Equal to 1e-9, of the largest value where that is above 1."""
    assert fast.dtype == plain.dtype == torch.float64
    assert fast.shape == plain.shape, f"{what}: {tuple(fast.shape)} is not {tuple(plain.shape)}"
    error = (fast - plain).abs().max().item()
    assert error <= TOLERANCE * max(1.0, plain.abs().max().item()), f"{what}: off by {error:.3g}"


def same_with_gradients(fast: Tensor, plain: Tensor, learned: dict[str, Tensor]) -> None:
    """Equal features, and equal gradients of one random linear function of them."""
    same("features", fast, plain)
    weights = torch.randn_like(plain)
    gradients = [torch.autograd.grad((f * weights).sum(), list(learned.values())) for f in (fast, plain)]
    for name, of_fast, of_plain in zip(learned, *gradients, strict=True):
        assert of_plain.abs().max() > 1e-6, f"{name} has no effect: nothing is compared"
        same(f"gradient of {name}", of_fast, of_plain)


def make_context(backbone: Backbone, n_ctx: int, words: str | None = None, **options) -> TextContext:
    """A context in float64, moved off its initial values."""
    context = TextContext(backbone, n_ctx, words, **options).double()
    with torch.no_grad():
        for parameter in context.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return context


def make_images() -> Tensor:
    return torch.randn(N_IMAGES, 3, 16, 16, dtype=torch.float64)
