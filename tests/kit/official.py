"""A case of the official training code: the same steps with our method, compared at every point that the case gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tests.kit.cases import Case, Gold, Hyper, close, load_official, view
from vlprompt.backbones.backbone import unit
from vlprompt.config.teacher import Teacher
from vlprompt.methods import Batch, Method, find_method
from vlprompt.methods.base import divergences, total
from vlprompt.methods.fdbpl import entropy, informativeness
from vlprompt.methods.templates import IMAGENET_TEMPLATES
from vlprompt.methods.zero_shot import frozen_class_features
from vlprompt.prompting.text import class_tokens, fill

Options = Callable[[Hyper], dict[str, Any]]
"""Our options for a case's hyper-parameters; ``template`` may also be the data set's."""

Prepare = Callable[[Method, Case, Gold], None]
"""Gives a method the case's random numbers, and what comes with no batch."""

TYPICAL = {
    "loss": 1e-6, "logits": 2e-5, "eval_logits_init": 2e-5, "eval_logits_after3": 1e-3, "novel_eval_logits": 1e-3,
    "grad_max_rel": 5e-6, "after3_max_rel_to_move": 1e-4,
}  # fmt: skip
"""The noise of a case that does not say its own."""


def make(case: Case, options: Options, h: Hyper) -> Method:
    """Our method under the case's hyper-parameters, every one of which has been read."""
    cls, given = find_method(case.method), options(h)
    of_data_set = {}
    if "template" in given and "template" not in {f.name for f in fields(cls.Config)}:
        of_data_set["template"] = given.pop("template")
    assert not h.unread, f"hyper-parameters that do not reach {cls.name}: {sorted(h.unread)}"
    return cls(case.backbone, case.info["classnames"], cls.Config(**given), **of_data_set)


def make_batch(method: Method, images: Tensor, labels: Tensor, given: Mapping[str, Tensor] | None = None) -> Batch:
    """The case's images and what the method needs beside them."""
    given = given or {}
    frozen = method.backbone.encode_images(images) if "frozen_image_features" in method.needs else None
    if "teacher_probabilities" not in method.needs:
        return Batch(images, labels.long(), frozen, second_view=given.get("images2"))
    teacher_logits = given.get("teacher_logits")
    assert teacher_logits is not None
    # The labels are not used, so no value of theirs may matter.
    return Batch(images, torch.full_like(labels.long(), -1), frozen, teacher_logits.softmax(-1))


