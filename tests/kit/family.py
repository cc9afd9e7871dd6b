"""Golden cases of methods that need more than a batch: a second view, descriptions, a teacher, an attack."""

from __future__ import annotations

from typing import Any

import torch

from tests.kit.cases import Case, Gold, Hyper, close, load_official, view
from tests.kit.official import check_training, make, make_batch, sgd, step
from vlprompt.backbones.attack import Pixels
from vlprompt.backbones.backbone import unit
from vlprompt.config.teacher import Teacher, Tuned
from vlprompt.methods import Method, find_method
from vlprompt.methods.base import total
from vlprompt.methods.pouf import mutual_information, transport
from vlprompt.methods.promptot import transport_plan


def weigh(method: Method, gold: Gold) -> None:
    """Official terms as ours are, with the method's weight."""
    for key in [k for k in gold if k.endswith("_unweighted")]:
        gold[key.removesuffix("_unweighted")] = method.config.w * gold.pop(key)


def ivlp(h: Hyper) -> dict[str, Any]:
    return {
        "n_ctx_text": h["n_ctx_text"],
        "n_ctx_vision": h["n_ctx_vision"],
        "depth_text": h["prompt_depth_text"],
        "depth_vision": h["prompt_depth_vision"],
        "init": h.words,
    }


def promptot(h: Hyper) -> dict[str, Any]:
    return ivlp(h) | {"w": h["div"], "eta": h["eta1"]}


def check_promptot(case: Case) -> None:
    """A training run; costs and plan of its first step."""
    assert case.info.get("first_template", "a photo of a {}.") == "a photo of a {}."
    noise = case.info.get("noise_sensitivity", {}).get("loss", 1e-6)

    def at_first(method: Method, _: Case, gold: Gold) -> None:
        weigh(method, gold)
        seen = method.regularisers

        def check(out: Any, batch: Any) -> Any:
            costs = method.costs(out, batch)
            gold.compare("ot_cost", costs, noise)
            gold.compare("ot_plan", transport_plan(costs))
            method.regularisers = seen
            return seen(out, batch)

        method.regularisers = check

    check_training(case, promptot, at_first)


def coprompt(h: Hyper) -> dict[str, Any]:
    h.told("gpt_prompt_index_per_step")
    return {
        "n_ctx": h["n_ctx"],
        "depth": h["prompt_depth"],
        "init": h.words,
        "w": h["lambda"],
        "consistency": "cosine" if h.get("distill", "cosine") == "cosine" else "mse",
        "image_share": h.get("image_adapter_m", 0.1),
        "text_share": h.get("text_adapter_m", 0.2),
    }


def check_coprompt(case: Case) -> None:
    """A training run on the case's descriptions, drawn in its order."""
    drawn = case.info["hyper"]["gpt_prompt_index_per_step"]

    def describe(method: Method, _: Case, gold: Gold) -> None:
        weigh(method, gold)
        method.descriptions = case.info["gpt_prompts"]
        with torch.no_grad():  # the case's are those of the towers, and ours are read behind the adapters
            for key, adapter in (("image_features", method.image_adapter), ("text_features", method.text_adapter)):
                if key in gold:
                    gold[key] = adapter(gold[key])
        frozen = gold.pop("frozen/gpt_text_features", None)
        if frozen is not None:
            for k, golden in enumerate(frozen):
                method.draw = lambda k=k: k
                close("descriptions", method.frozen_texts(), golden)
        order = iter([drawn[0], *drawn])  # the first step is looked at, and then taken
        method.draw = lambda: next(order)

    check_training(case, coprompt, describe)


def fap(h: Hyper) -> dict[str, Any]:
    h.told("ctx_init")  # the official code takes the template's
    return {
        "n_ctx": h["n_ctx"],
        "depth": h["prompt_depth"],
        "w": h["pgd_lambda_1"],
        "adversarial": "cos" if h.get("pgd_adv_term", "cos") == "cos" else "none",
        "eps": h["pgd_eps"],
        "alpha": h["pgd_alpha"],
        "steps": h["pgd_train_iter"],
    }


