"""Methods that learn from a teacher: its views and probabilities, their losses, and runs with one."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor
from torch.nn.functional import kl_div

from tests.kit import TINY
from tests.kit.command import processes
from tests.kit.marks import slow, sweep
from tests.kit.pictures import CLASSES
from tests.kit.runs import TEACHER, StopsAfter, arguments, configured, log, prompts
from vlprompt import PromptClassifier, build_method, fit
from vlprompt.artefact.artefact import load_artefact, save_artefact
from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.load import load_backbone
from vlprompt.config.schema import OptimConfig, TrainConfig, build_config
from vlprompt.config.teacher import Teacher, find_teacher
from vlprompt.data.batches import TrainingViews
from vlprompt.data.images import Preprocess, random_regions
from vlprompt.data.reading import ImageReader
from vlprompt.errors import ArtefactError, BackboneError, ConfigError, DataError, Interrupted
from vlprompt.methods import METHODS, Batch, Method, find_method
from vlprompt.methods.base import divergences
from vlprompt.methods.fdbpl import hinge, informativeness
from vlprompt.methods.zero_shot import frozen_class_features
from vlprompt.prompting import text
from vlprompt.training.loop import Training
from vlprompt.training.run import saved_config, train

TAUGHT = sorted(name for name, cls in METHODS.items() if "teacher_probabilities" in cls.needs)
TERMS = dict.fromkeys(TAUGHT, ("kl_forward", "kl_reverse")) | {"promptkd": ("kd",)}
"""What a teacher's word is in the losses."""
NAMES = ("violin", "steam train", "yellow kite", "lamp", "old boot")  # of no other test: `tiny` remembers texts
WORDS = ("cat", "dog", "sea horse", "house", "tree", "red square", "star")
"""A dictionary that holds the pictures' classes."""


@pytest.fixture
def dictionary(tmp_path: Path) -> Path:
    (tmp_path / "words.txt").write_text("\n".join(WORDS), encoding="utf-8")
    return tmp_path / "words.txt"


def make(backbone: Backbone, name: str, **settings: Any) -> Method:
    torch.manual_seed(0)
    cls = find_method(name)
    return cls(backbone, NAMES, cls.Config(**settings))


