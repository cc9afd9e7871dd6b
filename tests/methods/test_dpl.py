"""Decoupled attention and the method on it: the identities, and the equations written out plainly, in float64.

The plain computation takes one row after the other, or one text or image at a time, under an explicit bias.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.kit import REPOSITORY
from tests.kit.plain import (
    LAYERS,
    ODD_NAMES,
    make_images,
    plain_block,
    plain_norm,
    quick,
    same,
    same_with_gradients,
    small_backbone,
    write,
)
from vlprompt.backbones import attention as kernels
from vlprompt.backbones.attention import packed_attention, plain_attention
from vlprompt.backbones.backbone import Backbone, unit
from vlprompt.backbones.load import load_backbone
from vlprompt.backbones.packing import pack
from vlprompt.cli.listing import listing, table
from vlprompt.config.schema import build_config
from vlprompt.errors import BackboneError, ConfigError, DataError
from vlprompt.methods import METHODS, Batch, Can, Method, find_method
from vlprompt.methods.dpl.decoupled import (
    SubProcesses,
    attention_bias,
    decoupled_attention,
    image_attention,
    text_attention,
)
from vlprompt.prompting.text import encode_classes

NAMES = ("dog", "cat", "grey wolf", "forget-me-not", "car")
WORDS = "a photo of a"
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SMALL: dict[str, Any] = {"n_ctx_text": 3, "n_ctx_vision": 2, "depth_text": 2, "depth_vision": 2, "init": None}
EXACT: dict[str, Any] = {"instance_to_prompt": "exact", "prompt_to_prompt": "keep", "prompt_to_instance": "exact"}


def make(backbone: Backbone | None = None, name: str = "dpl", seed: int = 0, **given: Any) -> Method:
    """A method in float64, moved off its initial values (learned factors too)."""
    torch.manual_seed(seed)
    cls = find_method(name)
    method = cls(backbone or small_backbone(), NAMES, cls.Config(**SMALL | given)).double()
    with torch.no_grad():
        for parameter in method.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return method


def logits(method: Method, images: Tensor, names: Sequence[str] = NAMES) -> Tensor:
    return method.logits(method.encode_images(images), method.class_features(names))


def frozen_logits(backbone: Backbone, images: Tensor, template: str = "a photo of a {}.") -> Tensor:
    texts = [template.replace("{}", name) for name in NAMES]
    return backbone.logits(backbone.encode_images(images), backbone.encode_texts(texts))


# --- the four sub-processes -----------------------------------------------------------------------


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Ordinary attention, written out: q [H, N, d], k and v [H, N, d], visible [N, N]."""
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~visible, -math.inf)
    return scores.softmax(-1) @ v


def recombined(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, is_prompt: Tensor, s: SubProcesses, odds: Tensor
) -> Tensor:
    """The four pieces, each computed for itself and weighted, row by row; ``odds`` [H] are the learned factors."""

    def piece(head: int, row: int, keys: list[int]) -> tuple[Tensor, Tensor]:
        """A(q, K, V) over some keys, and the sum of their exponentials; zeros if there are none."""
        if not keys:
            return torch.zeros_like(v[head, 0]), v.new_zeros(())
        exponentials = (k[head, keys] @ q[head, row] / math.sqrt(q.shape[-1])).exp()
        return exponentials @ v[head, keys] / exponentials.sum(), exponentials.sum()

    out = torch.empty_like(q)
    for head in range(len(q)):
        for row in range(q.shape[1]):
            seen = [j for j in range(q.shape[1]) if visible[row, j]]
            instance, prompt = ([j for j in seen if is_prompt[j] == wanted] for wanted in (False, True))
            if is_prompt[row]:
                prompt = {"keep": prompt, "drop": [], "identity": [row]}[s.prompt_to_prompt]
            (a_x, sum_x), (a_p, sum_p) = piece(head, row, instance), piece(head, row, prompt)
            lambda_ = sum_p / (sum_p + sum_x)
            if is_prompt[row]:
                c = 1 / s.scale_prompts if s.prompt_to_instance == "scaled" else 1.0
            else:
                c = {"scaled": s.scale, "learned": odds[head]}.get(s.instance_to_prompt, 1.0)
            lambda_ = c * lambda_ / (c * lambda_ + 1 - lambda_)
            if s.instance_to_prompt == "constant" and not is_prompt[row]:
                lambda_ = torch.tensor(s.weight if prompt else 0.0, dtype=v.dtype)
            out[head, row] = (1 - lambda_) * a_x + lambda_ * a_p
    return out


