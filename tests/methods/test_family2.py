"""Prompt-OT, CoPrompt, PromptKD, FAP and POUF beyond their golden cases: plans, descriptions, teachers, attacks."""

from __future__ import annotations

import itertools
import json
import math
from functools import partial
from pathlib import Path
from shutil import copyfile, copytree

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

from tests.kit.command import vlprompt
from tests.kit.marks import image_sides, slow, sweep
from tests.kit.pictures import CLASSES
from tests.kit.runs import TEACHER, arguments, check_stopped, configured, described, prompts
from vlprompt.api import PromptedModel
from vlprompt.artefact.artefact import load_artefact, read_artefact_config
from vlprompt.artefact.export import export_classes
from vlprompt.backbones.attack import Pixels, pgd
from vlprompt.backbones.backbone import Backbone
from vlprompt.bench.protocols import Asked, plan
from vlprompt.config.schema import build_config
from vlprompt.config.teacher import let_ask_teacher
from vlprompt.errors import ArtefactError, ConfigError, DataError, VlpromptError
from vlprompt.methods import METHODS, Batch, Method, find_method
from vlprompt.methods.pouf import mutual_information, transport
from vlprompt.methods.promptot import transport_plan
from vlprompt.training.attack import Attack, attacked, find_attack, margins
from vlprompt.training.run import train

NAMES = ("violin", "steam train", "yellow kite", "lamp", "old boot")


def make(backbone: Backbone, name: str, **settings) -> Method:
    torch.manual_seed(0)
    cls = find_method(name)
    return cls(backbone, NAMES, cls.Config(**settings))


def images(backbone: Backbone, n: int = 6) -> torch.Tensor:
    size = backbone.image_size
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


# --- Prompt-OT ------------------------------------------------------------------------------------


def test_the_plan_is_the_best_of_all() -> None:
    costs = torch.rand(5, 5, generator=torch.Generator().manual_seed(2))
    plan = transport_plan(costs)
    best = min(sum(costs[i, j].item() for i, j in enumerate(p)) / 5 for p in itertools.permutations(range(5)))
    assert (plan * costs).sum().item() == pytest.approx(best)
    torch.testing.assert_close(plan.sum(0), torch.full((5,), 0.2))
    torch.testing.assert_close(plan.sum(1), torch.full((5,), 0.2))


def test_promptot_does_not_mind_which_frozen_pair_it_goes_to(tiny: Backbone) -> None:
    method, x, y = make(tiny, "promptot"), images(tiny), torch.arange(6) % 5
    v0, order = tiny.encode_images(x), torch.tensor([3, 1, 5, 0, 2, 4])
    out = method(Batch(x, y, v0))
    costs = method.costs(out, Batch(x, y, v0))
    near = (transport_plan(costs) * costs).sum()
    paired = costs.diagonal().mean()  # what comparing each image with itself would cost
    assert near <= paired * (1 + 1e-6)
    changed = method.costs(out, Batch(x, y, v0))[:, order]
    torch.testing.assert_close((transport_plan(changed) * changed).sum(), near)


def test_promptot_reads_one_template_or_all(tiny: Backbone) -> None:
    one, all_ = make(tiny, "promptot"), make(tiny, "promptot", ensemble="imagenet")
    torch.testing.assert_close(one.frozen_classes(NAMES), make(tiny, "zero_shot").class_features(NAMES))
    assert not torch.allclose(one.frozen_classes(NAMES), all_.frozen_classes(NAMES), atol=1e-3)