def make_batch(backbone: Backbone, n: int = 6, seed: int = 0) -> Batch:
    """Random images and a random teacher; no labels that could be read."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, backbone.image_size, backbone.image_size, generator=generator)
    p = (3 * torch.randn(n, len(NAMES), generator=generator)).softmax(-1)
    return Batch(images, torch.full((n,), -1), backbone.encode_images(images), p)


# --- the teacher ----------------------------------------------------------------------------------


def test_the_teacher_is_a_zero_shot_model_at_the_given_scale(mini: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(4, 3, mini.image_size, mini.image_size)
    teacher = Teacher(mini, NAMES, "a drawing of a {}.", 20.0)
    monkeypatch.setattr(mini, "encode_texts", None)  # class features are there already
    cosines = mini.encode_images(images) @ frozen_class_features(mini, NAMES, ["a drawing of a {}."]).T
    torch.testing.assert_close(teacher.probabilities(images), (20 * cosines).softmax(-1))
    assert not teacher.probabilities(images).requires_grad


def test_its_fingerprint_covers_all_that_decides_the_probabilities(mini: Backbone, tiny: Backbone) -> None:
    given = [
        (mini, NAMES, "a {}.", 20.0), (tiny, NAMES, "a {}.", 20.0), (mini, NAMES[::-1], "a {}.", 20.0),
        (mini, NAMES, "one {}.", 20.0), (mini, NAMES, "a {}.", 21.0),
    ]  # fmt: skip
    assert len({Teacher(*g).fingerprint for g in given}) == len(given)
    assert Teacher(*given[0]).fingerprint == Teacher(*given[0]).fingerprint


def views(pictures: Path, teacher: Preprocess | None, student: Preprocess, workers: int = 0) -> TrainingViews:
    files = sorted((pictures / "train").rglob("*.png"))
    labels = [CLASSES.index(file.parent.name) for file in files]
    return TrainingViews(files, labels, student, 5, 3, reader=ImageReader(workers), teacher=teacher)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_teacher_sees_the_students_regions_in_its_own_size_and_scale(pictures, tiny, mini, workers) -> None:
    own = Preprocess(48, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    plain = list(views(pictures, None, tiny.preprocess).epoch(2))
    both = list(views(pictures, own, tiny.preprocess, workers).epoch(2))
    assert len(plain) == len(both) == 2
    seen = 0
    files = sorted((pictures / "train").rglob("*.png"))
    order = np.random.default_rng([3, 2]).permutation(len(files))
    for batch, same in zip(plain, both, strict=True):
        assert torch.equal(batch.images, same.images)
        assert torch.equal(batch.labels, same.labels)
        assert same.teacher_images.shape == (5, 3, 48, 48)
        for student, view in zip(batch.images, same.teacher_images, strict=True):
            i = order[seen]
            image = Image.open(files[i])
            region = random_regions(np.random.default_rng([3, 2, i]), *image.size)[0]
            assert torch.equal(view, own.region(image, region))
            assert torch.equal(student, tiny.preprocess.region(image, region))
            seen += 1


def test_a_teacher_that_reads_the_same_has_no_view_of_its_own(pictures, tiny) -> None:
    same = Preprocess(**vars(tiny.preprocess))
    assert all(batch.teacher_images is None for batch in views(pictures, same, tiny.preprocess).epoch(0))
    scaled = Preprocess(**vars(tiny.preprocess) | {"std": (1, 1, 1)})
    assert all(batch.teacher_images is not None for batch in views(pictures, scaled, tiny.preprocess).epoch(0))


# --- losses ---------------------------------------------------------------------------------------


def plain_kl(a: Tensor, b: Tensor) -> float:
    """KL(a ‖ b) of two distributions, term by term."""
    return sum(x * math.log(x / y) for x, y in zip(a.tolist(), b.tolist(), strict=True))


def test_both_divergences_by_hand() -> None:
    torch.manual_seed(0)
    logits, p = torch.randn(4, 6, dtype=torch.double), torch.randn(4, 6, dtype=torch.double).softmax(-1)
    forward, reverse = divergences(logits, p)
    for b in range(4):
        q = logits[b].softmax(-1)
        assert forward[b].item() == pytest.approx(plain_kl(p[b], q))
        assert reverse[b].item() == pytest.approx(plain_kl(q, p[b]))
    torch.testing.assert_close(forward.mean(), kl_div(logits.log_softmax(-1), p, reduction="batchmean"))


def test_a_probability_of_zero_is_only_very_unlikely() -> None:
    logits, p = torch.zeros(2, 3, requires_grad=True), torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0]])
    forward, reverse = divergences(logits, p)
    (forward.sum() + reverse.sum()).backward()
    assert forward.tolist() == pytest.approx([math.log(3), math.log(1.5)])
    assert reverse.isfinite().all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", TAUGHT)
def test_a_student_that_agrees_with_its_teacher_is_at_rest(tiny: Backbone, name: str) -> None:
    method, batch = make(tiny, name), make_batch(tiny)
    with torch.no_grad():
        p = method.logits(method.image_features(batch), method.class_features(NAMES)).softmax(-1)
    losses = method.losses(Batch(batch.images, batch.labels, batch.frozen_image_features, p))
    for term in TERMS[name]:
        assert losses[term].item() == pytest.approx(0, abs=1e-5)
        (gradient,) = torch.autograd.grad(losses[term], next(method.parameters()), retain_graph=True)
        (other,) = torch.autograd.grad(method.losses(batch)[term], next(method.parameters()))
        assert gradient.norm() < 1e-3 * other.norm()


@pytest.mark.parametrize("name", TAUGHT)
def test_the_most_probable_classes_of_a_batch_alone_are_compared(tiny: Backbone, name: str) -> None:
    batch, k = make_batch(tiny), 3
    mean = batch.teacher_probabilities.mean(0).tolist()
    best = sorted(sorted(range(len(NAMES)), key=lambda c: -mean[c])[:k])
    ours = make(tiny, name).losses(batch.comparing(k))

    fewer = make(tiny, name)  # the same as a method of those classes alone, under the teacher's odds among them
    fewer.class_names = tuple(NAMES[c] for c in best)
    p = batch.teacher_probabilities[:, best]
    plain = fewer.losses(Batch(batch.images, batch.labels, batch.frozen_image_features, p / p.sum(-1, keepdim=True)))
    if name == "fdbpl_promptsrc":  # whose weight is that of all classes
        ratio = (
            informativeness(batch.teacher_probabilities).mean() / informativeness(p / p.sum(-1, keepdim=True)).mean()
        )
        plain |= {term: ratio * plain[term] for term in ("kl_forward", "kl_reverse")}
    assert ours.keys() == plain.keys()
    for term in ours:
        torch.testing.assert_close(ours[term], plain[term], atol=1e-5, rtol=1e-4)
    everything = make(tiny, name).losses(batch.comparing(len(NAMES) + 3))
    assert all(torch.equal(everything[term], value) for term, value in make(tiny, name).losses(batch).items())


@pytest.mark.parametrize("name", ["kdpl_coop", "fdbpl_coop"])
def test_methods_of_text_prompts_need_no_images_where_their_features_are_given(tiny: Backbone, name: str) -> None:
    batch = make_batch(tiny)
    without = Batch(None, batch.labels, batch.frozen_image_features, batch.teacher_probabilities)  # type: ignore[arg-type]
    losses, same = make(tiny, name).losses(batch), make(tiny, name).losses(without)
    assert all(torch.equal(losses[term], same[term]) for term in losses)


def test_classes_that_change_in_every_step_do_not_fill_the_memory(tiny: Backbone) -> None:
    method = make(tiny, "kdpl_coop")
    for seed in range(3 * text.LISTS_KEPT):
        method.losses(make_batch(tiny, seed=seed).comparing(2))
    lists = {tuple(n) for n in method.context._packed}
    assert 1 < len(lists) <= text.LISTS_KEPT
    for name in ("kdpl_vpt", "kdpl_promptsrc"):  # frozen features of all classes, once
        other = load_backbone(str(TINY))
        method = make(other, name)
        known = []
        for seed in range(3):
            method.losses(make_batch(other, seed=seed).comparing(2))
            known.append(len(other._known))
        assert known[0] == known[-1] == 1


@pytest.mark.parametrize("name", TAUGHT)
def test_one_class_a_batch_would_teach_nothing(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^teacher.classes_per_batch = 1 \(allowed: greater than or equal to 2\)$"):
        build_config(name, overrides={"classes_per_batch": 1})
    assert build_config(name, overrides={"classes_per_batch": 2}).teacher.classes_per_batch == 2


def test_class_specific_contexts_take_all_classes_or_none(tiny: Backbone, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^teacher.classes_per_batch = 3 \(allowed where each class has"):
        train(configured(pictures, "kdpl_coop", class_specific=True, classes_per_batch=3), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert make(tiny, "kdpl_coop", class_specific=True, n_ctx=2, init=None).losses(make_batch(tiny))


# --- FDBPL ----------------------------------------------------------------------------------------


def test_informativeness_is_one_for_a_sure_teacher_and_zero_for_one_that_cannot_tell() -> None:
    p = torch.stack([torch.eye(8)[2], torch.full((8,), 1 / 8), torch.tensor([0.5, 0.5, 0, 0, 0, 0, 0, 0])])
    assert informativeness(p).tolist() == pytest.approx([1, 0, 1 - math.log(2) / math.log(8)], abs=1e-5)
    assert informativeness(torch.ones(3, 1)).tolist() == pytest.approx([1, 1, 1], abs=1e-5)


def plain_hinge(v: Tensor, d: Tensor, p: Tensor, w: Tensor) -> Tensor:
    """The cascade as it is written down, pair by pair."""
    terms = []
    for a in range(len(v)):
        for b in range(len(v)):
            i, j = p[a].argmax(), p[b].argmax()
            if i != j:
                d_ij = d[i] - d[j]
                terms.append(w[a] * w[b] * max(0.2 - v[a] @ d_ij + v[b] @ d_ij, torch.zeros((), dtype=v.dtype)))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("n", [2, 7, 20])
def test_the_hinge_is_what_it_says_pair_by_pair(n: int) -> None:
    torch.manual_seed(n)
    v = torch.nn.functional.normalize(torch.randn(n, 16, dtype=torch.double), dim=-1)
    d = (0.4 * torch.randn(5, 16, dtype=torch.double)).requires_grad_()
    p = (2 * torch.randn(n, 5, dtype=torch.double)).softmax(-1)
    p[0], p[1] = torch.eye(5, dtype=torch.double)[0], torch.eye(5, dtype=torch.double)[1]  # one pair at least
    w = informativeness(p)
    ours, plain = hinge(v, d, p, w), plain_hinge(v, d, p, w)
    torch.testing.assert_close(ours, plain, atol=1e-12, rtol=0)
    for term in (ours, plain):
        assert term.item() > 0
    gradients = [torch.autograd.grad(x, d)[0] for x in (ours, plain)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


def test_the_hinge_of_one_class_is_zero() -> None:
    v, d = torch.randn(4, 8), torch.randn(3, 8, requires_grad=True)
    term = hinge(v, d, torch.eye(3)[[1, 1, 1, 1]], torch.ones(4))
    assert term.item() == 0
    assert not torch.autograd.grad(term, d)[0].any()


def test_the_cascade_is_one_more_term_and_off_by_default(tiny: Backbone) -> None:
    batch = make_batch(tiny, 12)
    off, on = make(tiny, "fdbpl_coop").losses(batch), make(tiny, "fdbpl_coop", pcd="hinge").losses(batch)
    assert set(on) - set(off) == {"pcd"}
    assert all(torch.equal(off[term], on[term]) for term in off)
    method = make(tiny, "fdbpl_coop")
    v, p = batch.frozen_image_features, batch.teacher_probabilities
    d = method.class_features(NAMES) - method.encode_classes(NAMES, method.negative)
    torch.testing.assert_close(on["pcd"], 0.1 * plain_hinge(v, d, p, informativeness(p)))


def test_the_negative_context_is_not_saved(tiny: Backbone, tmp_path: Path) -> None:
    method = make(tiny, "fdbpl_coop")
    assert "negative.vectors" in method.state_dict()  # checkpoints go on with it
    save_artefact(method, tmp_path)
    assert set(prompts(tmp_path)) == {"context.vectors"}
    loaded = load_artefact(tmp_path)
    assert torch.equal(loaded.class_features(NAMES), method.class_features(NAMES))


@pytest.mark.parametrize(
    ("name", "settings", "couples"),
    [
        pytest.param("kdpl_coop", {}, False, marks=slow),
        ("fdbpl_coop", {}, False), ("fdbpl_coop", {"pcd": "hinge"}, True), ("fdbpl_promptsrc", {}, True),
    ],
)  # fmt: skip
def test_only_terms_over_the_batch_couple_it(tiny: Backbone, pictures, mini, name, settings, couples) -> None:
    """A batch in parts gives the whole batch's prompts (in float64), or is refused."""
    student, own = load_backbone(str(TINY)).to(dtype=torch.double), load_backbone(TEACHER).to(dtype=torch.double)
    teacher = Teacher(own, CLASSES, "a photo of a {}.", student.logit_scale)

    def tuned(parts: int) -> dict[str, Tensor]:
        torch.manual_seed(1)
        cls = find_method(name)
        method = cls(student, CLASSES, cls.Config(**settings)).double()
        regions = views(pictures, double(own.preprocess), double(student.preprocess))
        optim, config = OptimConfig(lr=0.01, warmup_epochs=0), TrainConfig(epochs=2, accumulate=parts)
        assert Training(method, regions, optim, config, teacher=teacher).run()
        return method.state_dict()

    if couples:
        with pytest.raises(ConfigError, match=rf"^method '{name}' compares the images of a batch: it does not allow"):
            tuned(3)
        return
    whole, parts = tuned(1), tuned(3)
    for key in whole:
        torch.testing.assert_close(parts[key], whole[key], atol=1e-9, rtol=0)