@dataclass(frozen=True)
class Shape:
    """Sizes, which of N tokens are prompts (some, never the first, which everyone sees), and who sees whom."""

    heads: int
    width: int
    is_prompt: list[bool]
    density: float
    seed: int

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        torch.manual_seed(self.seed)
        is_prompt = torch.tensor([False, *self.is_prompt])
        n = len(is_prompt)
        q, k, v = (torch.randn(1, self.heads, n, self.width, dtype=torch.float64) for _ in range(3))
        visible = (torch.rand(n, n) < self.density) | torch.eye(n, dtype=torch.bool)
        visible[:, 0] = True
        return 2 * q, k, v, visible, is_prompt


shape = st.builds(
    Shape,
    heads=st.integers(1, 3),
    width=st.integers(1, 5),
    is_prompt=st.lists(st.booleans(), min_size=1, max_size=8).filter(any),
    density=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
sub_processes = st.builds(
    SubProcesses,
    instance_to_prompt=st.sampled_from(["exact", "scaled", "constant", "learned"]),
    prompt_to_prompt=st.sampled_from(["keep", "drop", "identity"]),
    prompt_to_instance=st.sampled_from(["exact", "scaled"]),
    scale=st.sampled_from([0.0, 0.1, 1.0, 10.0]),
    weight=st.sampled_from([0.0, 0.3, 1.0]),
    scale_prompts=st.sampled_from([0.1, 1.0, 10.0]),
)


@quick
@given(shape)
def test_the_four_pieces_recombined_are_softmax_attention(drawn: Shape) -> None:
    q, k, v, visible, is_prompt = drawn.tensors()
    exact = SubProcesses()
    pieces = recombined(q[0], k[0], v[0], visible, is_prompt, exact, torch.ones(drawn.heads))
    same("pieces", pieces, softmax_attention(q[0], k[0], v[0], visible))
    bias, reads = attention_bias(visible, is_prompt, exact), ~is_prompt[:, None] & is_prompt
    same("fused", decoupled_attention(q, k, v, bias, reads, is_prompt.nonzero()[:, 0])[0], pieces)


@quick
@given(shape, sub_processes)
def test_fused_attention_equals_the_four_weighted_pieces(drawn: Shape, s: SubProcesses) -> None:
    q, k, v, visible, is_prompt = drawn.tensors()
    odds = torch.rand(drawn.heads, dtype=torch.float64) + 0.5
    bias, reads = attention_bias(visible, is_prompt, s), ~is_prompt[:, None] & is_prompt
    prompts = is_prompt.nonzero()[:, 0]
    weight = s.weight if s.instance_to_prompt == "constant" else None
    log_odds = odds.log() if s.instance_to_prompt == "learned" else None
    fused = decoupled_attention(q, k, v, bias, reads, prompts, weight, log_odds)[0]
    same("pieces", fused, recombined(q[0], k[0], v[0], visible, is_prompt, s, odds))
    row = torch.tensor([drawn.seed % len(is_prompt)])  # one query asks, as in the last block
    alone = decoupled_attention(q[:, :, row], k, v, bias[row], reads[row], prompts, weight, log_odds)[0]
    same("one row", alone, fused[:, row])


def test_a_scale_multiplies_the_odds() -> None:
    """λ → cλ/(cλ + 1 − λ): with values 1 at prompts and 0 elsewhere, attention is λ itself."""
    torch.manual_seed(0)
    q, k = (torch.randn(1, 1, 7, 4, dtype=torch.float64) for _ in range(2))
    is_prompt = torch.arange(7) > 4
    reads, prompts = ~is_prompt[:, None] & is_prompt, is_prompt.nonzero()[:, 0]
    v = is_prompt.double().expand(1, 1, 4, 7).transpose(-1, -2)
    shares = []
    for s in (SubProcesses(), SubProcesses("scaled", scale=5.0)):
        bias = attention_bias(torch.ones(7, 7, dtype=torch.bool), is_prompt, s)
        shares.append(decoupled_attention(q, k, v, bias, reads, prompts)[0, 0, :5, 0])
    same("share", shares[1], 5 * shares[0] / (5 * shares[0] + 1 - shares[0]))


# --- whole towers, plainly ------------------------------------------------------------------------


def sub_processes_of(method: Method, scale: float) -> SubProcesses:
    c = method.config
    return SubProcesses(
        c.instance_to_prompt, c.prompt_to_prompt, c.prompt_to_instance, scale, c.weight, c.scale_prompts
    )


def constant_of(method: Method) -> float | None:
    return method.config.weight if method.config.instance_to_prompt == "constant" else None


def plain_tower(
    blocks: nn.ModuleList, heads: int, x: Tensor, where: Sequence[int], prompts: Sequence[Tensor], mode: str,
    biases: Sequence[Tensor], constant: float | None,
) -> Tensor:  # fmt: skip
    """x [N, D], with the first prompts in it, through every block under its bias [N, N]."""
    is_prompt = torch.tensor([i in where for i in range(len(x))])
    reads = ~is_prompt[:, None] & is_prompt

    def mixed(logits: Tensor, dim: int) -> Tensor:
        """The weights that a constant λ_X gives: of a row that reads no prompt, the instance's."""
        some = (reads & logits.isfinite()).any(dim, keepdim=True)
        instance, prompt = logits.masked_fill(reads, -math.inf), logits.masked_fill(some & ~reads, -math.inf)
        return torch.where(
            some, (1 - constant) * instance.softmax(dim) + constant * prompt.softmax(dim), instance.softmax(dim)
        )

    weigh = Tensor.softmax if constant is None else mixed
    for i, block in enumerate(blocks):
        if 0 < i < len(prompts):
            x = write(x, where, prompts[i], mode)
        x = plain_block(x, block, heads, biases[i], weigh)
    return x


def biases_of(visible: Tensor, is_prompt: Tensor, s: SubProcesses, log_odds: Tensor | None) -> list[Tensor]:
    bias = attention_bias(visible, is_prompt, s)
    if log_odds is None:
        return [bias] * LAYERS
    reads = ~is_prompt[:, None] & is_prompt
    return [bias + odds[0] * reads for odds in log_odds]  # the plain block has one bias for all heads


def plain_images(method: Method, images: Tensor) -> Tensor:
    tower, c = method.backbone.image_tower, method.config
    size, side, n = tower.config.patch_size, range(0, 16, tower.config.patch_size), len(tower.positions)
    is_prompt = torch.arange(n + c.n_ctx_vision) >= n
    visible = torch.ones(len(is_prompt), len(is_prompt), dtype=torch.bool)
    biases = biases_of(visible, is_prompt, sub_processes_of(method, c.scale_vision), method.log_odds_vision)
    prompts, where, features = list(method.visual.vectors), range(n, n + c.n_ctx_vision), []
    for image in images:
        patches = torch.stack([image[:, i : i + size, j : j + size].flatten() for i in side for j in side])
        x = torch.cat([tower.class_token[None], patches @ tower.patches.weight.flatten(1).T]) + tower.positions
        x = plain_norm(torch.cat([x, prompts[0]]), tower.ln_pre)
        x = plain_tower(tower.blocks, tower.config.heads, x, where, prompts, c.carry, biases, constant_of(method))
        features.append(tower.projection.weight @ plain_norm(x, tower.ln_post)[0])
    return unit(torch.stack(features))


def plain_texts(method: Method, names: Sequence[str]) -> Tensor:
    """Each sentence by itself, its learned tokens behind it, unless the text is a context."""
    backbone, c = method.backbone, method.config
    tower, features = backbone.text_tower, []
    prompts = [method.context.vectors, *(() if method.context.deep is None else method.context.deep)]
    for name in names:
        if c.text == "context":
            ids = backbone.tokenize([f"{' '.join(['x'] * c.n_ctx_text)} {name}."])[0]
            n, where, pooled = len(ids), range(1, 1 + c.n_ctx_text), len(ids) - 1
            x = write(tower.token_embedding.weight[ids], where, prompts[0], "replace") + tower.positions[:n]
            visible = torch.ones(n, n, dtype=torch.bool).tril()
        else:
            ids = backbone.tokenize([f"a photo of a {name}."])[0]
            n, pooled = len(ids), len(ids) - 1
            where = range(n, n + c.n_ctx_text)
            x = tower.token_embedding.weight[ids] + tower.positions[:n]
            x = torch.cat([x, prompts[0] + tower.positions[1 : 1 + c.n_ctx_text]])
            readers = range(n) if c.text == "sentence" else [pooled]
            visible = torch.ones(len(x), len(x), dtype=torch.bool)
            for i in range(n):
                for j in range(len(x)):
                    visible[i, j] = j <= i if j < n else i in readers
        is_prompt = torch.tensor([i in where for i in range(len(x))])
        biases = biases_of(visible, is_prompt, sub_processes_of(method, c.scale_text), method.log_odds_text)
        x = plain_tower(tower.blocks, tower.config.heads, x, where, prompts, c.carry, biases, constant_of(method))
        features.append(tower.projection.weight @ plain_norm(x, tower.ln_final)[pooled])
    return unit(torch.stack(features))


method_settings = st.fixed_dictionaries(
    {
        "instance_to_prompt": st.sampled_from(["exact", "scaled", "constant", "learned"]),
        "weight": st.sampled_from([0.05, 0.6]),
        "prompt_to_prompt": st.sampled_from(["keep", "drop", "identity"]),
        "prompt_to_instance": st.sampled_from(["exact", "scaled"]),
        "carry": st.sampled_from(["replace", "add"]),
        "text": st.sampled_from(["sentence", "read-only", "context"]),
        "n_ctx_text": st.integers(1, 4),
        "n_ctx_vision": st.integers(1, 4),
        "depth_text": st.integers(1, LAYERS),
        "depth_vision": st.integers(1, LAYERS),
        "scale_text": st.sampled_from([0.3, 4.0]),
        "scale_vision": st.sampled_from([0.3, 4.0]),
        "seed": st.integers(0, 1000),
    }
)


def plain_method(drawn: dict[str, Any]) -> Method:
    method = make(**drawn)
    if drawn["instance_to_prompt"] == "learned":  # a factor for each layer, the same for all heads
        with torch.no_grad():
            for log_odds in (method.log_odds_text, method.log_odds_vision):
                log_odds.copy_(log_odds[:, :1].expand_as(log_odds))
    return method


@settings(quick, max_examples=60)
@given(method_settings, st.lists(st.sampled_from([*NAMES, *ODD_NAMES[:4]]), min_size=1, max_size=4))
def test_class_features_equal_the_plain_ones(drawn: dict[str, Any], names: list[str]) -> None:
    method = plain_method(drawn)
    learned = dict(method.context.named_parameters())
    plain = plain_texts(method, [name.replace("_", " ") for name in names])
    same_with_gradients(method.class_features(names), plain, learned)


@settings(quick, max_examples=40)
@given(method_settings)
def test_image_features_equal_the_plain_ones(drawn: dict[str, Any]) -> None:
    method = plain_method(drawn)
    images = make_images()
    same_with_gradients(
        method.encode_images(images), plain_images(method, images), dict(method.visual.named_parameters())
    )


@pytest.mark.parametrize(("kind", "times"), [("exact", 1), ("scaled", 1), ("learned", 1), ("constant", 2)])
def test_what_is_but_a_bias_is_one_fused_attention(kind: str, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    fused = kernels.scaled_dot_product_attention
    monkeypatch.setattr(kernels, "scaled_dot_product_attention", lambda *q, **how: calls.append(1) or fused(*q, **how))
    method = make(instance_to_prompt=kind, prompt_to_prompt="identity", prompt_to_instance="scaled")
    method.encode_images(make_images())
    assert len(calls) == times * LAYERS
    calls.clear()
    method.class_features(["cat", "bird"])  # texts of one length
    assert len(calls) == times * LAYERS


# --- identities of the method ---------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, LAYERS])
@pytest.mark.parametrize("n_ctx", [2, 4, 6])
def test_exact_weights_in_coops_place_are_ivlp(n_ctx: int, depth: int) -> None:
    sizes = {"n_ctx_text": n_ctx, "n_ctx_vision": n_ctx, "depth_text": depth, "depth_vision": depth, "init": WORDS}
    dpl, ivlp = make(**EXACT, text="context", carry="replace", **sizes), make(name="ivlp", **sizes)
    assert dpl.state_dict().keys() == ivlp.state_dict().keys()
    assert all(torch.equal(p, ivlp.state_dict()[k]) for k, p in dpl.state_dict().items())  # the same seed
    images, labels = make_images(), torch.arange(3)
    same("logits", logits(dpl, images), logits(ivlp, images))
    losses = [m.losses(Batch(images, labels)) for m in (dpl, ivlp)]
    assert losses[0].keys() == losses[1].keys() == {"ce"}
    for method, loss in zip((dpl, ivlp), losses, strict=True):
        method.backward(loss)
    for (name, p), other in zip(dpl.named_parameters(), ivlp.parameters(), strict=True):
        assert other.grad.abs().max() > 1e-6
        same(f"gradient of {name}", p.grad, other.grad)
    scaled = make(**EXACT | {"instance_to_prompt": "scaled"}, text="context", carry="replace", **sizes)
    assert not torch.allclose(logits(scaled, images), logits(ivlp, images))


OFF = [
    {"instance_to_prompt": "scaled", "scale_text": 0.0, "scale_vision": 0.0},
    {"instance_to_prompt": "constant", "weight": 0.0},
]


@pytest.mark.parametrize("text", ["sentence", "read-only"])
@pytest.mark.parametrize("carry", ["replace", "add"])
@pytest.mark.parametrize("off", OFF, ids=["scaled", "constant"])
def test_prompts_that_nothing_reads_leave_frozen_clip(off: dict[str, Any], carry: str, text: str) -> None:
    images = make_images()
    for prompt_to_prompt in ("keep", "drop", "identity"):
        method = make(**off, carry=carry, text=text, prompt_to_prompt=prompt_to_prompt, prompt_to_instance="scaled")
        same("logits", logits(method, images), frozen_logits(method.backbone, images))
        losses = method.losses(Batch(images, torch.arange(3)))
        assert not any(g.any() for g in method.gradients(losses)["total"])
    own = make(**off, carry=carry, text=text, template="{}, a kind of thing")
    same("own template", logits(own, images), frozen_logits(own.backbone, images, "{}, a kind of thing"))


@pytest.mark.parametrize("carry", ["replace", "add"])
def test_logits_go_to_frozen_clips_as_the_scale_goes_to_zero(carry: str) -> None:
    images, distances = make_images(), []
    for scale in (1.0, 1e-8, 1e-10):
        method = make(instance_to_prompt="scaled", scale_text=scale, scale_vision=scale, carry=carry)
        distances.append((logits(method, images) - frozen_logits(method.backbone, images)).abs().max().item())
    assert distances[0] > 0.1
    assert distances[2] == pytest.approx(distances[1] / 100, rel=0.01)  # in proportion to c


def test_learned_factors_start_exact_and_are_factors_of_the_odds() -> None:
    images, sizes = make_images(), {"seed": 3, "carry": "add"}
    learned, exact = make(instance_to_prompt="learned", **sizes), make(**EXACT, **sizes)
    scaled = make(instance_to_prompt="scaled", scale_text=3.0, scale_vision=3.0, **sizes)
    fresh = find_method("dpl")(small_backbone(), NAMES, learned.config)
    factors = ("log_odds_text", "log_odds_vision")
    for name, tower in zip(factors, (learned.backbone.text_tower, learned.backbone.image_tower), strict=True):
        assert not getattr(fresh, name).any()
        assert getattr(fresh, name).shape == (LAYERS, tower.config.heads)
    assert not {*factors} & set(exact.state_dict())
    learned.load_state_dict(exact.state_dict() | {n: torch.zeros_like(getattr(learned, n)) for n in factors})
    same("at zero", logits(learned, images), logits(exact, images))
    scaled.load_state_dict(exact.state_dict())
    with torch.no_grad():
        for name in factors:
            getattr(learned, name).fill_(math.log(3))
    same("ln 3", logits(learned, images), logits(scaled, images))
    for name in factors:  # each layer and head has a say of its own
        gradient = torch.autograd.grad(logits(learned, images).square().sum(), getattr(learned, name))[0]
        assert gradient.abs().min() > 0


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_to_prompt": "drop"}, {"prompt_to_prompt": "identity"}, {"prompt_to_instance": "scaled"},
        {"instance_to_prompt": "scaled"}, {"instance_to_prompt": "constant"}, {"text": "read-only"},
        {"text": "context"}, {"carry": "replace"},
    ],
    ids=str,
)  # fmt: skip
def test_every_piece_changes_the_logits(change: dict[str, Any]) -> None:
    base = EXACT | {"carry": "add", "text": "sentence", "scale_text": 4.0, "scale_vision": 4.0}
    images = make_images()
    plain, changed = make(**base), make(**base | change)
    assert not torch.allclose(logits(plain, images), logits(changed, images), atol=1e-3)


