"""DroPLe beside its golden cases: what is skipped changes nothing, draws follow the seed, evaluation has none."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.kit import TINY
from tests.kit.drople import objective
from tests.kit.marks import sweep
from tests.kit.runs import StopsAfter, configured, log, prompts
from vlprompt.artefact.artefact import load_artefact, save_artefact
from vlprompt.backbones.attention import packed_attention, packed_with_maps, plain_attention, with_maps
from vlprompt.backbones.backbone import Backbone, unit
from vlprompt.backbones.load import load_backbone
from vlprompt.backbones.packing import pack
from vlprompt.config.schema import build_config
from vlprompt.errors import ConfigError, Interrupted
from vlprompt.methods import Batch
from vlprompt.methods.base import total
from vlprompt.methods.drople import drople, dropout
from vlprompt.methods.drople.drople import LOG_SCALE_MAX, DroPLe
from vlprompt.methods.drople.losses import residual, rising
from vlprompt.prompting.text import encode_classes
from vlprompt.training.run import train

GOLDEN = TINY
NAMES = ("tin can", "wild boar", "a very old elm tree", "barn", "sea_lion", "grey cube")
"""No other test's: the shared backbone remembers texts as they were first packed."""


def make(backbone: Backbone, class_names: Sequence[str] = NAMES, **settings: Any) -> DroPLe:
    torch.manual_seed(0)
    return DroPLe(backbone, class_names, DroPLe.Config(**settings)).to(backbone.dtype)


def pictures(backbone: Backbone, n: int = 4) -> Tensor:
    size = backbone.image_size
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.double).to(
        backbone.dtype
    )


def batch_of(backbone: Backbone, n: int = 4) -> Batch:
    images = pictures(backbone, n)
    return Batch(images, torch.arange(n) % len(NAMES), backbone.encode_images(images), second_view=images + 0.1)


def close(ours: Tensor, reference: Tensor, atol: float = 1e-9) -> None:
    torch.testing.assert_close(ours, reference, atol=atol, rtol=0)


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """(rows, probabilities) of every call that hits tokens."""
    seen: list[tuple[Tensor, Tensor]] = []

    def spy(x: Tensor, rows: Tensor, p: Tensor, *given: Any) -> Tensor:
        seen.append((rows, p))
        return dropout.drop(x, rows, p, *given)

    monkeypatch.setattr(drople, "drop", spy)
    return seen


# --- attention with maps, and the towers' hooks -----------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_attention_with_maps_is_plain_attention(causal: bool) -> None:
    q, k, v = (torch.randn(3, 7, 8, dtype=torch.double, requires_grad=True) for _ in range(3))
    mask = torch.ones(7, 7, dtype=torch.bool).tril() if causal else None
    maps: list[Tensor] = []
    ours = with_maps(2, maps, mask)(q, k, v)
    heads = [t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v)]
    plain = nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2).flatten(2)
    close(ours, plain, 1e-12)
    for a, b in zip(
        torch.autograd.grad(ours.sin().sum(), (q, k, v)), torch.autograd.grad(plain.sin().sum(), (q, k, v)), strict=True
    ):
        close(a, b, 1e-12)
    (weights,) = maps
    assert not weights.requires_grad
    assert weights.shape == (3, 2, 7, 7)
    close(weights.sum(-1), torch.ones(3, 2, 7, dtype=torch.double))
    close((weights @ heads[2]).transpose(1, 2).flatten(2).detach(), plain.detach())


def test_packed_attention_with_maps_is_packed_attention() -> None:
    text = pack([[1, 2, 3], [1, 2, 3, 4, 5], [1, 9, 3], [1, 2, 3, 4, 5, 6]], share_prefix=False)
    q, k, v = (torch.randn(1, len(text.tokens), 8, dtype=torch.double) for _ in range(3))
    maps: list[Tensor] = []
    close(packed_with_maps(text, 2, maps)(q, k, v), packed_attention(text, 2)(q, k, v), 1e-12)
    assert [tuple(m.shape) for m in maps] == [(2, 2, 3, 3), (1, 2, 5, 5), (1, 2, 6, 6)]
    assert all(not m.triu(1).any() for m in maps)


