"""PLOT's transport and APT's additions, against plain computations; their runs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tests.kit.marks import sweep
from tests.kit.plain import N_IMAGES, plain_norm, same_with_gradients, small_backbone
from tests.kit.runs import check_stopped, configured, prompts
from vlprompt.backbones.backbone import Backbone, unit
from vlprompt.backbones.resnet import ResNetTower
from vlprompt.backbones.towers import ImageConfig
from vlprompt.cli.explain import patch_features
from vlprompt.config.schema import build_config
from vlprompt.errors import BackboneError, ConfigError
from vlprompt.methods import METHODS, Batch, Method, find_method
from vlprompt.methods.plot import sinkhorn
from vlprompt.training.run import train

NAMES = ("dog", "sea horse", "forget-me-not", "cat")


def small(name: str, **options: object) -> Method:
    """A method on three blocks, in float64."""
    torch.manual_seed(0)
    cls = find_method(name)
    return cls(small_backbone(), NAMES, cls.Config(**options)).double()


def images(backbone: Backbone, n: int = N_IMAGES) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, backbone.image_size, backbone.image_size, dtype=backbone.dtype, generator=generator)


def costs(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.double)


# --- Sinkhorn's algorithm -------------------------------------------------------------------------


def plain_sinkhorn(
    costs: Tensor, eps: float, iterations: int, stop: float, power: float = 1.0
) -> tuple[list[list[float]], int]:
    """One plan, number by number, and how many iterations it took."""
    p, n = costs.shape
    kernel = [[math.exp(-costs[i, j].item() / eps) for j in range(n)] for i in range(p)]
    r, c, done = [1.0] * p, [1.0] * n, 0
    for _ in range(iterations):
        done, before = done + 1, r
        r = [(1 / p / sum(kernel[i][j] * c[j] for j in range(n))) ** power for i in range(p)]
        c = [(1 / n / sum(kernel[i][j] * r[i] for i in range(p))) ** power for j in range(n)]
        if sum(abs(a - b) for a, b in zip(r, before, strict=True)) / p < stop:
            break
    return [[r[i] * kernel[i][j] * c[j] for j in range(n)] for i in range(p)], done


@pytest.mark.parametrize("power", [1.0, 0.8])
def test_each_plan_is_a_plain_loop_s_and_stops_by_itself(power: float) -> None:
    some = torch.stack([scale * costs(7, 3) for scale in (0.01, 0.3, 1.0)])
    took = []
    for stop in (0.0, 0.01):
        plans = sinkhorn(some, 0.1, 100, stop, power)
        for one, found in zip(some, plans, strict=True):
            expected, n = plain_sinkhorn(one, 0.1, 100, stop, power)
            torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.double), rtol=0, atol=1e-12)
            alone = sinkhorn(one, 0.1, 100, stop, power)  # whatever is beside it, but for the last digit
            torch.testing.assert_close(alone, found, rtol=0, atol=1e-15)
            took.append(n)
    assert took[:3] == [100, 100, 100]
    assert took[3] < took[5] < 100


def test_a_plan_of_little_entropy_costs_what_the_best_one_does() -> None:
    some = costs(6, 4)
    plan = sinkhorn(some, 0.002, 20_000)
    torch.testing.assert_close(plan.sum(1), torch.full((6,), 1 / 6, dtype=torch.double), rtol=0, atol=1e-6)
    torch.testing.assert_close(plan.sum(0), torch.full((4,), 1 / 4, dtype=torch.double), rtol=0, atol=1e-6)
    rows, columns = np.kron(np.eye(6), np.ones(4)), np.kron(np.ones(6), np.eye(4))
    best = linprog(some.flatten().numpy(), A_eq=[*rows, *columns], b_eq=[1 / 6] * 6 + [1 / 4] * 4)
    assert (plan * some).sum().item() == pytest.approx(best.fun, abs=5e-4)


def test_an_unbalanced_plan_is_the_least_of_its_objective() -> None:
    """Σ T C − eps · entropy + ρ · KL of both sums from the weights: no change of the plan makes it less."""
    some, eps, rho = costs(5, 3), 0.1, 0.4
    plan = sinkhorn(some, eps, 2000, 0.0, rho / (rho + eps)).requires_grad_()

    def divergence(sums: Tensor) -> Tensor:
        w = 1 / len(sums)
        return (sums * (sums / w).log() - sums + w).sum()

    entropy = -(plan * (plan.log() - 1)).sum()
    value = (plan * some).sum() - eps * entropy + rho * (divergence(plan.sum(1)) + divergence(plan.sum(0)))
    assert torch.autograd.grad(value, plan)[0].abs().max() < 1e-9
    assert plan.sum().item() != pytest.approx(1, abs=0.01)
    much = sinkhorn(some, eps, 2000, 0.0, 1e5 / (1e5 + eps))
    torch.testing.assert_close(much, sinkhorn(some, eps, 2000), rtol=0, atol=1e-5)


# --- plot -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"transport": "unbalanced", "rho": 0.5, "n_contexts": 2}, {"eps": 1.0}])
def test_plot_scores_what_the_plan_leads_to_the_contexts(options: dict) -> None:
    method = small("plot", n_ctx=2, **options)
    backbone, c = method.backbone, method.config
    v = unit(patch_features(method, images(backbone)))  # of the last block, read one by one
    torch.testing.assert_close(method.encode_images(images(backbone)), v, rtol=0, atol=1e-9)
    t = torch.stack([method.encode_classes(NAMES, context) for context in method.contexts])
    power = c.rho / (c.rho + c.eps) if c.transport == "unbalanced" else 1.0
    expected = []
    for image in v:
        for of_class in t.unbind(1):
            cosines = image @ of_class.T
            made = plain_sinkhorn(1 - cosines, c.eps, c.iterations, c.stop, power)[0]
            expected.append(backbone.logit_scale * (torch.tensor(made, dtype=torch.double) * cosines).sum())
    logits = method.logits(method.encode_images(images(backbone)), method.class_features(NAMES))
    same_with_gradients(logits, torch.stack(expected).unflatten(0, (-1, len(NAMES))), dict(method.named_parameters()))


def test_plot_scores_many_pairs_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    method = small("plot", n_ctx=2)
    x = images(method.backbone, 5)
    whole = method.eval().predict(x, NAMES)
    monkeypatch.setattr("vlprompt.methods.plot.PAIRS_AT_ONCE", 2 * len(NAMES))
    torch.testing.assert_close(method.predict(x, NAMES), whole, rtol=0, atol=1e-9)


def test_plot_reads_a_resnet_s_places(tiny: Backbone) -> None:
    """The official backbone: every place asks as the mean does, whose answer is the image's feature."""
    torch.manual_seed(0)
    sizes = {"layers": 0, "heads": 2, "mlp_width": 0, "embed_dim": tiny.embed_dim}
    tower = ResNetTower(ImageConfig(64, 32, 8, pool="resnet", stages=(1, 1, 1, 1), **sizes)).requires_grad_(False)
    backbone = replace(tiny, name="rn", image_tower=tower, fingerprint="rn")
    method = METHODS["plot"](backbone, NAMES, METHODS["plot"].Config(n_ctx=2))
    x, pool = torch.randn(2, 3, 64, 64), tower.attnpool
    places = tower.places(x).flatten(2).mT
    tokens = torch.cat([places.mean(1, keepdim=True), places], 1) + pool.positional_embedding
    told = []
    for i in range(1 + 4):
        heads = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (pool.q_proj(tokens[:, i : i + 1]),
                 pool.k_proj(tokens), pool.v_proj(tokens)))  # fmt: skip
        told.append(pool.c_proj(scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)[:, 0]))
    torch.testing.assert_close(method.encode_images(x), unit(torch.stack(told[1:], 1)), atol=1e-5, rtol=0)
    torch.testing.assert_close(tower(x), told[0], atol=1e-5, rtol=0)
    losses = method.losses(Batch(x, torch.tensor([0, 3])))
    assert all(g.any() for g in method.gradients(losses)["total"])


