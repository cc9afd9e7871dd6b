"""Every method against the numbers of its official implementation, for every case found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kit import drople
from tests.kit.cases import FOLDERS, Case, close, find_cases, load_official, view
from vlprompt.backbones.backbone import unit
from vlprompt.config.teacher import Teacher
from vlprompt.methods import METHODS, Batch, Method, find_method
from vlprompt.methods.base import divergences, total
from vlprompt.methods.fdbpl import entropy, informativeness
from vlprompt.methods.promptsrc import gaussian_weights
from vlprompt.methods.templates import IMAGENET_TEMPLATES
from vlprompt.methods.zero_shot import frozen_class_features

CONFIGS: dict[str, Callable[[dict], dict]] = {
    "zero_shot": lambda h: {},
    "coop": lambda h: {
        "n_ctx": h["n_ctx"],
        "init": h["ctx_init"] or None,
        "class_specific": h["class_specific"],
        "position": h["class_token_position"],
    },
    "cocoop": lambda h: {"n_ctx": h["n_ctx"], "init": h["ctx_init"]},
    "kgcoop": lambda h: {"n_ctx": h["n_ctx"], "init": h["ctx_init"], "w": h["w"]},
    "prograd": lambda h: {
        "n_ctx": h["n_ctx"],
        "init": h["ctx_init"],
        "lambda_": h["lambda_"],
        "temperature": h["T"],
    },
    "vpt": lambda h: {"n_ctx": h["n_ctx_vision"], "depth": h["prompt_depth_vision"]},
    "ivlp": lambda h: {
        "n_ctx_text": h["n_ctx_text"],
        "n_ctx_vision": h["n_ctx_vision"],
        "depth_text": h["prompt_depth_text"],
        "depth_vision": h["prompt_depth_vision"],
        "init": h["ctx_init"],
    },
    "maple": lambda h: {"n_ctx": h["n_ctx"], "depth": h["prompt_depth"], "init": h["ctx_init"]},
    "promptsrc": lambda h: {
        **CONFIGS["ivlp"](h),
        "text_weight": h["text_loss_weight"],
        "image_weight": h["image_loss_weight"],
    },
    "kdpl_coop": lambda h: {"n_ctx": h["N_CTX"], "init": h["CTX_INIT"], "class_specific": h["CSC"]},
    "kdpl_vpt": lambda h: CONFIGS["vpt"](h),
    "kdpl_maple": lambda h: {"n_ctx": h["n_ctx"], "depth": h["prompt_depth"]},
    "kdpl_promptsrc": lambda h: CONFIGS["promptsrc"]({k.lower(): v for k, v in h.items()}),
    "fdbpl_coop": lambda h: {"init": h["ctx_init"], "init_negative": h["ctx_init_negative"]},
    "fdbpl_promptsrc": lambda h: CONFIGS["kdpl_promptsrc"](h),
}


def make(case: Case, info: dict) -> Method:
    cls = find_method(case.method)
    config = cls.Config(**CONFIGS[case.method](info.get("hyper", {})))
    return cls(case.backbone, info["classnames"], config)


def make_batch(method: Method, images: Tensor, labels: Tensor, teacher_logits: Tensor | None = None) -> Batch:
    frozen = method.backbone.encode_images(images) if "frozen_image_features" in method.needs else None
    if "teacher_probabilities" not in method.needs:
        return Batch(images, labels.long(), frozen)
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


def sgd(method: Method, o: dict) -> torch.optim.SGD:
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


def check_loss_terms(
    case: Case, method: Method, losses: dict[str, Tensor], gold: dict[str, Tensor], noise: dict
) -> None:
    """Our terms are weighted; official cases list ``loss/TERM`` and for some also the term without its weight."""
    official = {k.removeprefix("loss/"): v for k, v in gold.items() if k.startswith("loss/")}
    if case.file.parent.name in ("kdpl", "fdbpl"):
        official = check_divergences(method, official, gold)
    for term, value in losses.items():
        close(f"loss/{term}", value, official[term], noise.get("loss", 0))
    extra = set(official) - set(losses)
    assert extra <= {f"{term}_unweighted" for term in losses}, f"official loss terms not computed: {extra}"
    official = losses["ce"] if method.name == "prograd" else total(losses)  # there the KL only vetoes
    close("loss", official, gold["loss"], noise.get("loss", 0))


def check_divergences(method: Method, official: dict[str, Tensor], gold: dict[str, Tensor]) -> dict[str, Tensor]:
    """Distillation's terms with their weights, as ours are; what they are made of is compared here."""
    p = gold["teacher_logits"].softmax(-1)
    weighted = dict(official)
    if method.name == "fdbpl_coop":  # per view, and then each term with its weight
        w, cascade = weighted.pop("weight_w"), weighted.pop("term_cascade")
        close("weight_w", informativeness(p), w)
        assert abs(cascade) < 1e-6, "the official cascade cancels"
        weighted.pop("cascade_sum_of_abs")
        forward, reverse = divergences(gold["logits"], p)
        close("kl_forward", forward, weighted.pop("kl_forward_per_sample"))
        close("kl_reverse", reverse, weighted.pop("kl_reverse_per_sample"))
        close("negative", -entropy(gold["logits_negative"].softmax(-1)), weighted.pop("negative_entropy_per_sample"))
        cosine = torch.nn.functional.cosine_similarity(gold["logits"], gold["logits_negative"])
        close("cosine", cosine, weighted.pop("cosine_per_sample"))
        return {term.removeprefix("term_"): value for term, value in weighted.items()}
    weight = 0.5
    if method.name == "fdbpl_promptsrc":
        w = weighted.pop("weight_w")
        close("weight_w", informativeness(p), w)
        weight = 0.5 * w.mean()
    return weighted | {term: weight * weighted[term] for term in ("kl_forward", "kl_reverse")}