def test_rows_of_packed_texts() -> None:
    texts = [[1, 2, 3], [1, 7, 8, 4, 5], [1, 9, 3]]
    packed = pack(texts, share_prefix=False)
    rows, mask = packed.rows(torch.tensor([1, 2, 0, 1]))
    assert [packed.tokens[r[m]].tolist() for r, m in zip(rows, mask, strict=True)] == [texts[c] for c in (1, 2, 0, 1)]
    assert packed.tokens[rows[1]].tolist() == [1, 9, 3, 3, 3]
    states = torch.randn(1, len(packed.tokens), 2)
    prefix, texts = packed.texts(states)
    assert [tuple(t.shape) for t in (prefix, *texts)] == [(1, 0, 2), (1, 2, 3, 2), (1, 1, 5, 2)]
    assert torch.equal(torch.cat([t.flatten(1, 2) for t in texts], 1), states)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_hooks_of_the_towers(double: Backbone, tower: str) -> None:
    method = make(double)
    heads = double.text_tower.config.heads
    text = method.context.packed(double, NAMES, share_prefix=False)

    def run(attention: Any = None, before_block: Any = None) -> Tensor:
        if tower == "image":
            return double.image_tower(pictures(double), method.visual_prompts(), attention, before_block)
        return double.text_tower(text, method.context.prompts(), attention, before_block)[0]

    layers = getattr(double, f"{tower}_tower").config.layers
    plain = run()
    seen: list[tuple[int, tuple[int, ...]]] = []
    read: list[int] = []

    def look(i: int, x: Tensor) -> Tensor:
        seen.append((i, tuple(x.shape)))
        return x

    fused = plain_attention(double.image_tower.config.heads) if tower == "image" else packed_attention(text, heads)
    calls: list[int] = []

    def counted(i: int) -> Callable[..., Tensor]:
        return lambda *qkv: calls.append(i) or fused(*qkv)

    last = getattr(double, f"{tower}_tower").blocks[-1]
    hook = last.register_forward_hook(lambda block, given, out: read.append(out.shape[1]))
    close(run(before_block=look), plain, 0)
    hook.remove()
    assert read == [1 if tower == "image" else len(NAMES)], "the last block gives the pooled tokens alone"
    close(run([counted(i) for i in range(layers)]), plain, 0)
    assert [i for i, _ in seen] == calls == list(range(layers))
    assert len({shape for _, shape in seen[1:]}) == 1
    halved = run(before_block=lambda i, x: x / 2 if i == 4 else x)
    assert (halved - plain).abs().max() > 1e-3, "what comes back goes on"
    grads = torch.autograd.grad(
        run(before_block=lambda i, x: x / 2 if i == layers - 1 else x).sum(), list(method.context.parameters()),
        allow_unused=True,
    ) if tower == "text" else torch.autograd.grad(halved.sum(), [method.visual.vectors])  # fmt: skip
    assert all(g is not None and g.any() for g in grads)


# --- importance -----------------------------------------------------------------------------------


def test_importance_reaches_from_0_to_1_and_where_all_are_alike_is_0() -> None:
    s = torch.rand(3, 5, 9)
    i = dropout.importance(s)
    assert torch.equal(i.amin(-1), torch.zeros(5))
    assert torch.equal(i.amax(-1), torch.ones(5))
    assert torch.equal(i.argmax(-1), s.sum(0).argmax(-1))
    assert torch.equal(dropout.importance(torch.full((3, 2, 4), 0.25)), torch.zeros(2, 4))
    assert torch.equal(dropout.importance(torch.rand(3, 2, 1)), torch.zeros(2, 1))


@pytest.mark.parametrize("g", [0, -1])
def test_scores_one_token_at_a_time(g: int) -> None:
    maps, cross = torch.rand(2, 3, 5, 5).softmax(-1), torch.rand(2, 4, 5).softmax(-1)
    tokens = [j for j in range(5) if j != g % 5]
    for b in range(2):
        s_self = [
            torch.stack([max(maps[b, h, j, k] for k in tokens if k != j) for h in range(3)]).mean() for j in tokens
        ]
        s_cls = [maps[b, :, g, j].mean() for j in tokens]
        s_cross = [cross[b, :, j].max() for j in tokens]
        for ours, s in zip(dropout.scores(maps, cross, g)[:, b], (s_self, s_cls, s_cross), strict=True):
            torch.testing.assert_close(ours, torch.stack(s) / sum(s))


def test_probabilities_do_not_depend_on_the_other_classes_and_images(double: Backbone, draws: list) -> None:
    settings = {"sigma": 0.0, "depth_text": 4, "depth_vision": 3}
    together, images = make(double, **settings), pictures(double)
    together._texts(together.class_names, torch.zeros(1).long())
    texts = [p for _, p in draws]
    draws.clear()
    for c, name in enumerate(NAMES):
        alone = make(double, [name], **settings)
        alone._texts(alone.class_names, torch.zeros(1).long())
        for i, (_, p) in enumerate(draws):
            order = list(together.context.packed(double, NAMES, share_prefix=False).order.argsort())
            close(texts[i].unflatten(1, (len(NAMES), -1))[0, order.index(c)], p[0])
        draws.clear()
    together._images(images)
    whole = [p for _, p in draws]
    draws.clear()
    for b in range(len(images)):
        together._images(images[b : b + 1])
        for i, (_, p) in enumerate(draws):
            close(whole[i][b : b + 1], p)
        draws.clear()
    assert len(texts) == 4
    assert len(whole) == 3
    for p in (*texts, *whole):
        assert p.min() >= 0.1 - 1e-12
        assert p.max() <= 0.5 + 1e-12
        assert p.std() > 0.01 or p.shape[1] == len(NAMES)