def test_plot_refuses_what_has_no_patches_of_its_own() -> None:
    method = find_method("plot")
    with pytest.raises(BackboneError, match="pools all patches into one feature: plot needs those of each patch"):
        method(small_backbone(causal=False, pool="map"), NAMES, method.Config())


# --- apt ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [None, 1, 2])
def test_apt_is_a_plain_forward(depth: int | None) -> None:
    method = small("apt", depth=depth)
    tower, x0 = method.backbone.image_tower, images(method.backbone)
    side, features = range(0, 16, 4), []
    for image in x0:
        patches = torch.stack([image[:, i : i + 4, j : j + 4].flatten() for i in side for j in side])
        x = torch.cat([tower.class_token[None], patches @ tower.patches.weight.flatten(1).T]) + tower.positions
        x = plain_norm(x, tower.ln_pre)
        for i, block in enumerate(tower.blocks):
            q, k, v = (plain_norm(x, block.ln_1) @ block.qkv.weight.T + block.qkv.bias).chunk(3, -1)
            if i < len(method.keys):
                first = torch.eye(len(x), dtype=x.dtype)[:, :1]  # of the class token
                k, v = k + first * method.keys[i], v + first * method.values[i]
            heads = [
                (qh @ kh.T / qh.shape[-1] ** 0.5).softmax(-1) @ vh
                for qh, kh, vh in zip(*(t.chunk(tower.config.heads, -1) for t in (q, k, v)), strict=True)
            ]
            x = x + torch.cat(heads, -1) @ block.out.weight.T + block.out.bias
            h = plain_norm(x, block.ln_2) @ block.fc_1.weight.T + block.fc_1.bias
            x = x + h * torch.sigmoid(1.702 * h) @ block.fc_2.weight.T + block.fc_2.bias
        features.append(tower.projection.weight @ plain_norm(x, tower.ln_post)[0])
    same_with_gradients(method.encode_images(x0), unit(torch.stack(features)), dict(method.named_parameters()))