def double(preprocess: Preprocess) -> Preprocess:
    """The same views in float64."""

    class Double(Preprocess):
        def region(self, *given):
            return super().region(*given).double()

    return Double(**vars(preprocess))


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TAUGHT)
def test_a_run_with_a_teacher(name, pictures, mini, tmp_path) -> None:
    said: list[str] = []
    config = configured(pictures, name, **{"train.epochs": 1})
    method, result = train(config, tmp_path / "run", say=said.append)
    assert f"taught by {TEACHER}: 3 classes, 'a photo of a {{}}.'" in said[0].splitlines()
    assert result.teacher == json.loads((tmp_path / "run" / "metrics.json").read_text())["teacher"] == TEACHER
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["teacher_fingerprint"] == mini.fingerprint
    assert f"| teacher | `{TEACHER}` in place of labels |" in (tmp_path / "run" / "README.md").read_text("utf-8")
    assert set(TERMS[name]) <= set(log(tmp_path / "run")[0])
    assert method.class_names == CLASSES


def test_labels_decide_nothing(pictures, tiny, mini) -> None:
    teacher = Teacher(mini, CLASSES, "a photo of a {}.", tiny.logit_scale)
    tuned = []
    for order in (torch.arange(12), torch.arange(12).flip(0)):
        method = build_method("kdpl_coop", tiny, CLASSES)
        regions = views(pictures, mini.preprocess, tiny.preprocess)
        regions.labels = regions.labels[order]
        Training(method, regions, OptimConfig(warmup_epochs=0), TrainConfig(epochs=1), teacher=teacher).run()
        tuned.append(method.context.vectors)
    assert torch.equal(*tuned)