def check_teacher(case: Case, method: Method, gold: dict[str, Tensor]) -> None:
    """Our teacher's probabilities for the images, and its class features, which the reduced set cannot make."""
    if case.teacher is None or "teacher_logits" not in gold:
        return
    teacher = Teacher(case.teacher, method.class_names, "a photo of a {}.", method.backbone.logit_scale)
    close("teacher", teacher.probabilities(gold["images"]), gold["teacher_logits"].softmax(-1), 1e-6)
    if "frozen/teacher_text_features" in gold:
        close("teacher's text", teacher.class_features, unit(gold["frozen/teacher_text_features"]), 2e-7)


def check_frozen(method: Method, images: Tensor, gold: dict[str, Tensor]) -> None:
    """Frozen constants of the loss; features are compared normalised."""
    b, names = method.backbone, method.class_names
    v0, single = b.encode_images(images), frozen_class_features(b, names, [method.template])
    many = frozen_class_features(b, names, IMAGENET_TEMPLATES, "raw")
    ours = {
        "text_features": single,
        "text_features_normalized": single,
        "fixed_text_embeddings": many,
        "zero_shot_image_features_normalized": v0,
        "zero_shot_logits": b.logits(v0, many if "promptsrc" in method.name else single),
    }
    for key in (k for k in gold if k.startswith("frozen/") and "teacher" not in k):
        name = key.removeprefix("frozen/")
        golden = gold[key] if name == "zero_shot_logits" else unit(gold[key])
        close(key, ours[name], golden, 1e-6 * golden.abs().max().item())


def check_zero_shot(case: Case) -> None:
    info, gold = case.info, case.tensors
    method = find_method("zero_shot")(case.backbone, info["classnames"], template=info["templates"][0])
    noise = info.get("noise_sensitivity", {}).get("logits", 1e-5)
    for key, names in (
        ("logits", "classnames"),
        ("eval_logits_init", "classnames"),
        ("novel_eval_logits", "novel_classnames"),
    ):
        close(key, eval_logits(method, gold["images"], info[names]), gold[key], noise)
    check_frozen(method, gold["images"], gold)
    close("image_features", method.encode_images(gold["images"]), unit(gold["image_features"]))
    check_tokens(case, method, gold)


def check_tokens(case: Case, method: Method, gold: dict[str, Tensor]) -> None:
    """Our ids where they reach the text tower unchanged: everywhere but at the learned tokens."""
    if "tokenized_prompts" not in gold:
        return
    if not hasattr(method, "context"):
        texts = [method.template.format(n.replace("_", " ")) for n in method.class_names]
        ids, slots = method.backbone.tokenize(texts), [[] for _ in texts]
    else:
        from vlprompt.prompting.text import class_tokens

        c = method.context
        tokens = class_tokens(method.backbone, method.class_names, c.n_ctx, c.words, c.position)
        ids, slots = tokens.ids, tokens.slots
        if c.position != "end":  # the official code moves embeddings, its ids stay in the order of the sentence
            return
    for ours, skip, official in zip(ids, slots, gold["tokenized_prompts"].tolist(), strict=True):
        official = official[: official.index(max(official)) + 1]
        assert [t for i, t in enumerate(ours) if i not in skip] == [t for i, t in enumerate(official) if i not in skip]


