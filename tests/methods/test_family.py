"""What is particular to the family's methods, beside the numbers of their official code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity

from tests.kit import TINY
from tests.kit.cases import FAMILY
from tests.kit.marks import sweep
from tests.kit.pictures import write_pictures
from tests.kit.plain import plain_block, plain_norm, same_with_gradients, small_backbone, write
from tests.kit.runs import check_stopped, configured
from vlprompt.api import PromptedModel, build_method
from vlprompt.artefact.artefact import save_artefact
from vlprompt.artefact.calibration import Calibration
from vlprompt.backbones.backbone import Backbone, unit
from vlprompt.config.schema import build_config, parse_override
from vlprompt.errors import ConfigError
from vlprompt.methods import Batch, Method, find_method
from vlprompt.prompting.text import class_tokens
from vlprompt.training.run import train

NAMES = ("dog", "sea horse", "forget-me-not", "cat")


def small(name: str, **options: object) -> Method:
    """A method on three blocks, in float64."""
    torch.manual_seed(0)
    cls = find_method(name)
    return cls(small_backbone(), NAMES, cls.Config(**options)).double()


def images(backbone: Backbone, n: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, backbone.image_size, backbone.image_size, dtype=backbone.dtype, generator=generator)


@pytest.mark.parametrize("name", sweep(FAMILY, "lasp", "mmrl"))
def test_a_stopped_run_resumes_to_the_same_bits(name: str, pictures: Path, tmp_path: Path) -> None:
    fewer = {"method.samples": 2} if name == "bayesian" else {}
    config = configured(pictures, name, **{"train.epochs": 2}, **fewer)
    train(config, tmp_path / "whole")
    check_stopped(config, tmp_path, 2)


# --- tcp --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "weight", "n"), [(1, 1.0, 2), (2, 1.0, 4), (1, 0.3, 2), (2, 0.3, 6), (1, 1.0, 6)])
def test_tcp_is_a_plain_forward(layer: int, weight: float, n: int) -> None:
    """The class tokens take the first places of the context, at most four."""
    method = small("tcp", layer=layer, weight=weight, n_ctx=n, end=", a pet")
    tower, own = method.backbone.text_tower, method.class_tokens(NAMES)
    tokens, features = class_tokens(method.backbone, NAMES, n, end=", a pet"), []
    for c, (ids, where) in enumerate(zip(tokens.ids, tokens.slots, strict=True)):
        x = write(tower.token_embedding.weight[ids], where, method.context.vectors, "replace")
        x = x + tower.positions[: len(ids)]
        mask = torch.full((len(ids), len(ids)), -torch.inf, dtype=x.dtype).triu(1)
        for i, block in enumerate(tower.blocks):
            if i == layer:
                x = write(x, where[:4], weight * own[c] + (1 - weight) * x[where[:4]], "replace")
            x = plain_block(x, block, tower.config.heads, mask)
        features.append(tower.projection.weight @ plain_norm(x, tower.ln_final)[-1])
    same_with_gradients(method.class_features(NAMES), unit(torch.stack(features)), dict(method.named_parameters()))


def test_tcp_needs_a_block_after_its_layer() -> None:
    with pytest.raises(ConfigError, match=r"method.layer = 3 \(allowed: 1 to 2, with 3 blocks\)"):
        small("tcp", layer=3)


# --- lasp -------------------------------------------------------------------------------------------


def test_lasp_tells_hand_written_texts_apart_by_its_class_features() -> None:
    """The text-to-text loss of two groups, written out; virtual classes count, and no class counts twice."""
    templates = ("a {}.", "{} texture.", "the {}.")
    virtual = ("otter", "forget-me-not", "sea_horse", "otter", "river_cat", "river cat")
    method = small("lasp", groups=2, templates=templates, virtual_classes=virtual, init=None, w=2.0).eval()
    backbone, names = method.backbone, [*NAMES, "otter", "river cat"]
    losses = []
    for context, own in zip(method.contexts, (templates[::2], templates[1::2]), strict=True):
        t = unit(method.encode_classes(names, context, normalise=False) + method.correction)
        each = []
        for template in own:
            for c, name in enumerate(names):
                reference = backbone.encode_texts([template.format(name)])[0]
                each.append(-(backbone.logit_scale * t @ reference).log_softmax(-1)[c])
        losses.append(torch.stack(each).mean())
    batch = Batch(images(backbone), torch.arange(5) % len(NAMES))
    torch.testing.assert_close(method.losses(batch)["text_to_text"], 2 * torch.stack(losses).mean())
    assert method.class_features(NAMES).shape == (len(NAMES), backbone.embed_dim)


def test_lasp_starts_from_the_frozen_image_tower_and_cuts_gradients() -> None:
    method = small("lasp")
    x = images(method.backbone)
    torch.testing.assert_close(method.encode_images(x), method.backbone.encode_images(x), rtol=0, atol=1e-9)
    batch = Batch(x, torch.arange(5) % len(NAMES))
    whole = method.gradients(method.losses(batch))
    cut = method.combine(whole)
    norm = torch.cat([g.flatten() for g in whole["total"]]).norm()
    assert norm > 1
    for a, b in zip(cut, whole["total"], strict=True):
        torch.testing.assert_close(a, b / norm)
    assert all(a is b for a, b in zip(small("lasp", max_norm=None).combine(whole), whole["total"], strict=True))
    little = {"total": [g / norm / 2 for g in whole["total"]]}
    assert all(torch.equal(a, b) for a, b in zip(method.combine(little), little["total"], strict=True))


def test_lasp_adds_noise_to_half_of_the_steps() -> None:
    method, r = small("lasp"), torch.zeros(2, 3, dtype=torch.double)
    torch.manual_seed(0)
    drawn = [method.draw_noise(r).abs().sum().item() > 0 for _ in range(200)]
    assert 70 < sum(drawn) < 130
    assert not method.eval().draw_noise(r).any()


def test_lists_on_the_command_line() -> None:
    key, value = parse_override("virtual_classes=[otter, sea horse]")
    assert build_config("lasp", overrides={key: value}).options.virtual_classes == ("otter", "sea horse")
    for given, said in {
        "virtual_classes=otter": r"method.virtual_classes = otter \(allowed: list, as in \[a, b\]\)",
        "templates=[a photo]": r"method.templates = a photo \(allowed: text with \{\} for the class name\)",
        "templates=[]": r"method.templates = \[\] \(allowed: value should have at least 1 item",
        "virtual_classes=[": r"method.virtual_classes = \[ \(allowed: list",
    }.items():
        with pytest.raises(ConfigError, match=said):
            build_config("lasp", overrides=dict([parse_override(given)]))
    with pytest.raises(ConfigError, match=r"method.groups = 3 \(allowed: 1 to 2, a template each\)"):
        small("lasp", groups=3, templates=("a {}.", "the {}."))


# --- mmrl -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [(1, 2, 3), (2, 3), (3,), (1, 3), (2,)])
def test_mmrl_is_a_plain_forward(layers: tuple[int, ...]) -> None:
    """Texts grow by the tokens behind their start, images by those at their end, from the first of the layers on."""
    method = small("mmrl", layers=layers, n_tokens=2, width=6)
    backbone, text, image = method.backbone, method.backbone.text_tower, method.backbone.image_tower
    own, features = method.layer_tokens("text"), []
    for ids in backbone.tokenize([method.template.format(name) for name in NAMES]):
        x = text.token_embedding.weight[ids] + text.positions[: len(ids)]
        for i, block in enumerate(text.blocks):
            if i in own:
                x = torch.cat([x[:1], own[i], x[1 if i == min(own) else 3 :]])
            mask = torch.full((len(x), len(x)), -torch.inf, dtype=x.dtype).triu(1)
            x = plain_block(x, block, text.config.heads, mask)
        features.append(text.projection.weight @ plain_norm(x, text.ln_final)[-1])
    texts = {k: p for k, p in method.named_parameters() if "text" in k or k == "tokens"}
    same_with_gradients(method.class_features(NAMES), unit(torch.stack(features)), texts)
    own, features = method.layer_tokens("image"), []
    for x in image.embed(images(backbone)):
        n = len(x)
        for i, block in enumerate(image.blocks):
            x = torch.cat([x[:n], own[i]]) if i in own else x
            x = plain_block(x, block, image.config.heads, torch.zeros(len(x), len(x), dtype=x.dtype))
        x = plain_norm(x, image.ln_post)
        features.append(torch.stack([image.projection.weight @ x[0], x[n:].mean(0) @ method.projection]))
    seen = {k: p for k, p in method.named_parameters() if "text" not in k}
    same_with_gradients(method.encode_images(images(backbone)), unit(torch.stack(features)), seen)


def test_mmrl_scores_novel_classes_by_the_class_token_alone() -> None:
    method = small("mmrl", layers=(2, 3), width=6, alpha=0.6).eval()
    x, names = images(method.backbone), ("otter", "cat", "river")
    v, t = method.encode_images(x).detach(), method.class_features(names).detach()
    main, rep = (100 * v[:, i] @ t.T for i in range(2))
    both = 0.6 * main + 0.4 * rep
    logits = method.predict(x, names)
    torch.testing.assert_close(logits, torch.stack([main[:, 0], both[:, 1], main[:, 2]], 1))
    own = small("mmrl", layers=(2, 3), width=6, alpha=0.6, scale=None).eval()
    torch.testing.assert_close(own.predict(x, names), logits / 100 * own.backbone.logit_scale)


def test_mmrl_is_saved_without_its_maps(tiny: Backbone, tmp_path: Path) -> None:
    method = build_method("mmrl", tiny, NAMES)
    save_artefact(method, tmp_path)
    text, image, embed = tiny.text_tower.config.width, tiny.image_tower.config.width, tiny.embed_dim
    state = load_file(tmp_path / "prompts.safetensors")
    expected = {"text_tokens": (7, 5, text), "image_tokens": (7, 5, image), "projection": (image, embed)}
    assert {k: tuple(v.shape) for k, v in state.items()} == expected


@pytest.mark.parametrize("layers", [(3, 2), (2, 2), (3, 4)])
def test_mmrl_knows_its_layers(layers: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"method.layers = .*\(allowed: rising numbers from 1 to 3\)"):
        small("mmrl", layers=layers)
    with pytest.raises(ConfigError, match=r"method.layers = 0 \(allowed: greater than or equal to 1\)"):
        build_config("mmrl", overrides={"layers": "[0, 2]"})


# --- comma ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("last", "blocks"), [("repeated", (0, 1, 2)), ("each", (0, 1, 2)), ("repeated", (0, 1, 1)), ("repeated", (0, 0, 0))]
)
def test_comma_compares_the_last_states_of_padded_texts(last: str, blocks: tuple[int, ...]) -> None:
    """One text at a time; blocks as they run where the first of the last n stands in for them."""
    n = {(0, 1, 2): 1 if last == "repeated" else 2, (0, 1, 1): 2, (0, 0, 0): 3}[blocks]
    method = small("comma", depth=2, last=last, last_blocks=n, w=3.0)
    backbone, tower = method.backbone, method.backbone.text_tower
    length = backbone.context_length
    mask = torch.full((length, length), -torch.inf, dtype=torch.double).triu(1)
    first, deep = method.context.prompts().tokens
    tokens, distances, features = class_tokens(backbone, NAMES, 2, "a photo of a"), [], []
    hand = backbone.tokenize([method.template.format(name) for name in NAMES])
    for ids, where, by_hand in zip(tokens.ids, tokens.slots, hand, strict=True):
        end, states = len(ids) - 1, []
        for text, learned in ((ids, True), (by_hand, False)):
            x = tower.token_embedding.weight[[*text, *[0] * (length - len(text))]]
            x = (write(x, where, first, "replace") if learned else x) + tower.positions
            for i, b in enumerate(blocks):
                x = write(x, where, deep, "replace") if learned and i == 1 else x
                x = plain_block(x, tower.blocks[b], tower.config.heads, mask)
                states += [x] if i >= len(blocks) - n else []
            features += [tower.projection.weight @ plain_norm(x, tower.ln_final)[end]] if learned else []
        distances += [1 - cosine_similarity(a, b, -1) for a, b in zip(states[:n], states[n:], strict=True)]
    out = method(Batch(images(backbone), torch.arange(5) % len(NAMES)))
    t = unit(torch.stack(features))
    torch.testing.assert_close(out.t, t, rtol=0, atol=1e-9)
    torch.testing.assert_close(method.class_features(NAMES), t, rtol=0, atol=1e-9)
    kg = method.regularisers(out, Batch(None, torch.arange(5)))["kg"]
    torch.testing.assert_close(kg, 3 * torch.stack(distances).mean(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("generators", ["frozen", "learned"])
def test_comma_generates_visual_prompts_from_both_towers(generators: str, tmp_path: Path) -> None:
    method = small("comma", depth=3, generators=generators)
    text, (first, second, third) = method.context.prompts().tokens, method.visual_prompts().tokens
    one, two = method.coupled.generators
    for made, from_both, own, below in ((second, one, text[0], first), (third, two, text[1], second)):
        keys = own @ from_both.fc.weight.T + from_both.fc.bias
        weights = (below @ keys.T / keys.shape[-1] ** 0.5).softmax(-1)
        torch.testing.assert_close(made, from_both.mlp(from_both.ln(weights @ keys)))
    assert third.requires_grad == (generators == "learned")
    assert any("generators" in name for name, _ in method.named_parameters()) == (generators == "learned")
    assert {*method.inference_state()} == {"context.vectors", "context.deep", "folded"}


def test_comma_has_as_many_last_blocks_as_the_tower() -> None:
    with pytest.raises(ConfigError, match=r"method.last_blocks = 4 \(allowed: 1 to 3, the text tower's\)"):
        small("comma", depth=2, last_blocks=4)


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
    scale = torch.linspace(0.2, 3, len(x), dtype=torch.double)
    scaled = (scale[:, None] * p.log()).softmax(-1)
    torch.testing.assert_close(method.spread(x, NAMES, scale), scaled.std(0, correction=0), rtol=0, atol=1e-9)
    torch.testing.assert_close(method.predict(x[2:3], NAMES), logits[2:3], rtol=0, atol=1e-9)
    method.train()
    assert not torch.equal(method.noise(mu), method.noise(mu)), "a step draws anew"


def test_bayesian_has_no_spread_without_variance() -> None:
    method = small("bayesian").eval()
    with torch.no_grad():
        method.log_variance.fill_(-100)
    assert method.spread(images(method.backbone), NAMES).max() < 1e-9


@pytest.mark.parametrize("names", [NAMES, ("otter", "sea horse")])
def test_the_spread_is_of_calibrated_probabilities(
    names: Sequence[str], tiny: Backbone, tmp_path: Path, vlprompt
) -> None:
    files = sorted(write_pictures(tmp_path / "photos", n=1).rglob("*.png"))
    model = PromptedModel(build_method("bayesian", tiny, NAMES, samples=3))
    as_it_is = model.predict(files, names)
    model.calibration = Calibration(200.0, ((0.5,),) * 3, "energy", None, 0.95)
    calibrated = model.predict(files, names)
    assert 0 < calibrated.spread.max() < as_it_is.spread.max() / 20, "nearly uniform, whatever is drawn"
    save_artefact(model.method, tmp_path / "run", calibration=model.calibration)
    given = ("--class-names", ",".join(names), "--backbone", str(TINY), "--json")
    said = json.loads(vlprompt("predict", str(tmp_path / "run"), str(files[0]), *given)[1])["predictions"][0]["top"][0]
    best = calibrated.probabilities[0].argmax()
    assert said["spread"] == pytest.approx(calibrated.spread[0, best], abs=1e-9)


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