def test_replacing_prompts_throws_away_what_they_read_before_the_last_prompted_layer() -> None:
    images = make_images()
    for depth, matters in ((LAYERS, False), (LAYERS - 1, True)):
        base = EXACT | {"carry": "replace", "depth_text": depth, "depth_vision": depth}
        plain, dropped = logits(make(**base), images), logits(make(**base | {"prompt_to_prompt": "drop"}), images)
        assert torch.allclose(plain, dropped) != matters


# --- language-conditioned text prompts ------------------------------------------------------------


def states(method: Method, names: Sequence[str]) -> list[Tensor]:
    """Output of every block but the last for the packed texts of a method with exact weights, [T, D] each."""
    seen: list[Tensor] = []

    def keep(layer: int, x: Tensor) -> Tensor:
        seen.append(x[0])
        return x

    packed, tower = method.context.packed(method.backbone, names, share_prefix=False), method.backbone.text_tower
    attention = text_attention(tower, packed, SubProcesses())
    tower(packed, method.context.prompts(), attention, keep)
    return seen[1:]  # before a block is after the one before it


def test_prompts_read_the_words_of_their_class() -> None:
    method = make(**EXACT)
    packed = method.context.packed(method.backbone, ("dog", "cat"))  # one group: texts of one length
    after_first = states(method, ("dog", "cat"))[0]
    prompts = after_first[packed.slots].unflatten(0, (2, -1))
    same_place = make(**EXACT, text="context")
    packed = same_place.context.packed(same_place.backbone, ("dog", "cat"), share_prefix=False)
    in_context = states(same_place, ("dog", "cat"))[0][packed.slots].unflatten(0, (2, -1))
    assert (prompts[0] - prompts[1]).abs().amax(-1).gt(1e-3).all()
    assert torch.equal(in_context[0], in_context[1])  # a causal context is blind to the class