def check_training(case: Case) -> None:
    info, gold = case.info, case.tensors
    noise = info["noise_sensitivity"]
    method = make(case, info)
    batch = make_batch(method, gold["images"], gold["labels"], gold.get("teacher_logits"))
    names = load_official(method, gold, "init/")
    class_names, novel = info["classnames"], info.get("novel_classnames")

    close(
        "eval_logits_init",
        eval_logits(method, batch.images, class_names),
        gold["eval_logits_init"],
        noise["eval_logits_init"],
    )
    v = method.image_features(batch)
    t = method.class_features(method.class_names, v)
    close("logits", method.logits(v, t), gold["logits"], noise["logits"])
    close("image_features", v, unit(gold["image_features"]), 2e-7)
    if method.name == "fdbpl_coop":
        against = method.encode_classes(method.class_names, method.negative)
        close("positive text_features", t, gold["text_features_positive_normalized"], 2e-7)
        close("negative text_features", against, gold["text_features_negative_normalized"], 2e-7)
        close("logits_negative", method.logits(v, against), gold["logits_negative"], noise["logits"])
    if "text_features" in gold:
        golden = unit(gold["text_features"])
        if "selected_classes" in gold:  # in the order of numpy's argpartition, which is not the classes' own
            order = (t @ golden.T).argmax(-1)
            assert sorted(order.tolist()) == gold["selected_classes"].tolist()
            golden = golden[order]
        close("text_features", t, golden, 2e-7)
    check_frozen(method, batch.images, gold)
    check_teacher(case, method, gold)
    check_tokens(case, method, gold)

    check_loss_terms(case, method, step(method, batch), gold, noise)
    for name in names:
        g = gold[f"grad/{name}"]
        close(f"grad/{name}", view(method, name, gradient=True), g, noise["grad_max_rel"], g.abs().max().item())

    optimizer, per_step = sgd(method, info["optimizer"]), []
    for _ in range(info["optimizer"]["steps"]):
        losses = step(method, batch, optimizer)
        per_step.append(losses["ce"] if method.name == "prograd" else total(losses))
    close(
        "loss_per_step",
        torch.stack(per_step),
        gold["loss_per_step"],
        max(noise["loss"], noise["eval_logits_after3"]),
    )
    for name in names:
        after, move = (
            gold[f"after3/{name}"],
            (gold[f"after3/{name}"] - gold[f"init/{name}"]).abs().max().item(),
        )
        close(f"after3/{name}", view(method, name), after, noise["after3_max_rel_to_move"], move)
    load_official(method, gold, "after3/")  # the logits are those of exactly these parameters
    after3 = eval_logits(method, batch.images, class_names)
    close("eval_logits_after3", after3, gold["eval_logits_after3"], noise["eval_logits_after3"])
    if novel:
        close(
            "novel_eval_logits",
            eval_logits(method, batch.images, novel),
            gold["novel_eval_logits"],
            noise["novel_eval_logits"],
        )


def check_gaussian_weights(case: Case) -> None:
    gold = case.tensors
    assert gold
    for key, golden in gold.items():
        epochs, mean, std = (
            float("".join(ch for ch in part if ch.isdigit() or ch == ".")) for part in key.split("/")[1].split("_")
        )
        close(key, torch.tensor(gaussian_weights(int(epochs), mean, std), dtype=torch.float64), golden)


def check_gaussian_average(case: Case) -> None:
    info, gold = case.info, case.tensors
    h = info["hyper"]
    cls = find_method("promptsrc")
    config = cls.Config(**CONFIGS["promptsrc"](h), average_mean=h["gpa_mean"], average_std=h["gpa_std"])
    method = cls(case.backbone, info["classnames"], config)
    names = load_official(method, gold, "init/")
    optimizer = sgd(method, info["optimizer"])
    last = {}
    for epoch in range(h["max_epoch"]):
        batch = make_batch(method, gold["epoch_images"][epoch], gold["epoch_labels"][epoch])
        close(
            f"loss of epoch {epoch}",
            total(step(method, batch, optimizer)),
            gold["loss_per_epoch"][epoch],
            1e-5,
        )
        last = {n: view(method, n).detach().clone() for n in names}
        method.after_epoch(epoch, h["max_epoch"])
    for n in names:  # the case gives no noise: a few fp32 roundings, amplified by five steps at the official rate
        close(f"last_epoch/{n}", last[n], gold[f"last_epoch/{n}"], 1e-5)
        close(f"gpa/{n}", view(method, n), gold[f"gpa/{n}"], 1e-5)
    ours = eval_logits(method, gold["epoch_images"][0], info["classnames"])
    close("gpa_eval_logits", ours, gold["gpa_eval_logits"], 1e-4)


@pytest.mark.parametrize("case", find_cases())
def test_official_numbers(case: Case) -> None:
    if case.method not in METHODS and FOLDERS["full"] in case.file.parents:
        pytest.skip(f"the whole set also has cases of methods that this package has not: {case.method}")
    if case.method == "zero_shot":
        check_zero_shot(case)
    elif "gpa_weights" in case.file.stem:
        check_gaussian_weights(case)
    elif "gpa_run" in case.file.stem:
        check_gaussian_average(case)
    elif case.method == "drople":
        drople.CHECKS[case.file.stem](case)
    else:
        assert case.method in CONFIGS, f"{case.method} is registered, but nothing here checks its golden cases"
        check_training(case)


def test_reduced_set_covers_every_method() -> None:
    reduced = {Case(f).method for f in FOLDERS["reduced"].glob("*/*.json")}
    assert {m for m, cls in METHODS.items() if cls.parity == "golden"} <= reduced
