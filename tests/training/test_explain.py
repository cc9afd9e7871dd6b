"""Which patches speak for a class: against a plain computation, and by deleting them."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from tests.kit.marks import image_sides, slow, sweep
from tests.kit.plain import plain_block, plain_norm, small_backbone, write
from vlprompt import load_backbone
from vlprompt.backbones.attention import observed, plain_attention
from vlprompt.backbones.backbone import Backbone
from vlprompt.data.datasets import load_dataset
from vlprompt.data.images import load_image
from vlprompt.data.known.table import PHOTOGRAPHS
from vlprompt.errors import ConfigError, DataError
from vlprompt.methods import METHODS, Method, find_method
from vlprompt.training.explain import relevance

NAMES = ("cat", "dog", "sea horse")


def built(backbone: Backbone, name: str, **settings: object) -> Method:
    torch.manual_seed(0)
    cls = find_method(name)
    return cls(backbone, NAMES, cls.Config(**settings)).to(dtype=backbone.dtype).eval()


def an_image(backbone: Backbone, seed: int = 0) -> Tensor:
    size = backbone.image_size
    return torch.randn(3, size, size, dtype=backbone.dtype, generator=torch.Generator().manual_seed(seed))


def plain_relevance(backbone: Backbone, image: Tensor, prompts: list[Tensor], mode: str, t: Tensor) -> Tensor:
    """Written out, for learned tokens of the image tower [M, D] a layer and class features, scaled, t [E]: [P]."""
    tower = backbone.image_tower
    heads, n, maps = tower.config.heads, len(tower.positions), []

    def weigh(logits: Tensor, dim: int) -> Tensor:
        maps.append(logits.softmax(dim))
        return maps[-1]

    x = tower.embed(image[None].requires_grad_())[0]
    m = len(prompts[0]) if prompts else 0
    if m:
        x = torch.cat([x, plain_norm(prompts[0], tower.ln_pre) if tower.class_token is not None else prompts[0]])
    for i, block in enumerate(tower.blocks):
        if 0 < i < len(prompts):
            x = write(x, range(n, n + m), prompts[i], mode)
        x = plain_block(x, block, heads, x.new_zeros(len(x), len(x)), weigh)
    x = plain_norm(x, tower.ln_post)
    assert tower.class_token is not None
    v = normalize(tower.projection(x[0]), dim=-1)
    slopes = torch.autograd.grad(v @ t, maps)
    r = torch.eye(n + m, dtype=x.dtype)
    for i in range(len(tower.blocks)):
        if mode == "replace" and 0 < i < len(prompts):
            r[n:] = torch.eye(n + m, dtype=x.dtype)[n:]
        own = slice(i * heads, (i + 1) * heads)
        terms = [(a * s).clamp(min=0) for a, s in zip(maps[own], slopes[own], strict=True)]
        r = r + sum(terms) / heads @ r
    patches = r[0, 1:n].detach()
    return patches / patches.sum()


@pytest.mark.parametrize(
    ("name", "settings"),
    [("zero_shot", {}), ("coop", {"n_ctx": 2}), ("vpt", {"n_ctx": 2, "depth": 1}), ("vpt", {"n_ctx": 3, "depth": 3}),
     ("ivlp", {"depth_vision": 2, "depth_text": 2}), ("drople", {"depth_vision": 2, "depth_text": 2})],
)  # fmt: skip
def test_relevance_is_that_of_a_plain_computation(name: str, settings: dict) -> None:
    backbone = small_backbone()
    method = built(backbone, name, **settings)
    image = an_image(backbone)
    prompts = method.visual_prompts()
    with torch.no_grad():
        t = method.scale_and_bias()[0] * method.class_features(NAMES)
    for c in range(3):
        found = relevance(method, image, class_index=c)
        plain = plain_relevance(
            backbone, image.clone(), [x.detach() for x in prompts.tokens] if prompts else [],
            prompts.mode if prompts else "replace", t[c],
        )  # fmt: skip
        torch.testing.assert_close(found.map.flatten().double(), plain, rtol=1e-5, atol=1e-7)
        assert found.name == NAMES[c]
        assert found.index == c
        p = method.predict(image[None], NAMES).softmax(-1)[0, c]
        assert found.probability == pytest.approx(p.item(), abs=1e-9)


def test_an_attention_is_observed_as_it_is() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 2, 8, dtype=torch.double), *torch.randn(2, 2, 5, 8, dtype=torch.double)
    maps: list[Tensor] = []
    plain = plain_attention(2)
    torch.testing.assert_close(observed(plain, 2, maps)(q, k, v), plain(q, k, v), rtol=0, atol=1e-12)
    qh, kh = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k))
    torch.testing.assert_close(maps[0], (qh @ kh.mT / 2).softmax(-1), rtol=0, atol=1e-12)
    assert scaled_dot_product_attention(qh, kh, kh).shape == qh.shape


@pytest.mark.parametrize("name", sweep(sorted(METHODS), *image_sides()))
def test_every_method_has_it(name: str, tiny: Backbone) -> None:
    method, image = built(tiny, name), an_image(tiny)
    if name in ("linear_probe", "lp_plus_plus"):
        torch.nn.init.normal_(method.weight if name == "linear_probe" else method.w)
    found = relevance(method, image)
    assert found.map.shape == (4, 4)
    assert found.map.min() >= 0
    assert found.map.sum() == pytest.approx(1, abs=1e-5)
    assert found.map.std() > 0
    best = method.predict(image[None], NAMES)[0].softmax(-1)
    assert (found.index, found.name) == (int(best.argmax()), NAMES[best.argmax()])
    others = [relevance(method, image, class_index=c).map for c in range(3)]
    assert torch.equal(others[found.index], found.map)
    assert not torch.allclose(others[0], others[1], atol=1e-4), "it is the class's own"


@pytest.mark.parametrize(("name", "settings"), [("lasp", {"norms": False}), ("clip_lora", {"encoder": "text"})])
def test_methods_that_leave_the_image_tower_alone(name: str, settings: dict, tiny: Backbone) -> None:
    assert relevance(built(tiny, name, **settings), an_image(tiny)).map.sum() == pytest.approx(1, abs=1e-5)


def test_where_nothing_speaks_for_a_class(tiny: Backbone) -> None:
    assert relevance(built(tiny, "linear_probe"), an_image(tiny)).map.eq(0).all(), "not fitted"


def test_a_pooling_head_is_followed() -> None:
    """SigLIP's: the map of its attention, times what came before."""
    backbone = small_backbone(causal=False, pool="map")
    classes = normalize(torch.randn(3, 24, dtype=torch.double, generator=torch.Generator().manual_seed(1)), dim=-1)

    class Known(find_method("zero_shot")):
        def class_features(self, names: object, v: object = None) -> Tensor:
            return classes

    method, image, tower = Known(backbone, NAMES).eval(), an_image(backbone), backbone.image_tower
    found = relevance(method, image, class_index=1)
    maps: list[Tensor] = []
    attend = observed(plain_attention(2), 2, maps)
    x = tower.run(tower.embed(image[None].requires_grad_()), attention=attend)
    head, x = tower.head, tower.ln_post(x)
    q, k, v = (
        given @ w.T + b
        for given, w, b in zip((head.probe, x, x), head.attention.in_proj_weight.chunk(3),
                               head.attention.in_proj_bias.chunk(3), strict=True)
    )  # fmt: skip
    y = head.attention.out_proj(attend(q, k, v))
    v = normalize((y + head.fc_2(head.activation(head.fc_1(head.ln(y)))))[0, 0], dim=-1)
    torch.testing.assert_close(v, method.encode_images(image[None])[0].detach(), rtol=0, atol=1e-9)
    slopes = torch.autograd.grad(backbone.logit_scale * v @ classes[1], maps)
    r = torch.eye(16, dtype=torch.double)
    *blocks, pool = ((a * s).clamp(min=0)[0].mean(0) for a, s in zip(maps, slopes, strict=True))
    for weights in blocks:
        r = r + weights @ r
    expected = (pool @ r)[0].detach()
    torch.testing.assert_close(found.map.flatten().double(), expected / expected.sum(), rtol=1e-5, atol=1e-7)