def test_promptot_is_not_computed_in_parts(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'promptot' compares the images of a batch: it does not allow .*acc"):
        configured(pictures, "promptot", **{"train.accumulate": 2})


# --- CoPrompt -------------------------------------------------------------------------------------


def test_coprompt_draws_one_description_of_every_class(tiny: Backbone) -> None:
    method, x = make(tiny, "coprompt"), images(tiny)
    batch = Batch(x, torch.arange(6) % 5, second_view=x + 0.1)
    method.descriptions = {name: [f"{name} {k}" for k in range(2 + (name == "lamp"))] for name in NAMES}
    drawn = {method.draw() for _ in range(50)}
    assert drawn == {0, 1, 2}
    method.draw = lambda: 2  # where others begin again
    assert torch.equal(method.frozen_texts(), tiny.encode_texts([f"{n} {2 if n == 'lamp' else 0}" for n in NAMES]))
    out = method(batch)
    t0, v0 = method.frozen_texts(), tiny.encode_images(x + 0.1)
    cosines = (out.t * t0).sum(-1).mean() + (out.v * v0).sum(-1).mean()
    torch.testing.assert_close(method.regularisers(out, batch)["consistency"], 8 * (2 - cosines))
    squares = (out.t - t0).square().mean() + (out.v - v0).square().mean()
    of_squares = make(tiny, "coprompt", consistency="mse", w=1.0)
    of_squares.descriptions, of_squares.draw = method.descriptions, method.draw
    torch.testing.assert_close(of_squares.regularisers(out, batch)["consistency"], squares)


def test_coprompt_without_adapters_is_maple(tiny: Backbone) -> None:
    method, maple = make(tiny, "coprompt", image_share=0.0, text_share=0.0), make(tiny, "maple")
    torch.testing.assert_close(method.eval().predict(images(tiny), NAMES), maple.eval().predict(images(tiny), NAMES))


@slow
def test_coprompt_resumes_with_descriptions(pictures: Path, tmp_path: Path) -> None:
    config = configured(pictures, "coprompt", **{"data.descriptions": str(described(tmp_path))})
    said: list[str] = []
    train(config, tmp_path / "whole", say=said.append)
    assert not any("no class descriptions" in text for text in said)
    whole = check_stopped(config, tmp_path, 4)
    train(configured(pictures, "coprompt"), tmp_path / "without", say=said.append)
    assert any(text.startswith("coprompt has no class descriptions (data.descriptions)") for text in said)
    assert not torch.equal(prompts(tmp_path / "without")["folded"], whole["folded"])
    assert load_artefact(tmp_path / "whole").descriptions is None


# --- FAP, and attacks on any method ---------------------------------------------------------------


def test_pgd_stays_in_the_ball_and_raises_the_loss() -> None:
    generator = torch.Generator().manual_seed(3)
    x, w = torch.rand(2, 3, 4, 4, generator=generator), torch.randn(2, 3, 4, 4, generator=generator)
    delta = pgd(x, lambda changed: (w * changed).sum(), torch.zeros_like(x), 0.1, 0.06, 2)
    best = (x + 0.1 * w.sign()).clamp(0, 1) - x  # of a linear loss, two steps reach the best corner
    torch.testing.assert_close(delta, best)
    far = pgd(x, lambda changed: (w * changed).sum(), 5 * torch.ones_like(x), 0.1, 0.01, 1)
    assert far.abs().max() <= 0.1 + 1e-6
    assert (x + far).max() <= 1
    with pytest.raises(VlpromptError, match="gradient by the image's pixels"):
        pgd(x, lambda changed: changed.detach().sum(), torch.zeros_like(x), 0.1, 0.1, 1)


def test_pixels_are_read_back(tiny: Backbone) -> None:
    pixels, x = Pixels(tiny.preprocess), torch.rand(2, 3, 5, 5)
    torch.testing.assert_close(pixels.of(pixels.read(x)), x)
    black = pixels.read(torch.zeros(1, 3, 1, 1)).flatten().tolist()
    expected = [-m / s for m, s in zip(tiny.preprocess.mean, tiny.preprocess.std, strict=True)]
    assert black == pytest.approx(expected)


def test_fap_starts_with_the_template_and_its_braces(tiny: Backbone) -> None:
    method, other = make(tiny, "fap"), make(tiny, "fap", init="a photo of a")
    assert method.context.words == "a photo of a {}."
    assert torch.equal(method.context.vectors, other.context.vectors)  # "a photo"
    assert not torch.allclose(method.class_features(NAMES), other.class_features(NAMES), atol=1e-3)
    assert method.coupled.deep.shape == (8, 2, tiny.image_tower.config.width)


def test_fap_attacks_what_it_learns_from(tiny: Backbone) -> None:
    method, pixels = make(tiny, "fap"), Pixels(tiny.preprocess)
    batch = Batch(pixels.read(torch.rand(4, 3, tiny.image_size, tiny.image_size)), torch.arange(4))
    out = method(batch)
    changed = method.attacked(batch.images, out)
    assert (pixels.of(changed) - pixels.of(batch.images)).abs().max() <= 1 / 255 + 1e-6
    v = method.encode_images(changed)
    p, q = out.logits.softmax(-1), method.logits(v, out.t).softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    method.attacked = lambda images, out: changed
    found = method.regularisers(out, batch)["adversarial"]
    torch.testing.assert_close(found, 1.5 * (kl * (1 + (out.v * v).sum(-1))).mean(), rtol=1e-3, atol=1e-4)
    method.config = method.Config(adversarial="none", w=2.0)
    torch.testing.assert_close(method.regularisers(out, batch)["adversarial"], 2 * kl.mean(), rtol=1e-3, atol=1e-4)


def test_fap_saves_both_towers_prompts_and_no_maps(tiny: Backbone, tmp_path: Path) -> None:
    method = make(tiny, "fap", depth=3)
    shapes = {k: tuple(v.shape) for k, v in method.inference_state().items()}
    text, image = tiny.text_tower.config.width, tiny.image_tower.config.width
    assert shapes == {"context.vectors": (2, text), "folded_text": (2, 2, text), "folded_image": (3, 2, image)}


@pytest.mark.parametrize("name", sweep(sorted(METHODS), *image_sides()))
def test_every_method_can_be_attacked(name: str, tiny: Backbone) -> None:
    method, pixels = make(tiny, name), Pixels(tiny.preprocess)
    x = pixels.read(torch.rand(5, 3, tiny.image_size, tiny.image_size, generator=torch.Generator().manual_seed(5)))
    if name in ("linear_probe", "lp_plus_plus"):
        method.fit_features(tiny.encode_images(x), torch.arange(5))
    method.eval()
    logits = method.predict(x, NAMES)
    labels = logits.argmax(-1)
    labels[0] = (labels[0] + 1) % 5  # wrong already
    changed = attacked(method, x, labels, NAMES, Attack(eps=8 / 255, steps=4))
    assert torch.equal(changed[0], x[0])
    moved = (pixels.of(changed[1:]) - pixels.of(x[1:])).abs()
    assert 0 < moved.max() <= 8 / 255 + 1e-6
    after = method.predict(changed, NAMES)
    assert cross_entropy(after[1:], labels[1:]) > cross_entropy(logits[1:], labels[1:])
    assert torch.equal(attacked(method, x, labels, NAMES, Attack(eps=8 / 255, steps=4)), changed)


def test_an_attack_steps_as_on_the_cross_entropy(tiny: Backbone) -> None:
    """And goes on where the gradient of that is rounded to 0, as with logits of gda."""
    logits = torch.tensor([[3.0, 1.0, 2.0], [900.0, 100.0, -300.0]], requires_grad=True)
    labels = torch.tensor([0, 0])
    far = margins(logits, labels)
    torch.testing.assert_close(softplus(far), cross_entropy(logits, labels, reduction="none"))
    (masked,) = torch.autograd.grad(cross_entropy(logits, labels), logits, retain_graph=True)
    (gradient,) = torch.autograd.grad(far.sum(), logits)
    assert not masked[1].any()
    assert gradient[1].tolist() == [-1, 1, 0]
    method, pixels = make(tiny, "vpt").eval(), Pixels(tiny.preprocess)
    x = torch.rand(4, 3, tiny.image_size, tiny.image_size, generator=torch.Generator().manual_seed(5))
    labels = method.predict(pixels.read(x), NAMES).argmax(-1)

    def loss(changed: Tensor) -> Tensor:
        return cross_entropy(method.logits(method.encode_images(pixels.read(changed)), t), labels)

    t = method.class_features(NAMES).detach()
    start = (2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) - 1) / 255
    expected = x + pgd(x, loss, start, 1 / 255, 1 / 255, 1)
    found = pixels.of(attacked(method, pixels.read(x), labels, NAMES, Attack(steps=1)))
    assert (expected - found).abs().lt(1e-5).float().mean() > 0.999  # signs of gradients of about 0 apart