def check_fap(case: Case) -> None:
    """A training run on images in 0..1, attacked from the case's random start; the attack of its first step."""

    def attack(method: Method, _: Case, gold: Gold) -> None:
        weigh(method, gold)
        gold["loss/ce"] = gold.pop("loss/natural_ce", gold["loss"] - gold.get("loss/adversarial", 0))
        pixels, seen = Pixels(method.backbone.preprocess), method.attacked
        clean = gold["images"]
        gold["images"] = pixels.read(clean)
        if "pgd_uniform" in gold:
            method.start = lambda x: gold["pgd_uniform"]
        for key in ("image_features", "text_features"):  # of the attack's start, the clean images, …
            if key in gold and gold[key].ndim == 3:
                gold[key] = gold[key][1]

        def check(images: torch.Tensor, out: Any) -> torch.Tensor:
            changed = seen(images, out)
            if "pgd_delta" in gold and next(first, None):
                # A gradient of nearly zero has another sign after one rounding.
                official = clean + gold["pgd_delta"]
                apart = (pixels.of(changed) - official).abs() > 1e-6
                assert apart.float().mean() < 1e-3, f"the attack differs at {apart.sum()} of {apart.numel()} values"
                changed = pixels.read(official)
            return changed

        first = iter([True, True])  # the first step is looked at, and then taken
        method.attacked = check

    check_training(case, fap, attack)


def promptkd(h: Hyper) -> dict[str, Any]:
    h.told("modal", "teacher_prompts", "n_ctx_text", "ctx_init", "prompt_depth_text")  # no part of the student
    sizes = {"n_ctx": h["n_ctx_vision"], "depth": h["prompt_depth_vision"]}
    return sizes | {"w": h["kd_weight"], "temperature": h["temperature"]}


BEFORE_NORM = "VPT_image_trans.conv1.0.bias"
"""In front of a batch normalisation: its gradient is rounding noise."""


def check_promptkd(case: Case) -> None:
    """A training run with the case's teacher: its logits, and its class features where the whole set has it."""
    tensors = {k: v.flatten(1) if v.shape[2:] == (1, 1) else v for k, v in case.tensors.items()}  # 1 x 1 convolutions
    info, gold, h = case.info, Gold(tensors), Hyper(case)
    noise, names = info.get("noise_sensitivity", {}), info["classnames"]
    method, teacher = make(case, promptkd, h), ivlp_teacher(case, gold)
    if teacher is None:
        frozen = gold["frozen/teacher_text_features_normalized"]
        method.take_teacher(lambda asked: frozen if list(asked) == names else None)
    else:
        method.take_teacher(teacher.class_vectors)
        gold.compare("frozen/teacher_text_features_normalized", method.vectors, 2e-7)
        gold.compare("teacher_logits", teacher.model.method.predict(gold["images"], names), noise["logits"])
        v = teacher.model.method.encode_images(gold["images"])
        gold.compare("frozen/teacher_image_features_normalized", v, 2e-7)
    official = load_official(method, gold, "init/")
    batch = make_batch(method, gold["images"], gold["labels"], gold)

    def predicted(asked: list[str]) -> torch.Tensor:
        return method.eval().predict(gold["images"], asked)

    gold.compare("eval_logits_init", predicted(names), noise["eval_logits_init"])
    buffers = {k: v.clone() for k, v in method.named_buffers()}
    out = method.train()(batch)
    gold.compare("logits", out.logits, noise["logits"])
    gold.compare("image_features_projected_normalized", out.v, 2e-7)
    method.load_state_dict(buffers, strict=False)  # the steps begin with statistics of no batch
    optimizer, per_step = sgd(method, info["optimizer"]), []
    for i in range(info["optimizer"]["steps"]):
        losses = step(method, batch, optimizer)
        per_step.append(total(losses))
        if i == 0:
            gold.compare("loss/kd", losses["kd"], noise["loss"])
            for name in official - {BEFORE_NORM}:
                gold.compare(
                    f"grad/{name}", view(method, name, gradient=True), 1e-5, gold[f"grad/{name}"].abs().max().item()
                )
            assert view(method, BEFORE_NORM, gradient=True).abs().max() < 1e-5
    gold.compare("loss", per_step[0], noise["loss"])
    gold.compare("loss_per_step", torch.stack(per_step), noise["eval_logits_after3"])
    for name in official - {BEFORE_NORM}:
        move = (gold[f"after3/{name}"] - gold[f"init/{name}"]).abs().max().item()
        gold.compare(f"after3/{name}", view(method, name), 1e-4, move)
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        ours = getattr(method.projection[1], key)
        gold.compare(f"after3_buffers/VPT_image_trans.conv1.1.{key}", ours, 1e-5)
    load_official(method, gold, "after3/")
    gold.compare("eval_logits_after3", predicted(names), noise["eval_logits_after3"])
    if teacher is not None:
        gold.compare("novel_eval_logits", predicted(info["novel_classnames"]), noise["novel_eval_logits"])
    assert gold.compared > 10