def test_other_threads_are_not_watched(tiny: Backbone) -> None:
    """The page of `vlprompt app` asks about two images at once."""
    method, images = built(tiny, "vpt"), [an_image(tiny, seed) for seed in range(8)]
    expected = [relevance(method, image).map for image in images]
    found: dict[int, Tensor] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: relevance(method, images[i]).map})) for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(8))


def test_names_of_ones_own_and_others(tiny: Backbone) -> None:
    image = an_image(tiny)
    found = relevance(built(tiny, "coop"), image, ["horse", "red rose"], 1)
    assert found.name == "red rose"
    probe = built(tiny, "linear_probe")
    torch.nn.init.normal_(probe.weight)
    some = relevance(probe, image, ["sea horse", "cat"], 0)
    assert torch.equal(some.map, relevance(probe, image, class_index=2).map)
    assert some.probability > relevance(probe, image, class_index=2).probability, "among two"
    with pytest.raises(DataError, match="linear_probe knows its own 3 classes alone, not 'horse': did you mean"):
        relevance(probe, image, ["horse"])
    with pytest.raises(ConfigError, match=r"class_index = 3 \(allowed: 0 to 2, for 3 classes\)"):
        relevance(probe, image, class_index=3)


def test_what_has_no_gradient_is_refused(tiny: Backbone) -> None:
    class Nearest(find_method("zero_shot")):
        def logits(self, v: Tensor, t: Tensor) -> Tensor:
            return (v @ t.T).argsort(-1).argsort(-1).float()

    message = "cannot explain method 'zero_shot': its logits have no gradient by the image's pixels"
    with pytest.raises(ConfigError, match=message):
        relevance(Nearest(tiny, NAMES), an_image(tiny))