def test_what_is_hit(tiny: Backbone, draws: list) -> None:
    patches, lengths = len(tiny.image_tower.positions) - 1, [len(t) for t in tiny.tokenize(NAMES)]
    for mode in ("gaussian", "zero"):
        method = make(tiny, mode=mode, depth_text=3, depth_vision=2)
        method._images(pictures(tiny))
        assert [rows.tolist() for rows, _ in draws] == [[*range(1, patches + 1)], [*range(1, patches + 5)]]
        draws.clear()
        method._texts(method.class_names, torch.zeros(1).long())
        text = method.context.packed(tiny, NAMES, share_prefix=False)
        positions = [sorted({int(text.positions[r]) for r in rows}) for rows, _ in draws]
        # Before the last prompted layer only noise on the start token is carried on; zero spares it always.
        assert positions == ([[0], [0], [0, 1, 2, 3, 4]] if mode == "gaussian" else [[1, 2, 3, 4]])
        for rows, p in draws:
            assert len(rows) == p.shape[1] == len(NAMES) * len(set(text.positions[rows].tolist()))
        draws.clear()
    assert len(set(lengths)) > 1


# --- sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["gaussian", "zero"])
def test_tokens_are_hit_as_often_as_their_probability_says(mode: str) -> None:
    torch.manual_seed(0)
    n, p = 20_000, torch.tensor([0.0, 0.1, 0.3, 0.5, 1.0])
    x, rows = torch.ones(n, 7, 3), torch.tensor([5, 1, 2, 3, 6])
    y = dropout.drop(x, rows, p.expand(n, -1), mode, 0.03)  # type: ignore[arg-type]
    assert torch.equal(y[:, [0, 4]], x[:, [0, 4]])
    hit = (y != x).any(-1)[:, rows]
    error = 4 * (p * (1 - p) / n).sqrt()
    assert ((hit.float().mean(0) - p).abs() <= error).all()
    changed = (y - x)[:, rows][hit]
    if mode == "zero":
        assert torch.equal(changed, torch.full_like(changed, -1))
    else:
        assert changed.std().item() == pytest.approx(0.03, rel=0.02)
        assert changed.mean().item() == pytest.approx(0, abs=1e-3)
        assert torch.corrcoef(changed.T)[0, 1].abs() < 0.05, "each channel has noise of its own"
    apart = torch.corrcoef(hit[:, 1:4].float().T)
    assert (apart - torch.eye(3)).abs().max() < 0.05, "tokens are hit independently of each other"