def test_read_only_words_stay_what_the_frozen_model_makes_of_them() -> None:
    ids = small_backbone().tokenize(["a photo of a dog."])
    n, frozen = len(ids[0]), []

    def keep(layer: int, x: Tensor) -> Tensor:
        frozen.append(x[0])
        return x

    small_backbone().text_tower(pack(ids), before_block=keep)
    for text, changes in (("read-only", False), ("sentence", True)):
        method = make(**EXACT, text=text)
        for ours, theirs in zip(states(method, ("dog",)), frozen[1:], strict=True):
            words = (ours[: n - 1] - theirs[: n - 1]).abs().max() > 1e-9
            assert words == changes
            assert (ours[n - 1] - theirs[n - 1]).abs().max() > 1e-3  # the pooled token reads the prompts


def test_learned_tokens_start_as_the_words_of_the_sentence() -> None:
    """In the template's own words, at their own positions: after the first block's input nothing tells them apart."""
    method = find_method("dpl")(small_backbone(), NAMES, find_method("dpl").Config(depth_text=1, depth_vision=1))
    packed = method.context.packed(method.backbone, ("dog",))
    assert packed.positions[packed.slots].tolist() == [1, 2, 3, 4]
    ids = method.backbone.tokenizer.words(WORDS)
    known = method.backbone.text_tower.token_embedding.weight[ids].float()
    assert torch.equal(method.context.vectors, known)
    assert packed.tokens[1:5].tolist() == ids