@slow
def test_deletion() -> None:
    """Without its highest patches an image is told with less confidence than without as many drawn at random."""
    backbone = load_backbone("mini")
    split = load_dataset(str(PHOTOGRAPHS)).split
    paths = split.paths("test")
    every = len(paths) // 50
    x = torch.stack([backbone.preprocess(load_image(path)) for path in paths[::every][:50]])
    method = find_method("zero_shot")(backbone, split.class_names).eval()
    maps = [relevance(method, image) for image in x]
    side, patch = len(maps[0].map), backbone.image_tower.config.patch_size
    generator = torch.Generator().manual_seed(0)

    def probability(orders: list[Tensor], n: int) -> Tensor:
        gone = torch.zeros(50, side * side, dtype=torch.bool)
        for row, order in zip(gone, orders, strict=True):
            row[order[:n]] = True
        pixels = gone.view(50, 1, side, side).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
        p = method.predict(torch.where(pixels, x.mean((2, 3), keepdim=True), x), split.class_names).softmax(-1)
        return p[range(50), [found.index for found in maps]]

    highest = [found.map.flatten().argsort(descending=True) for found in maps]
    orders = {
        "highest": highest,
        "lowest": [order.flip(0) for order in highest],
        "random": [torch.randperm(side * side, generator=generator) for _ in maps],
    }
    some = (side * side // 8, side * side // 4, side * side // 2)
    p = {name: torch.stack([probability(order, n) for n in some]) for name, order in orders.items()}
    gain = p["random"] - p["highest"]
    assert (gain.mean(1) > 0).all()
    of_image = gain.mean(0)
    assert of_image.mean() > 3 * of_image.std() / 50**0.5
    assert p["lowest"].mean() > p["random"].mean()