def test_sampling_is_one_draw_a_block(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = torch.rand_like
    monkeypatch.setattr(torch, "rand_like", lambda *a, **k: calls.append(1) or real(*a, **k))
    for names, n in ((NAMES[:1], 1), (NAMES, 8)):
        calls.clear()
        method = make(tiny, names)
        method._images(pictures(tiny, n))
        assert len(calls) == method.config.depth_vision
        method._texts(method.class_names, torch.zeros(n).long())
        assert len(calls) == method.config.depth_vision + method.config.depth_text


def test_a_seed_decides_every_draw(tiny: Backbone) -> None:
    method, batch = make(tiny), batch_of(tiny)
    ours = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        ours.append(total(method.losses(batch)))
    assert torch.equal(ours[0], ours[1])
    assert not torch.equal(ours[0], ours[2])


def test_maps_exist_only_where_they_are_read(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real = {"with_maps": with_maps, "packed_with_maps": packed_with_maps}
    for name, make_attention in real.items():

        def counted(*given: Any, name: str = name, make_attention: Any = make_attention) -> Any:
            attention = make_attention(*given)
            return lambda *qkv: calls.append(name) or attention(*qkv)

        monkeypatch.setattr(drople, name, counted)
    batch = batch_of(tiny)
    expected = {
        "importance": {"gaussian": (6, 9), "zero": (6, 1)},
        "uniform": {"gaussian": (0, 0), "zero": (0, 0)},
        "none": {"gaussian": (0, 0), "zero": (0, 0)},
    }
    for kind, modes in expected.items():
        for mode, (images, texts) in modes.items():
            method = make(tiny, dropout=kind, mode=mode)
            calls.clear()
            method.losses(batch)
            assert (calls.count("with_maps"), calls.count("packed_with_maps")) == (images, texts), (kind, mode)
            calls.clear()
            method.eval().losses(batch)
            assert calls == []


# --- exactness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["importance", "uniform", "none"])
def test_without_noise_features_are_those_of_evaluation(double: Backbone, kind: str) -> None:
    method = make(double, dropout=kind, sigma=0.0)
    images, labels = pictures(double), torch.tensor([0, 2, 4, 2])
    v, of_images = method._images(images)
    t, of_texts = method._texts(method.class_names, labels)
    close(v, method.encode_images(images))
    close(t, method.class_features(NAMES))
    assert len(of_images) == len(of_texts) == method.aligned == 6
    parameters = [*method.context.parameters(), method.visual.vectors]
    for ours, reference in ((v, method.encode_images(images)), (t, method.class_features(NAMES))):
        for a, b in zip(*(torch.autograd.grad(x.sin().sum(), parameters, allow_unused=True) for x in (ours, reference)), strict=True):  # fmt: skip  # noqa: E501
            assert (a is None) == (b is None)
            if a is not None:
                close(a, b)


def test_tokens_that_the_next_block_replaces_need_no_dropout(double: Backbone) -> None:
    """Everything at 0 … n_ctx (but SOS) and every patch and prompt zeroed behind every block, one text at a time."""
    method = make(double, dropout="uniform", mode="zero", p_max=1.0, p_min=1.0)
    depth, n_ctx = method.config.depth_text, method.config.n_ctx_text

    def zero_context(i: int, x: Tensor) -> Tensor:
        if not 0 < i <= depth:
            return x
        x = x.clone()
        x[:, 1 : 1 + n_ctx] = 0
        return x

    with torch.no_grad():
        alone = [
            double.text_tower(
                method.context.packed(double, (name,), share_prefix=False), method.context.prompts(), None, zero_context
            )[0, 0]
            for name in NAMES
        ]
        t, _ = method._texts(method.class_names, torch.zeros(1).long())
        close(t, unit(torch.stack(alone)))
        assert (t - method.class_features(NAMES)).abs().max() > 1e-3

        def zero_patches(i: int, x: Tensor) -> Tensor:
            return torch.cat([x[:, :1], 0 * x[:, 1:]], 1) if 0 < i <= method.config.depth_vision else x

        images = pictures(double)
        v, _ = method._images(images)
        close(v, unit(double.image_tower(images, method.visual_prompts(), None, zero_patches)))


def test_what_the_shared_tokens_see_one_image_and_text_at_a_time(double: Backbone) -> None:
    method, labels = make(double, dropout="none"), torch.tensor([0, 2, 4, 2])
    shared, images = method.shared, pictures(double)
    assert shared is not None
    _, of_images = method._images(images)
    _, of_texts = method._texts(method.class_names, labels)

    def seen(mapped: nn.Linear, x: Tensor) -> Tensor:  # [N, D], as in the paper
        wx = mapped(x)
        return (shared.tokens @ wx.T).softmax(-1) @ wx

    with torch.no_grad():
        states: dict[tuple[str, int, int], Tensor] = {}
        for b, label in enumerate(labels.tolist()):
            double.image_tower(
                images[b : b + 1], method.visual_prompts(), None,
                lambda i, x, b=b: states.setdefault(("image", b, i - 1), x)[:],
            )  # fmt: skip
            double.text_tower(
                method.context.packed(double, (NAMES[label],), share_prefix=False), method.context.prompts(), None,
                lambda i, x, b=b: states.setdefault(("text", b, i - 1), x)[:],
            )  # fmt: skip
        for i in range(method.aligned):
            for b in range(len(labels)):
                close(of_images[i][b], seen(shared.image, states["image", b, i][0]))
                close(of_texts[i][b], seen(shared.text, states["text", b, i][0]))


def test_importance_of_an_image_from_the_papers_formulas(double: Backbone) -> None:
    method = make(double)
    shared, tower = method.shared, double.image_tower
    assert shared is not None
    states: list[Tensor] = []
    with torch.no_grad():
        tower(pictures(double, 1), method.visual_prompts(), None, lambda i, x: states.append(x) or x)
        del states[0]  # before the first block
        blocks = method.dropout_of(pictures(double, 1))
        assert len(blocks) == 6
        for i in (1, 5):
            x = states[i - 1]
            x = torch.cat([x[:, :-4], method.visual.vectors[i][None]], 1)
            q, k, _ = tower.blocks[i].qkv(tower.blocks[i].ln_1(x)).chunk(3, -1)
            heads = tower.config.heads
            q, k = (z[0].unflatten(-1, (heads, -1)).transpose(0, 1) for z in (q, k))
            maps = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
            cross = (shared.tokens @ shared.image(states[i][0]).T).softmax(-1)
            among = maps[:, 1:, 1:].clone()
            among.diagonal(dim1=1, dim2=2).zero_()
            raw = torch.stack([among.amax(-1).mean(0), maps[:, 0, 1:].mean(0), cross[:, 1:].amax(0)])
            score = (raw / (raw.sum(-1, keepdim=True) + 1e-8)).mean(0)
            expected = (score - score.min()) / (score.max() - score.min())
            close(blocks[i].importance[0], expected)
            close(blocks[i].p[0], 0.5 - 0.4 * expected)
    assert [b.reach for b in blocks] == [16] * 5 + [20]


@pytest.mark.parametrize("name", ["barn", "a very old elm tree"])
def test_probabilities_of_a_text_from_the_papers_formulas(name: str, double: Backbone, draws: list) -> None:
    method, tower, i = make(double, [name], sigma=0.0, depth_text=3), double.text_tower, 2
    shared, states = method.shared, list[Tensor]()
    assert shared is not None
    with torch.no_grad():
        method._texts(method.class_names, torch.zeros(1).long())
        text = method.context.packed(double, (name,), share_prefix=False)
        tower(text, method.context.prompts(), None, lambda i, x: states.append(x[0]) or x)
        del states[0]  # before the first block
        x = states[i - 1].clone()
        x[1:5] = method.context.deep[i - 1]
        q, k, _ = tower.blocks[i].qkv(tower.blocks[i].ln_1(x)).chunk(3, -1)
        q, k = (z.unflatten(-1, (tower.config.heads, -1)).transpose(0, 1) for z in (q, k))
        seen = torch.ones(len(x), len(x), dtype=torch.bool).tril()
        maps = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf).softmax(-1)
        cross = (shared.tokens @ shared.text(states[i]).T).softmax(-1)
        among = maps[:, :-1, :-1].clone()  # the end token, which is pooled, stands last
        among.diagonal(dim1=1, dim2=2).zero_()
        raw = torch.stack([among.amax(-1).mean(0), maps[:, -1, :-1].mean(0), cross[:, :-1].amax(0)])
        score = (raw / (raw.sum(-1, keepdim=True) + 1e-8)).mean(0)
        expected = (score - score.min()) / (score.max() - score.min())
    rows, p = draws[i]
    assert rows.tolist() == [0, 1, 2, 3, 4]
    close(p[0], 0.5 - 0.4 * expected[:5])


# --- evaluation -----------------------------------------------------------------------------------


def test_evaluation_knows_no_dropout(tiny: Backbone) -> None:
    method, images = make(tiny).eval(), pictures(tiny)
    before = torch.get_rng_state()
    v, t = method.encode_images(images), method.class_features(NAMES)
    first = method.losses(batch_of(tiny))
    assert torch.equal(torch.get_rng_state(), before), "no random number is drawn"
    assert torch.equal(total(method.losses(batch_of(tiny))), total(first))
    close(v, unit(tiny.image_tower(images, method.visual_prompts())), 0)
    packed = method.context.packed(tiny, NAMES)
    assert packed.prefix > 4, "evaluation shares the prefix"
    close(t, encode_classes(tiny.text_tower, method.context.prompts(), packed), 0)
    method.train()
    assert torch.equal(method.encode_images(images), v), "nor do features outside of losses"
    assert torch.equal(method.class_features(NAMES), t)
    torch.manual_seed(0)
    assert not torch.equal(total(method.losses(batch_of(tiny))), total(first))


def test_texts_have_no_full_stop(tiny: Backbone) -> None:
    method = make(tiny)
    packed = method.context.packed(tiny, ("barn",))
    assert packed.tokens.tolist() == tiny.tokenize(["a photo of a barn"])[0]
    with torch.no_grad():
        method.context.deep = None  # the first layer's words alone
        close(
            encode_classes(tiny.text_tower, method.context.prompts(), packed),
            tiny.encode_texts(["a photo of a barn"]),
            1e-6,
        )


# --- loss terms -----------------------------------------------------------------------------------


def test_a_batch_in_parts_is_the_whole(double: Backbone) -> None:
    """What train.accumulate and several processes rest on; with dropout each part has draws of its own."""
    method, batch = make(double, dropout="none"), batch_of(double, 5)
    whole = method.losses(batch)
    halves = [slice(0, 2), slice(2, 5)]
    parts = [method.losses(batch.map(lambda t, part=part: t[part])) for part in halves]
    for term, value in whole.items():
        close(0.4 * parts[0][term] + 0.6 * parts[1][term], value)


def test_the_learned_branch_alone_sees_the_second_view(tiny: Backbone) -> None:
    method, batch = make(tiny, dropout="none"), batch_of(tiny)
    same = replace(batch, second_view=batch.images)
    other = replace(batch, images=torch.full_like(batch.images, torch.nan))
    assert torch.equal(total(method.losses(other)), total(method.losses(batch)))
    assert not torch.equal(method.losses(same)["ce"], method.losses(batch)["ce"])


def test_the_frozen_branch_is_the_plain_view_and_the_data_sets_template(double: Backbone) -> None:
    """What the loss terms, which golden cases check, are given."""
    torch.manual_seed(0)
    template, batch = "one {}, drawn.", batch_of(double)
    method = DroPLe(double, NAMES, DroPLe.Config(dropout="none"), template).double()
    v, t = method.encode_images(batch.second_view), method.class_features(NAMES)
    v0 = double.encode_images(batch.images)
    t0 = double.encode_texts([template.replace("{}", name.replace("_", " ")) for name in NAMES])
    seen = list(zip(method._images(batch.second_view)[1], method._texts(NAMES, batch.labels)[1], strict=True))
    method.after_epoch(0, 2)
    expected = objective(v, t, v0, t0, method.scale(), batch.labels, seen, method.lam, method.config)
    losses = method.losses(batch)
    assert losses.keys() == expected.keys()
    for term, value in expected.items():
        close(losses[term], value)


def test_shared_tokens_learn_from_the_alignment_alone(tiny: Backbone) -> None:
    method = make(tiny)
    losses = method.losses(batch_of(tiny))
    parameters = list(method.shared.parameters())
    rest = sum(value for term, value in losses.items() if term != "alignment")
    assert all(g is None for g in torch.autograd.grad(rest, parameters, retain_graph=True, allow_unused=True))
    assert all(g.any() for g in torch.autograd.grad(losses["alignment"], parameters))


def test_weights_are_those_of_their_terms(tiny: Backbone) -> None:
    weights = {
        "text_consistency": "text_weight", "image_consistency": "image_weight", "distillation": "distillation_weight",
        "residual_entropy": "entropy_weight", "alignment": "alignment_weight",
    }  # fmt: skip
    batch = batch_of(tiny)
    base = make(tiny, dropout="none").losses(batch)
    assert list(base) == ["ce", *weights]
    for term, setting in weights.items():
        default = getattr(DroPLe.Config(), setting)
        doubled = make(tiny, dropout="none", **{setting: 2 * default}).losses(batch)
        assert {t for t in base if not torch.equal(base[t], doubled[t])} == {term}
        torch.testing.assert_close(doubled[term], 2 * base[term])
        assert make(tiny, dropout="none", **{setting: 0.0}).losses(batch)[term] == 0


def test_the_logit_scale_stays_within_its_ends_and_comes_back(tiny: Backbone) -> None:
    method, batch = make(tiny, dropout="none"), batch_of(tiny)
    assert method.logit_scale.item() == pytest.approx(min(math.log(tiny.logit_scale), LOG_SCALE_MAX))
    for value, end in ((7.0, LOG_SCALE_MAX), (-3.0, 0.0)):
        with torch.no_grad():
            method.logit_scale.fill_(value)
        v, t = method.encode_images(batch.images), method.class_features(NAMES)
        torch.testing.assert_close(method.logits(v, t), math.exp(end) * v @ t.T)
        assert method.scale_and_bias()[0].item() == pytest.approx(math.exp(end))
        method.zero_grad()
        method.backward(method.losses(batch))
        assert method.logit_scale.item() == pytest.approx(end)
        assert method.logit_scale.grad.any()


def test_lambda_rises_over_the_epochs_and_a_new_training_starts_anew(tiny: Backbone) -> None:
    method = make(tiny)
    for epochs in (20, 3, 1):
        seen = []
        for e in range(epochs):
            seen.append(method.lam.item())
            method.after_epoch(e, epochs)
        assert seen == pytest.approx([0.1 * (1 - (1 + 10 * e / epochs) ** -0.75) for e in range(epochs)])
        assert seen == sorted(seen)
    assert rising(0.1, 19, 20) == pytest.approx(0.083, abs=1e-3)
    fixed = make(tiny, lam_schedule="fixed", lam=0.3)
    fixed.after_epoch(0, 5)
    assert fixed.lam == 0.3
    method.after_epoch(0, 7)
    again = make(tiny)
    again.load_training_state(method.training_state())
    assert again.lam == method.lam > 0


@pytest.mark.parametrize("lam", [0.0, 0.0005, 0.3, 0.9995])
def test_residuals_never_divide_by_zero(lam: float) -> None:
    z, z0 = torch.randn(2, 3, 4)
    rest = {0.0: 0.999, 0.0005: 0.9985, 0.3: 0.7, 0.9995: 0.0015}[lam]
    ours = residual(z, z0, torch.tensor(lam, dtype=torch.double))
    torch.testing.assert_close(ours, (z - lam * z0) / rest)


def test_initial_prompts(tiny: Backbone) -> None:
    method = make(tiny)
    width = tiny.text_tower.config.width
    assert method.context.deep.shape == (8, 4, width)
    bound = width**-0.5  # Kaiming uniform with a = √5 over D inputs
    assert 0.95 * bound < method.context.deep.abs().max() <= bound
    assert method.visual.vectors.shape[0] == 6
    for n_ctx in (1, 4):  # of one tensor [6, n_ctx, D], whose inputs Kaiming counts as n_ctx · D
        vectors, bound = make(tiny, n_ctx_vision=n_ctx).visual.vectors, (n_ctx * tiny.image_tower.config.width) ** -0.5
        assert 0.95 * bound < vectors.abs().max() <= bound
        assert vectors.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


@pytest.mark.parametrize("tau", [0.25, 3.0])
def test_the_temperature_of_the_shared_tokens(double: Backbone, tau: float, draws: list) -> None:
    """a_rj = softmax_j(τ · e_r · (W x_j + b)), in what they see, in what is hit and in what a tuned model explains."""
    method, images = make(double, temperature=tau), pictures(double)
    shared, x = method.shared, torch.randn(3, 7, double.image_tower.config.width, dtype=torch.double)
    mapped = x @ shared.image.weight.T + shared.image.bias
    a = (tau * shared.tokens @ mapped.mT).softmax(-1)
    ours = dropout.look(shared.keys(shared.image), x)
    close(ours, a)
    close(shared.pool(shared.image, ours, x), a @ mapped)
    plain = make(double)  # the same tokens
    assert torch.equal(plain.shared.tokens, shared.tokens)
    hit = []
    for each in (method, plain):
        draws.clear()
        torch.manual_seed(0)
        each._images(images)
        hit.append(draws[0][1])
    assert (hit[0] - hit[1]).abs().max() > 1e-4
    close(method.dropout_of(images)[0].p[:, : hit[0].shape[1]], hit[0])
    close(method.inference_state()["image_keys"], tau * shared.tokens @ shared.image.weight)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_towers_of_half_precision(precision: torch.dtype) -> None:
    backbone = load_backbone(str(GOLDEN)).to(dtype=precision)
    method = make(backbone, lora_rank=2).float()
    losses = method.losses(batch_of(backbone))
    method.backward(losses)
    assert all(value.isfinite() and value.dtype == torch.float32 for value in losses.values())
    assert all(p.grad.isfinite().all() for p in method.parameters())


# --- adapters -------------------------------------------------------------------------------------


def moved_lora(backbone: Backbone, **settings: Any) -> DroPLe:
    method = make(backbone, lora_rank=3, **settings)
    with torch.no_grad():
        method.lora.b.normal_(std=0.05)
    return method.eval()


def test_adapters_are_changed_weights_of_the_later_half(double: Backbone, tmp_path: Path) -> None:
    before = copy.deepcopy(double.image_tower.state_dict())
    method, images = moved_lora(double), pictures(double)
    edited = copy.deepcopy(double.image_tower)
    d = edited.config.width
    assert [*method.lora.layers] == [6, 7, 8, 9, 10, 11]
    for n, i in enumerate(method.lora.layers):
        a, b = method.lora.a[n], method.lora.b[n]
        edited.blocks[i].qkv.weight[:d] += (16 / 3) * b[0] @ a[0]
        edited.blocks[i].qkv.weight[2 * d :] += (16 / 3) * b[1] @ a[1]
    close(method.encode_images(images), unit(edited(images, method.visual_prompts())))
    plain = make(double).encode_images(images)
    assert (method.encode_images(images) - plain).abs().max() > 1e-3
    assert all(torch.equal(v, before[k]) for k, v in double.image_tower.state_dict().items())
    close(make(double, lora_rank=3).encode_images(images), plain, 1e-12)  # B starts at zero


def test_adapters_are_saved_and_learn_slowly(tiny: Backbone, tmp_path: Path) -> None:
    method, images = moved_lora(tiny), pictures(tiny)
    save_artefact(method, tmp_path)
    assert torch.equal(load_artefact(tmp_path).encode_images(images), method.encode_images(images))
    method.train()
    method.backward(method.losses(batch_of(tiny)))
    assert method.lora.a.grad.any()
    assert method.lora.b.grad.any()
    from vlprompt.training.schedule import build_optimizer

    groups = build_optimizer(method, build_config("drople").optim).param_groups
    assert [(g["share"], g["floor"], len(g["params"])) for g in groups] == [(1.0, 0.0, 9), (0.1, 0.5, 2)]
    assert {id(p) for p in groups[1]["params"]} == {id(method.lora.a), id(method.lora.b)}


def test_dropout_of_adapters_is_absent_in_evaluation(tiny: Backbone) -> None:
    method, images = moved_lora(tiny, lora_dropout=0.5), pictures(tiny)
    v = method.encode_images(images)
    assert torch.equal(method.encode_images(images), v)
    method.train()
    assert torch.equal(method.encode_images(images), v), "nor outside of losses, as after an epoch of fit"
    assert not torch.equal(method._images(images)[0], method._images(images)[0])


# --- the artefact, and runs -----------------------------------------------------------------------


def test_the_artefact_leaves_the_shared_tokens_out(tiny: Backbone, tmp_path: Path) -> None:
    method, images = make(tiny).eval(), pictures(tiny, 2)
    save_artefact(method, tmp_path)
    state = prompts(tmp_path)
    assert set(state) == {"context.vectors", "context.deep", "visual.vectors", "logit_scale", "image_keys"}
    loaded = load_artefact(tmp_path)
    for ours, theirs in zip(method.dropout_of(images), loaded.dropout_of(images), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours[:2], theirs[:2], strict=True))


