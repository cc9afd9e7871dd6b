"""What is particular to the family's methods, beside the numbers of their official code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.kit import TINY
from tests.kit.pictures import write_pictures
from tests.kit.plain import plain_block, plain_norm, same_with_gradients, small_backbone, write
from vlprompt.api import PromptedModel, build_method
from vlprompt.artefact.artefact import save_artefact
from vlprompt.backbones.backbone import Backbone, unit
from vlprompt.errors import ConfigError
from vlprompt.methods import Method, find_method
from vlprompt.prompting.text import class_tokens

NAMES = ("dog", "sea horse", "forget-me-not", "cat")


def small(name: str, **options: object) -> Method:
    """A method on three blocks, in float64."""
    torch.manual_seed(0)
    cls = find_method(name)
    return cls(small_backbone(), NAMES, cls.Config(**options)).double()


def images(backbone: Backbone, n: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, backbone.image_size, backbone.image_size, dtype=backbone.dtype, generator=generator)


# --- tcp --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "weight"), [(1, 1.0), (2, 1.0), (1, 0.3), (2, 0.3)])
def test_tcp_is_a_plain_forward(layer: int, weight: float) -> None:
    method = small("tcp", layer=layer, weight=weight, n_ctx=2)
    tower, own = method.backbone.text_tower, method.class_tokens(NAMES)
    tokens, features = class_tokens(method.backbone, NAMES, 2), []
    for c, (ids, where) in enumerate(zip(tokens.ids, tokens.slots, strict=True)):
        x = write(tower.token_embedding.weight[ids], where, method.context.vectors, "replace")
        x = x + tower.positions[: len(ids)]
        mask = torch.full((len(ids), len(ids)), -torch.inf, dtype=x.dtype).triu(1)
        for i, block in enumerate(tower.blocks):
            if i == layer:
                x = write(x, where, weight * own[c] + (1 - weight) * x[where], "replace")
            x = plain_block(x, block, tower.config.heads, mask)
        features.append(tower.projection.weight @ plain_norm(x, tower.ln_final)[-1])
    same_with_gradients(method.class_features(NAMES), unit(torch.stack(features)), dict(method.named_parameters()))


def test_tcp_needs_a_block_after_its_layer() -> None:
    with pytest.raises(ConfigError, match=r"method.layer = 3 \(allowed: 1 to 2, with 3 blocks\)"):
        small("tcp", layer=3)


# --- bayesian ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditional", [False, True])
def test_bayesian_averages_probabilities_over_its_samples(conditional: bool) -> None:
    method = small("bayesian", conditional=conditional, samples=4).eval()
    x = images(method.backbone)
    logits, spread = method.predict(x, NAMES), method.spread(x, NAMES)
    v = method.backbone.encode_images(x)
    mu, log_variance = method.posterior(v)
    noise = method.noise(mu)[0]
    each = []  # of each sample, each image
    for eps in noise:
        residual = (mu + eps * log_variance.exp().sqrt()).expand(len(v), -1)
        t = method.encode_classes(NAMES, method.context, bias=residual)
        each.append((method.backbone.logit_scale * (v[:, None] * t).sum(-1)).softmax(-1))
    p = torch.stack(each).detach()
    torch.testing.assert_close(logits.exp(), p.mean(0), rtol=0, atol=1e-9)
    torch.testing.assert_close(spread, ((p - p.mean(0)) ** 2).mean(0).sqrt(), rtol=0, atol=1e-9)
    assert spread.max() > 1e-4
    torch.testing.assert_close(method.predict(x[2:3], NAMES), logits[2:3], rtol=0, atol=1e-9)
    method.train()
    assert not torch.equal(method.noise(mu), method.noise(mu)), "a step draws anew"


def test_bayesian_has_no_spread_without_variance() -> None:
    method = small("bayesian").eval()
    with torch.no_grad():
        method.log_variance.fill_(-100)
    assert method.spread(images(method.backbone), NAMES).max() < 1e-9


def test_predictions_tell_their_spread(tiny: Backbone, tmp_path: Path, vlprompt) -> None:
    files = sorted(write_pictures(tmp_path / "photos", n=1).rglob("*.png"))
    model = PromptedModel(build_method("bayesian", tiny, NAMES, samples=3))
    predictions = model.predict(files)
    assert predictions.spread is not None
    assert predictions.spread.shape == predictions.probabilities.shape
    assert PromptedModel(build_method("coop", tiny, NAMES)).predict(files).spread is None
    save_artefact(model.method, tmp_path / "run")
    given = ("predict", str(tmp_path / "run"), str(files[0]), "--backbone", str(TINY))
    said = json.loads(vlprompt(*given, "--json")[1])["predictions"][0]["top"][0]
    best = predictions.probabilities[0].argmax()
    assert said["spread"] == pytest.approx(predictions.spread[0, best], abs=1e-6)
    assert vlprompt(*given, "--csv")[1].splitlines()[0] == "image,class,probability,spread"
    assert f"± {100 * said['spread']:4.1f} %" in vlprompt(*given)[1]
