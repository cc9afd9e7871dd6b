"""DroPLe's golden cases: its components as input → output tensors, and its objective on given features."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.kit.cases import Case, Gold, Hyper, close
from vlprompt.backbones.backbone import unit
from vlprompt.data.batches import Batch
from vlprompt.methods.base import Output, total
from vlprompt.methods.drople.drople import DroPLe
from vlprompt.methods.drople.dropout import SharedTokens, content, drop, importance, look, scores
from vlprompt.methods.drople.losses import entropy, regularisers, residual, rising


def leaf(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_()


def check_importance(case: Case) -> None:
    """Scores, probabilities, and the tokens that are hit by the given draws."""
    gold, h = case.tensors, Hyper(case)
    sigma, most, least = h["noise_sigma"], h["noise_max_prob"], h["noise_min_prob"]
    h.told("official_default_sigma")
    assert not h.unread
    for tower, g in (("vision", 0), ("text", -1)):
        tensors = {k.removeprefix(f"{tower}/"): v for k, v in gold.items() if k.startswith(tower)}
        out = {k.removeprefix("out/"): v for k, v in tensors.items() if k.startswith("out/")}
        maps, cross = tensors["in/self_attn"], tensors["in/token_attn"]
        s = scores(maps, cross, g)
        s_cls = out.pop("cls_attention")
        close("S_cls", s[1], s_cls / s_cls.sum(-1, keepdim=True))
        close("importance", s.mean(0), out.pop("token_importance"))
        i = importance(s)
        close("normalised", i, out.pop("normalized_importance"))
        after = out.pop("modified_hidden_states")
        assert out
        for name, golden in out.items():
            p_max, p_min = map(float, re.findall(r"_([\d.]+)", name))
            close(name, p_max - i * (p_max - p_min), golden)
        chosen = (tensors["in/target_mask1"] | tensors["in/target_mask2"]).bool()
        rows = chosen.nonzero()[:, 0]
        p = (most - i * (most - least))[:, chosen[content(g)]]
        with pytest.MonkeyPatch.context() as patch:  # the official draws
            patch.setattr(torch, "rand_like", lambda p, u=tensors["in/uniform_draws"]: u)
            patch.setattr(torch, "randn_like", lambda x, eps=tensors["in/standard_normal"][:, rows]: eps)
            ours = drop(tensors["in/hidden_states"], rows, p, "gaussian", sigma)
        close("tokens", ours, after)
        assert 0 < (ours != tensors["in/hidden_states"]).any(-1).sum() < rows.numel() * len(ours)


def objective(v, t, v0, t0, scale, labels, seen, lam, config: DroPLe.Config) -> dict[str, torch.Tensor]:
    """All loss terms of DroPLe, of features given."""
    out, method = (
        Output(v, t, scale * v @ t.T, seen),
        SimpleNamespace(config=config, adjusted=lambda logits, batch: logits),
    )
    supervision = DroPLe.supervision(method, out, Batch(None, labels))  # type: ignore[arg-type]
    return supervision | regularisers(out, v0, t0, scale, lam, config)


def check_shared_tokens(case: Case) -> None:
    """Their attention, what they see, the alignment loss and its gradients."""
    gold = case.tensors
    e, (d_v, d_t) = gold["init/learnable_tokens"], (gold[f"in/{x}_tokens"].shape[-1] for x in ("visual", "text"))
    shared = SharedTokens(case.backbone, *e.shape, case.info["hyper"]["temperature"])
    shared.image, shared.text = (torch.nn.Linear(d, e.shape[1]) for d in (d_v, d_t))
    parameters = {"learnable_tokens": shared.tokens}
    for ours, official in ((shared.image, "visual_mapping"), (shared.text, "text_mapping")):
        parameters |= {f"{official}.weight": ours.weight, f"{official}.bias": ours.bias}
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(gold[f"init/{name}"])
    inputs, seen = {}, {}
    for tower, mapped in (("visual", shared.image), ("text", shared.text)):
        inputs[tower] = leaf(gold[f"in/{tower}_tokens"])
        a = look(shared.keys(mapped), inputs[tower])
        seen[tower] = shared.pool(mapped, a, inputs[tower])
        close(f"{tower} attention", a, gold[f"out/{tower}_attn"])
        close(f"{tower} features", seen[tower], gold[f"out/{tower}_features"])
    z = unit(torch.randn(2, 4))  # no part of the other terms
    both = [(seen["visual"], seen["text"][gold["labels"].long()])]
    terms = objective(
        z, z, z, z, torch.ones(1), torch.zeros(2).long(), both, torch.tensor(0.1), DroPLe.Config(alignment_weight=1.0)
    )
    close("loss", terms["alignment"], gold["loss"])
    terms["alignment"].backward()
    for name, p in parameters.items():
        assert p.grad is not None
        close(f"grad/{name}", p.grad, gold[f"grad/{name}"])
    for tower, x in inputs.items():
        assert x.grad is not None
        close(f"grad of {tower} tokens", x.grad, gold[f"grad_{tower}_tokens"])


def check_residual_entropy(case: Case) -> None:
    """Both entropies for every λ, and their gradients for one."""
    gold = case.tensors
    t0, v0, scale = gold["in/frozen_text"], gold["in/frozen_image"], gold["in/logit_scale_exp"]
    close("entropy", torch.stack([entropy(p.log()) for p in gold["in/probs"][:, None]]), gold["out/entropy_of_probs"])
    for i, lam in enumerate(torch.tensor(case.info["hyper"]["lams"], dtype=torch.double)):
        t, v = leaf(gold["in/learned_text"]), leaf(gold["in/learned_image"])
        h_t = entropy(scale * v0 @ residual(t, t0, lam).T)
        h_v = entropy(scale * residual(v, v0, lam) @ t0.T)
        close(f"text, λ = {lam}", h_t, gold["out/entropy_text"][i], 1e-7)
        close(f"image, λ = {lam}", h_v, gold["out/entropy_image"][i], 1e-7)
        if i == 1:
            (-0.1 * (h_t + h_v)).backward()
            assert t.grad is not None
            assert v.grad is not None
            close("gradient of the texts", t.grad, gold["out/grad_learned_text_lam1"])
            close("gradient of the images", v.grad, gold["out/grad_learned_image_lam1"])


def check_schedule(case: Case) -> None:
    """λ of every epoch."""
    for name, golden in case.tensors.items():
        kind, epochs, lam = re.fullmatch(r"(.+)/epochs(\d+)_lam([\d.]+)", name).groups()  # type: ignore[union-attr]
        ours = torch.tensor([rising(float(lam), e, int(epochs)) for e in range(int(epochs))], dtype=torch.double)
        close(name, ours if kind == "lam" else float(lam) - ours, golden)


def check_objective(case: Case) -> None:
    """Every term, and the gradients of their sum."""
    gold, h = Gold(case.tensors), Hyper(case)
    t, v = leaf(gold["in/learned_text"]), leaf(gold["in/learned_image"])
    log_scale, labels = leaf(gold["in/logit_scale_exp"].log()), gold["labels"].long()
    images, texts = (
        [leaf(gold[k]) for k in sorted(gold) if k.startswith(f"in/{tower}_mag_features_")]
        for tower in ("visual", "text")
    )
    config = DroPLe.Config(
        label_smoothing=h["label_smoothing"],
        text_weight=h["text_l1"],
        image_weight=h["image_l1"],
        distillation_weight=h["lambda_dist"] if h.get("distillation_type", "soft") == "soft" else 0,
        entropy_weight=h["weight_res"],
        alignment_weight=h["mag_weight"],
    )
    lam = torch.tensor(rising(h["lam_res"], h["epoch"], h["max_epochs"]), dtype=torch.double)
    assert not h.unread
    gold.compare("lam", lam)
    v0, t0 = unit(gold["in/frozen_image"]), unit(gold["in/frozen_text"])
    seen = [(image, text[labels]) for image, text in zip(images, texts, strict=False)]  # further layers are ignored
    terms = objective(unit(v), unit(t), v0, t0, log_scale.exp(), labels, seen, lam, config)
    official = {  # how their names begin; the weights follow
        "ce": "ce_", "text_consistency": "text_l1_x", "image_consistency": "image_l1_x",
        "residual_entropy": "residual_x", "alignment": "mag_x",
    }  # fmt: skip
    assert set(terms) == {*official, "distillation"}
    for term, begins in official.items():
        for key in (k for k in gold if k.startswith(f"loss/{begins}")):
            gold.compare(key, terms[term], 1e-7)
    if config.distillation_weight:
        gold.compare("loss/distill_soft", terms["distillation"] / config.distillation_weight, 1e-7)
    gold.compare("loss", total(terms))
    total(terms).backward()
    gradients = {"learned_text": t, "learned_image": v, "logit_scale": log_scale}
    gradients |= {f"visual_mag_features_{i}": x for i, x in enumerate(images)}
    gradients |= {f"text_mag_features_{i}": x for i, x in enumerate(texts)}
    for name, x in gradients.items():
        gold.compare(f"out/grad_{name}", torch.zeros_like(x) if x.grad is None else x.grad)


CHECKS: dict[str, Callable[[Case], None]] = {
    "vision/in/self_attn": check_importance,
    "init/learnable_tokens": check_shared_tokens,
    "out/entropy_text": check_residual_entropy,
    "annealing_factor/": check_schedule,
    "in/visual_mag_features_0": check_objective,
}
"""By a tensor that only such a case has, or how its name begins."""


def check(case: Case) -> None:
    """The piece of DroPLe that the case is of, by what it holds."""
    (found,) = (check for begins, check in CHECKS.items() if any(key.startswith(begins) for key in case.tensors))
    found(case)