def test_the_teachers_settings_reach_it(pictures, tmp_path) -> None:
    more = {"teacher.template": "a drawing of a {}.", "teacher.logit_scale": 5.0, "train.epochs": 1}
    said: list[str] = []
    train(configured(pictures, "kdpl_coop", **more), tmp_path / "soft", say=said.append)
    assert "'a drawing of a {}.'" in said[0]
    train(configured(pictures, "kdpl_coop", **{"train.epochs": 1}), tmp_path / "plain")
    soft, plain = (prompts(tmp_path / run)["context.vectors"] for run in ("soft", "plain"))
    assert not torch.equal(soft, plain)
    assert saved_config(tmp_path / "soft").teacher.logit_scale == 5.0


@pytest.mark.parametrize("name", TAUGHT)
def test_a_missing_teacher_is_named(name, pictures, tmp_path) -> None:
    with pytest.raises(ConfigError) as error:
        train(configured(pictures, name, **{"teacher.backbone": None}), tmp_path / "run")
    assert str(error.value) == f"teacher.backbone is not given: method '{name}' learns from a teacher (--teacher)"
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"^teacher.backbone is not given"):
        fit(build_method(name, load_backbone(str(TINY)), ["a", "b"]), [Image.new("RGB", (32, 32))], ["a"], epochs=1)


