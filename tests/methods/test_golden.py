"""Every method against the numbers of its official implementation, for every case found.

A case lies in the folder of its method and may have any name. ``OPTIONS`` says, for each method, which of our options
the hyper-parameters of a case are; one that nobody reads is an error. A folder whose cases are no training runs on
images has a check of its own in ``CHECKS``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copyfile
from typing import Any

import pytest
import torch

from tests.kit import drople, family
from tests.kit.cases import FOLDERS, Case, Gold, Hyper, close, find_cases, load_official, view
from tests.kit.official import (
    Options,
    check_frozen,
    check_tokens,
    check_training,
    eval_logits,
    make,
    make_batch,
    sgd,
    step,
)
from tests.methods.test_heads_golden import CHECKS as HEADS
from vlprompt.backbones.backbone import unit
from vlprompt.methods import METHODS, Batch
from vlprompt.methods.base import total
from vlprompt.methods.promptsrc import gaussian_weights


def coop(h: Hyper) -> dict[str, Any]:
    h.told("template", "random_init")
    position = h.get("class_token_position", "end")
    return {**h.context(), "class_specific": h.class_specific, "position": position}


def cocoop(h: Hyper) -> dict[str, Any]:
    h.told("meta_net")
    return h.context()


def kgcoop(h: Hyper) -> dict[str, Any]:
    words = "a photo of a" if h.words else None  # whatever they are
    h.told("n_ctx", "class_token_position")
    n_ctx = 4 if words else h["n_ctx"]
    return {"n_ctx": n_ctx, "init": words, "w": h["w"], "template": h.get("template", "a photo of a {}.")}


def prograd(h: Hyper) -> dict[str, Any]:
    options = {"n_ctx": h["n_ctx"], "init": h.words, "class_specific": h.class_specific}
    options["position"] = h.get("class_token_position", "end")
    return options | {"lambda_": h["lambda_"], "temperature": h["t"], "template": h.get("zero_shot_template")}


def vpt(h: Hyper) -> dict[str, Any]:
    h.told("ctx_init")
    return {"n_ctx": h["n_ctx_vision"], "depth": h["prompt_depth_vision"]}


def maple(h: Hyper) -> dict[str, Any]:
    return {"n_ctx": h["n_ctx"], "depth": h["prompt_depth"], "init": h.get("ctx_init", "a photo of a") or None}


def promptsrc(h: Hyper) -> dict[str, Any]:
    weights = {"text_weight": h["text_loss_weight"], "image_weight": h["image_loss_weight"]}
    return family.ivlp(h) | weights | {"average_mean": h.get("gpa_mean", 15), "average_std": h.get("gpa_std", 1)}


def fdbpl_coop(h: Hyper) -> dict[str, Any]:
    negative = h.context(5, "ctx_init_negative")
    both = {"n_ctx_negative": negative["n_ctx"], "init_negative": negative["init"]}
    position = h.get("class_token_position", "end")
    return {**h.context(5), **both, "class_specific": h.class_specific, "position": position}


OPTIONS: dict[str, Options] = {
    "coop": coop,
    "cocoop": cocoop,
    "kgcoop": kgcoop,
    "prograd": prograd,
    "vpt": vpt,
    "ivlp": family.ivlp,
    "maple": maple,
    "promptsrc": promptsrc,
    "kdpl_coop": coop,
    "kdpl_vpt": vpt,
    "kdpl_maple": maple,
    "kdpl_promptsrc": promptsrc,
    "fdbpl_coop": fdbpl_coop,
    "fdbpl_promptsrc": promptsrc,
}


def check_zero_shot(case: Case) -> None:
    """One template, or the mean over several."""
    info, gold = case.info, Gold(case.tensors)
    method = make(case, lambda _: {"template": tuple(info["templates"])}, Hyper(case))
    noise = info.get("noise_sensitivity", {}).get("logits", 1e-5)
    for key, names in (
        ("logits", "classnames"),
        ("eval_logits_init", "classnames"),
        ("novel_eval_logits", "novel_classnames"),
    ):
        if key in gold:
            gold.compare(key, eval_logits(method, gold["images"], info[names]), noise)
    assert gold.compared
    check_frozen(method, Batch(gold["images"], torch.zeros(0)), gold, slice(None))
    if "image_features" in gold:
        close("image_features", method.encode_images(gold["images"]), unit(gold["image_features"]))
    if len(info["templates"]) == 1:
        check_tokens(method, gold)


def check_promptsrc(case: Case) -> None:
    """A training run, one that is averaged over epochs, or the weights of an average."""
    if any(key.startswith("gpa_weights/") for key in case.tensors):
        check_gaussian_weights(case)
    elif any(key.startswith("gpa/") for key in case.tensors):
        check_gaussian_average(case)
    else:
        check_training(case, promptsrc)


def check_gaussian_weights(case: Case) -> None:
    for key, golden in case.tensors.items():
        epochs, mean, std = (
            float("".join(ch for ch in part if ch.isdigit() or ch == ".")) for part in key.split("/")[1].split("_")
        )
        close(key, torch.tensor(gaussian_weights(int(epochs), mean, std), dtype=torch.float64), golden)


def check_gaussian_average(case: Case) -> None:
    info, gold, h = case.info, Gold(case.tensors), Hyper(case)
    epochs = h["max_epoch"]
    method = make(case, promptsrc, h)
    names = load_official(method, gold, "init/")
    optimizer = sgd(method, info["optimizer"])
    last = {}
    for epoch in range(epochs):
        batch = make_batch(method, gold["epoch_images"][epoch], gold["epoch_labels"][epoch])
        close(
            f"loss of epoch {epoch}",
            total(step(method, batch, optimizer)),
            gold["loss_per_epoch"][epoch],
            1e-5 if epoch < 3 else 5e-5,  # roundings of fp32, which differ between processors, amplified as below
        )
        last = {n: view(method, n).detach().clone() for n in names}
        method.after_epoch(epoch, epochs)
    for n in names:  # the case gives no noise: a few fp32 roundings, amplified by five steps at the official rate
        gold.compare(f"last_epoch/{n}", last[n], 1e-5)
        gold.compare(f"gpa/{n}", view(method, n), 1e-5)
    gold.compare("gpa_eval_logits", eval_logits(method, gold["epoch_images"][0], info["classnames"]), 1e-4)
    assert gold.compared


CHECKS: dict[str, Callable[[Case], None]] = {
    "zeroshot": check_zero_shot,
    "promptsrc": check_promptsrc,
    "drople": drople.check,
    "promptot": family.check_promptot,
    "coprompt": family.check_coprompt,
    "fap": family.check_fap,
    "promptkd": family.check_promptkd,
    "pouf": family.check_pouf,
}


@pytest.mark.parametrize("case", [p for p in find_cases() if p.values[0].folder not in HEADS])
def test_official_numbers(case: Case) -> None:
    if case.folder in CHECKS:
        CHECKS[case.folder](case)
    elif case.method in OPTIONS:
        check_training(case, OPTIONS[case.method])
    else:
        assert case.method not in METHODS, f"{case.method} is registered, but nothing here checks its golden cases"
        assert FOLDERS["full"] in case.file.parents, f"nothing here checks the cases of {case.folder}"
        pytest.skip(f"the whole set also has cases of methods that this package has not: {case.method}")


def test_a_case_may_have_any_name(tmp_path: Path) -> None:
    folder = FOLDERS["reduced"]
    (tmp_path / "backbone").symlink_to(folder.parent / "backbone")
    for i, file in enumerate(sorted([*folder.glob("drople/*.json"), folder / "promptsrc" / "gpa_weights.json"])):
        named = tmp_path / "cases" / file.parent.name / f"b_{i}.json"
        named.parent.mkdir(parents=True, exist_ok=True)
        for suffix in (".json", ".safetensors"):
            copyfile(file.with_suffix(suffix), named.with_suffix(suffix))
        CHECKS[file.parent.name](Case(named))


def test_a_hyper_parameter_that_nobody_reads_is_an_error(tmp_path: Path) -> None:
    file = FOLDERS["reduced"] / "vpt" / "a_8_depth12.json"
    info = json.loads(file.read_text())
    info["hyper"]["dropout"] = 0.5
    changed = tmp_path / "cases" / "vpt" / "b.json"
    changed.parent.mkdir(parents=True)
    (tmp_path / "backbone").symlink_to(FOLDERS["reduced"].parent / "backbone")
    changed.write_text(json.dumps(info))
    with pytest.raises(AssertionError, match=r"hyper-parameters that do not reach vpt: \['dropout'\]"):
        make(Case(changed), vpt, Hyper(Case(changed)))


def test_reduced_set_covers_every_method() -> None:
    reduced = {Case(f).method for f in FOLDERS["reduced"].glob("*/*.json")}
    assert {m for m, cls in METHODS.items() if cls.parity == "golden"} <= reduced
