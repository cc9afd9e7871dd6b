"""What every registered method must do: learn only its own parameters, reload exactly, take other class names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.kit.marks import sweep
from vlprompt.artefact.artefact import load_artefact, save_artefact
from vlprompt.backbones.backbone import Backbone
from vlprompt.config.schema import build_config, config_of, parse_yaml
from vlprompt.errors import ConfigError, DataError
from vlprompt.methods import METHODS, Batch, Method, find_method
from vlprompt.methods.base import total
from vlprompt.methods.promptsrc import gaussian_weights
from vlprompt.methods.templates import SELECT_TEMPLATES
from vlprompt.prompting.text import class_tokens, word_vectors

NAMES = ("red square", "blue circle", "green star", "black dog", "old oak tree", "house", "sea_horse")
OTHER_NAMES = ("one of the very old and very tall trees behind the red house", "向日葵", "подсолнух", "café", "x")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in sorted(METHODS)} | {
    "coop, class-specific": ("coop", {"class_specific": True, "n_ctx": 4}),
    "coop, name in the middle": ("coop", {"position": "middle", "init": "a photo of a", "n_ctx": 4}),
    "vpt, shallow": ("vpt", {"depth": 1}),
    "maple, more tokens than words": ("maple", {"n_ctx": 5, "depth": 2}),
    "ivlp, first layer": ("ivlp", {"depth_text": 1, "depth_vision": 1}),
    "ivlp, language-only": ("ivlp", {"depth_vision": 0}),
    "ivlp, vision-only": ("ivlp", {"depth_text": 0}),
    "promptsrc, language-only": ("promptsrc", {"n_ctx_vision": 0}),
    "promptsrc, vision-only": ("promptsrc", {"n_ctx_text": 0, "init": None}),
    "prograd, class-specific": ("prograd", {"class_specific": True, "template": "{}, a kind of thing"}),
    "fdbpl_coop, two lengths": ("fdbpl_coop", {"n_ctx": 5, "init": None, "n_ctx_negative": 4}),
    "zero_shot, several templates": ("zero_shot", {"template": ("a {}.", "the {}.")}),
    "dpl, learned weights": ("dpl", {"instance_to_prompt": "learned", "prompt_to_prompt": "drop"}),
    "dpl, constant weight": ("dpl", {"instance_to_prompt": "constant", "text": "read-only"}),
    "dpl, visual": ("dpl", {"branches": "visual", "carry": "replace"}),
    "dpl, textual": ("dpl", {"branches": "textual", "text": "context", "prompt_to_instance": "scaled"}),
    "drople, zeros": ("drople", {"mode": "zero", "depth_text": 12, "depth_vision": 2}),
    "drople, uniform": ("drople", {"dropout": "uniform", "lam_schedule": "fixed"}),
    "pouf, head": ("pouf", {"learn": "head"}),
    "promptot, all templates": ("promptot", {"ensemble": "imagenet", "depth_vision": 2}),
    "coprompt, squares": ("coprompt", {"consistency": "mse", "depth": 2}),
    "fap, first layer": ("fap", {"depth": 1, "adversarial": "none"}),
    "zero_shot, ensemble": ("zero_shot", {"ensemble": "select"}),
    "linear_probe, given C": ("linear_probe", {"C": 10.0}),
    "bayesian, conditional": ("bayesian", {"conditional": True, "samples": 3}),
    "lasp, groups": ("lasp", {"groups": 3, "virtual_classes": ("otter", "sea horse")}),
    "lasp, text alone": ("lasp", {"norms": False, "correction": False, "templates": ("a {}.",)}),
    "mmrl, three blocks": ("mmrl", {"layers": (1, 3, 4), "n_tokens": 2, "scale": None}),
    "comma, learned": ("comma", {"generators": "learned", "depth": 3, "last_blocks": 2}),
    "apt, first block": ("apt", {"depth": 1}),
    "plot, unbalanced": ("plot", {"transport": "unbalanced", "n_contexts": 2, "n_ctx": 3}),
    "tcp, in part": ("tcp", {"weight": 0.5, "layer": 2, "init": "a photo of a"}),
    "clap, corrected": ("clap", {"weights": "corrected-constant", "adaptive": True}),
    "clap, cosine": ("clap", {"distance": "cosine"}),
    "clip_lora, vision": ("clip_lora", {"encoder": "vision", "matrices": "qo", "position": "half-up"}),
    "clip_lora, text": ("clip_lora", {"encoder": "text", "dropout": 0.0, "r": 1}),
    "gda, mean": ("gda", {"covariance": "mean"}),
    "gda, no new classes": ("gda", {"k": 0}),
    "prolip, number": ("prolip", {"lam": 0.1}),
    "fdbpl_coop, hinge": ("fdbpl_coop", {"pcd": "hinge"}),
}
OTHER_WAYS = (
    "coop, class-specific", "dpl, constant weight", "drople, uniform", "ivlp, language-only", "lasp, groups",
    "pouf, head", "vpt, shallow", "zero_shot, several templates",
)  # fmt: skip
"""Of the variants those that are tried every time."""
FROM_FROZEN = {"clap", "zs_lp", "task_res", "prolip", "tip_adapter_f"}  # begin at frozen features, or zero
STEPS, IMAGES = 3, 28


def images_and_labels(backbone: Backbone, n_classes: int, n: int = IMAGES, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noise around a colour of each class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % n_classes
    colours = torch.randn(n_classes, 3, 1, 1, generator=generator)
    size = backbone.image_size
    return colours[labels] + 0.3 * torch.randn(n, 3, size, size, generator=generator), labels


def make(backbone: Backbone, name: str, class_names: Sequence[str] = NAMES, seed: int = 0, **settings: Any) -> Method:
    torch.manual_seed(seed)
    cls = find_method(name)
    return cls(backbone, class_names, cls.Config(**settings))


def make_batch(method: Method, images: Tensor, labels: Tensor) -> Batch:
    frozen = method.backbone.encode_images(images) if "frozen_image_features" in method.needs else None
    second = images + 0.1 if "second_view" in method.needs else None
    if "teacher_probabilities" not in method.needs:
        return Batch(images, labels, frozen, second_view=second)
    n = len(method.class_names)
    surest = torch.linspace(1, 8, len(labels))[:, None]  # from a teacher that can hardly tell to one that is sure
    return Batch(images, labels, frozen, (surest * torch.eye(n)[labels] + torch.arange(n) / n).softmax(-1))


@torch.no_grad()
def logits_of(method: Method, images: Tensor, class_names: Sequence[str] | None = None) -> Tensor:
    v = method.encode_images(images)
    return method.logits(v, method.class_features(tuple(class_names or method.class_names), v))


@dataclass
class Tuned:
    """A method after a few steps, and what was seen on the way."""

    method: Method
    before: dict[str, Tensor]
    losses: list[dict[str, Tensor]]
    gradients: list[dict[str, Tensor | None]]
    images: Tensor
    labels: Tensor


@pytest.fixture(scope="module", params=sweep(VARIANTS, *METHODS, *OTHER_WAYS))
def tuned(request: pytest.FixtureRequest, tiny: Backbone) -> Tuned:
    name, settings = VARIANTS[request.param]
    method = make(tiny, name, **settings)
    images, labels = images_and_labels(tiny, len(NAMES))
    before = {k: v.clone() for k, v in method.state_dict().items()}
    seen = Tuned(method, before, [], [], images, labels)
    method.fit_features(tiny.encode_images(images), labels)
    if not method.trains:
        return seen
    optimizer = torch.optim.SGD(method.parameters(), 0.01)
    for step in range(STEPS):
        chosen = slice(7 * step, 7 * step + 7)
        optimizer.zero_grad()
        losses = method.losses(make_batch(method, images[chosen], labels[chosen]))
        method.backward(losses)
        seen.losses.append(losses)
        seen.gradients.append({k: None if p.grad is None else p.grad.clone() for k, p in method.named_parameters()})
        optimizer.step()
    method.eval()
    return seen


# --- every method ---------------------------------------------------------------------------------


def test_only_its_own_parameters_receive_gradients(tuned: Tuned) -> None:
    backbone = tuned.method.backbone
    frozen = [*backbone.image_tower.parameters(), *backbone.text_tower.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in frozen)
    own = {id(p) for p in tuned.method.parameters()}
    assert own.isdisjoint(map(id, frozen))
    for step, gradients in enumerate(tuned.gradients):
        for name, gradient in gradients.items():
            assert gradient is not None, f"{name} receives no gradient"
            assert gradient.isfinite().all(), name
            behind_zero = step == 0 and (tuned.method.name, name[-2:]) == ("clip_lora", ".a")  # its B begins at zero
            assert gradient.any() != behind_zero, f"the gradient of {name} is zero"


def test_training_moves_every_parameter(tuned: Tuned) -> None:
    for name, p in tuned.method.named_parameters():
        assert not torch.equal(p, tuned.before[name]), f"{name} has not moved"


def test_prompts_are_fp32(tuned: Tuned) -> None:
    assert all(t.dtype == torch.float32 for t in tuned.method.inference_state().values())


def test_losses_are_named_finite_and_scalar(tuned: Tuned) -> None:
    assert bool(tuned.losses) == tuned.method.trains
    taught = "teacher_probabilities" in tuned.method.needs
    for losses in tuned.losses:
        own = {"promptkd": {"kd"}, "pouf": {"transport", "im"}}.get(tuned.method.name)
        assert (own or ({"kl_forward", "kl_reverse"} if taught else {"ce"})) <= set(losses)
        for term, value in losses.items():
            assert value.shape == (), term
            assert value.isfinite(), term
            below_zero = {
                ("fdbpl_coop", "negative"),
                ("drople", "residual_entropy"),
                ("pouf", "im"),
            }  # which are maximised
            assert value > -1e-7 or (tuned.method.name, term) in below_zero, term  # 1 − cosine, less its rounding
        torch.testing.assert_close(total(losses), sum(losses.values()))


def test_class_features_are_normalised(tuned: Tuned) -> None:
    method = tuned.method
    v = method.encode_images(tuned.images[:3])
    t = method.class_features(NAMES, v)
    patches = (method.backbone.image_size // method.backbone.image_tower.config.patch_size) ** 2
    branches = {"mmrl": (2,), "plot": (patches,)}.get(method.name, ())
    assert v.shape == (3, *branches, method.backbone.embed_dim)
    each = (3,) if method.image_dependent else ()
    several = {"bayesian": "samples", "plot": "n_contexts"}
    samples = (getattr(method.config, several[method.name]),) if method.name in several else ()
    wide = method.backbone.embed_dim + (method.name == "gda")  # with a bias behind
    assert t.shape == (*each, *samples, len(NAMES), wide)
    for features in (v, t) if method.name not in ("linear_probe", "lp_plus_plus", "gda") else (v,):
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(features.shape[:-1]))


def test_reloading_gives_identical_logits(tuned: Tuned, tmp_path: Path) -> None:
    method = tuned.method
    save_artefact(method, tmp_path)
    again = load_artefact(tmp_path)
    assert type(again) is type(method)
    assert again.config == method.config
    assert again.class_names == NAMES
    assert again.template == method.template
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    assert torch.equal(logits_of(again, tuned.images), logits_of(method, tuned.images))
    if method.takes_new_classes:
        other = logits_of(method, tuned.images[:3], OTHER_NAMES)
        assert torch.equal(logits_of(again, tuned.images[:3], OTHER_NAMES), other)
    save_artefact(again, tmp_path / "copy")  # a loaded model can be saved again
    assert (tmp_path / "copy" / "prompts.safetensors").read_bytes() == (tmp_path / "prompts.safetensors").read_bytes()


def test_other_class_names_without_retraining(tuned: Tuned) -> None:
    method, images = tuned.method, tuned.images[:3]
    if not method.takes_new_classes:
        for names in (OTHER_NAMES, NAMES[:-1], NAMES[::-1]):
            with pytest.raises(DataError, match=rf"\A{method.name} .*class.*\Z"):
                logits_of(method, images, names)
        return
    logits = logits_of(method, images, OTHER_NAMES)
    assert logits.shape == (3, len(OTHER_NAMES))
    assert logits.isfinite().all()
    if method.name == "bayesian":  # it averages probabilities, and these depend on all classes
        return
    # A class's logit does not depend on the classes beside it, but for GDA's new ones, which share a covariance.
    if method.name != "gda":
        torch.testing.assert_close(logits_of(method, images, OTHER_NAMES[1:3]), logits[:, 1:3], atol=1e-4, rtol=0)
    torch.testing.assert_close(
        logits_of(method, images, ("house",)), logits_of(method, images)[:, 5:6], atol=1e-4, rtol=0
    )


def test_nothing_learned_depends_on_the_class_list(tuned: Tuned) -> None:
    method = tuned.method
    fewer = make(method.backbone, method.name, NAMES[:2], **vars(method.config))
    shapes = {k: v.shape for k, v in method.inference_state().items()}
    same = shapes == {k: v.shape for k, v in fewer.inference_state().items()}
    assert same == (method.takes_new_classes and method.name != "gda")  # which has a rule for new ones


def test_the_seed_alone_decides_the_initial_parameters(tuned: Tuned) -> None:
    method = tuned.method
    again, other = (make(method.backbone, method.name, seed=s, **vars(method.config)) for s in (0, 1))
    # Of frozen texts the last bit depends on which were encoded together.
    off = 1e-6 if method.name in FROM_FROZEN else 0
    for k, v in again.state_dict().items():
        torch.testing.assert_close(v, tuned.before[k], rtol=0, atol=off)
    if (
        method.trains and not getattr(method.config, "init", None) and method.name not in FROM_FROZEN
    ):  # noise, not words
        assert any(not torch.equal(v, tuned.before[k]) for k, v in other.state_dict().items())


def test_the_listing_is_filled() -> None:
    for name, cls in METHODS.items():
        assert cls.name == name
        assert cls.paper
        assert cls.learns
        assert 2020 < cls.year < 2100
        assert cls.needs <= {"frozen_image_features", "second_view", "teacher_probabilities"}
        assert (cls.__doc__ or "").splitlines()[0]


# --- one method -----------------------------------------------------------------------------------


def test_maple_saves_folded_visual_prompts_and_no_projections(tiny: Backbone, tmp_path: Path) -> None:
    method = make(tiny, "maple", depth=3)
    save_artefact(method, tmp_path)
    state = load_file(tmp_path / "prompts.safetensors")
    width = tiny.text_tower.config.width
    assert {k: tuple(v.shape) for k, v in state.items()} == {
        "context.vectors": (2, width),
        "context.deep": (2, 2, width),
        "folded": (3, 2, tiny.image_tower.config.width),
    }
    assert torch.equal(state["folded"], torch.stack(list(method.visual_prompts().layers)))
    loaded = load_artefact(tmp_path)
    assert not any("projections" in name for name in loaded.state_dict())


def test_cocoop_has_class_features_for_each_image(tiny: Backbone) -> None:
    method = make(tiny, "cocoop")
    images, labels = images_and_labels(tiny, len(NAMES), 4)
    v = method.encode_images(images)
    t = method.class_features(NAMES, v)
    assert t.shape == (4, len(NAMES), tiny.embed_dim)
    assert not torch.allclose(t[0], t[1])
    for b in range(4):  # an image's class features do not depend on the images beside it
        torch.testing.assert_close(method.class_features(NAMES, v[b : b + 1])[0], t[b], atol=1e-5, rtol=0)
    logits = method.logits(v, t)
    torch.testing.assert_close(logits, tiny.logit_scale * (v[:, None] * t).sum(-1))
    assert method.losses(Batch(images, labels))["ce"].isfinite()


def test_cocoop_without_meta_net_is_a_plain_context(tiny: Backbone) -> None:
    cocoop, coop = make(tiny, "cocoop"), make(tiny, "coop", n_ctx=4, init="a photo of a")
    torch.nn.init.zeros_(cocoop.meta_net[2].weight)
    torch.nn.init.zeros_(cocoop.meta_net[2].bias)
    images, _ = images_and_labels(tiny, 2, 2)
    torch.testing.assert_close(logits_of(cocoop, images), logits_of(coop, images), atol=1e-4, rtol=0)


def test_class_specific_contexts_are_learned_separately(tiny: Backbone) -> None:
    method = make(tiny, "coop", class_specific=True, n_ctx=4)
    assert method.context.vectors.shape == (len(NAMES), 4, tiny.text_tower.config.width)
    before = method.class_features(NAMES)
    with torch.no_grad():
        method.context.vectors[2] *= -1
    moved = (method.class_features(NAMES) - before).abs().amax(-1) > 1e-4
    assert moved.tolist() == [c == 2 for c in range(len(NAMES))]


class Gradients:
    """ProGrad on two loss terms whose gradients are known."""

    def __init__(self, backbone: Backbone, lambda_: float = 1.0) -> None:
        self.method = make(backbone, "prograd", lambda_=lambda_)
        self.vectors = self.method.context.vectors

    def project(self, ce: Tensor, kl: Tensor) -> Tensor:
        self.method.zero_grad()
        self.method.backward({"ce": (self.vectors * ce).sum(), "kl": (self.vectors * kl).sum()})
        assert self.vectors.grad is not None
        return self.vectors.grad


def test_prograd_is_plain_where_the_gradients_agree(tiny: Backbone) -> None:
    g = Gradients(tiny)
    ce = torch.randn_like(g.vectors)
    kl = torch.randn_like(ce)
    kl = kl if (ce * kl).sum() > 0 else -kl
    assert torch.equal(g.project(ce, kl), ce)
    assert torch.equal(g.project(ce, ce), ce)


@pytest.mark.parametrize("lambda_", [0.0, 0.5, 1.0])
def test_prograd_removes_the_share_lambda_of_what_opposes(tiny: Backbone, lambda_: float) -> None:
    g = Gradients(tiny, lambda_)
    ce = torch.randn_like(g.vectors)
    kl = torch.randn_like(ce)
    kl = kl if (ce * kl).sum() < 0 else -kl
    along = (ce * kl).sum() / (kl * kl).sum() * kl  # the component of ce along kl
    torch.testing.assert_close(g.project(ce, kl), ce - lambda_ * along)
    cosine = (g.project(ce, 1000 * kl) * kl).sum() / ce.norm() / kl.norm()
    expected = (1 - lambda_) * (ce * kl).sum() / ce.norm() / kl.norm()  # zero for the official lambda
    torch.testing.assert_close(cosine, expected, atol=1e-6, rtol=1e-4)


def test_prograd_never_opposes_the_zero_shot_prediction(tiny: Backbone) -> None:
    method = make(tiny, "prograd", n_ctx=4)
    with torch.no_grad():  # a little away from zero-shot's own words
        method.context.vectors += 0.01 * torch.randn_like(method.context.vectors)
    images, _ = images_and_labels(tiny, len(NAMES), 7)
    zero_shot = logits_of(make(tiny, "zero_shot"), images)
    vetoed = []
    for labels in (zero_shot.argmax(-1), *[zero_shot.argmin(-1)] * 3):  # what zero-shot finds most, and least likely
        losses = method.losses(make_batch(method, images, labels))
        kl, ce = (torch.autograd.grad(losses[t], method.context.vectors, retain_graph=True)[0] for t in ("kl", "ce"))
        method.zero_grad()
        method.backward(losses)
        g = method.context.vectors.grad
        assert (g * kl).sum() >= -1e-5 * g.norm() * kl.norm()
        vetoed.append(bool((ce * kl).sum() < 0))
        assert torch.equal(g, ce) != vetoed[-1]
        with torch.no_grad():
            method.context.vectors -= 0.001 * g
    assert set(vetoed) == {True, False}, f"both cases must have been seen: {vetoed}"


def test_prograd_with_gradients_of_zero(tiny: Backbone) -> None:
    g = Gradients(tiny)
    ce, zero = torch.randn_like(g.vectors), torch.zeros_like(g.vectors)
    assert torch.equal(g.project(ce, zero), ce)
    assert torch.equal(g.project(zero, ce), zero)


def test_prograd_starts_with_zeros_in_front_of_the_words(tiny: Backbone) -> None:
    vectors = make(tiny, "prograd").context.vectors
    assert not vectors[:12].any()
    assert vectors[12:].any(-1).all()


def test_prograd_reads_a_template_of_its_own(tiny: Backbone) -> None:
    images, labels = images_and_labels(tiny, len(NAMES), 7)
    own, template = make(tiny, "prograd", template="{}, a type of flower."), "{}, a type of flower."
    cls = find_method("prograd")
    torch.manual_seed(0)
    of_data_set = cls(tiny, NAMES, cls.Config(), template=template)
    plain = make(tiny, "prograd")
    kl = [m.losses(make_batch(m, images, labels))["kl"] for m in (own, of_data_set, plain)]
    assert torch.equal(kl[0], kl[1])
    assert not torch.equal(kl[0], kl[2])


def test_prograd_counts_words_as_the_official_code_does(tiny: Backbone) -> None:
    """Of 9 tokens in 8 words, 8 are learned behind 8 zeros; the last, "a", stays frozen in the text."""
    words = "a type of flower, a photo of a"
    method = make(tiny, "prograd", init=words.replace(" ", "_"))
    ids = tiny.tokenizer.words(words)
    assert (len(words.split()), len(method.context.vectors)) == (8, 16)
    assert not method.context.vectors[:8].any()
    known = word_vectors(tiny, words)
    assert torch.equal(method.context.vectors[8:], known[:8])
    texts = class_tokens(tiny, ("house",), 16, method.context.words)
    assert texts.slots == [list(range(1, 17))]
    assert texts.ids[0][17 : 1 + 8 + len(ids)] == ids[8:]


def test_prograd_learns_a_context_for_each_class(tiny: Backbone) -> None:
    images, labels = images_and_labels(tiny, len(NAMES), 7)
    method = make(tiny, "prograd", class_specific=True, n_ctx=6)
    assert method.context.vectors.shape == (len(NAMES), 6, tiny.text_tower.config.width)
    assert not method.context.vectors[:, :2].any()
    shared = make(tiny, "prograd", n_ctx=6)
    torch.testing.assert_close(logits_of(method, images), logits_of(shared, images), atol=1e-4, rtol=0)
    losses = [m.losses(make_batch(m, images, labels)) for m in (method, shared)]
    torch.testing.assert_close(losses[0], losses[1])


def test_fdbpl_has_two_contexts_of_their_own_lengths(tiny: Backbone) -> None:
    method = make(tiny, "fdbpl_coop", n_ctx=5, init=None, n_ctx_negative=3, init_negative="a_photo_of_no")
    assert (len(method.context.vectors), len(method.negative.vectors)) == (5, 3)
    assert torch.equal(method.negative.vectors, word_vectors(tiny, "a photo of"))
    assert len(make(tiny, "fdbpl_coop", n_ctx=5, init=None).negative.vectors) == 5


@pytest.mark.parametrize("none", ["n_ctx", "depth"])
@pytest.mark.parametrize("name", ["ivlp", "promptsrc"])
def test_one_tower_alone(tiny: Backbone, name: str, none: str) -> None:
    images, labels = images_and_labels(tiny, len(NAMES), 7)
    both, vpt = make(tiny, name), make(tiny, "vpt", n_ctx=4, depth=9)
    language = make(tiny, name, **{f"{none}_vision": 0})
    vision = make(tiny, name, **{f"{none}_text": 0}, init="a_photo_of_a")
    language.context.load_state_dict(both.context.state_dict())
    for method in (vision, vpt):
        method.visual.load_state_dict(both.visual.state_dict())
    assert [n for n, _ in language.named_parameters()] == ["context.vectors", "context.deep"]
    assert [n for n, _ in vision.named_parameters()] == ["visual.vectors"]
    assert torch.equal(language.class_features(NAMES), both.class_features(NAMES))
    assert torch.equal(logits_of(vision, images), logits_of(vpt, images))
    frozen = tiny.encode_images(images)
    assert torch.equal(language.predict(images, NAMES), language.predict(frozen, NAMES))
    assert language.config.can == find_method("coop").Config().can
    assert vision.config.can == vpt.config.can
    losses = [m.losses(make_batch(m, images, labels)) for m in (language, vision)]
    if name == "promptsrc":
        assert losses[0]["image_l1"] == 0 < losses[1]["image_l1"]
    taught = Batch(images, labels, frozen, torch.ones(7, len(NAMES)).softmax(-1), classes=torch.tensor([1, 3]))
    assert torch.equal(vision(taught).t, vpt.class_features(NAMES)[[1, 3]])
    other = "depth" if none == "n_ctx" else "n_ctx"
    assert language.config.unused() == {f"{other}_vision": f"{none}_vision"}
    with pytest.raises(ConfigError, match=r"^method.depth_text = .*: nothing is learned"):
        make(tiny, name, **{f"{none}_vision": 0, f"{none}_text": 0})


def test_frozen_texts_without_words_are_the_data_sets_own(tiny: Backbone) -> None:
    cls = find_method("ivlp")
    method = cls(tiny, NAMES, cls.Config(depth_text=0, init=None), template="{}, a type of flower.")
    ours, theirs = method.class_features(("house",)), tiny.encode_texts(["house, a type of flower."])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", [n for n, cls in METHODS.items() if "init" in cls.Config.__dataclass_fields__])
def test_underscores_in_initial_words_are_spaces(tiny: Backbone, name: str) -> None:
    """As in the official configurations: CTX_INIT: "a_photo_of_a"."""
    written, spoken = (make(tiny, name, init=words).eval() for words in ("a_photo_of_a", "a photo of a"))
    before = spoken.state_dict()
    assert all(torch.equal(x, before[k]) for k, x in written.state_dict().items())
    v = tiny.encode_images(images_and_labels(tiny, 2, 2)[0])
    assert torch.equal(written.class_features(NAMES, v), spoken.class_features(NAMES, v))


def test_kgcoop_pulls_towards_the_template(tiny: Backbone) -> None:
    images, labels = images_and_labels(tiny, len(NAMES), 7)
    batch = Batch(images, labels)
    torch.manual_seed(0)
    cls = find_method("kgcoop")
    same = cls(tiny, NAMES, cls.Config(), template="a photo of a {}.")  # the initial words make the same text
    assert same.losses(batch)["kg"].item() == pytest.approx(0, abs=1e-4)
    moved = make(tiny, "kgcoop", init=None, seed=1)
    assert moved.losses(batch)["kg"] > 0.01
    double = make(tiny, "kgcoop", init=None, seed=1, w=16.0)
    torch.testing.assert_close(double.losses(batch)["kg"], 2 * moved.losses(batch)["kg"])


@pytest.mark.parametrize(
    ("epochs", "mean", "std"), [(20, 15, 1), (20, 6, 10), (50, 30, 30), (1, 1, 1), (3, 15, 1), (5, -2.5, 0.3)]
)
def test_gaussian_weights_sum_to_one(epochs: int, mean: float, std: float) -> None:
    weights = gaussian_weights(epochs, mean, std)
    assert len(weights) == epochs
    assert sum(weights) == pytest.approx(1)
    assert min(weights) >= 0
    peak = min(max(round(mean), 1), epochs)
    assert max(weights) == weights[peak - 1]


@pytest.mark.parametrize("mean", [1000.0, -1000.0])
def test_a_mean_out_of_reach_leaves_the_last_epoch(mean: float) -> None:
    assert gaussian_weights(4, mean, 1.0) == [0, 0, 0, 1]


def test_promptsrc_becomes_the_average_of_its_epochs(tiny: Backbone) -> None:
    method = make(tiny, "promptsrc", average_mean=2.0, average_std=1.0)
    for _ in range(2):  # a second training starts a new average
        seen = []
        for epoch in range(3):
            with torch.no_grad():
                for p in method.parameters():
                    p += torch.randn_like(p)
            seen.append({k: p.detach().clone() for k, p in method.named_parameters()})
            method.after_epoch(epoch, 3)
            if epoch < 2:  # training goes on from the prompts themselves
                assert all(torch.equal(p, seen[-1][k]) for k, p in method.named_parameters())
        weights = gaussian_weights(3, 2.0, 1.0)
        for name, p in method.named_parameters():
            expected = sum(w * s[name] for w, s in zip(weights, seen, strict=True))
            torch.testing.assert_close(p.detach(), expected)


def test_promptsrc_is_at_rest_where_nothing_is_learned(tiny: Backbone) -> None:
    method = make(tiny, "promptsrc")
    images, labels = images_and_labels(tiny, len(NAMES), 7)
    batch = make_batch(method, images, labels)
    terms = method.losses(batch)
    assert set(terms) == {"ce", "text_l1", "image_l1", "logits_kl"}
    off = make(tiny, "promptsrc", text_weight=0.0, image_weight=0.0).losses(batch)
    assert off["text_l1"] == 0
    assert off["image_l1"] == 0
    torch.testing.assert_close(off["ce"], terms["ce"])


def test_vpt_covers_the_whole_image_tower(tiny: Backbone) -> None:
    layers, width = tiny.image_tower.config.layers, tiny.image_tower.config.width
    assert make(tiny, "vpt").visual.vectors.shape == (layers, 8, width)
    assert make(tiny, "vpt", depth=1).visual.vectors.shape == (1, 8, width)
    with pytest.raises(ConfigError, match=r"visual prompt depth = 13 \(allowed: 1 to 12"):
        make(tiny, "vpt", depth=13)


@pytest.mark.parametrize("name", ["zero_shot", "vpt"])
def test_a_template_needs_a_place_for_the_class_name(tiny: Backbone, name: str) -> None:
    with pytest.raises(ConfigError, match=r"method.template = a photo \(allowed: text with \{\} for the class name\)"):
        build_config(name, overrides={"template": "a photo"})
    braces = make(tiny, name, template="a {photo} of {}: {}.")  # other braces are text
    plain = tiny.encode_texts(["a {photo} of house: house."])
    torch.testing.assert_close(braces.class_features(("house",)), plain)


@pytest.mark.parametrize("given", [["a {}.", "the {}."], '["a {}.", "the {}."]'])
def test_several_templates(given: list[str] | str) -> None:
    config = build_config("zero_shot", overrides={"template": given})
    assert config.options.template == ("a {}.", "the {}.")
    assert config_of(parse_yaml(config.to_yaml())) == config
    for bad in (["a {}.", "the"], '["a {}.", "the"]', []):
        with pytest.raises(ConfigError, match=r"^method.template = "):
            build_config("zero_shot", overrides={"template": bad})


@pytest.mark.parametrize("ensemble", ["none", "select"])
def test_a_template_beside_an_ensemble_has_no_effect(tiny: Backbone, ensemble: str) -> None:
    plain, changed = (make(tiny, "zero_shot", ensemble=ensemble, template=t) for t in (None, "{}, a kind of thing"))
    same = torch.equal(plain.class_features(NAMES), changed.class_features(NAMES))
    assert same == ("template" in changed.config.unused())


def test_zero_shot_ensembles(tiny: Backbone) -> None:
    images, _ = images_and_labels(tiny, 2, 2)
    single = logits_of(make(tiny, "zero_shot"), images)
    select = logits_of(make(tiny, "zero_shot", template=SELECT_TEMPLATES), images)
    assert torch.equal(select, logits_of(make(tiny, "zero_shot", ensemble="select"), images))
    assert not torch.equal(select, single)
    select, imagenet = (logits_of(make(tiny, "zero_shot", ensemble=e), images) for e in ("select", "imagenet"))
    assert not torch.allclose(single, select)
    assert not torch.allclose(select, imagenet)
    cls = find_method("zero_shot")
    of_data = cls(tiny, NAMES, cls.Config(), template="{} texture.")
    own = make(tiny, "zero_shot", template="{} texture.")
    assert torch.equal(logits_of(of_data, images), logits_of(own, images))


# --- linear probe ---------------------------------------------------------------------------------


def probe(backbone: Backbone, n_classes: int, n: int, **settings: Any) -> tuple[Method, Tensor, Tensor]:
    images, labels = images_and_labels(backbone, n_classes, n)
    features = backbone.encode_images(images)
    method = make(backbone, "linear_probe", NAMES[:n_classes], **settings)
    method.fit_features(features, labels)
    return method, features, labels


@pytest.mark.parametrize("n_classes", [2, 3, 7])
@pytest.mark.parametrize("per_class", [1, 2, 5])  # too few for cross-validation, and enough
def test_linear_probe_equals_scikit_learn(tiny: Backbone, n_classes: int, per_class: int) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    method, features, labels = probe(tiny, n_classes, n_classes * per_class, C=10.0)
    model = linear_model.LogisticRegression(C=10.0, max_iter=1000).fit(features.double(), labels)
    t = method.class_features(method.class_names)
    probabilities = method.logits(features, t).softmax(-1)
    assert t.shape == (n_classes, tiny.embed_dim)
    expected = torch.from_numpy(model.predict_proba(features.double())).float()
    torch.testing.assert_close(probabilities, expected, atol=1e-4, rtol=0)
    chosen, *_ = probe(tiny, n_classes, n_classes * per_class)
    assert chosen.logits(features, chosen.weight).argmax(-1).tolist() == labels.tolist()


def test_linear_probe_of_one_class(tiny: Backbone, tmp_path: Path) -> None:
    method, features, _ = probe(tiny, 1, 3)
    logits = method.logits(features, method.class_features(NAMES[:1]))
    assert logits.shape == (3, 1)
    assert logits.softmax(-1).tolist() == [[1], [1], [1]]
    save_artefact(method, tmp_path)
    assert torch.equal(load_artefact(tmp_path).weight, method.weight)


@pytest.mark.parametrize("absent", [0, 1, 2])
def test_linear_probe_needs_images_of_every_class(tiny: Backbone, absent: int) -> None:
    method = make(tiny, "linear_probe", NAMES[:3])
    features = torch.randn(8, tiny.embed_dim)
    labels = torch.tensor([c for c in range(3) if c != absent] * 4)
    with pytest.raises(DataError, match=rf"class '{NAMES[absent]}': it has no training images"):
        method.fit_features(features, labels)
    assert not method.weight.any()