def test_the_command_line_takes_a_teacher(vlprompt, pictures, tmp_path) -> None:
    given = ("train", "kdpl_coop", str(pictures), "--backbone", str(TINY), "--out", str(tmp_path / "run"))
    shown = vlprompt(*given, "--teacher", "mini", "logit_scale=30", "--dry-run")
    assert yaml.safe_load(shown.out)["teacher"] == {
        "backbone": "mini", "template": None, "logit_scale": 30.0, "class_names_file": None,
        "classes_per_batch": None,
    }  # fmt: skip
    refused = vlprompt(*given)
    expected = "error: teacher.backbone is not given: method 'kdpl_coop' learns from a teacher (--teacher)\n"
    assert refused == (2, "", expected)


def test_bad_teachers(pictures, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"^teacher.logit_scale = 30: method 'coop' learns from labels, unless teac"):
        build_config("coop", overrides={"teacher.logit_scale": 30})
    assert build_config("coop", overrides={"teacher.backbone": None}) == build_config("coop")
    with pytest.raises(BackboneError, match=r"^no backbone 'minni': did you mean 'mini'"):
        train(configured(pictures, "kdpl_vpt", **{"teacher.backbone": "minni"}), tmp_path / "run")
    with pytest.raises(
        ConfigError, match=r"^teacher.template = x \(allowed: .*; teacher.logit_scale = 0.0 \(allowed: g"
    ):
        build_config("kdpl_coop", overrides={"teacher.logit_scale": 0.0, "teacher.template": "x"})
    assert not (tmp_path / "run").exists()


def test_a_short_key_means_the_methods_own_setting_first() -> None:
    config = build_config("kdpl_vpt", overrides={"template": "one {}.", "backbone": "other"})
    assert (config.options.template, config.teacher.template) == ("one {}.", None)
    assert (config.backbone, config.teacher.backbone) == ("other", None)
    with pytest.raises(ConfigError, match=r"'template' is not clear \(write one of data.template, teacher.template\)"):
        build_config("kdpl_coop", overrides={"template": "one {}."})


def test_off_is_a_word_in_a_file_too(tmp_path) -> None:
    (tmp_path / "c.yaml").write_text("pcd: off\nclass_specific: true\n")
    from vlprompt.config.schema import read_config

    settings = build_config("fdbpl_coop", file=read_config(tmp_path / "c.yaml")).options
    assert (settings.pcd, settings.class_specific) == ("off", True)


