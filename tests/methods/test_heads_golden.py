"""Heads and adapters against the numbers of their official code, for every case found by its folder."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kit.cases import Case, Hyper, close, find_cases
from vlprompt.artefact import calibration
from vlprompt.backbones.backbone import unit
from vlprompt.config.schema import OptimConfig, build_config
from vlprompt.methods import Batch, Method, find_method
from vlprompt.methods.base import Support, total
from vlprompt.methods.heads.clip_lora import LoRA
from vlprompt.training.prepare import log_prior
from vlprompt.training.schedule import build_optimizer, learning_rate


class Given:
    """A backbone whose text features are given; it is never asked for images."""

    name, logit_bias, text_chunk = "given", 0.0, None
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, texts: Tensor, new: Tensor | None = None, scale: float = 100.0, projection: Any = None) -> None:
        self.rows = torch.cat([texts, new]) if new is not None else texts
        self.names = tuple(f"class {c}" for c in range(len(texts)))
        self.new_names = tuple(f"class {c}" for c in range(len(texts), len(self.rows)))
        self.embed_dim, self.logit_scale = texts.shape[1], scale
        self.image_tower = SimpleNamespace(projection=projection, get_parameter=lambda name: projection.weight)
        self.tokenizer = SimpleNamespace(words=lambda text: [int(text.split()[1])], reads=lambda text: (True, True))

    def encode_texts(self, texts: list[str], normalise: bool = True) -> Tensor:
        rows = self.rows[[int(text.split()[-1].rstrip(".")) for text in texts]]
        return unit(rows) if normalise else rows

    def remember(self, key: Any, compute: Callable[[], Tensor]) -> Tensor:
        return compute()

    def logits(self, v: Tensor, t: Tensor) -> Tensor:
        return self.logit_scale * v @ t.T


class Official:
    """A case's numbers, and what was seen of them: what a case does not give is not asked for."""

    def __init__(self, case: Case) -> None:
        self.info, self.gold, self.hyper = case.info, case.tensors, Hyper(case)
        self.noise = self.info.get("noise_sensitivity", {})
        self.asked: set[str] = set()
        self.hyper.told("shots", "augment_epoch", "n_classes")  # what the tensors are anyway

    def __getitem__(self, key: str) -> Tensor:
        return self.gold[key]

    def labels(self, name: str = "train_labels") -> Tensor:
        return self.gold[name].long()

    def check(self, key: str, ours: Tensor | float, move: Tensor | None = None) -> None:
        """Compare, if the case has it; ``move`` is what the parameter began at."""
        if key not in self.gold:
            return
        golden, ours = self.gold[key].float(), torch.as_tensor(ours).float()
        scale = golden.abs().max().item()
        of_move = (golden - move).abs().max().item() if move is not None else scale
        noise = self.noise.get(key, 0.0)
        noise = max(noise, scale * self.noise.get(f"{key} (rel. to max)", 0))
        of_moves = 0 if self.noise or move is None else 1e-4
        noise = max(noise, of_move * self.noise.get(f"{key} (rel. to max move)", of_moves))
        close(key, ours, golden, noise)
        self.asked.add(key)


def made(o: Official, backbone: Any, **settings: Any) -> Method:
    cls = find_method(o.info["method"])
    return cls(backbone, backbone.names, cls.Config(**settings), "{}")


