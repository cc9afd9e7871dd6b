"""The family's methods against the numbers of their official implementations, for every case found in their folders.

What a case leaves out is not asked for; a hyper-parameter that nobody reads is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kit.cases import FAMILY, Case, Gold, Hyper, close, find_cases
from tests.kit.official import TYPICAL, check_tokens, make, make_batch, step
from vlprompt.backbones.backbone import unit
from vlprompt.backbones.towers import Prompts
from vlprompt.config.schema import OptimConfig
from vlprompt.methods import Batch, Method, Output
from vlprompt.methods.base import total
from vlprompt.methods.zero_shot import frozen_class_features
from vlprompt.training.schedule import build_optimizer


def bayesian(h: Hyper, info: dict) -> dict[str, Any]:
    conditional = {"cocoopvpt": True, "coopvpt": False}[h["vpt_type"]]
    return {**h.context(), "samples": h["l"], "conditional": conditional}


def comma(h: Hyper, info: dict) -> dict[str, Any]:
    options = {"n_ctx": h["n_ctx"], "init": h.words, "depth": h["prompt_depth"], "last_blocks": h["last_layer"]}
    return {**options, "w": h["weight"], "template": info["frozen_template"]}


def lasp(h: Hyper, info: dict) -> dict[str, Any]:
    return {
        **h.context(),
        "w": h["lasp_loss_weight"],
        "templates": tuple(h["lasp_templates"]),
        "virtual_classes": tuple(h["text_to_text_classnames"]),
        "correction": h["correction_w"],
        "norms": h["finetune_vit_ln"],
        "norms_rate": h.get("vit_ln_lr_factor", 0.1),
        "max_norm": None,  # at fp32, at which the cases were made
    }


def mmrl(h: Hyper, info: dict) -> dict[str, Any]:
    tokens = {"n_tokens": h["n_rep_tokens"], "width": h["rep_dim"], "layers": tuple(h["rep_layers"])}
    return {**tokens, "alpha": h["alpha"], "w": h["reg_weight"], "template": info["template"]}


def tcp(h: Hyper, info: dict) -> dict[str, Any]:
    words = "a photo of a" if h.words else None  # whatever they are
    n_ctx = 4 if words else h["n_ctx"]
    h.told("n_ctx", "meta_net")
    end = h.get("prompt_template", "{}.").partition("{}")[2]
    given = {"layer": h["inject_layer"], "weight": h["inject_weight"], "w": h["kg_weight"]}
    return {"n_ctx": n_ctx, "init": words, "end": end, **given, "template": h["frozen_template"]}


@dataclass(frozen=True)
class Official:
    """How a method's cases are read; the defaults are those of a method whose terms are called as there."""

    options: Callable[[Hyper, dict], dict[str, Any]]
    """Our options of a case's hyper-parameters, and of what else it says."""
    names: dict[str, str]
    """Official parameter → ours; an index in brackets is a part of it."""
    terms: Callable[[dict, dict[str, Tensor]], dict[str, Tensor]]
    """Our weighted loss terms, of the case's hyper-parameters and official terms."""
    written: set[str] = field(default_factory=set)
    """Official parameters that every forward pass overwrites: no parameters of ours."""


FORMS = {
    "bayesian": Official(
        bayesian,
        {
            r"prompt_learner\.ctx": "context.vectors",
            r"prompt_learner\.mean_posterior": "mean",
            r"prompt_learner\.std_posterior": "log_variance",
            r"prompt_learner\.meta_net\.weight_mean\.module\.(.+)": r"blocks.0.\1",
            r"prompt_learner\.meta_net\.weight_log_variance\.module\.(.+)": r"blocks.1.\1",
        },
        lambda h, x: {"ce": x["task"], "kl": 0.001 * x["kl_unweighted"]},
    ),
    "comma": Official(
        comma,
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
        lambda h, x: {"ce": x["ce"], "kg": h["weight"] * x["kg_unweighted"]},
        {"prompt_learner.compound_prompts_image"},
    ),
    "lasp": Official(
        lasp,
        {
            r"prompt_learner\.ctx": "contexts.0.vectors",
            r"prompt_learner\.w": "correction",
            **{
                rf"image_encoder\.transformer\.resblocks\.(\d+)\.ln_{j + 1}\.{part}": rf"norms[\1,{2 * j + k}]"
                for j in range(2)
                for k, part in enumerate(("weight", "bias"))
            },
        },
        lambda h, x: {"ce": x["ce"], "text_to_text": h["lasp_loss_weight"] * x["text_to_text_unweighted"]},
    ),
    "mmrl": Official(
        mmrl,
        {
            r"representation_learner\.compound_rep_tokens": "tokens",
            r"representation_learner\.compound_rep_tokens_r2vproj\.(.+)": r"maps.image.\1",
            r"representation_learner\.compound_rep_tokens_r2tproj\.(.+)": r"maps.text.\1",
            r"image_encoder\.proj_rep": "projection",
        },
        lambda h, x: {
            "ce": h["alpha"] * x["ce_main"],
            "ce_rep": (1 - h["alpha"]) * x["ce_rep"],
            "image": h["reg_weight"] * x["cos_image"],
            "text": h["reg_weight"] * x["cos_text"],
        },
    ),
    "tcp": Official(
        tcp,
        {
            r"prompt_learner\.ctx": "context.vectors",
            r"prompt_learner\.meta_net\.linear1\.(\w+)": r"down.\1",
            r"prompt_learner\.meta_net\.linear2\.(\w+)": r"up.\1",
        },
        lambda h, x: {"ce": x["ce"], "kg": h["kg_weight"] * x["kg_x8"] / 8},
    ),
}