def test_a_sentence_may_fill_the_context_length() -> None:
    method = make(template="{}", n_ctx_text=4)
    longest = "photo " * 74 + "photo"  # start, 75 words, end
    assert method.class_features([longest]).isfinite().all()
    with pytest.raises(DataError, match=r"text of class 'photo photo .*…' has 78 tokens; .* at most 77"):
        method.class_features([longest + " photo"])
    with pytest.raises(DataError, match="class name '_' has no token that the backbone knows"):
        method.class_features(["_"])


def test_text_prompts_on_a_bidirectional_tower() -> None:
    """SigLIP-like text: padded to one length, read from both sides, pooled at the last position."""
    backbone = small_backbone(causal=False)
    images = make_images()
    off = make(backbone, branches="textual", instance_to_prompt="scaled", scale_text=0.0)
    same("off", logits(off, images), frozen_logits(backbone, images))
    on = make(backbone, branches="textual", **EXACT)
    together = on.class_features(NAMES)
    assert not torch.allclose(together, off.class_features(NAMES))
    same("one by one", together, torch.cat([on.class_features([name]) for name in NAMES]))


# --- branches -------------------------------------------------------------------------------------


def test_a_branch_that_is_off_is_frozen() -> None:
    images = make_images()
    for branches, own, other in (("visual", "visual.", "context."), ("textual", "context.", "visual.")):
        for more in ({}, {"instance_to_prompt": "learned"}):
            method = make(branches=branches, **more)
            names = [name for name, _ in method.named_parameters()]
            assert any(name.startswith(own) for name in names)
            assert not any(name.startswith(other) for name in names)
            assert sum(name.startswith("log_odds") for name in names) == len(more)
            frozen = frozen_logits(method.backbone, images)
            v, t = method.encode_images(images), method.class_features(NAMES)
            assert torch.allclose(v, method.backbone.encode_images(images)) == (branches == "textual")
            assert torch.allclose(t, frozen_class(method.backbone)) == (branches == "visual")
            assert (Can.USE_FROZEN_FEATURES not in method.config.can) == (branches == "visual")
            assert not torch.allclose(method.logits(v, t), frozen)
    marked = torch.randn(3, 16, dtype=torch.float64)
    textual = make(branches="textual")
    assert textual.image_features(Batch(images, torch.arange(3), marked)) is marked  # nothing is computed again


