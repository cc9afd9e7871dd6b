"""The family's methods against the numbers of their official implementations, for every case found."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from tests.kit.cases import FAMILY, Case, close, find_cases
from vlprompt.backbones.backbone import unit
from vlprompt.backbones.towers import Prompts
from vlprompt.config.schema import OptimConfig
from vlprompt.methods import Batch, Method, find_method
from vlprompt.methods.base import total
from vlprompt.methods.zero_shot import frozen_class_features
from vlprompt.training.schedule import build_optimizer


@dataclass(frozen=True)
class Official:
    """How a method's case is read; the defaults are those of a method with one context and one loss."""

    options: Callable[[dict], dict]
    """Our options of the case's description."""
    names: dict[str, str]
    """Official parameter → ours; an index in brackets is a part of it."""
    terms: dict[str, Callable[[dict, dict[str, Tensor]], Tensor]] = field(default_factory=dict)
    """Our weighted loss term of the case's hyper-parameters and official terms, where it is not the same."""
    written: set[str] = field(default_factory=set)
    """Official parameters that every forward pass overwrites: no parameters of ours."""


def ctx_init(h: dict) -> str | None:
    return h["ctx_init"] or None


FORMS = {
    "bayesian": Official(
        lambda info: {
            "n_ctx": info["hyper"]["n_ctx"],
            "init": ctx_init(info["hyper"]),
            "samples": info["hyper"]["l"],
            "conditional": {"cocoopvpt": True, "coopvpt": False}[info["hyper"]["vpt_type"]],
        },
        {
            r"prompt_learner\.ctx": "context.vectors",
            r"prompt_learner\.mean_posterior": "mean",
            r"prompt_learner\.std_posterior": "log_variance",
            r"prompt_learner\.meta_net\.weight_mean\.module\.(.+)": r"blocks.0.\1",
            r"prompt_learner\.meta_net\.weight_log_variance\.module\.(.+)": r"blocks.1.\1",
        },
        {
            "ce": lambda h, official: official["task"],
            "kl": lambda h, official: 0.001 * official["kl_unweighted"],
        },
    ),
    "comma": Official(
        lambda info: {
            "n_ctx": info["hyper"]["n_ctx"],
            "init": ctx_init(info["hyper"]),
            "depth": info["hyper"]["prompt_depth"],
            "last_blocks": info["hyper"]["last_layer"],
            "w": info["hyper"]["weight"],
        },
        {
            r"prompt_learner\.ctx": "context.vectors",
            r"prompt_learner\.compound_prompts_text": "context.deep",
            r"prompt_learner\.proj\.(\w+)": r"coupled.projections.0.\1",
            r"prompt_learner\.compound_prompt_projections_image_base\.(.+)": r"coupled.generators.0.\1",
            **{
                rf"prompt_learner\.compound_prompt_projections_image\.{i}\.(.+)": rf"coupled.generators.{i + 1}.\1"
                for i in range(10)
            },
        },
        {"kg": lambda h, official: h["weight"] * official["kg_unweighted"]},
        {"prompt_learner.compound_prompts_image"},
    ),
    "lasp": Official(
        lambda info: {
            "n_ctx": info["hyper"]["n_ctx"],
            "init": ctx_init(info["hyper"]),
            "w": info["hyper"]["lasp_loss_weight"],
            "templates": tuple(info["hyper"]["lasp_templates"]),
            "virtual_classes": tuple(info["hyper"]["text_to_text_classnames"]),
            "correction": info["hyper"]["correction_w"],
            "norms": info["hyper"]["finetune_vit_ln"],
            "norms_rate": info["hyper"]["vit_ln_lr_factor"],
            "max_norm": None,
        },
        {
            r"prompt_learner\.ctx": "contexts.0.vectors",
            r"prompt_learner\.w": "correction",
            **{
                rf"image_encoder\.transformer\.resblocks\.(\d+)\.ln_{j + 1}\.{part}": rf"norms[\1,{2 * j + k}]"
                for j in range(2)
                for k, part in enumerate(("weight", "bias"))
            },
        },
        {"text_to_text": lambda h, official: h["lasp_loss_weight"] * official["text_to_text_unweighted"]},
    ),
    "mmrl": Official(
        lambda info: {
            "n_tokens": info["hyper"]["n_rep_tokens"],
            "width": info["hyper"]["rep_dim"],
            "layers": tuple(info["hyper"]["rep_layers"]),
            "alpha": info["hyper"]["alpha"],
            "w": info["hyper"]["reg_weight"],
        },
        {
            r"representation_learner\.compound_rep_tokens": "tokens",
            r"representation_learner\.compound_rep_tokens_r2vproj\.(.+)": r"maps.image.\1",
            r"representation_learner\.compound_rep_tokens_r2tproj\.(.+)": r"maps.text.\1",
            r"image_encoder\.proj_rep": "projection",
        },
        {
            "ce": lambda h, official: h["alpha"] * official["ce_main"],
            "ce_rep": lambda h, official: (1 - h["alpha"]) * official["ce_rep"],
            "image": lambda h, official: h["reg_weight"] * official["cos_image"],
            "text": lambda h, official: h["reg_weight"] * official["cos_text"],
        },
    ),
    "tcp": Official(
        lambda info: {
            "n_ctx": info["hyper"]["n_ctx"],
            "init": ctx_init(info["hyper"]),
            "layer": info["hyper"]["inject_layer"],
            "weight": info["hyper"]["inject_weight"],
            "w": info["hyper"]["kg_weight"],
        },
        {
            r"prompt_learner\.ctx": "context.vectors",
            r"prompt_learner\.meta_net\.linear1\.(\w+)": r"down.\1",
            r"prompt_learner\.meta_net\.linear2\.(\w+)": r"up.\1",
        },
        {"kg": lambda h, official: official["kg_x8"] / 8 * h["kg_weight"]},
    ),
}


