"""AttentionDrop: what it does to logits, where it acts, what it leaves alone, and what it is refused for."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kit.command import vlprompt
from tests.kit.marks import sweep
from tests.kit.plain import small_backbone
from tests.kit.runs import arguments, check_stopped, configured, log, prompts
from tests.methods.test_methods import NAMES, images_and_labels, make, make_batch
from vlprompt.api import build_method, fit
from vlprompt.backbones.attention import attend, changed_logits, packed_attention, plain_attention
from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.packing import pack
from vlprompt.backbones.resnet import ResNetTower
from vlprompt.backbones.towers import ImageConfig
from vlprompt.config.schema import TrainConfig, build_config
from vlprompt.data.datasets import load_dataset
from vlprompt.errors import ConfigError
from vlprompt.methods import METHODS, Can
from vlprompt.training.attention_drop import blurred, check_attention, losses_of, masked
from vlprompt.training.run import train

KINDS = ("mask", "blur", "consistency")
DROPS = sorted(name for name, cls in METHODS.items() if Can.DROP_ATTENTION in cls.Config().can)
LEAVES = sorted(set(METHODS) - set(DROPS))


# --- logits ---------------------------------------------------------------------------------------


def test_only_the_largest_are_masked_and_about_as_many_as_asked_for() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 2, 500, 9)
    kept = masked(logits, 3, 0.25)
    gone = kept.isneginf()
    largest = torch.zeros_like(gone).scatter(-1, logits.topk(3).indices, True)
    assert not (gone & ~largest).any()
    assert gone.sum().item() / largest.sum().item() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(kept[~gone], logits[~gone])


def test_a_query_never_loses_all_that_it_sees() -> None:
    torch.manual_seed(0)
    causal = torch.randn(200, 4, 4).masked_fill(~torch.ones(4, 4, dtype=torch.bool).tril(), -torch.inf)
    for k in (1, 4, 50):
        out = masked(causal, k, 0.9)
        assert out.softmax(-1).isfinite().all()
        assert torch.equal(out[:, 0], causal[:, 0])  # the first token sees itself alone
        assert (out.isneginf() >= causal.isneginf()).all()


def test_the_blur_is_a_gaussian_among_the_keys_that_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 5, dtype=torch.double)
    logits[1, 3:] = -torch.inf
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(0.5))
    out = blurred(logits, 2.0)  # of standard deviation 1
    for q in range(3):
        seen = [j for j in range(5) if logits[q, j] > -math.inf]
        for j in range(5):
            if j not in seen:
                assert out[q, j] == -math.inf
                continue
            weights = [math.exp(-((i - j) ** 2) / 2) for i in seen]
            mean = sum(w * logits[q, i].item() for w, i in zip(weights, seen, strict=True)) / sum(weights)
            assert out[q, j].item() == pytest.approx(mean)


def test_a_blur_of_no_width_changes_nothing_and_each_one_is_drawn_anew() -> None:
    logits = torch.randn(3, 5)
    torch.testing.assert_close(blurred(logits, 1e-3), logits, rtol=0, atol=0)
    assert not torch.equal(blurred(logits, 3.0), blurred(logits, 3.0))


# --- where it acts --------------------------------------------------------------------------------


def same(logits: Tensor) -> Tensor:
    return logits


@pytest.mark.parametrize("share_prefix", [True, False])
def test_unchanged_logits_give_the_fused_kernel_s_attention(share_prefix: bool) -> None:
    """Of packed texts, pooled rows and images, in float64, with gradients."""
    tower, heads = small_backbone().text_tower, 2
    text = pack([[1, 5, 6, 7], [1, 5, 2], [1, 5, 9, 3]], share_prefix=share_prefix)
    x = torch.randn(1, len(text.tokens), tower.config.width, dtype=torch.double, requires_grad=True)
    attentions = (packed_attention(text, heads), x), (packed_attention(text, heads), x[:, text.pooled])
    for attention, q in (*attentions, (plain_attention(heads), x)):
        outputs = []
        for changes in (False, True):
            if not changes:
                out = attention(q, x, 2 * x)
            else:
                with changed_logits(same):
                    out = attention(q, x, 2 * x)
            outputs.append((out, torch.autograd.grad(out.square().sum(), x, retain_graph=True)[0]))
        for fused, written_out in zip(*outputs, strict=True):
            torch.testing.assert_close(written_out, fused, rtol=0, atol=1e-9)


def test_what_no_gradient_passes_through_is_left_alone() -> None:
    q = torch.randn(1, 2, 3, 4)
    with changed_logits(lambda logits: 0 * logits):
        assert torch.equal(attend(q, q, q), torch.nn.functional.scaled_dot_product_attention(q, q, q))
        q.requires_grad_()
        torch.testing.assert_close(attend(q, q, q), q.mean(2, keepdim=True).expand_as(q))
        with torch.no_grad():
            once = attend(2 * q, q + 0, q)
        assert torch.equal(once, torch.nn.functional.scaled_dot_product_attention(2 * q, q, q))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sweep(DROPS, "coop", "vpt", "drople", "dpl", "mmrl", "comma"))
def test_every_method_that_prompts_is_perturbed_in_training_alone(name: str, kind: str, tiny: Backbone) -> None:
    method = make(tiny, name)
    images, labels = images_and_labels(tiny, len(NAMES), 4)
    batch, config = make_batch(method, images, labels), TrainConfig(attention_drop=kind)

    def losses(config: TrainConfig) -> dict[str, Tensor]:
        torch.manual_seed(5)
        return losses_of(method, batch, config)

    plain = losses(TrainConfig())
    known = {key: value.clone() for key, value in {**tiny._known, **tiny._texts}.items()}
    state = {key: value.clone() for key, value in method.state_dict().items()}
    predicted = method.eval().predict(images, NAMES)
    method.train()
    perturbed = losses(config)
    assert set(perturbed) == {*plain, *(["consistency"] if kind == "consistency" else [])}
    assert any(not torch.equal(plain[term], perturbed[term]) for term in plain)
    assert all(value.isfinite() for value in perturbed.values())
    gradients = method.gradients(perturbed)
    assert all(g.isfinite().all() for group in gradients.values() for g in group)
    again = losses(config)
    assert all(torch.equal(perturbed[term], again[term]) for term in perturbed)
    # Frozen features are remembered as they were, and evaluation gives the same bits.
    now = {**tiny._known, **tiny._texts}
    assert all(torch.equal(value, now[key]) for key, value in known.items() if key in now)
    assert all(torch.equal(plain[term], value) for term, value in losses(TrainConfig()).items())
    method.load_state_dict(state)  # PromptKD's batch statistics move with every pass
    assert torch.equal(method.eval().predict(images, NAMES), predicted)


def test_what_is_remembered_was_not_perturbed(tiny: Backbone) -> None:
    """COMMA makes frozen states in a training step: they are the same whether the first step was perturbed or not."""
    seen = []
    for kind in (None, "mask"):
        tiny.to()  # forgets
        method = make(tiny, "comma")
        images, labels = images_and_labels(tiny, len(NAMES), 4)
        losses_of(method, make_batch(method, images, labels), TrainConfig(attention_drop=kind, attention_drop_p=0.9))
        seen.append(dict(tiny._known))
    assert seen[0].keys() == seen[1].keys()
    assert any(isinstance(key, tuple) and key[0] == "comma" for key in seen[0])
    assert all(torch.equal(seen[0][key], seen[1][key]) for key in seen[0])


def test_consistency_compares_two_passes(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    method = make(tiny, "coop", n_ctx=2)
    images, labels = images_and_labels(tiny, len(NAMES), 4)
    batch = make_batch(method, images, labels)
    made = []
    monkeypatch.setattr(method, "logits", lambda v, t: made.append(0.1 * v @ t.T * (1 + len(made))) or made[-1])
    terms = losses_of(method, batch, TrainConfig(attention_drop="consistency", attention_drop_weight=3.0))
    p, q = (x.softmax(-1) for x in made)
    kl = ((p * (p / q).log()).sum(-1).mean() + (q * (q / p).log()).sum(-1).mean()) / 2
    ce = sum(torch.nn.functional.cross_entropy(x, labels) for x in made) / 2
    torch.testing.assert_close(terms["consistency"], 3 * kl, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(terms["ce"], ce)


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "kind"),
    sweep([("coop", "mask"), ("vpt", "blur"), ("ivlp", "consistency")], ("vpt", "blur")),
)
def test_a_stopped_run_resumes_to_the_same_bits(method: str, kind: str, pictures: Path, tmp_path: Path) -> None:
    config = configured(pictures, method, **{"train.epochs": 2, "train.attention_drop": kind})
    train(config, tmp_path / "whole")
    tuned = check_stopped(config, tmp_path, 2)
    train(configured(pictures, method, **{"train.epochs": 2}), tmp_path / "plain")
    assert any(not torch.equal(tuned[k], v) for k, v in prompts(tmp_path / "plain").items())
    assert ("consistency" in log(tmp_path / "whole")[0]) == (kind == "consistency")


def test_fit_takes_it(tiny: Backbone, pictures: Path) -> None:
    split = load_dataset(str(pictures)).split
    paths, labels = split.paths("train")[:4], split.labels("train")[:4]
    given = {"epochs": 1, "batch_size": 2, "warmup_epochs": 0}
    tuned = [
        fit(build_method("coop", tiny, split.class_names), paths, labels, **given, **more).context.vectors
        for more in ({}, {"attention_drop": "mask", "attention_drop_k": 2, "attention_drop_p": 0.5})
    ]
    assert not torch.equal(*tuned)


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEAVES)
def test_methods_without_a_tower_in_their_steps_are_refused(name: str) -> None:
    says = f"^train.attention_drop = mask: method '{name}' has no steps that run a tower's attention$"
    with pytest.raises(ConfigError, match=says):
        build_config(name, overrides={"attention_drop": "mask"})


@pytest.mark.parametrize(
    ("method", "asked", "says"),
    [
        ("coop", {"attention_drop": "masks"}, "attention_drop = masks .*'mask', 'blur' or 'consistency'; did you mean"),
        ("coop", {"attention_drop": True}, "train.attention_drop = True"),
        ("coop", {"attention_drop": "mask", "attention_drop_p": 1.0}, "train.attention_drop_p = 1.0"),
        ("coop", {"attention_drop": "mask", "attention_drop_p": 0}, "train.attention_drop_p = 0"),
        ("coop", {"attention_drop": "mask", "attention_drop_k": 0}, "train.attention_drop_k = 0"),
        ("coop", {"attention_drop": "blur", "attention_drop_sigma": -1}, "train.attention_drop_sigma = -1"),
        ("coop", {"attention_drop_k": 3}, "train.attention_drop_k = 3: it is of train.attention_drop=mask or consist"),
        (
            "coop",
            {"attention_drop": "mask", "attention_drop_sigma": 2.0},
            "train.attention_drop_sigma = 2.0: it is of train.attention_drop=blur",
        ),
        (
            "coop",
            {"attention_drop": "mask", "text_chunk": 2},
            "train.text_chunk: with train.attention_drop the texts of all classes are encoded at once",
        ),
        ("pouf", {"attention_drop": "mask", "learn": "head"}, "method 'pouf' has no steps that run a tower's attent"),
    ],
)
def test_what_is_refused(method: str, asked: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build_config(method, overrides=asked)


def test_a_resnet_is_refused(tiny: Backbone) -> None:
    sizes = {"layers": 0, "heads": 2, "mlp_width": 0, "embed_dim": tiny.embed_dim}
    tower = ResNetTower(ImageConfig(32, 32, 8, pool="resnet", stages=(1, 1, 1, 1), **sizes))
    resnet = replace(tiny, name="rn", image_tower=tower)
    says = "train.attention_drop = blur: backbone 'rn' is a ResNet, without attention in its blocks"
    with pytest.raises(ConfigError, match=says):
        check_attention(make(resnet, "coop"), TrainConfig(attention_drop="blur"))
    check_attention(make(resnet, "coop"), TrainConfig())


def test_the_command_line_says_so(pictures: Path, tmp_path: Path) -> None:
    done = vlprompt(*arguments("gda", pictures, tmp_path / "run", "attention_drop=mask"))
    assert done.code == 2
    assert "train.attention_drop = mask: method 'gda' has no steps that run a tower's attention" in done.err
    assert not (tmp_path / "run").exists()