def test_apt_of_zeros_is_zero_shot(tiny: Backbone) -> None:
    apt, frozen = (METHODS[name](tiny, NAMES).eval() for name in ("apt", "zero_shot"))
    x = images(tiny)
    assert not torch.allclose(apt.predict(x, NAMES), frozen.predict(x, NAMES), atol=1e-3)
    torch.nn.init.zeros_(apt.keys)
    torch.nn.init.zeros_(apt.values)
    torch.testing.assert_close(apt.predict(x, NAMES), frozen.predict(x, NAMES), atol=1e-4, rtol=0)
    assert sum(p.numel() for p in apt.learned()) == 2 * tiny.image_tower.config.layers * tiny.image_tower.config.width


# --- runs and settings ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "more"), sweep([("plot", {}), ("plot", {"method.transport": "unbalanced"}), ("apt", {})], ("apt", {}))
)
def test_a_stopped_run_resumes_to_the_same_bits(name: str, more: dict, pictures: Path, tmp_path: Path) -> None:
    config = configured(pictures, name, **{"train.epochs": 2}, **more)
    train(config, tmp_path / "whole")
    check_stopped(config, tmp_path, 2)


def test_apt_goes_on_from_an_earlier_task(pictures: Path, tmp_path: Path) -> None:
    train(configured(pictures, "apt", **{"train.epochs": 1}), tmp_path / "first")
    again = configured(pictures, "apt", **{"train.warm_start": str(tmp_path / "first"), "optim.lr": 1e-12})
    train(again, tmp_path / "second")
    first, second = prompts(tmp_path / "first"), prompts(tmp_path / "second")
    assert first.keys() == second.keys() == {"keys", "values"}
    assert all(torch.allclose(first[k], second[k], atol=1e-7, rtol=0) for k in first)


@pytest.mark.parametrize(
    ("name", "asked", "says"),
    [
        ("plot", {"eps": 0.01}, "method.eps = 0.01 .*0.03"),
        ("plot", {"n_contexts": 0}, "method.n_contexts = 0"),
        ("plot", {"transport": "unbalance"}, "method.transport = unbalance .*did you mean 'unbalanced'"),
        ("plot", {"rho": 0}, "method.rho = 0"),
        ("plot", {"graphs": True}, "train.graphs: method 'plot' does other operations from step to step"),
        ("apt", {"depth": 0}, "method.depth = 0"),
        ("apt", {"text_chunk": 2}, "train.text_chunk: method 'apt' encodes the texts of all classes at once"),
    ],
)
def test_options_out_of_range(name: str, asked: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build_config(name, overrides=asked)


def test_apt_needs_blocks_and_a_class_token(tiny: Backbone) -> None:
    with pytest.raises(ConfigError, match=r"visual prompt depth = 99 \(allowed: 1 to"):
        METHODS["apt"](tiny, NAMES, METHODS["apt"].Config(depth=99))
    with pytest.raises(BackboneError, match="has no class token"):
        METHODS["apt"](small_backbone(causal=False, pool="map"), NAMES)


def test_presets_are_those_of_their_protocols() -> None:
    few = build_config("plot", "few-shot-fgvc_aircraft")
    assert (few.data.batch_size, few.train.epochs, few.optim.lr) == (32, 50, 0.002)
    cars = build_config("apt", "class-incremental-stanford_cars")
    assert (cars.optim.name, cars.optim.lr, cars.train.epochs, cars.data.batch_size) == ("adam", 0.005, 50, 64)