def ours(form: Official, official: str) -> tuple[str, tuple[int, ...]]:
    """Our parameter for an official name, and the index into it."""
    for pattern, name in form.names.items():
        if re.fullmatch(pattern, official):
            name, _, index = re.sub(pattern, name, official).partition("[")
            return name, tuple(int(i) for i in index.rstrip("]").split(",") if i)
    raise KeyError(f"official parameter {official} is not mapped")


def load(form: Official, method: Method, gold: dict[str, Tensor], prefix: str) -> None:
    """Set all parameters from ``prefix``NAME tensors."""
    names = [n for k in gold if k.startswith(prefix) and (n := k.removeprefix(prefix)) not in form.written]
    state = dict(method.state_dict(keep_vars=True))
    with torch.no_grad():
        for name in names:
            key, index = ours(form, name)
            state[key][index].copy_(gold[prefix + name])
    learned = {n for n, _ in method.named_parameters()}
    assert learned <= {ours(form, n)[0] for n in names}, "a parameter has no official counterpart"


def learned(form: Official, method: Method, gold: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """The official names of what is learned, with our values and gradients."""
    parameters = dict(method.named_parameters())
    for key in (k.removeprefix("grad/") for k in gold if k.startswith("grad/")):
        if key in form.written:
            continue
        name, index = ours(form, key)
        if name in parameters:
            p = parameters[name]
            yield key, p[index], None if p.grad is None else p.grad[index]


def make(case: Case, form: Official) -> Method:
    info, cls = case.info, find_method(case.method)
    template = info.get("frozen_template") or info.get("template") or "a photo of a {}."
    return cls(case.backbone, info["classnames"], cls.Config(**form.options(info)), template)


def make_batch(method: Method, gold: dict[str, Tensor]) -> Batch:
    frozen = method.backbone.encode_images(gold["images"]) if "frozen_image_features" in method.needs else None
    return Batch(gold["images"], gold["labels"].long(), frozen)


def step(method: Method, batch: Batch, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    optimizer.zero_grad()
    losses = method.losses(batch)
    method.backward(losses)
    return losses


def check_terms(form: Official, h: dict, losses: dict[str, Tensor], gold: dict[str, Tensor], noise: float) -> None:
    official = {k.removeprefix("loss/"): v for k, v in gold.items() if k.startswith("loss/")}
    for term, value in losses.items():
        expected = form.terms[term](h, official) if term in form.terms else official[term]
        close(f"loss/{term}", value, expected.reshape(()), noise)
    assert len(losses) == len(official), f"official loss terms {[*official]}, ours {[*losses]}"
    close("loss", total(losses), gold["loss"].reshape(()), noise)


def predict(method: Method, images: Tensor, names: list[str]) -> Tensor:
    logits = method.eval().predict(images, names)
    if method.name != "mmrl":
        return logits
    v, t = method.encode_images(images), method.class_features(names)
    main, rep, both = *method.branches(v, t), method.logits(v, t)
    assert torch.equal(logits, both if tuple(names) == method.class_names else main)
    return torch.stack([main, rep, both])


def check(case: Case, form: Official, predict: Callable[[Method, Tensor, list[str]], Tensor] = predict) -> Method:
    """Everything that a case holds; returns the method as it is after three steps."""
    info, gold = case.info, case.tensors
    noise, o = info["noise_sensitivity"], info["optimizer"]
    method, images = make(case, form), gold["images"]
    prepare(method, gold)
    batch = make_batch(method, gold)
    load(form, method, gold, "init/")
    if "eval_logits_init" in gold:
        at_first = predict(method, images, info["classnames"])
        close("eval_logits_init", at_first, gold["eval_logits_init"], noise["eval_logits_init"])
    method.train()
    out = method(batch)
    check_forward(method, out, gold, noise["logits"])
    decay = {"weight_decay": o["weight_decay"], "momentum": o["momentum"]}
    optimizer = build_optimizer(method, OptimConfig(name=o["name"], lr=o["lr"], **decay))
    for group in optimizer.param_groups:
        group["lr"] = o["lr"] * group["share"]
    per_step, momentum = [], torch.zeros(())
    for i in range(o["steps"]):
        for name in form.written:  # an official step changes it too, in vain
            value, g = overwritten(method, batch)
            if i == 0:
                close(f"grad/{name}", g, gold[f"grad/{name}"], noise["grad_max_rel"], g.abs().max().item())
            momentum = o["momentum"] * momentum + g + o["weight_decay"] * value
            if i == o["steps"] - 1:
                close(f"after3/{name}", value - o["lr"] * momentum, gold[f"after3/{name}"], 1e-5)
        losses = step(method, batch, optimizer)
        per_step.append(total(losses))
        if i == 0:
            check_terms(form, info["hyper"], losses, gold, noise["loss"])
            for name, _, gradient in learned(form, method, gold):
                g = gold[f"grad/{name}"]
                close(f"grad/{name}", gradient, g, noise["grad_max_rel"], g.abs().max().item())
        optimizer.step()
        if i == 0 and "class_prompts" in gold:  # written down in the second step
            close("class_prompts", method.class_tokens(method.class_names), gold["class_prompts"])
    reached = max(noise["loss"], noise["eval_logits_after3"])
    close("loss_per_step", torch.stack(per_step), gold["loss_per_step"].reshape(-1), reached)
    for name, value, _ in learned(form, method, gold):
        after = gold[f"after3/{name}"]
        move = (after - gold[f"init/{name}"]).abs().max().item()
        close(f"after3/{name}", value, after, noise["after3_max_rel_to_move"], move)
    load(form, method, gold, "after3/")  # the logits are those of exactly these parameters
    after3 = predict(method, images, info["classnames"])
    close("eval_logits_after3", after3, gold["eval_logits_after3"], noise["eval_logits_after3"])
    if "novel_eval_logits" in gold:
        novel = predict(method, images, info["novel_classnames"])
        close("novel_eval_logits", novel, gold["novel_eval_logits"], noise["novel_eval_logits"])
    return method


def overwritten(method: Method, batch: Batch) -> tuple[Tensor, Tensor]:
    """COMMA's generated visual prompts of the deeper layers, and the gradient that stops there."""
    first, *deep = method.visual_prompts().tokens
    values = torch.stack(deep).detach().requires_grad_()
    method.visual_prompts = lambda: Prompts([first, *values])
    (g,) = torch.autograd.grad(total(method.losses(batch)), values)
    del method.visual_prompts
    return values.detach(), g


def prepare(method: Method, gold: dict[str, Tensor]) -> None:
    """Give a method the case's random numbers in place of its own."""
    if "eps" in gold:  # [L, 1, D], in training and evaluation
        method.noise = lambda mu: gold["eps"].transpose(0, 1)
    if method.name == "lasp":  # the official order of the classes is that of the text-to-text loss
        noise = gold.get("standard_normal_noise")
        method.draw_noise = lambda r: torch.zeros_like(r) if noise is None else 0.05 * noise.reshape(r.shape)


def check_forward(method: Method, out, gold: dict[str, Tensor], noise: float) -> None:
    if method.name == "mmrl":
        main, rep = method.branches(out.v, out.t)
        close("logits_rep", rep, gold["logits_rep"], noise)
        close("logits_fusion", out.logits, gold["logits_fusion"], noise)
        out = replace(out, logits=main, v=out.v[:, 0])
    of_samples = gold["logits"].ndim == 3  # log-probabilities, [L, B, C]
    logits = method.log_probabilities(out.v, out.t).transpose(0, 1) if of_samples else out.logits
    close("logits", logits, gold["logits"], noise)
    close("image_features", out.v, unit(gold["image_features"]), 2e-7)
    text = gold["text_features"]
    if method.name == "lasp":  # of the classes, and of all in the text-to-text loss; before the correction
        text = text[0] if text.ndim == 3 else text
    close("text_features", out.t.reshape(text.shape), unit(text), 2e-7)
    if "frozen/class_text_features" in gold:
        close("references", method.references(), unit(gold["frozen/class_text_features"]).flatten(0, 1), 1e-6)
    if "frozen/text_features_normalized" in gold:
        t0 = frozen_class_features(method.backbone, method.class_names, [method.template])
        close("frozen", t0, gold["frozen/text_features_normalized"], 1e-6)


@pytest.mark.parametrize("case", find_cases(FAMILY))
def test_official_numbers(case: Case) -> None:
    check(case, FORMS[case.method])