def test_no_image_of_a_single_class_is_changed(tiny: Backbone) -> None:
    method, x = make(tiny, "coop").eval(), torch.rand(2, 3, tiny.image_size, tiny.image_size)
    assert torch.equal(attacked(method, x, torch.tensor([0, 0]), ("otter",), Attack(steps=1)), x)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("pgdd", None, None), "unknown attack 'pgdd'.*pgd"),
        (("pgd", "2", None), r"^--eps 2 \(allowed: a number above 0, at most 1, as 0.01 or 1/255\)$"),
        (("pgd", "0", None), "^--eps 0 "),
        (("pgd", "1/0", None), "^--eps 1/0 "),
        (("pgd", "small", None), "^--eps small "),
        (("pgd", "-1/255", None), "^--eps -1/255 "),
        (("pgd", None, 0), r"^--attack-steps 0 \(allowed: 1 or more\)$"),
        ((None, "1/255", 5), r"^--eps and --attack-steps without --attack \(allowed with it: pgd\)$"),
    ],
)
def test_attacks_that_are_none(asked: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_attack(*asked)


def test_robust_accuracy_is_reported(pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(configured(pictures, "coop", **{"train.epochs": 1}), run)
    command = ["evaluate", run, pictures, "--split", "val", "--attack", "pgd", "--eps", "16/255", "--attack-steps", 5]
    found = vlprompt(*command, "--json").json
    assert found["attack"] == {"name": "pgd", "eps": 16 / 255, "steps": 5}
    assert 0 <= found["robust_accuracy"] <= found["accuracy"]
    assert f"accuracy {found['robust_accuracy']:.2f} % under pgd within 16/255, 5 steps" in vlprompt(*command).out
    refused = vlprompt("evaluate", run, pictures, "--eps", "1/255")
    assert (refused.code, refused.err.count("\n")) == (2, 1)


# --- PromptKD -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher_run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tuned teacher, of which all classes can be asked."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    train(configured(pictures, "ivlp", backbone="mini", **{"train.epochs": 1, "method.depth_text": 2}), out)
    return out


def test_promptkd_keeps_its_teachers_classes(pictures: Path, teacher_run: Path, tmp_path: Path) -> None:
    config = configured(pictures, "promptkd", **{"teacher.backbone": str(teacher_run)})
    method, result = train(config, tmp_path / "whole")
    teacher = load_artefact(teacher_run)
    torch.testing.assert_close(method.vectors, teacher.class_features(CLASSES))
    assert result.teacher == str(teacher_run)
    whole = check_stopped(config, tmp_path, 4)
    assert whole["projection.0.weight"].shape == (teacher.backbone.embed_dim, method.backbone.embed_dim)
    # Other names are asked of the teacher while it is there; the artefact does without it, for its own names.
    x = images(method.backbone)
    novel = method.predict(x, ("otter", "cat"))
    expected = method.logits(method.encode_images(x), teacher.class_features(("otter", "cat")))
    torch.testing.assert_close(novel, expected)
    again = load_artefact(tmp_path / "whole")
    assert torch.equal(again.predict(x, CLASSES), method.predict(x, CLASSES))
    assert torch.equal(again.predict(x, CLASSES[::-1]), method.predict(x, CLASSES).flip(-1))
    with pytest.raises(
        DataError, match=r"^promptkd keeps its teacher's features of 3 classes, and has none of 'otter'"
    ):
        again.predict(x, ("otter", "cat"))
    let_ask_teacher(again)
    assert torch.equal(again.predict(x, ("otter", "cat")), novel)
    assert "transductive" in (tmp_path / "whole" / "README.md").read_text("utf-8")
    with pytest.raises(ArtefactError, match="cannot export promptkd"):
        export_classes(again, CLASSES, tmp_path / "x.safetensors")


@slow
def test_promptkd_asks_its_teacher_about_new_names(pictures: Path, teacher_run: Path, tmp_path: Path) -> None:
    """Through save and reload; wherever the teacher lies now, and with none but the one that it had."""
    teacher, run, picture = tmp_path / "teacher", tmp_path / "run", pictures / "train" / "cat" / "0.png"
    copytree(teacher_run, teacher)
    given = ["--teacher", teacher, "setting=inductive", "--classes", "base", "--epochs", "1"]
    done = vlprompt(*arguments("promptkd", pictures, run, *given))
    assert done.code == 0, done.err
    ask = ("predict", run, picture, "--class-names", "otter,cat", "--json")
    first = vlprompt(*ask)
    assert first.code == 0, first.err
    method = load_artefact(run)
    v = method.encode_images(method.backbone.preprocess(Image.open(picture))[None])
    expected = method.logits(v, load_artefact(teacher).class_features(("otter", "cat")))
    best = ("otter", "cat")[expected.argmax()]
    assert json.loads(first.out)["predictions"][0]["top"][0]["class"] == best
    assert vlprompt("evaluate", run, pictures, "--split", "val", "--json").code == 0
    moved = teacher.rename(tmp_path / "moved")
    assert vlprompt("predict", run, picture).code == 0
    lost = vlprompt(*ask)
    assert lost.code == 2
    assert f"promptkd was taught by '{teacher}', and asks it about other classes than its own: " in lost.err
    assert lost.err.endswith("say where it lies with --teacher (in Python: teacher=)\n")
    assert vlprompt(*ask, "--teacher", moved).out == first.out
    wrong = vlprompt(*ask, "--teacher", "mini")
    assert (wrong.code, "'mini' is another model (--teacher" in wrong.err) == (2, True)
    model = PromptedModel.from_pretrained(run, teacher=str(moved))
    torch.testing.assert_close(model.logits([picture], ["otter", "cat"]), expected)
    exported = vlprompt("export", run, "--class-names", "otter,cat", "--out", tmp_path / "x.onnx", "--teacher", moved)
    assert exported.code == 0, exported.err
    model.save_pretrained(tmp_path / "copy")
    assert read_artefact_config(tmp_path / "copy")["teacher"]["name"] == str(teacher)
    unasked = vlprompt("predict", teacher_run, picture, "--teacher", moved)
    assert unasked.err == f"error: teacher = {moved}: this model, of method 'ivlp', asks no teacher about classes\n"


def test_promptkd_goes_on_with_its_own_classes(pictures: Path, teacher_run: Path, tmp_path: Path) -> None:
    """A run that begins with another's prompts takes its projection, and not its classes, as many as they are."""
    given = {"teacher.backbone": str(teacher_run), "setting": "inductive", "train.epochs": 1}
    first, _ = train(configured(pictures, "promptkd", **given, **{"data.task": "1/2"}), tmp_path / "first")
    given |= {
        "data.task": "2/2",
        "train.warm_start": str(tmp_path / "first"),
        "optim.lr": 1e-12,
        "optim.warmup_lr": 1e-12,
    }
    second, _ = train(configured(pictures, "promptkd", **given), tmp_path / "second")
    assert set(first.class_names) | set(second.class_names) == set(CLASSES)
    teacher = load_artefact(teacher_run)
    torch.testing.assert_close(second.vectors, teacher.class_features(second.class_names))
    torch.testing.assert_close(second.projection[0].weight, first.projection[0].weight)


def test_what_has_no_class_features_teaches_no_promptkd(pictures: Path, tmp_path: Path) -> None:
    train(configured(pictures, "gda"), tmp_path / "gda")
    with pytest.raises(ConfigError, match=r"^teacher.backbone = .*: gda has no class features of its own$"):
        train(configured(pictures, "promptkd", **{"teacher.backbone": str(tmp_path / "gda")}), tmp_path / "run")


def test_promptkd_reads_no_labels(tiny: Backbone) -> None:
    method, x = make(tiny, "promptkd", w=1.0, temperature=2.0), images(tiny)
    p = torch.rand(6, 5, generator=torch.Generator().manual_seed(4)).softmax(-1)
    found = method.losses(Batch(x, torch.full((6,), -1), teacher_probabilities=p))
    q = (method(Batch(x, torch.full((6,), -1))).logits / 2).softmax(-1)
    softer = p.sqrt() / p.sqrt().sum(-1, keepdim=True)
    kl = (softer * (softer / q).log()).sum(-1)
    torch.testing.assert_close(found["kd"], 4 * kl.mean() / 5)


def test_promptkd_needs_two_images_in_a_batch(tiny: Backbone) -> None:
    method, x = make(tiny, "promptkd"), images(tiny, 1)
    with pytest.raises(DataError, match=r"normalises features over a batch.*\(data.batch_size\)$"):
        method.losses(Batch(x, torch.zeros(1), teacher_probabilities=torch.ones(1, 5) / 5))
    assert method.eval().predict(x, NAMES).isfinite().all()


def test_transductive_runs_say_so(teacher_run: Path, pictures: Path) -> None:
    asked = partial(Asked, "base-to-novel", data=[str(pictures)], seeds=[1], shots=[2], teacher=str(teacher_run))
    (whole,) = plan(asked({"promptkd": ("promptkd", {})}))
    assert (whole.name, whole.config.data.classes) == ("promptkd-transductive", "all")
    (half,) = plan(asked({"promptkd": ("promptkd", {"setting": "inductive"})}))
    assert (half.name, half.config.data.classes) == ("promptkd", "base")
    assert [m.classes for m in whole.measurements] == ["base", "novel"]
    with pytest.raises(ConfigError, match=r"^data.classes = base: .*\(allowed: all, or method.setting=inductive\)"):
        build_config("promptkd", overrides={"data.classes": "base", "teacher.backbone": "x"})
    config = build_config("promptkd", overrides={"data.classes": "base", "setting": "inductive"})
    assert not config.options.transductive


def test_a_teacher_without_class_features_leaves_the_students(tiny: Backbone) -> None:
    method = make(tiny, "promptkd")
    method.take_teacher(lambda names: None)
    torch.testing.assert_close(method.class_features(NAMES), make(tiny, "zero_shot").class_features(NAMES))
    assert method.class_features(("otter",)).shape == (1, tiny.embed_dim)


# --- POUF -----------------------------------------------------------------------------------------


def test_pouf_reads_no_labels_and_begins_as_zero_shot(tiny: Backbone) -> None:
    x = images(tiny)
    for learn in ("prompt", "head"):
        method = make(tiny, "pouf", learn=learn)
        there = [method.losses(Batch(x, labels)) for labels in (torch.arange(6) % 5, torch.full((6,), -1))]
        assert there[0].keys() == {"transport", "im"}
        torch.testing.assert_close(there[0], there[1], rtol=0, atol=0)
    zero_shot = make(tiny, "zero_shot", template="a photo of a {}")
    torch.testing.assert_close(method.predict(x, NAMES), zero_shot.predict(x, NAMES), rtol=1e-5, atol=1e-4)
    assert sorted(n for n, _ in method.named_parameters()) == ["head", "log_scale"]
    with pytest.raises(DataError, match=r"^pouf learned features of each of its classes"):
        method.class_features(("otter",))


def test_pouf_is_sure_of_each_and_even_over_all() -> None:
    sure, even = 50 * torch.eye(4), torch.zeros(4, 4)
    same = torch.zeros(4, 4)
    same[:, 0] = 50
    found = [mutual_information(logits).item() for logits in (sure, even, same)]
    assert found == pytest.approx([-math.log(4), 0, 0], abs=1e-3)
    near, far = torch.eye(4), 1 - torch.eye(4)
    assert transport(100 * near, near) == pytest.approx(0, abs=1e-4)
    assert transport(-100 * far, far) == pytest.approx(2, abs=1e-4)


def test_nesterov_is_sgds(pictures: Path) -> None:
    config = configured(pictures, "pouf")
    assert config.optim.nesterov
    with pytest.raises(ConfigError, match=r"^optim.nesterov = true: it is of sgd with a momentum"):
        configured(pictures, "pouf", **{"optim.momentum": 0})
    with pytest.raises(ConfigError, match=r"^optim.nesterov = true"):
        configured(pictures, "coop", **{"optim.nesterov": True, "optim.name": "adamw"})


# --- images without labels ------------------------------------------------------------------------


@pytest.fixture
def loose(pictures: Path, tmp_path: Path) -> Path:
    """Seven pictures in one folder."""
    folder = tmp_path / "loose"
    folder.mkdir()
    for i, file in enumerate(sorted((pictures / "train").rglob("*.png"))[:7]):
        copyfile(file, folder / f"{i}.png")
    (tmp_path / "names.txt").write_text("cat\ndog\nsea horse\n", "utf-8")
    return folder


@pytest.mark.parametrize("method", ["pouf", "kdpl_coop"])
def test_a_folder_without_labels(method: str, loose: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    given = arguments(method, loose, tmp_path / "run", "--class-names-file", str(names), "--epochs", "2")
    done = vlprompt(*given, *(["--teacher", TEACHER] if method != "pouf" else []))
    assert done.code == 0, done.err
    assert "trained without labels" in done.err
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["train_accuracy"] is None
    assert load_artefact(tmp_path / "run").class_names == CLASSES
    more = {"data.class_names_file": str(names)}
    config = configured(loose, method, **more)
    train(config, tmp_path / "whole")
    check_stopped(config, tmp_path, 2)
    (loose / "0.png").unlink()
    with pytest.raises(ConfigError, match="no longer gives the images"):
        train(config, tmp_path / "stopped", resume=True)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("coop", {}, r"^data.class_names_file = .*: method 'coop' learns from labels, or"),
        ("pouf", {"data.shots": 2}, r"^data.shots = 2: images without labels"),
        ("pouf", {"data.classes": "base"}, r"^data.classes = base: images without labels"),
        ("pouf", {"data.split_file": "x.json"}, r"^data.class_names_file = .*: the split file x.json has labels$"),
    ],
)
def test_images_without_labels_have_no_classes(
    method: str, changes: dict, message: str, loose: Path, tmp_path: Path
) -> None:
    config = configured(loose, method, **{"data.class_names_file": str(tmp_path / "names.txt"), **changes})
    with pytest.raises(ConfigError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