def frozen_class(backbone: Backbone) -> Tensor:
    return backbone.encode_texts([f"a photo of a {name}." for name in NAMES])


def test_a_backbone_without_class_token_takes_text_prompts_alone() -> None:
    backbone = small_backbone(pool="map")
    with pytest.raises(BackboneError, match="backbone 'small' has no class token"):
        make(backbone)
    assert make(backbone, branches="textual").class_features(NAMES).isfinite().all()


# --- settings, precision, listing -----------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("weight", ["scaled", "constant", "learned"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_half_precision_towers(device: str, precision: str, weight: str, tiny: Backbone) -> None:
    low = load_backbone(tiny.name, device, precision)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    values = []
    for backbone in (tiny, low):
        torch.manual_seed(0)
        cls = find_method("dpl")
        method = cls(backbone, ("house", "tree"), cls.Config(instance_to_prompt=weight)).to(backbone.device)
        losses = method.losses(Batch(images, torch.tensor([0, 1], device=backbone.device)))
        assert all(g.isfinite().all() for g in method.gradients(losses)["total"])
        values.append((method.encode_images(images) @ method.class_features(("house", "tree")).T).cpu())
    torch.testing.assert_close(values[1], values[0], atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"branches": "visal"}, r"method.branches = visal \(allowed: 'visual', 'textual' or 'both'; did"),
        ({"text": "lctp"}, r"method.text = lctp \(allowed: 'sentence', 'read-only' or 'context'\)"),
        ({"carry": "added"}, r"method.carry = added \(allowed: 'add' or 'replace'; did you mean 'add'"),
        ({"instance_to_prompt": "scale"}, r"method.instance_to_prompt = scale \(allowed: .*; did you mean 'scaled'"),
        ({"prompt_to_prompt": "keeps"}, r"method.prompt_to_prompt = keeps \(allowed: .*; did you mean 'keep'"),
        ({"prompt_to_instance": "learned"}, r"method.prompt_to_instance = learned \(allowed: 'exact' or 'scaled'\)"),
        ({"scale_vision": -1}, r"method.scale_vision = -1 \(allowed: greater than or equal to 0\)"),
        ({"scale_text": "inf"}, r"method.scale_text = inf \(allowed: less than or equal to 1000000\)"),
        ({"scale_prompts": 0}, r"method.scale_prompts = 0 \(allowed: greater than 0\)"),
        ({"weight": 1.5}, r"method.weight = 1.5 \(allowed: less than or equal to 1\)"),
        ({"weight": -0.1}, r"method.weight = -0.1 \(allowed: greater than or equal to 0\)"),
        ({"template": "a photo"}, r"method.template = a photo \(allowed: text with \{\} for the class name\)"),
        ({"n_ctx_text": 0}, r"method.n_ctx_text = 0 \(allowed: greater than or equal to 1\)"),
        ({"scale_visoin": 2}, r"unknown key 'scale_visoin': did you mean 'method.scale_vision'"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_config("dpl", overrides=given)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"depth_text": LAYERS + 1}, rf"text prompt depth = {LAYERS + 1} \(allowed: 1 to {LAYERS}, the text"),
        ({"depth_vision": LAYERS + 1}, rf"visual prompt depth = {LAYERS + 1} \(allowed: 1 to {LAYERS}, the image"),
        ({"n_ctx_text": 77}, r"text prompt tokens = 77 \(allowed: 1 to 76, the positions after the first\)"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_the_backbone_cannot_take_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**given)
    assert make(n_ctx_text=76).class_features(("dog",)).isfinite().all()