def ours(form: Official, official: str) -> tuple[str, tuple[int, ...]]:
    """Our parameter for an official name, and the index into it."""
    for pattern, name in form.names.items():
        if re.fullmatch(pattern, official):
            name, _, index = re.sub(pattern, name, official).partition("[")
            return name, tuple(int(i) for i in index.rstrip("]").split(",") if i)
    raise KeyError(f"official parameter {official} is not mapped")


def load(form: Official, method: Method, gold: Gold, prefix: str) -> None:
    """Set all parameters from ``prefix``NAME tensors."""
    names = [n for k in gold if k.startswith(prefix) and (n := k.removeprefix(prefix)) not in form.written]
    state = dict(method.state_dict(keep_vars=True))
    with torch.no_grad():
        for name in names:
            key, index = ours(form, name)
            state[key][index].copy_(gold[prefix + name])
    learned = {n for n, _ in method.named_parameters()}
    assert learned <= {ours(form, n)[0] for n in names}, "a parameter has no official counterpart"


def learned(form: Official, method: Method, gold: Gold, prefix: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The official names of what is learned and has a ``prefix``NAME tensor, with our values and gradients."""
    parameters = dict(method.named_parameters())
    for key in (k.removeprefix(prefix) for k in gold if k.startswith(prefix)):
        if key in form.written:
            continue
        name, index = ours(form, key)
        if name in parameters:
            p = parameters[name]
            yield key, p[index], p.grad[index]


def check_terms(form: Official, h: dict, losses: dict[str, Tensor], gold: Gold, noise: float) -> None:
    if official := {k.removeprefix("loss/"): v.reshape(()) for k, v in gold.items() if k.startswith("loss/")}:
        expected = form.terms(h, official)
        assert losses.keys() == expected.keys()
        assert len(official) == len(expected), f"official loss terms {[*official]}, ours {[*losses]}"
        for term, value in losses.items():
            close(f"loss/{term}", value, expected[term], noise)
    if "loss" in gold:
        close("loss", total(losses), gold["loss"].reshape(()), noise)


def predict(method: Method, images: Tensor, names: list[str]) -> Tensor:
    logits = method.eval().predict(images, names)
    if method.name != "mmrl":
        return logits
    v, t = method.encode_images(images), method.class_features(names)
    main, rep, both = *method.branches(v, t), method.logits(v, t)
    assert torch.equal(logits, both if tuple(names) == method.class_names else main)
    return torch.stack([main, rep, both])


def overwritten(method: Method, batch: Batch) -> tuple[Tensor, Tensor]:
    """COMMA's generated visual prompts of the deeper layers, and the gradient that stops there."""
    first, *deep = method.visual_prompts().tokens
    values = torch.stack(deep).detach().requires_grad_()
    method.visual_prompts = lambda: Prompts([first, *values])
    (g,) = torch.autograd.grad(total(method.losses(batch)), values)
    del method.visual_prompts
    return values.detach(), g


def take_draws(method: Method, gold: Gold) -> None:
    """Give a method the case's random numbers in place of its own."""
    if "eps" in gold:  # [L, 1, D], in training and evaluation
        method.noise = lambda mu: gold["eps"].transpose(0, 1)
    if method.name == "lasp":
        noise = gold.get("standard_normal_noise")
        method.draw_noise = lambda r: torch.zeros_like(r) if noise is None else 0.05 * noise.reshape(r.shape)


def check_forward(method: Method, out: Output, gold: Gold, noise: float) -> None:
    if method.name == "mmrl":
        main, rep = method.branches(out.v, out.t)
        gold.compare("logits_rep", rep, noise)
        gold.compare("logits_fusion", out.logits, noise)
        out = replace(out, logits=main, v=out.v[:, 0])
    of_samples = gold["logits"].ndim == 3  # log-probabilities, [L, B, C]
    logits = method.log_probabilities(out.v, out.t).transpose(0, 1) if of_samples else out.logits
    gold.compare("logits", logits, noise)
    if "image_features" in gold:
        close("image_features", out.v, unit(gold["image_features"]), 2e-7)
    if (text := gold.get("text_features")) is not None:
        if method.name == "lasp":  # of the classes, and of all in the text-to-text loss; before the correction
            text = text[0] if text.ndim == 3 else text[: len(out.t)]
        close("text_features", out.t.reshape(text.shape), unit(text), 2e-7)
    t0 = frozen_class_features(method.backbone, method.class_names, [method.template])
    gold.compare("frozen/text_features_normalized", t0, 1e-6)
    gold.compare("frozen/image_features_normalized", method.backbone.encode_images(gold["images"]), 1e-6)
    if "frozen/class_text_features" in gold:
        close("references", method.references(), unit(gold["frozen/class_text_features"]).flatten(0, 1), 1e-6)


@pytest.mark.parametrize("case", find_cases(FAMILY))
def test_official_numbers(case: Case) -> None:
    info, gold, form = case.info, Gold(case.tensors), FORMS[case.folder]
    noise, names, images = TYPICAL | info.get("noise_sensitivity", {}), info["classnames"], gold["images"]
    method = make(case, lambda h: form.options(h, info), Hyper(case))
    take_draws(method, gold)
    batch = make_batch(method, images, gold["labels"])
    load(form, method, gold, "init/")
    gold.compare("eval_logits_init", predict(method, images, names), noise["eval_logits_init"])
    method.train()
    check_forward(method, method(batch), gold, noise["logits"])
    if method.name != "lasp":
        check_tokens(method, gold)
    check_terms(form, {k.lower(): v for k, v in info["hyper"].items()}, step(method, batch), gold, noise["loss"])
    for name, _, gradient in learned(form, method, gold, "grad/"):
        gold.compare(f"grad/{name}", gradient, noise["grad_max_rel"], gold[f"grad/{name}"].abs().max().item())
    if o := info.get("optimizer"):
        check_steps(form, method, batch, gold, o, noise)
    if any(k.startswith("after3/") for k in gold):
        load(form, method, gold, "after3/")  # the logits are those of exactly these parameters
        gold.compare("eval_logits_after3", predict(method, images, names), noise["eval_logits_after3"])
        if "novel_eval_logits" in gold:
            novel = predict(method, images, info["novel_classnames"])
            gold.compare("novel_eval_logits", novel, noise["novel_eval_logits"])
    assert gold.compared, "the case gives nothing to compare"


def check_steps(form: Official, method: Method, batch: Batch, gold: Gold, o: dict, noise: dict) -> None:
    """Where the official steps lead."""
    given = OptimConfig(name=o["name"], lr=o["lr"], weight_decay=o["weight_decay"], momentum=o["momentum"])
    optimizer = build_optimizer(method, given)
    for group in optimizer.param_groups:
        group["lr"] = o["lr"] * group["share"]
    per_step, momentum = [], torch.zeros(())
    for i in range(o["steps"]):
        for name in form.written:  # an official step changes it too, in vain
            value, g = overwritten(method, batch)
            if i == 0:
                gold.compare(f"grad/{name}", g, noise["grad_max_rel"], g.abs().max().item())
            momentum = o["momentum"] * momentum + g + o["weight_decay"] * value
            if i == o["steps"] - 1:
                gold.compare(f"after3/{name}", value - o["lr"] * momentum, 1e-5)
        per_step.append(total(step(method, batch, optimizer)))
        if i == 0 and "class_prompts" in gold:  # written down in the second step
            gold.compare("class_prompts", method.class_tokens(method.class_names))
    if "loss_per_step" in gold:
        reached = max(noise["loss"], noise["eval_logits_after3"])
        close("loss_per_step", torch.stack(per_step), gold["loss_per_step"].reshape(-1), reached)
    for name, value, _ in learned(form, method, gold, "after3/"):
        move = (gold[f"after3/{name}"] - gold[f"init/{name}"]).abs().max().item()
        gold.compare(f"after3/{name}", value, noise["after3_max_rel_to_move"], move)