@pytest.mark.parametrize("name", sweep(["kdpl_promptsrc", "fdbpl_coop"], "fdbpl_coop"))
def test_a_stopped_run_goes_on_with_its_teacher_and_no_other(name, pictures, tiny, tmp_path) -> None:
    config = configured(pictures, name, **{"train.epochs": 2})
    train(config, tmp_path / "whole")
    run = tmp_path / "stopped"
    with pytest.raises(Interrupted):
        train(config, run, [StopsAfter(2)])
    other = yaml.safe_load((run / "config.yaml").read_text())
    other["teacher"]["backbone"] = str(TINY)
    whole = (run / "config.yaml").read_bytes()
    (run / "config.yaml").write_text(yaml.safe_dump(other))
    with pytest.raises(ArtefactError, match=rf"stopped was begun with another teacher than '{TINY}' is now"):
        train(saved_config(run), run, resume=True)
    (run / "config.yaml").write_bytes(whole)
    train(saved_config(run), run, resume=True)
    ours, theirs = prompts(run), prompts(tmp_path / "whole")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert log(run) == log(tmp_path / "whole")


def test_a_class_agnostic_run(pictures, dictionary, tmp_path) -> None:
    said: list[str] = []
    more = {"teacher.class_names_file": str(dictionary), "teacher.classes_per_batch": 4, "train.epochs": 1}
    method, result = train(configured(pictures, "kdpl_coop", **more), tmp_path / "run", say=said.append)
    assert method.class_names == WORDS
    assert f"taught by {TEACHER}: 7 classes, 'a photo of a {{}}.'" in said[0]
    assert "3 classes of" in said[0]  # what it is evaluated on
    assert 0 <= result.train_accuracy <= 100
    loaded = load_artefact(tmp_path / "run")
    assert torch.equal(loaded.class_features(CLASSES), method.class_features(CLASSES))


def test_a_dictionary_that_cannot_be_used(pictures, dictionary, tmp_path) -> None:
    def run(**more: Any) -> None:
        train(configured(pictures, "kdpl_coop", **{k.replace("__", "."): v for k, v in more.items()}), tmp_path / "run")

    with pytest.raises(DataError, match=r"^cannot read class names from nowhere.txt"):
        run(teacher__class_names_file="nowhere.txt")
    with pytest.raises(ConfigError, match=r"^teacher.class_names_file: with class_specific"):
        run(teacher__class_names_file=str(dictionary), class_specific=True)
    dictionary.write_text("cat\ncat\n")
    with pytest.raises(DataError, match=r"words.txt: 2 classes are named 'cat'"):
        run(teacher__class_names_file=str(dictionary))
    dictionary.write_text("\n \n")
    with pytest.raises(DataError, match=r"words.txt: there are no class names"):
        run(teacher__class_names_file=str(dictionary))
    assert not (tmp_path / "run").exists()