@pytest.mark.parametrize(
    ("into", "back", "unused"),
    [
        ("exact", "exact", {"scale_vision", "scale_text", "weight", "scale_prompts"}),
        ("learned", "scaled", {"scale_vision", "scale_text", "weight"}),
        ("scaled", "exact", {"weight", "scale_prompts"}),
        ("constant", "scaled", {"scale_vision", "scale_text"}),
    ],
)
def test_settings_without_effect(into: str, back: str, unused: set[str]) -> None:
    other = {"scale_vision": 7.0, "scale_text": 7.0, "weight": 0.5, "scale_prompts": 7.0}
    given, images = {"instance_to_prompt": into, "prompt_to_instance": back}, make_images()
    plain = make(small_backbone(), **given)
    assert plain.config.unused() == {
        key: "prompt_to_instance" if key == "scale_prompts" else "instance_to_prompt" for key in unused
    }
    for key, value in other.items():
        changed = make(small_backbone(), **given, **{key: value})
        same = torch.equal(logits(changed, images), logits(plain, images))
        assert same == (key in unused), key


@pytest.mark.parametrize("branches", ["visual", "textual", "both"])
@pytest.mark.parametrize("text", ["sentence", "read-only", "context"])
def test_a_template_without_effect(branches: str, text: str) -> None:
    given, template = {"branches": branches, "text": text}, "{}, a kind of thing"
    plain, changed = make(small_backbone(), **given), make(small_backbone(), **given, template=template)
    same = torch.equal(plain.class_features(NAMES), changed.class_features(NAMES))
    assert same == ("template" in changed.config.unused())


