"""Golden cases of methods that need more than a batch: a second view, descriptions, a teacher, an attack."""

from __future__ import annotations

from typing import Any

import torch

from tests.kit.cases import Case, Gold, Hyper, close
from tests.kit.official import check_training
from vlprompt.backbones.attack import Pixels
from vlprompt.methods import Method
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