@pytest.mark.parametrize("n", sweep([1, 4], 4))
def test_an_interrupted_run_resumes_to_the_same_bits(n: int, pictures: Path, tmp_path: Path) -> None:
    config = configured(pictures, "drople", **{"train.epochs": 3, "method.lora_rank": 2, "optim.warmup_epochs": 0.1})
    train(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "stopped", [StopsAfter(n)])
    train(config, tmp_path / "stopped", resume=True)
    ours, theirs = prompts(tmp_path / "stopped"), prompts(tmp_path / "whole")
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert log(tmp_path / "stopped") == log(tmp_path / "whole")
    terms = {"ce", "text_consistency", "image_consistency", "distillation", "residual_entropy", "alignment"}
    assert set(log(tmp_path / "whole")[0]) == {"epoch", "lr", "val_accuracy", *terms}


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"p_min": 0.6}, r"method.p_min = 0.6 \(allowed: at most method.p_max = 0.5\)"),
        ({"depth_text": 13}, r"text prompt depth = 13 \(allowed: 1 to 12"),
        ({"depth_vision": 13}, r"visual prompt depth = 13 \(allowed: 1 to 12"),
    ],
)
def test_settings_that_do_not_fit_together(tiny: Backbone, setting: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make(tiny, **setting)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"dropout": "importanse"}, "method.dropout = importanse (allowed: 'importance', 'uniform' or 'none'; did you"),
        ({"mode": "noise"}, "method.mode = noise (allowed: 'gaussian' or 'zero'"),
        ({"p_max": 1.5}, "method.p_max = 1.5 (allowed: less than or equal to 1)"),
        ({"lam": 1}, "method.lam = 1 (allowed: less than 1)"),
        ({"lora_rank": -1}, "method.lora_rank = -1 (allowed: greater than or equal to 0)"),
    ],
)
def test_settings_out_of_range(setting: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        build_config("drople", overrides=setting)


def test_a_run_says_that_all_of_it_is_warm_up(pictures: Path, tmp_path: Path) -> None:
    for warm_up, count in ((1, 1), (0, 0)):
        said: list[str] = []
        given = {"train.epochs": 1, "optim.warmup_epochs": warm_up}
        train(configured(pictures, "coop", **given), tmp_path / f"run-{warm_up}", say=said.append)
        assert said.count("train.epochs = 1: all of it is warm-up, at a learning rate of 1e-05 "
                          "(optim.warmup_epochs = 1)") == count  # fmt: skip


def test_a_run_says_which_of_its_settings_have_no_effect(pictures: Path, tmp_path: Path) -> None:
    said: list[str] = []
    changed = {"method.mode": "zero", "method.sigma": 0.5, "method.lora_alpha": 8, "method.lora_dropout": 0.1}
    train(configured(pictures, "drople", **changed, **{"train.epochs": 1}), tmp_path / "run", say=said.append)
    assert [line for line in said if "no effect" in line] == [
        "method.sigma = 0.5 has no effect: method.mode = zero",
        "method.lora_alpha = 8.0 has no effect: method.lora_rank = 0",
    ]


@pytest.mark.parametrize(
    ("given", "unused"),
    [
        ({}, {"lora_alpha": "lora_rank", "lora_dropout": "lora_rank"}),
        ({"lora_rank": 2, "dropout": "uniform"}, {}),
        ({"lora_rank": 2, "mode": "zero"}, {"sigma": "mode"}),
        ({"lora_rank": 2, "entropy_weight": 0}, {"lam": "entropy_weight", "lam_schedule": "entropy_weight"}),
        (
            {"lora_rank": 2, "mode": "zero", "dropout": "none"},
            {"mode": "dropout", "p_max": "dropout", "p_min": "dropout", "sigma": "dropout"},
        ),
    ],
)
def test_settings_without_effect(tiny: Backbone, given: dict, unused: dict) -> None:
    assert DroPLe.Config(**given).unused() == unused
    other = {"mode": "zero" if DroPLe.Config(**given).mode == "gaussian" else "gaussian"}
    other |= {"p_max": 0.9, "p_min": 0.3, "sigma": 0.7, "lora_alpha": 3.0, "lora_dropout": 0.6}
    other |= {"lam": 0.4, "lam_schedule": "fixed"}
    batch, losses = batch_of(tiny), []
    for settings in (given, given | {key: other[key] for key in unused}):
        method = make(tiny, **settings)
        torch.manual_seed(1)
        losses.append(total(method.losses(batch)))
    assert torch.equal(*losses)