@pytest.mark.parametrize("branches", ["visual", "textual", "both"])
def test_settings_of_a_branch_that_is_off_have_no_effect(branches: str) -> None:
    given: dict[str, Any] = {"branches": branches, "instance_to_prompt": "scaled", "scale_text": 2.0, "n_ctx_text": 4}
    other = {"n_ctx_text": 5, "depth_text": 3, "init": WORDS, "text": "context", "scale_text": 7.0}
    other |= {"n_ctx_vision": 4, "depth_vision": 3, "scale_vision": 7.0}
    images = make_images()
    plain = make(small_backbone(), **given)
    unused = {key for key, setting in plain.config.unused().items() if setting == "branches"}
    for key, value in other.items():
        changed = make(small_backbone(), **given | {key: value})
        assert torch.equal(logits(changed, images), logits(plain, images)) == (key in unused), key


def test_the_listing_says_how_each_method_is_checked() -> None:
    rows = {row["name"]: row for row in listing("methods")}
    assert rows.keys() == METHODS.keys()
    for row in rows.values():
        assert {"paper", "year", "learns", "needs", "parity"} <= row.keys()
        assert row["parity"] in {"golden", "identity", "reconstructed"}
    dpl = rows["dpl"]
    assert (dpl["paper"], dpl["year"], dpl["parity"]) == ("Xu et al., arXiv", 2023, "reconstructed")
    line = next(line for line in table(list(rows.values())).splitlines() if line.startswith("dpl "))
    assert "reconstructed" in line.split()
    first = (METHODS["dpl"].__doc__ or "").splitlines()[0]
    page = (REPOSITORY / "docs" / "methods" / "dpl.md").read_text("utf-8")
    for text in (first, page):
        assert "reconstructed from the abstract" in text


# --- one attention function a block ---------------------------------------------------------------


def test_towers_call_one_attention_function_a_block() -> None:
    """In order; a different function in one block changes the features; the same function in all is one function."""
    backbone, images = small_backbone(), make_images()
    context = make(name="ivlp").context
    packed = context.packed(backbone, NAMES)
    calls: list[tuple[str, int]] = []

    def recorded(where: str, layer: int, attention: Any, factor: float = 1.0) -> Any:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            calls.append((where, layer))
            return factor * attention(q, k, v)

        return call

    plain = {
        "image": plain_attention(backbone.image_tower.config.heads),
        "text": packed_attention(packed, backbone.text_tower.config.heads),
    }

    def features(where: str, attention: Any) -> Tensor:
        if where == "image":
            return backbone.image_tower(images, attention=attention)
        return encode_classes(backbone.text_tower, context.prompts(), packed, False, attention)

    for where, attention in plain.items():
        same("sequence", features(where, [attention] * LAYERS), features(where, None))
        calls.clear()
        features(where, [recorded(where, i, attention) for i in range(LAYERS)])
        assert calls == [(where, i) for i in range(LAYERS)]
        others = [
            features(where, [recorded(where, i, attention, 2.0 if i == j else 1.0) for i in range(LAYERS)])
            for j in range(LAYERS)
        ]
        for j, changed in enumerate(others):
            assert not torch.allclose(changed, features(where, None)), j
            assert all(not torch.allclose(changed, other) for other in others[:j])


def test_image_attention_takes_the_class_token_alone_in_the_last_block() -> None:
    tower, s = small_backbone().image_tower, SubProcesses("scaled", scale=3.0)
    torch.manual_seed(0)
    n = len(tower.positions) + 2
    q, k, v = (torch.randn(2, n, tower.config.width, dtype=torch.float64) for _ in range(3))
    attention = image_attention(tower, 2, s)
    same("class token", attention(q[:, :1], k, v), attention(q, k, v)[:, :1])
    other = image_attention(tower, 2, replace(s, scale=4.0))
    assert not torch.allclose(other(q, k, v), attention(q, k, v))


def test_a_constant_weight_takes_a_second_attention_to_the_prompts_alone() -> None:
    tower, n_ctx = small_backbone().image_tower, 2
    n = len(tower.positions) + n_ctx
    x = torch.zeros(1, n, tower.config.width, dtype=torch.float64)

    def operations(s: SubProcesses) -> int:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            image_attention(tower, n_ctx, s)(x, x, x)
        return counter.get_total_flops()

    exact = operations(SubProcesses())
    assert operations(SubProcesses("constant", weight=0.3)) == exact + exact * n_ctx // n > exact
