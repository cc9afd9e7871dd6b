"""The fast computation of prompted features against the plain one, in float64, gradients included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.kit.plain import (
    LAYERS,
    N_IMAGES,
    ODD_NAMES,
    make_context,
    make_images,
    plain_classes,
    plain_image,
    plain_text,
    quick,
    same,
    same_with_gradients,
    small_backbone,
)
from vlprompt.backbones import attention
from vlprompt.backbones.attention import packed_attention
from vlprompt.backbones.backbone import Backbone, unit
from vlprompt.backbones.packing import pack, pack_with_room
from vlprompt.errors import BackboneError, ConfigError, DataError
from vlprompt.prompting.text import TextContext, class_tokens, encode_classes, word_vectors
from vlprompt.prompting.visual import CoupledPrompts, VisualPrompts

# Class texts


@dataclass(frozen=True)
class Setting:
    """What the property is drawn over."""

    names: list[str]
    n_ctx: int
    words: str | None
    position: str
    depth: int
    mode: str
    class_specific: bool
    images: int
    seed: int
    padded: bool

    def context(self, backbone: Backbone) -> TextContext:
        torch.manual_seed(self.seed)
        return make_context(
            backbone,
            self.n_ctx,
            self.words,
            position=self.position,
            depth=self.depth,
            mode=self.mode,
            n_classes=len(self.names) if self.class_specific else None,
        )


word = st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=7)
name = st.lists(word, min_size=1, max_size=4).map(" ".join) | st.sampled_from(ODD_NAMES)
names = st.lists(name, min_size=1, max_size=4)
related_names = st.builds(
    lambda first, others, gap: [f"{first}{gap}{other}" for other in others], word, names, st.sampled_from(" _-")
)
same_length = st.lists(st.sampled_from(["dog", "cat", "car", "tree"]), min_size=2, max_size=5)

setting = st.builds(
    Setting,
    names=names | related_names | same_length,
    n_ctx=st.integers(1, 6),
    words=st.sampled_from([None, "a photo of a", "a photo", "one of many pretty pictures of the"]),
    position=st.sampled_from(["end", "middle", "front"]),
    depth=st.integers(1, LAYERS),
    mode=st.sampled_from(["replace", "add"]),
    class_specific=st.booleans(),
    images=st.just(0),
    seed=st.integers(0, 1000),
    padded=st.booleans(),
)


def check_classes(backbone: Backbone, drawn: Setting) -> None:
    context = drawn.context(backbone)
    learned = dict(context.named_parameters())
    bias = None
    if drawn.images:
        bias = learned["bias"] = torch.randn(drawn.images, 32, dtype=torch.float64, requires_grad=True)
    packed = context.packed(backbone, drawn.names)
    with patch.object(attention, "MANY_LENGTHS", 2 if drawn.padded else 99):
        fast = encode_classes(backbone.text_tower, context.prompts(bias), packed)
    same_with_gradients(fast, plain_classes(backbone, drawn.names, context, bias), learned)


@quick
@given(setting)
def test_fast_class_features_equal_the_plain_ones(drawn: Setting) -> None:
    check_classes(small_backbone(), drawn)


@settings(quick, max_examples=100)
@given(setting, st.integers(1, N_IMAGES))
def test_image_dependent_class_features_equal_the_plain_ones(drawn: Setting, images: int) -> None:
    check_classes(small_backbone(), replace(drawn, images=images))


@settings(quick, max_examples=100)
@given(setting)
def test_bidirectional_class_features_equal_the_plain_ones(drawn: Setting) -> None:
    check_classes(small_backbone(causal=False), drawn)


@settings(quick, max_examples=100)
@given(setting)
def test_sharing_the_prefix_changes_nothing(drawn: Setting) -> None:
    backbone, context = small_backbone(), drawn.context(small_backbone())
    texts = class_tokens(backbone, drawn.names, drawn.n_ctx, drawn.words, drawn.position)
    shared, alone = (
        pack(texts.ids, texts.slots, class_specific=drawn.class_specific, share_prefix=share) for share in (True, False)
    )
    assert shared.prefix >= 1
    assert alone.prefix == 0
    fast, plain = (encode_classes(backbone.text_tower, context.prompts(), p) for p in (shared, alone))
    same_with_gradients(fast, plain, dict(context.named_parameters()))


@settings(quick, max_examples=100)
@given(setting)
def test_no_padding_is_stored(drawn: Setting) -> None:
    backbone = small_backbone()
    texts = class_tokens(backbone, drawn.names, drawn.n_ctx, drawn.words, drawn.position)
    packed = pack(texts.ids, texts.slots, class_specific=drawn.class_specific)
    rows = packed.prefix + sum(len(ids) - packed.prefix for ids in texts.ids)
    assert len(packed.tokens) == len(packed.positions) == rows
    assert len(packed.pooled) == len(texts.ids)
    ends = packed.positions[packed.pooled][packed.order]
    assert ends.tolist() == [len(ids) - 1 for ids in texts.ids]


@settings(quick, max_examples=50)
@given(names | related_names)
def test_frozen_text_features_equal_the_plain_ones(texts: list[str]) -> None:
    for backbone in (small_backbone(), small_backbone(causal=False)):
        tokenizer = backbone.tokenizer
        rows = []
        for text in texts:
            ids = [*tokenizer.start, *tokenizer.words(text), *tokenizer.end]
            rows.append(plain_text(backbone.text_tower, ids, (), (), "replace", tokenizer.pad or 0))
        plain = torch.stack(rows)
        same("features", backbone.encode_texts(texts, normalise=False), plain)
        same("unit features", backbone.encode_texts(texts), unit(plain))


DIFFERENT = ["dog", "cat", "forget-me-not"]


@pytest.mark.parametrize(("times", "specific", "groups"), [(1, False, 1), (1, True, 1), (40, False, 5)])
def test_few_texts_of_many_lengths_are_attended_to_at_once(times: int, specific: bool, groups: int) -> None:
    """By two calls of the kernel a layer, one for the shared prefix, which the last does not need."""
    backbone, names = small_backbone(), [" ".join(["xyz"] * n) for n in range(1, 6)] * times
    context = make_context(backbone, 3, n_classes=len(names) if specific else None)
    packed = context.packed(backbone, names)
    assert len(packed.groups) == 5
    kernel = attention.scaled_dot_product_attention
    with patch.object(attention, "scaled_dot_product_attention", side_effect=kernel) as called:
        encode_classes(backbone.text_tower, context.prompts(), packed)
    assert called.call_count == LAYERS * (1 + groups) - 1


def test_texts_joined_later_are_the_same_padded() -> None:
    """Those with room for tokens that join inside the tower, which some layers pass over."""
    tokens = [[1, 5, 2], [1, 5, 6, 7, 2], [1, 9, 2], [1, 5, 6, 7, 8, 9, 2], [1, 8, 9, 2]]
    torch.manual_seed(0)
    for text in pack_with_room(tokens, 2):
        q, k, v = torch.randn(3, 2, len(text.tokens), 32, dtype=torch.float64)
        for queries in (q, q[:, text.pooled]) if text.groups[0].mask[-1].all() else (q,):
            padded = packed_attention(text, 2)(queries, k, v)
            with patch.object(attention, "MANY_LENGTHS", 99):
                same("padded", padded, packed_attention(text, 2)(queries, k, v))


@pytest.mark.parametrize(
    ("position", "n_ctx", "words", "options", "prefix"),
    [
        ("end", 4, None, {}, 1 + 4),
        ("end", 4, None, {"depth": LAYERS}, 1 + 4),
        ("end", 2, "a photo of a", {}, 1 + 4),  # the frozen words too
        ("end", 6, "a photo of a", {}, 1 + 6),
        ("middle", 4, None, {}, 1 + 2),
        ("middle", 5, None, {}, 1 + 2),
        ("middle", 1, None, {}, 1),
        ("front", 4, None, {}, 1),
        ("end", 4, None, {"n_classes": 3}, 1),
        ("end", 2, "a photo of a", {"n_classes": 3}, 1),
        ("middle", 4, None, {"n_classes": 3}, 1),
    ],
)
def test_shared_prefix_is_as_long_as_it_can_be(
    position: str, n_ctx: int, words: str | None, options: dict, prefix: int
) -> None:
    context = TextContext(small_backbone(), n_ctx, words, position=position, **options)
    assert context.packed(small_backbone(), DIFFERENT).prefix == prefix


def test_words_that_all_class_names_begin_with_are_shared() -> None:
    backbone = small_backbone()
    assert TextContext(backbone, 4).packed(backbone, ["a dog", "a cat"]).prefix == 1 + 4 + 1
    assert TextContext(backbone, 4, position="front").packed(backbone, ["a dog", "a cat"]).prefix == 1 + 1


def test_bidirectional_texts_share_nothing_and_keep_their_padding() -> None:
    backbone = small_backbone(causal=False)
    packed = TextContext(backbone, 4).packed(backbone, DIFFERENT)
    assert packed.prefix == 0
    assert len(packed.tokens) == len(DIFFERENT) * backbone.context_length


def test_class_features_do_not_depend_on_the_other_classes() -> None:
    backbone = small_backbone()
    torch.manual_seed(1)
    context = make_context(backbone, 3, "a photo of a", depth=2)
    names = ["a dog", "a big grey wolf", "a cat", "a dog"]

    def features(names: list[str]) -> Tensor:
        return encode_classes(backbone.text_tower, context.prompts(), context.packed(backbone, names))

    together = features(names)
    same("one by one", together, torch.cat([features([n]) for n in names]))
    same("in another order", together.flip(0), features(names[::-1]))


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_a_context_takes_any_new_class_names(position: str) -> None:
    backbone = small_backbone()
    torch.manual_seed(2)
    context = make_context(backbone, 4, position=position, depth=2)
    for names in (DIFFERENT, ["giant panda"], list(ODD_NAMES), DIFFERENT):
        fast = encode_classes(backbone.text_tower, context.prompts(), context.packed(backbone, names))
        same("features", fast, plain_classes(backbone, names, context))


@pytest.mark.parametrize(("n_ctx", "free"), [(2, 0), (4, 0), (6, 2)])
def test_words_initialise_the_last_tokens(n_ctx: int, free: int) -> None:
    backbone, words = small_backbone(), "a photo of a"
    torch.manual_seed(3)
    context = TextContext(backbone, n_ctx, words)
    ids = backbone.tokenizer.words(words)
    known = backbone.text_tower.token_embedding.weight[ids]
    torch.testing.assert_close(word_vectors(backbone, words), known, rtol=0, atol=0)
    torch.testing.assert_close(context.vectors[free:], known[: n_ctx - free].float(), rtol=0, atol=0)
    assert context.vectors[:free].abs().lt(0.2).all()


def test_words_without_a_token_are_refused() -> None:
    with pytest.raises(ConfigError, match="initial words '  ' have no token"):
        TextContext(small_backbone(), 4, "  ")


def test_a_text_that_is_too_long_names_its_class() -> None:
    backbone = small_backbone()
    fits = "photo " * 72  # start, 2 learned tokens, 72 words, full stop, end: 77
    assert len(class_tokens(backbone, [fits.strip()], 2).ids[0]) == backbone.context_length
    with pytest.raises(
        DataError, match=r"text of class 'photo photo .*…' has 78 tokens; the backbone reads at most 77"
    ):
        TextContext(backbone, 3).packed(backbone, ["cat", fits.strip()])
    short = replace(backbone, tokenizer=replace(backbone.tokenizer, context_length=8))
    with pytest.raises(DataError, match=r"text of class 'photo_of_a' has 10 tokens; .* at most 8"):
        TextContext(short, 4).packed(short, ["a", "photo_of_a"])


@pytest.mark.parametrize("name", ["", "_", "  "])
def test_a_class_without_a_name_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=f"class name '{name}' has no token that the backbone knows"):
        class_tokens(small_backbone(), ["cat", name], 2)


@pytest.mark.parametrize("depth", [0, LAYERS + 1, -1])
def test_depth_out_of_range_is_refused(depth: int) -> None:
    backbone = small_backbone()
    for kind, build in (
        ("text", lambda: TextContext(backbone, 2, depth=depth)),
        ("visual", lambda: VisualPrompts(backbone, 2, depth=depth)),
        ("visual", lambda: CoupledPrompts(backbone, depth)),
    ):
        with pytest.raises(ConfigError, match=rf"{kind} prompt depth = {depth} \(allowed: 1 to {LAYERS}"):
            build()


# Images


def test_frozen_image_features_equal_the_plain_ones() -> None:
    backbone = small_backbone()
    torch.manual_seed(5)
    images = make_images()
    same("features", backbone.encode_images(images), unit(plain_image(backbone.image_tower, images)))


@settings(quick, max_examples=50)
@given(st.integers(1, 6), st.integers(1, LAYERS), st.sampled_from(["replace", "add"]), st.integers(0, 1000))
def test_visual_prompts_equal_the_plain_ones(n_ctx: int, depth: int, mode: str, seed: int) -> None:
    backbone = small_backbone()
    torch.manual_seed(seed)
    images = make_images()
    visual = VisualPrompts(backbone, n_ctx, depth, mode).double()
    fast = unit(backbone.image_tower(images, visual.prompts()))
    plain = unit(plain_image(backbone.image_tower, images, list(visual.vectors), mode))
    same_with_gradients(fast, plain, dict(visual.named_parameters()))


@pytest.mark.parametrize("depth", [1, 2, LAYERS])
def test_coupled_prompts_equal_the_plain_ones(depth: int) -> None:
    """Image and text features together, so that the gradient reaches the context by both ways."""
    backbone, names = small_backbone(), ["dog", "grey wolf", "cat"]
    torch.manual_seed(depth)
    images = make_images()
    context = make_context(backbone, 2, "a photo of a", depth=depth)
    coupled = CoupledPrompts(backbone, depth).double()
    text = context.prompts()
    v = unit(backbone.image_tower(images, coupled.prompts(text.layers)))
    t = encode_classes(backbone.text_tower, text, context.packed(backbone, names))

    tokens = [context.vectors, *(() if context.deep is None else context.deep)]
    projected = [x @ p.weight.T + p.bias for x, p in zip(tokens, coupled.projections, strict=True)]
    plain_v = unit(plain_image(backbone.image_tower, images, projected))
    plain_t = plain_classes(backbone, names, context)
    learned = {**dict(context.named_parameters()), **dict(coupled.named_parameters())}
    same_with_gradients(backbone.logits(v, t), 100 * plain_v @ plain_t.T, learned)


@pytest.mark.parametrize("build", [lambda b: VisualPrompts(b, 2), lambda b: CoupledPrompts(b, 1)])
def test_visual_prompts_need_a_class_token(build: Callable[[Backbone], nn.Module]) -> None:
    with pytest.raises(BackboneError, match="backbone 'small' has no class token"):
        build(small_backbone(pool="map"))
