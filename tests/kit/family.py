"""Golden cases of methods that need more than a batch: a second view, descriptions, a teacher, an attack."""

from __future__ import annotations

from typing import Any

import torch

from tests.kit.cases import Case, Gold, Hyper, close
from tests.kit.official import check_training
from vlprompt.methods import Method
from vlprompt.methods.promptot import transport_plan


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
    gold, noise = Gold(case.tensors), case.info.get("noise_sensitivity", {}).get("loss", 1e-6)

    def at_first(method: Method, *_: Any) -> None:
        seen = method.regularisers

        def check(out: Any, batch: Any) -> Any:
            costs = method.costs(out, batch)
            gold.compare("ot_cost", costs, noise)
            gold.compare("ot_plan", transport_plan(costs))
            if "loss/ot_unweighted" in gold:
                close("ot", (transport_plan(costs) * costs).sum(), gold["loss/ot_unweighted"], noise)
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