def step(method: Method, batch: Batch, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    method.zero_grad()
    losses = method.losses(batch)
    method.backward(losses)
    if optimizer:
        optimizer.step()
    return losses


def sgd(method: Method, o: Mapping[str, Any]) -> torch.optim.SGD:
    return torch.optim.SGD(
        method.parameters(),
        o["lr"],
        momentum=o["momentum"],
        weight_decay=o["weight_decay"],
        dampening=o["dampening"],
        nesterov=o["nesterov"],
    )


@torch.no_grad()
def eval_logits(method: Method, images: Tensor, class_names: list[str]) -> Tensor:
    v = method.encode_images(images)
    return method.logits(v, method.class_features(tuple(class_names), v))


def reported(method: Method, losses: dict[str, Tensor]) -> Tensor:
    """What the official code calls the loss; ProGrad's KL only vetoes."""
    return losses["ce"] if method.name == "prograd" else total(losses)


def check_training(case: Case, options: Options, prepare: Prepare = lambda *_: None) -> Method:
    """Features, logits, loss terms and gradients of the first step, and where the steps lead; the method at the end."""
    info, gold, h = case.info, Gold(case.tensors), Hyper(case)
    noise = TYPICAL | info.get("noise_sensitivity", {})
    k_max = h.get("k_max")
    h.told("class_agnostic", "prec")  # a dictionary of classes is `classnames`; half precision would show
    method = make(case, options, h)
    names = load_official(method, gold, "init/")
    prepare(method, case, gold)
    batch = make_batch(method, gold["images"], gold["labels"], gold)
    chosen = gold.get("selected_classes")
    batch = batch.comparing(k_max if chosen is None else len(chosen))
    if chosen is not None:
        assert torch.arange(len(method.class_names))[batch.compared].tolist() == chosen.tolist()
        assert k_max is None or len(chosen) == min(k_max, len(method.class_names))
    class_names = info["classnames"]

    gold.compare("eval_logits_init", eval_logits(method, batch.images, class_names), noise["eval_logits_init"])
    with torch.no_grad():
        out = method(batch)
    gold.compare("logits", out.logits, noise["logits"])
    if "image_features" in gold:
        close("image_features", out.v, unit(gold["image_features"]), 2e-7)
    if method.name == "fdbpl_coop":
        check_two_contexts(method, batch, gold, noise["logits"])
    order = check_text_features(out.t, gold)
    check_frozen(method, batch, gold, order, info.get("templates", IMAGENET_TEMPLATES))
    check_teacher(case, method, gold, info.get("teacher_template", "a photo of a {}."))
    check_tokens(method, gold)
    check_loss_terms(method, batch, step(method, batch), gold, noise)
    check_steps(case, method, batch, gold, names, noise)
    if "novel_eval_logits" in gold:
        novel = eval_logits(method, batch.images, info["novel_classnames"])
        gold.compare("novel_eval_logits", novel, noise["novel_eval_logits"])
    assert gold.compared, "the case gives nothing to compare"
    return method


def check_text_features(t: Tensor, gold: Gold) -> Tensor | slice:
    """Those of the classes that are compared; where a teacher chose them, in the order of numpy's argpartition."""
    if "text_features" not in gold:
        return slice(None)
    golden = unit(gold["text_features"])
    order = torch.arange(len(t))
    if "selected_classes" in gold:
        order = (t @ golden.T).argmax(0)
        assert sorted(order.tolist()) == list(range(len(t)))
    if t.ndim == 2:
        close("text_features", t[order], golden, 2e-7)
    return order


def check_two_contexts(method: Method, batch: Batch, gold: Gold, noise: float) -> None:
    """Features of FDBPL's positive and negative texts."""
    with torch.no_grad():
        out = method(batch)
        against = method.encode_classes(method.names_of(batch.compared), method.negative)
    gold.compare("text_features_positive_normalized", out.t, 2e-7)
    gold.compare("text_features_negative_normalized", against, 2e-7)
    gold.compare("logits_negative", method.logits(out.v, against), noise)


def check_steps(case: Case, method: Method, batch: Batch, gold: Gold, names: set[str], noise: Mapping) -> None:
    """Gradients of the first step, parameters and losses of the next ones, and logits of exactly those parameters."""
    for name in names:
        if (g := gold.get(f"grad/{name}")) is not None:
            ours = view(method, name, gradient=True)
            gold.compare(f"grad/{name}", ours, noise["grad_max_rel"], g.abs().max().item())
    if "optimizer" in case.info:
        optimizer, per_step = sgd(method, case.info["optimizer"]), []
        for _ in range(case.info["optimizer"]["steps"]):
            per_step.append(reported(method, step(method, batch, optimizer)))
        gold.compare("loss_per_step", torch.stack(per_step), max(noise["loss"], noise["eval_logits_after3"]))
    after = {name for name in names if f"after3/{name}" in gold}
    for name in after:
        move = (gold[f"after3/{name}"] - gold[f"init/{name}"]).abs().max().item()
        gold.compare(f"after3/{name}", view(method, name), noise["after3_max_rel_to_move"], move)
    if after:
        load_official(method, gold, "after3/")
    after3 = eval_logits(method, batch.images, case.info["classnames"])
    gold.compare("eval_logits_after3", after3, noise["eval_logits_after3"])


def check_loss_terms(method: Method, batch: Batch, losses: dict[str, Tensor], gold: Gold, noise: Mapping) -> None:
    """Our terms are weighted; official cases list ``loss/TERM`` and for some also the term without its weight."""
    official = {k.removeprefix("loss/"): v for k, v in gold.items() if k.startswith("loss/")}
    if "teacher_probabilities" in method.needs:
        official = check_divergences(method, batch, official, gold)
    for term in losses.keys() & official.keys():
        close(f"loss/{term}", losses[term], official[term], noise["loss"])
    extra = set(official) - set(losses)
    assert extra <= {f"{term}_unweighted" for term in losses}, f"official loss terms not computed: {extra}"
    gold.compare("loss", reported(method, losses), noise["loss"])
    if method.name == "prograd":
        gradients = method.gradients(method.losses(batch))
        for official_name, ours in (("ce", "supervision"), ("kl", "kl")):
            if (g := gold.get(f"grad_{official_name}/prompt_learner.ctx")) is not None:
                close(f"grad_{official_name}", gradients[ours][0], g, noise["grad_max_rel"], g.abs().max().item())


def check_divergences(method: Method, batch: Batch, official: dict[str, Tensor], gold: Gold) -> dict[str, Tensor]:
    """Distillation's terms with their weights, as ours are; what they are made of is compared here."""
    p = batch.taught
    if "teacher_logits_selected" in gold:
        close("teacher's choice", p, gold["teacher_logits_selected"].softmax(-1), 1e-7)
    weighted = dict(official)
    if method.name == "fdbpl_coop":  # per view, and then each term with its weight
        w, cascade = weighted.pop("weight_w", None), weighted.pop("term_cascade", torch.zeros(()))
        assert abs(cascade) < 1e-6, "the official cascade cancels"
        weighted.pop("cascade_sum_of_abs", None)
        forward, reverse = divergences(gold["logits"], p)
        pieces = {"kl_forward_per_sample": forward, "kl_reverse_per_sample": reverse}
        pieces["negative_entropy_per_sample"] = -entropy(gold["logits_negative"].softmax(-1))
        pieces["cosine_per_sample"] = cosine_similarity(gold["logits"], gold["logits_negative"])
        for name, ours in pieces.items():
            if (golden := weighted.pop(name, None)) is not None:
                close(name, ours, golden)
        if w is not None:
            close("weight_w", informativeness(p), w)
        return {term.removeprefix("term_"): value for term, value in weighted.items()}
    weight: Tensor | float = 0.5
    if method.name == "fdbpl_promptsrc":
        assert batch.teacher_probabilities is not None
        w = informativeness(batch.teacher_probabilities)
        if (golden := weighted.pop("weight_w", None)) is not None:
            close("weight_w", w, golden)
        weight = 0.5 * w.mean()
    return weighted | {t: weight * weighted[t] for t in ("kl_forward", "kl_reverse") if t in weighted}


def check_teacher(case: Case, method: Method, gold: Gold, template: str) -> None:
    """Our teacher's probabilities for the images, and its class features, which the reduced set cannot make."""
    if case.teacher is None or "teacher_logits" not in gold:
        return
    teacher = Teacher(case.teacher, method.class_names, template, method.backbone.logit_scale)
    close("teacher", teacher.probabilities(gold["images"]), gold["teacher_logits"].softmax(-1), 1e-6)
    if "frozen/teacher_text_features" in gold:
        close("teacher's text", teacher.class_features, unit(gold["frozen/teacher_text_features"]), 2e-7)


def check_frozen(
    method: Method, batch: Batch, gold: Gold, order: Tensor | slice, templates: tuple[str, ...] = IMAGENET_TEMPLATES
) -> None:
    """Frozen constants of the loss, of all classes or of those compared; features are compared normalised."""
    b, names = method.backbone, method.class_names
    assert batch.images is not None
    v0 = b.encode_images(batch.images)
    own = template_of(method)
    single = frozen_class_features(b, names, [own] if isinstance(own, str) else own)
    many = frozen_class_features(b, names, templates, "raw")
    ours = {
        "text_features": single,
        "text_features_normalized": single,
        "text_features_first_template_normalized": single,
        "image_features_normalized": v0,
        "fixed_text_embeddings": many,
        "zero_shot_image_features_normalized": v0,
        "zero_shot_logits": b.logits(v0, many if "promptsrc" in method.name else single).T,
    }
    for key in (k for k in gold if k.startswith("frozen/") and "teacher" not in k):
        name = key.removeprefix("frozen/")
        constant, golden = ours[name], gold[key] if name == "zero_shot_logits" else unit(gold[key])
        golden = golden.T if name == "zero_shot_logits" else golden
        if len(golden) != len(constant):  # those that a teacher chose, in its order or in the classes' own
            constant = constant[batch.compared]
            in_order = constant[order]
            constant = min(constant, in_order, key=lambda c: (c - golden).abs().max().item())
        close(key, constant, golden, 1e-6 * golden.abs().max().item())


def template_of(method: Method) -> Any:
    """The method's own template, or templates, or the data set's."""
    return getattr(method.config, "template", None) or method.template


def check_tokens(method: Method, gold: Gold) -> None:
    """Our ids where they reach the text tower unchanged: everywhere but at the learned tokens."""
    if "tokenized_prompts" not in gold:
        return
    c = getattr(method, "context", None)
    if c is None:
        own = template_of(method)
        texts = fill(own if isinstance(own, str) else own[0], method.class_names)
        ids, slots = method.backbone.tokenize(texts), [[] for _ in texts]
    else:
        tokens = class_tokens(method.backbone, method.class_names, c.n_ctx, c.words, c.position)
        ids, slots = tokens.ids, tokens.slots
        if c.position != "end":  # the official code moves embeddings, its ids stay in the order of the sentence
            return
    for ours, skip, official in zip(ids, slots, gold["tokenized_prompts"].tolist(), strict=True):
        official = official[: official.index(max(official)) + 1]
        assert [t for i, t in enumerate(ours) if i not in skip] == [t for i, t in enumerate(official) if i not in skip]