def ivlp_teacher(case: Case, gold: Gold) -> Teacher | None:
    """The case's teacher, tuned with the prompts that it gives; None where the set has none."""
    if case.teacher is None:
        return None
    cls, given = (
        find_method("ivlp"),
        {k.removeprefix("teacher/"): v for k, v in gold.items() if k.startswith("teacher/")},
    )
    deep = sum("text_encoder" in key for key in given) + 1, sum("image_encoder" in key for key in given)
    sizes = {"n_ctx_text": len(given["prompt_learner.ctx"]), "n_ctx_vision": len(given["image_encoder.VPT"])}
    options = cls.Config(depth_text=deep[0], depth_vision=deep[1], **sizes)
    method = cls(case.teacher, case.info["classnames"], options)
    load_official(method, {f"teacher/{k}": v for k, v in given.items()}, "teacher/")
    model = Tuned.__new__(Tuned)
    model.name, model.fingerprint, model.method = "teacher", "", method.eval()
    model.preprocess = case.teacher.preprocess
    return Teacher(model, case.info["classnames"])


def check_pouf(case: Case) -> None:
    """Both losses on given features, their gradients, and official steps of the class features and the scale."""
    gold, h, noise = Gold(case.tensors), Hyper(case), case.info.get("noise_sensitivity", {})
    h.told("prompt_lr", "lr", "lr_gamma", "lr_decay")  # the case's rates are there for each step
    weights = {"transport": h.get("trade_off", 1.0), "im": h.get("lambda_im", 0.3)}
    assert not h.unread
    given = {key: gold[key].clone().requires_grad_() for key in ("images", "text", "logit_scale")}

    def terms() -> dict[str, torch.Tensor]:
        cosines = unit(given["images"]) @ unit(given["text"]).T
        logits = given["logit_scale"].exp() * cosines
        gold.compare("sim", cosines, noise.get("sim", 3e-7)) if not per_step else None
        gold.compare("logits", logits, noise.get("logits", 5e-5)) if not per_step else None
        return {"transport": transport(logits, cosines), "im": mutual_information(logits)}

    per_step: list[torch.Tensor] = []
    found = terms()
    losses = {**found, "total": sum(weights[term] * value for term, value in found.items())}
    for term, value in losses.items():
        key = "loss" if term == "total" else f"loss/{term}"
        gold.compare(key, value, noise.get(key, 1e-6))
        for name, g in zip(given, torch.autograd.grad(value, list(given.values()), retain_graph=True), strict=True):
            rounding = noise.get(f"grad/{term}/{name} (rel. to max)", 1e-5)
            if f"grad/{term}/{name}" in gold:
                gold.compare(f"grad/{term}/{name}", g, rounding, gold[f"grad/{term}/{name}"].abs().max().item())
    o, learned = case.info["optimizer"], [given["text"], given["logit_scale"]]
    settings = {"momentum": o["momentum"], "weight_decay": o["weight_decay"], "nesterov": o["nesterov"]}
    optimizer = torch.optim.SGD([{"params": [p]} for p in learned], 1.0, **settings)
    for rates in gold["lr_per_step"]:
        for group, rate in zip(optimizer.param_groups, rates.tolist(), strict=True):
            group["lr"] = rate
        optimizer.zero_grad()
        found = terms()
        loss = sum(weights[term] * value for term, value in found.items())
        loss.backward()
        optimizer.step()
        per_step.append(loss)
    gold.compare("loss_per_step", torch.stack(per_step), noise.get("loss_per_step", 1e-6))
    for name, p in (("text", learned[0]), ("logit_scale", learned[1])):
        move = (gold[f"after3/{name}"] - gold[f"init/{name}"]).abs().max().item()
        gold.compare(f"after3/{name}", p, noise.get(f"after3/{name} (rel. to max move)", 1e-3), move)
    assert gold.compared > 10