def descend(
    o: Official, method: Method, steps: int, batch: Callable[[int], Batch], per_epoch: int, **settings: Any
) -> Any:
    """Steps under the method's own optimiser and schedule; hands out each step's losses before it is taken."""
    config = build_config(method.name, overrides=settings)
    optim: OptimConfig = config.optim
    optimizer = build_optimizer(method, optim)
    for step in range(steps):
        lr = learning_rate(step / per_epoch, config.train.epochs, optim)
        for group in optimizer.param_groups:
            group["lr"] = lr
        losses = method.losses(batch(step))
        method.zero_grad()
        method.backward(losses)
        yield step, losses, lr
        optimizer.step()
        if (step + 1) % per_epoch == 0:
            method.after_epoch(step // per_epoch, config.train.epochs)


def trained(o: Official, method: Method, steps: int, batch: Callable[[int], Batch], names: dict[str, str], test: Tensor,
            per_epoch: int = 1, **settings: Any) -> None:  # fmt: skip
    """What the cases of methods that take steps have in common; ``names`` are ours by the official ones."""
    own, seen, rates = dict(method.named_parameters()), [], []
    begin = {k: own[n].detach().clone() for k, n in names.items()}
    for k in names:
        o.check(f"init/{k}", begin[k])
    o.check("eval_logits_init", method.predict(test, method.class_names))
    o.check("zs_test_logits", method.predict(test, method.class_names))

    def after(done: int) -> None:
        for k, n in names.items():
            o.check(f"after{done}/{k}", own[n].detach(), begin[k])
        o.check(f"eval_logits_after{done}", method.predict(test, method.class_names))

    for step, losses, lr in descend(o, method, steps, batch, per_epoch, **settings):
        if step:
            after(step)
        else:
            o.check("logits", method(batch(0)).logits)
            o.check("loss", total(losses))
            o.check("loss/ce", losses["ce"])
        for k, n in names.items():
            for key in (
                [f"grad/{k}"] * (step == 0) + [f"grad_step{step + 1}/{k}"] + [f"grad_last/{k}"] * (step == steps - 1)
            ):
                o.check(key, own[n].grad)
        seen.append({k: v.detach() for k, v in losses.items()})
        rates.append(lr)
    after(steps)
    n = len(o.gold["loss_per_step"]) if "loss_per_step" in o.gold else 0
    o.check("loss_per_step", torch.stack([total(losses) for losses in seen])[:n])
    o.check("lr_per_step", torch.tensor(rates)[: len(o.gold.get("lr_per_step", []))])
    o.check("loss/constraint_per_step", torch.stack([losses.get("constraint", torch.tensor(0.0)) for losses in seen]))
    o.check(
        "loss_ce_per_step", torch.stack([losses["ce"] for losses in seen])[: len(o.gold.get("loss_ce_per_step", []))]
    )


def longest(o: Official) -> int:
    """Steps that a case shows."""
    after = [int(k.split("/")[0].removeprefix("after")) for k in o.gold if k.startswith("after")]
    return max([*after, len(o.gold.get("loss_per_step", [])), len(o.gold.get("order", []))])


# --- methods --------------------------------------------------------------------------------------


def clap(o: Official) -> None:
    h, backbone = o.hyper, Given(o["base_text_features"], scale=o.hyper["logit_scale"])
    word = h["constraint"]
    assert h["init"] == "ZS"
    settings: dict[str, Any] = {}
    if word != "none":
        parts = [w for w in ("corrected", "constant") if w in word]
        settings["weights"] = "balanced" if "balanced" in word else "-".join(parts) or "zero-shot"
        settings |= {"adaptive": "adaptative" in word, "distance": "cosine" if "cosine" in word else "l2"}
    method = made(o, backbone, **settings)
    method.fit_features(o["train_views"], o.labels())
    if word != "none":
        o.check("lambda", method.lam)
    v, y = unit(o["train_views"]).flatten(0, 1), o.labels().repeat(len(o["train_views"]))
    order = o["order"].long()
    trained(
        o, method, len(order), lambda s: Batch(None, y[order[s]], v[order[s]]), {"prototypes": "w"}, unit(o["test"]),
        h["num_batches"], lr=h["lr"], epochs=h["max_epoch"], batch_size=h["batch_size"],
    )  # fmt: skip


def task_res(o: Official) -> None:
    h, v = o.hyper, unit(o["train"])
    method = made(o, Given(o["base_text_features"], scale=h["logit_scale"]), alpha=h["alpha"])
    names = {"text_feature_residuals": "x"}
    batch = Batch(None, o.labels(), v)
    trained(o, method, longest(o), lambda s: batch, names, unit(o["test"]), lr=h["lr"], epochs=h["max_epoch"])


def clip_adapter(o: Official) -> None:
    h, v = o.hyper, unit(o["train"])
    narrow, e = o["init/fc.0.weight"].shape
    method = made(o, Given(o["text"], scale=h["logit_scale"]), ratio=h["ratio"], reduction=e // narrow)
    names = {"fc.0.weight": "fc.0.weight", "fc.2.weight": "fc.2.weight"}
    with torch.no_grad():
        for k in names:
            method.get_parameter(k).copy_(o[f"init/{k}"])
    flat = {} if h["warmup"] else {"warmup_epochs": 0, "cosine_epochs": 10**6}  # a constant rate
    batch = Batch(None, o.labels(), v)
    trained(o, method, longest(o), lambda s: batch, names, unit(o["test"]), lr=h["lr"], epochs=h["max_epoch"], **flat)


def prolip(o: Official) -> None:
    h = o.hyper
    if resnet := h["backbone"].startswith("RN"):  # its weight is that of a linear layer, [E, D]
        o.gold |= {k: v.T for k, v in o.gold.items() if k.endswith("/W")}
    w = o["init/W"]
    projection = torch.nn.Linear(*w.shape, bias=resnet)
    projection.weight.data = w.T.clone()
    if resnet:
        projection.bias.data = next(o[k] for k in ("bias", "init/bias", "init/b") if k in o.gold)
    method = made(
        o,
        Given(o["text_features"], projection=projection),
        lam=h["lambda_rule"].replace("N", "shots").replace("^2", "²"),
    )
    keep = o.labels() < len(o["text_features"])
    x, y = o["train_views"][:, keep], o.labels()[keep]
    method.images_per_class = h["shots"]
    o.check("lambda", method.lam)
    settings = {"lr": h["lr"], "epochs": h["train_epoch"]}
    views = [(s + method.first_view) % h["aug_views"] for s in range(h["train_epoch"])]
    batch = lambda s: Batch(None, y, extra={"pooled": x[views[s]]})  # noqa: E731
    last: dict[str, Tensor] = {}

    def keep_last(losses: dict[str, Tensor]) -> None:
        last.update(losses)

    original = method.losses
    method.losses = lambda b: (keep_last(made := original(b)), made)[1]  # type: ignore[method-assign]
    trained(o, method, h["train_epoch"], batch, {"W": "w"}, o["test"][:, None], **settings)
    o.check("loss_mse_last", last["distance"] / method.lam)
    o.check("loss_total_last", total(last))
    o.check("final/W", method.w)
    o.check("test_logits_final", method.predict(o["test"][:, None], method.class_names))


def grid(o: Official) -> dict[str, Any]:
    h = o.hyper
    (most_beta, most_alpha), (steps_beta, steps_alpha) = h["search_scale"], h["search_step"]
    search = {"most_beta": most_beta, "most_alpha": most_alpha, "steps_beta": steps_beta, "steps_alpha": steps_alpha}
    return {"alpha": h["init_alpha"], "beta": h["init_beta"], **search}


def support(o: Official) -> Support:
    val = unit(o["val"]), o.labels("val_labels")
    return Support(o["train_views"], o.labels(), unit(o["train_views"])[0], val)


def tip_adapter(o: Official) -> None:
    method = made(o, Given(o["text_features"]), **grid(o))
    method.fit_features(o["train_views"], o.labels())
    o.check("cache_keys", method.keys.T)
    o.check("cache_values", method.values(method.labels))
    v, y = unit(o["val"]), o.labels("val_labels")
    o.check("val_logits_init", method.predict(v, method.class_names))
    test = unit(o["test"])
    o.check("test_zeroshot_logits", 100 * test @ o["text_features"].T)
    o.check("test_logits_init", method.predict(test, method.class_names))
    method.finish(support(o))
    found(o, method, test)
    o.check("best_val_acc", 100 * (method.predict(v, method.class_names).argmax(-1) == y).float().mean())


def found(o: Official, method: Method, test: Tensor) -> None:
    o.check("best_beta", method.beta)
    o.check("best_alpha", method.alpha)
    o.check("test_logits_best", method.predict(test, method.class_names))


def tip_adapter_f(o: Official) -> None:
    h, test = o.hyper, unit(o["test"])
    method = made(o, Given(o["text_features"]), **grid(o))
    method.fit_features(o["train_views"], o.labels())
    o.check("cache_values", method.values(method.labels))
    v = unit(o["train_views"])
    batch = lambda s: Batch(None, o.labels(), v[s % len(v)])  # noqa: E731
    settings = {"lr": h["lr"], "epochs": h["train_epoch"]}
    best, most, last = 0, -1, torch.zeros(())
    keys = method.keys.detach().clone()
    trained(o, method, longest(o), batch, {"keys": "keys"}, test, **settings)
    method.fit_features(o["train_views"], o.labels())
    for step, losses, _ in descend(o, method, h["train_epoch"], batch, 1, **settings):
        if step:  # as the official code does, on the test images
            n = int((method.predict(test, method.class_names).argmax(-1) == o.labels("test_labels")).sum())
            best, most, keys = (step - 1, n, method.keys.detach().clone()) if n > most else (best, most, keys)
        last = total(losses)
    n = int((method.predict(test, method.class_names).argmax(-1) == o.labels("test_labels")).sum())
    best, keys = (h["train_epoch"] - 1, method.keys.detach().clone()) if n > most else (best, keys)
    o.check("loss_last_step", last)
    o.check("cache_keys", method.keys.detach().T)  # officially the memory that training writes into
    o.check("best_epoch", best)
    o.check("keys_best_epoch", keys)
    method.keys.data = keys
    method.finish(support(o))
    found(o, method, test)


def gda(o: Official) -> None:
    h, new = o.hyper, o.gold.get("text_features_new")
    settings = {"k": h["k"], "text_copies": h["text_copies"], "covariance": "mean"} if new is not None else {}
    assert h["prior"] == "uniform"
    method = made(o, Given(o["text_features"], new), **settings)
    method.fit_features(o["train_views"], o.labels())
    x, y = unit(o["train_views"]).flatten(0, 1), o.labels().repeat(len(o["train_views"]))
    o.check("mus", torch.stack([x[y == c].mean(0) for c in range(len(method.class_names))]))
    o.check("W", method.w.T)
    o.check("b", method.b)
    v, y = unit(o["val"]), o.labels("val_labels")
    right = []
    for alpha in h["alpha_grid"]:
        method.alpha.fill_(alpha)
        logits = method.predict(v, method.class_names)
        right.append(100 * (logits.argmax(-1) == y).float().mean())
        if alpha == 1:
            o.check("val_logits_alpha1", logits)
    o.check("val_acc_per_alpha", torch.stack(right))
    method.finish(support(o))
    o.check("best_alpha", method.alpha)
    o.check("test_logits_best", method.predict(unit(o["test"]), method.class_names))
    if new is not None:
        w, b = method.new_classifier(unit(new))
        o.check("W_new", w.T)
        o.check("b_new", b)
        o.check("test_new_logits", method.predict(unit(o["test_new"]), method.backbone.new_names))


def ss_text(o: Official) -> None:
    h = o.hyper
    # Text features stand in the sum as they are given: here of the length that the case gives them.
    backbone = Given(o["text"], scale=h["logit_scale"])
    method = made(o, backbone, balanced=h["balanced_importance"], repel=h["repel"])
    method.text_features = lambda names: backbone.rows  # type: ignore[method-assign]
    test = unit(o["test"])
    o.check("zs_test_logits", method.predict(test, method.class_names))
    method.fit_features(o["train"], o.labels())
    o.check("W", method.w)
    o.check("train_probs", method.predict(unit(o["train"]), method.class_names).softmax(-1))
    o.check("test_logits", method.predict(test, method.class_names))


def lp_plus_plus(o: Official) -> None:
    h, (v, y) = o.hyper, (unit(o["train"]), o.labels())
    method = made(o, Given(o["text_features"]), epochs=h["train_epoch"])
    method.b.copy_(o["init/bias"])
    method.fit_features(o["train"][None], y)
    t = method.text_features(method.class_names)
    o.check("step_size_w", method.steps(v)[0])
    o.check("step_size_alpha", method.steps(v)[1])
    o.check("init_alpha", method.alpha[0])
    w = method.w.clone()
    o.check("init/w", w)
    probes = [method.start(v, y), *method.descend(v, y)]
    logits = [probe.logits(v, t) for probe in probes]
    o.check("logits", logits[0])
    losses = torch.stack([torch.nn.functional.cross_entropy(x, y) for x in logits[:-1]])
    o.check("loss", losses[0])
    o.check("loss_per_step", losses)
    slopes = (probes[1].w - w) / -method.steps(v)[0], (probes[1].b - o["init/bias"]) / -method.steps(v)[0]
    o.check("grad/w", slopes[0])
    o.check("grad/bias", slopes[1])
    for step, (probe, x) in enumerate(zip(probes, logits, strict=True)):
        o.check(f"after{step}/w", probe.w, w)
        o.check(f"after{step}/bias", probe.b)
        o.check(f"logits_step{step + 1}", x)
    o.check("final/w", probes[-1].w)
    o.check("final/bias", probes[-1].b)
    o.check("final/alpha", probes[-1].alpha)
    val, test = unit(o["val"]), unit(o["test"])
    o.check("val_logits_final", probes[-1].logits(val, t))
    said = method.finish(Support(o["train"][None], y, v, (val, o.labels("val_labels"))))
    o.check("best_epoch", int(said.split()[1]) - 1)
    o.check("test_logits_best", method.predict(test, method.class_names))
    o.check("zs_test_logits", test @ t.T)


def clip_lora(o: Official, case: Case) -> None:
    h, info = o.hyper, o.info
    cls = find_method("clip_lora")
    settings = {"encoder": h["encoder"], "position": h["position"], "matrices": "".join(h["params"]), "r": h["r"]}
    config = cls.Config(**settings, alpha=h["alpha"], dropout=h["dropout_rate"])
    method = cls(case.backbone, tuple(info["classnames"]), config, h["template"])

    def place(name: str) -> tuple[LoRA, Tensor]:
        lora = method.visual if name.startswith("visual.") else method.textual
        parts = name.removeprefix("visual.").split(".")
        matrix = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "proj": "o"}[parts[4]]
        at = lora.blocks.index(int(parts[2])), lora.matrices.index(matrix)
        return lora, (lora.a if name.endswith("A") else lora.b), at

    names = {k.split("/", 1)[1] for k in o.gold if k.startswith(("init/", "grad", "after"))}
    with torch.no_grad():
        for key in (k for k in o.gold if k.startswith("init/")):
            _, parameter, at = place(key.removeprefix("init/"))
            parameter[at] = o[key]
    images = o["images"]
    method.eval()
    o.check("zeroshot_logits", method.predict(images, method.class_names))
    method.train()
    batch, seen, rates = Batch(images, o.labels("labels")), [], []
    steps, per_epoch = info["optimizer"]["steps"], h["n_iters"] * h["shots"]  # one long epoch: the cosine is per step
    for step, losses, lr in descend(o, method, steps, lambda s: batch, per_epoch, lr=h["lr"], epochs=1):
        if step == 0:
            o.check("logits", method(batch).logits)
            o.check("loss", total(losses))
        for name in names:
            _, parameter, at = place(name)
            for key in [f"grad/{name}"] * (step == 0) + [f"grad_step{step + 1}/{name}"]:
                o.check(key, parameter.grad[at])
        seen.append(losses["ce"].detach())
        rates.append(lr)
    o.check("loss_per_step", torch.stack(seen))
    o.check("lr_per_step", torch.tensor(rates))
    for name in names:
        _, parameter, at = place(name)
        o.check(f"after{steps}/{name}", parameter.detach()[at])
    method.eval()
    o.check(f"eval_logits_after{steps}", method.predict(images, method.class_names))
    o.check("novel_eval_logits", method.predict(images, tuple(info["novel_classnames"])))


def logit_adjustment(o: Official) -> None:
    logits = o["logits"].clone().requires_grad_()
    o.asked.add("logits")  # given
    prior = log_prior(o["class_counts"].long(), 1)
    o.check("log_prior", prior)
    method = SimpleNamespace(log_prior=o.hyper["tau"] * prior)
    batch = Batch(None, o.labels("labels"))
    adjusted = Method.adjusted(method, logits, batch)  # type: ignore[arg-type]
    o.check("adjusted_logits", adjusted)
    loss = torch.nn.functional.cross_entropy(adjusted, batch.labels)
    o.check("loss", loss)
    o.check("loss/ce_unadjusted", torch.nn.functional.cross_entropy(logits, batch.labels))
    loss.backward()
    o.check("grad/logits", logits.grad)


def dac(o: Official) -> None:
    texts = [o[f"{of}_text_{model}"] for model in ("zs", "tuned") for of in ("base", "current")]
    o.asked |= {"logits", *(f"{of}_text_{model}" for model in ("zs", "tuned") for of in ("base", "current"))}  # given
    factors = calibration.dac_factors(*texts, k=o.hyper.get("k", calibration.NEIGHBOURS))
    o.check("class_confidence", factors)
    logits = calibration.dac(o["logits"], factors)
    o.check("calibrated_logits", logits)
    o.check("calibrated_probs", logits.softmax(-1))
    assert torch.equal(logits.argmax(-1), o["logits"].argmax(-1))


CHECKS: dict[str, Callable[..., None]] = {
    "clap": clap,
    "zs_lp": clap,
    "task_res": task_res,
    "clip_adapter": clip_adapter,
    "prolip": prolip,
    "tip_adapter": tip_adapter,
    "tip_adapter_f": tip_adapter_f,
    "gda": gda,
    "ss_text": ss_text,
    "ss_text_plus": ss_text,
    "lp_plus_plus": lp_plus_plus,
    "clip_lora": clip_lora,
    "logit_adjustment": logit_adjustment,
    "dac": dac,
}
INPUTS = {
    "train", "train_views", "train_labels", "test", "test_labels", "val", "val_labels", "test_new", "test_new_labels",
    "text", "text_features", "text_features_new", "base_text_features", "order", "images", "labels",
    "tokenized_prompts", "class_counts", "bias", "init/bias", "init/fc.0.weight", "init/fc.2.weight",
    "counts_after", "cov_inv", "mu_new", "cov_inv_new",  # inside what W and b, and the prior, are compared for
    "final/alpha_grad_accumulated",  # inside what the last α is
}  # fmt: skip


@pytest.mark.parametrize("case", [p for p in find_cases() if p.values[0].file.parent.name in CHECKS])
def test_official_numbers_of_heads(case: Case) -> None:
    o = Official(case)
    check = CHECKS[o.info["method"]]
    check(o, case) if check is clip_lora else check(o)
    assert not o.hyper.unread, f"hyper-parameters that do not reach {o.info['method']}: {sorted(o.hyper.unread)}"
    left = {k for k in set(o.gold) - o.asked - INPUTS if not k.startswith("init/")}
    assert not left, f"official numbers that nothing was compared with: {sorted(left)}"