@slow
def test_two_processes_share_the_teachers_work(pictures, tmp_path) -> None:
    more = ["--teacher", TEACHER, "train.epochs=1", "data.batch_size=5", "lr=0.0005"]
    run = tmp_path / "two"
    results = processes(["-m", "vlprompt", *arguments("kdpl_coop", pictures, run, *more)])
    assert [code for code, *_ in results] == [0, 0], results
    assert f"taught by {TEACHER}" in results[0][2]
    assert "taught by" not in results[1][2]
    settings = {"train.epochs": 1, "data.batch_size": 5, "optim.lr": 0.0005}
    train(configured(pictures, "kdpl_coop", **settings), tmp_path / "one")
    ours, alone = (prompts(folder)["context.vectors"] for folder in (run, tmp_path / "one"))
    torch.testing.assert_close(ours, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_teacher_runs_in_the_students_precision(precision, pictures, tmp_path, monkeypatch) -> None:
    seen = []
    original = Teacher.probabilities

    def watch(self, images):
        seen.append((self.model.dtype, original(self, images).dtype))
        return original(self, images)

    monkeypatch.setattr(Teacher, "probabilities", watch)
    train(configured(pictures, "kdpl_coop", **{"train.epochs": 1, "train.precision": precision}), tmp_path / "run")
    towers = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert set(seen) == {(towers, torch.float32)}


def test_from_python(pictures, tiny, tmp_path) -> None:
    files = sorted((pictures / "train").rglob("*.png"))
    labels = [file.parent.name for file in files]
    method = fit(
        build_method("kdpl_coop", tiny, CLASSES), files, labels, teacher=TEACHER, epochs=3, batch_size=4, workers=0,
        warmup_epochs=0,
    )  # fmt: skip
    train(configured(pictures, "kdpl_coop"), tmp_path / "run")
    assert torch.equal(method.context.vectors, prompts(tmp_path / "run")["context.vectors"])
    classifier = PromptClassifier(
        "kdpl_coop", tiny, epochs=3, batch_size=4, settings={"teacher": TEACHER, "workers": 0, "warmup_epochs": 0}
    ).fit(files, labels)
    assert torch.equal(classifier.model_.method.context.vectors, method.context.vectors)


# --- other teachers than backbones -------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned_teacher(pictures, tmp_path_factory) -> Path:
    """A run of another method, as a teacher."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    train(configured(pictures, "promptsrc", **{"train.epochs": 2}), run)
    return run


def test_a_tuned_model_teaches_what_it_predicts(tuned_teacher, pictures, tiny, tmp_path) -> None:
    run = tmp_path / "run"
    said: list[str] = []
    train(configured(pictures, "coop", **{"teacher.backbone": str(tuned_teacher)}), run, say=said.append)
    assert f"taught by {tuned_teacher}: 3 classes" in said[0]
    assert {"kl_forward", "kl_reverse"} < set(log(run)[0])
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    config = build_config("coop", overrides={"teacher.backbone": str(tuned_teacher)})
    teacher = find_teacher(config, CLASSES, "a photo of a {}.", tiny)
    expected = load_artefact(tuned_teacher).predict(images, CLASSES).softmax(-1)
    torch.testing.assert_close(teacher.probabilities(images), expected)
    other = tmp_path / "other"
    shutil.copytree(tuned_teacher, other)
    again = find_teacher(replace(config, teacher=replace(config.teacher, backbone=str(other))), CLASSES, "", tiny)
    assert again.fingerprint == teacher.fingerprint, "where it lies decides nothing"


def test_teachers_come_in_the_students_precision(tuned_teacher, double) -> None:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    for name in (str(TINY), str(tuned_teacher)):
        config = build_config("coop", overrides={"teacher.backbone": name})
        p = find_teacher(config, CLASSES, "a photo of a {}.", double).probabilities(images)
        assert p.dtype == torch.double
        torch.testing.assert_close(p.sum(-1), torch.ones(4, dtype=torch.double), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("key", "value"), [("template", "one {}."), ("logit_scale", 3.0)])
def test_a_tuned_teacher_keeps_its_own(key, value, tuned_teacher, pictures, tmp_path) -> None:
    given = {"teacher.backbone": str(tuned_teacher), f"teacher.{key}": value}
    with pytest.raises(ConfigError, match=rf"^teacher.{key} = {value}: .*run is a tuned model, which has its own$"):
        train(configured(pictures, "coop", **given), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_linear_probe_teaches_its_own_classes_only(pictures, tmp_path, dictionary) -> None:
    train(configured(pictures, "linear_probe"), tmp_path / "probe")
    given = {"teacher.backbone": str(tmp_path / "probe"), "train.epochs": 1}
    train(configured(pictures, "coop", **given), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"probe: linear_probe knows the classes alone that it was tuned on$"):
        train(configured(pictures, "coop", **given, **{"teacher.class_names_file": str(dictionary)}), tmp_path / "no")


class Brightness:
    """A model of one's own: it tells classes by how bright images are."""

    name, fingerprint, device = "brightness", "1", torch.device("cpu")
    preprocess = Preprocess(8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def probabilities(self, images, class_names):
        assert images.shape[1:] == (3, 8, 8)
        return (images.mean((1, 2, 3))[:, None] * torch.arange(len(class_names))).softmax(-1)


def test_any_classifier_teaches(pictures, tiny) -> None:
    files = sorted((pictures / "train").rglob("*.png"))
    labels = [CLASSES.index(file.parent.name) for file in files]
    logs = []
    method = build_method("coop", tiny, CLASSES)
    fit(method, files, labels, teacher=Brightness(), epochs=1, batch_size=4, after_epoch=logs.append)
    assert set(logs[0].losses) == {"kl_forward", "kl_reverse"}
    with pytest.raises(ConfigError, match=r"^data.bank = banks: a bank has labels, and 'brightness' was g"):
        fit(build_method("coop", tiny, CLASSES), files, labels, teacher=Brightness(), bank="banks")
