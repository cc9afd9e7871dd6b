"""Calibration: temperatures, sets and thresholds have their right values; tuned models keep and use them."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.kit import TINY, sealed
from tests.kit.checks import tree
from tests.kit.command import vlprompt
from tests.kit.pictures import make_photos, make_pictures
from vlprompt.api import PromptedModel, build_method, fit
from vlprompt.artefact.artefact import load_calibration, read_artefact_config
from vlprompt.artefact.calibration import (
    Calibration,
    auroc,
    class_factors,
    fit_calibration,
    fit_temperature,
    novelty_areas,
)
from vlprompt.errors import ConfigError, DataError
from vlprompt.training.evaluate import score


def draws(n: int, classes: int, sharpness: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits whose softmax is the truth that labels are drawn from, times ``sharpness``."""
    generator = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(n, classes, generator=generator, dtype=torch.double)
    return sharpness * z, torch.multinomial(z.softmax(-1), 1, generator=generator)[:, 0]


# --- temperature ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sharpness", [0.25, 1.0, 4.0])
def test_the_temperature_undoes_a_scale_of_the_logits(sharpness: float) -> None:
    logits, labels = draws(20000, 6, sharpness)
    temperature, note = fit_temperature(logits, labels)
    assert temperature == pytest.approx(sharpness, rel=0.03)
    assert note == ""
    losses = [cross_entropy(logits / t, labels).item() for t in (0.99 * temperature, temperature, 1.01 * temperature)]
    assert losses[1] == min(losses)
    assert score(logits / temperature, labels, "abcdef").calibration_error < 0.015


def test_the_temperature_of_two_logits_is_known() -> None:
    # Three of four images are right by a margin of 2: p = 3/4 where 2 / T = log 3.
    logits, labels = torch.tensor([[2.0, 0.0]] * 4), torch.tensor([0, 0, 0, 1])
    assert fit_temperature(logits, labels)[0] == pytest.approx(2 / math.log(3), rel=1e-8)
    assert fit_temperature(logits.float() + 1e4, labels)[0] == pytest.approx(2 / math.log(3), rel=1e-8)


def test_where_no_temperature_is_best_it_says_why() -> None:
    logits = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    assert fit_temperature(logits, torch.tensor([0, 1])) == (
        1.0, "every held-out image is classified right: any lower temperature fits better"
    )  # fmt: skip
    temperature, note = fit_temperature(logits, torch.tensor([1, 0]))
    assert note.startswith("the logits say no more than chance")
    assert (logits / temperature).softmax(-1).amax() < 0.51, "surer than chance"


# --- sets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("coverage", [0.8, 0.9, 0.95])
def test_sets_cover_what_was_asked(coverage: float) -> None:
    logits, labels = draws(3000, 6, 2.0, seed=1)
    calibration, _ = fit_calibration(logits, labels)
    new, truth = draws(20000, 6, 2.0, seed=2)
    p = (new / calibration.temperature).softmax(-1)
    rows = torch.arange(len(truth))
    sets, by_class = calibration.sets(p, coverage), calibration.sets(p, coverage, by_class=True)
    assert sets[rows, truth].double().mean().item() == pytest.approx(coverage, abs=0.015)
    for c in range(6):
        own = truth == c
        assert by_class[rows, truth][own].double().mean().item() == pytest.approx(coverage, abs=0.04)
    assert (sets.sum(-1) == (1 - p <= quantile_of(calibration, coverage)).sum(-1)).all()


def quantile_of(calibration: Calibration, coverage: float) -> float:
    scores = np.concatenate([np.array(s) for s in calibration.misfit])
    n = len(scores)
    return float(np.quantile(scores, min(math.ceil((n + 1) * coverage) / n, 1), method="inverted_cdf")) + 1e-9


def test_a_quantile_counts_the_image_to_come() -> None:
    misfit = (tuple(i / 10 for i in range(1, 10)), (0.05,))  # 9 images of one class, one of the other
    calibration = Calibration(1.0, misfit, "energy", None, 0.95)
    p = torch.tensor([[0.1, 0.9], [0.2, 0.2], [0.05, 0.94]], dtype=torch.double)
    # ⌈11 · 0.8⌉ = 9 of 10 scores: 0.8.
    assert calibration.sets(p, 0.8).tolist() == [[False, True], [True, True], [False, True]]
    # Of the first class ⌈10 · 0.9⌉ = 9 of 9 scores: 0.9; the other has too few, and takes the common 0.9 of 10.
    assert calibration.sets(p, 0.9, by_class=True).tolist() == [[True, True], [True, True], [False, True]]
    # ⌈11 · 0.95⌉ = 11 of 10: no set but all classes promises that.
    assert calibration.sets(p, 0.95).all()
    for bad in (0.0, 1.0, -1.0, 1.5, math.nan):
        with pytest.raises(ConfigError, match=r"allowed: more than 0 and less than 1"):
            calibration.sets(p, bad)


# --- none of these --------------------------------------------------------------------------------


def test_the_area_under_the_curve_counts_pairs() -> None:
    known, novel = torch.tensor([1.0, 3.0, 2.0]), torch.tensor([2.0, 0.0])
    assert auroc(known, novel) == pytest.approx((3 + 1.5) / 6)  # 3 above 0; above 2 one, and one as high
    assert auroc(known, known) == pytest.approx(0.5)


def test_the_threshold_leaves_the_share_that_was_asked() -> None:
    logits, labels = draws(999, 6, 1.0)
    calibration, areas = fit_calibration(logits, labels, kept=0.95)
    z = logits / calibration.temperature
    out = calibration.none_of_these(z)
    assert out is not None
    assert out.sum() == 49  # the 50th smallest of 999 is the threshold: 50 / 1000 fall below it or at it
    assert calibration.score == max(areas, key=areas.__getitem__)
    new = draws(20000, 6, 1.0, seed=5)[0] / calibration.temperature
    assert calibration.none_of_these(new).double().mean().item() == pytest.approx(0.05, abs=0.02)  # type: ignore[union-attr]


def test_too_few_images_give_no_threshold() -> None:
    logits, labels = draws(19, 4, 1.0)
    assert fit_calibration(logits[:18], labels[:18])[0].threshold is None
    z, few = fit_calibration(logits, labels)[0], fit_calibration(logits[:18], labels[:18])[0]
    assert z.threshold is not None  # 5 % of the 20 images with the one to come
    assert few.none_of_these(logits) is None


def test_energy_or_probability_whichever_tells_novel_images() -> None:
    known = torch.tensor([[9.0, 0.0], [0.0, 9.0]])
    faint, torn = torch.tensor([[2.0, 0.0]]), torch.tensor([[9.0, 9.0]])
    labels = torch.tensor([0, 1])
    assert novelty_areas(known, labels, faint) == {"maximum probability": 1.0, "energy": 1.0}
    assert novelty_areas(known, labels, torn) == {"maximum probability": 1.0, "energy": 0.0}
    assert novelty_areas(known, labels) == {}  # of two classes none can be left out


def test_classes_left_out_stand_for_novel_ones() -> None:
    logits = 9 * torch.eye(4)
    # Known ones have 9 among two logits, those left out 0 twice.
    assert novelty_areas(logits, torch.arange(4)) == {"maximum probability": 1.0, "energy": 1.0}


# --- in a tuned model -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 training and 8 val pictures of noise a class, which a model takes for any class."""
    return make_pictures(tmp_path_factory.mktemp("noise"), val=8)


@pytest.fixture
def run(noise: Path, tmp_path: Path) -> Path:
    """Trained on them, and calibrated at the end."""
    done = vlprompt("train", "zero_shot", noise, "--backbone", TINY, "--out", tmp_path / "run")
    assert "calibrated on 24 val images: temperature " in done.err
    return tmp_path / "run"


def changed(run: Path, **values: Any) -> Calibration:
    """Give the run another calibration, of which the numbers are known."""
    config = read_artefact_config(run)
    config["calibration"] |= values
    sealed.write(run / "config.json", dict(config))
    calibration = load_calibration(run)
    assert calibration is not None
    return calibration


def test_training_calibrates_on_val_images(run: Path, noise: Path) -> None:
    calibration = load_calibration(run)
    assert calibration is not None
    assert sum(map(len, calibration.misfit)) == 24
    again = vlprompt("calibrate", run, noise, "--json").json
    assert again["temperature"] == calibration.temperature
    assert load_calibration(run) == calibration
    assert set(again) == {
        "run", "temperature", "score", "threshold", "kept", "temperature_note", "images", "calibration_error",
        "calibrated_error", "coverage", "coverage_by_class", "set_size", "asked", "novel_images", "auroc", "skipped",
    }  # fmt: skip


def test_resuming_a_finished_run_leaves_its_calibration(run: Path) -> None:
    calibration = changed(run, temperature=7.0)
    assert vlprompt("train", "--resume", run).code == 0
    assert load_calibration(run) == calibration
    (run / "config.json").write_text("{")
    done = vlprompt("train", "--resume", run)
    assert (done.code, "calibrated on 24 val images" in done.err) == (0, True)
    assert load_calibration(run) not in (None, calibration)


def test_without_enough_val_images_training_calibrates_nothing(photos: Path, tmp_path: Path) -> None:
    done = vlprompt("train", "zero_shot", photos, "--backbone", TINY, "--shots", "1", "--out", tmp_path / "run")
    assert done.code == 0
    assert load_calibration(tmp_path / "run") is None
    done = vlprompt("predict", tmp_path / "run", photos / "test", "--sets", "0.9")
    assert (done.code, done.out) == (2, "")
    assert "is not calibrated; see `vlprompt calibrate" in done.err


def test_predict_prints_calibrated_probabilities_sets_and_none(run: Path, noise: Path) -> None:
    image = noise / "val" / "cat" / "0.png"
    changed(run, temperature=1.0, threshold=None)
    plain = vlprompt("predict", run, image, "--json").json["predictions"][0]
    assert set(plain) == {"image", "top"}
    calibration = changed(run, temperature=2.5, misfit=[[0.5] * 50] * 3, score="maximum probability", threshold=1.1)
    warm = vlprompt("predict", run, image, "--json", "--sets", "0.9").json["predictions"][0]
    logits = torch.tensor([t["probability"] for t in plain["top"]], dtype=torch.double).log()
    expected = (logits / calibration.temperature).softmax(-1)
    assert [t["probability"] for t in warm["top"]] == pytest.approx(expected.tolist())
    assert warm["none_of_these"] is True
    assert warm["set"] == [t for t in warm["top"] if t["probability"] >= 0.5 - 1e-9]
    text = vlprompt("predict", run, image, "--sets", "0.9").out
    assert "\n  none of these\n" in text
    assert "\n  set: " in text
    rows = list(csv.reader(io.StringIO(vlprompt("predict", run, image, "--csv", "--sets", "0.9").out)))
    assert rows[0] == ["image", "class", "probability", "none_of_these", "in_set"]
    assert [row[3] for row in rows[1:]] == ["true"] * 3
    assert [row[1] for row in rows[1:] if row[4] == "true"] == [t["class"] for t in warm["set"]]
    # Of other class names nothing is known but their probabilities.
    other = vlprompt("predict", run, image, "--class-names", "cat,otter", "--json").json["predictions"][0]
    assert set(other) == {"image", "top"}
    done = vlprompt("predict", run, image, "--class-names", "cat,otter", "--sets", "0.9")
    assert done.code == 2
    assert "sets are of the model's own classes" in done.err


def test_images_of_other_classes_measure_the_threshold(noise: Path, tmp_path: Path) -> None:
    assert vlprompt(
        "train", "zero_shot", noise, "--backbone", TINY, "--classes", "base", "--out", tmp_path / "run"
    ).code == 0  # fmt: skip
    told = vlprompt("calibrate", tmp_path / "run", noise, "--json").json
    assert (told["images"], told["novel_images"]) == (16, 8)
    assert set(told["auroc"]) == {"maximum probability", "energy"}
    said = vlprompt("calibrate", tmp_path / "run", noise)
    assert "known images against 8 images of other classes" in said.out
    assert "too few images for a threshold that keeps 95 % of them" in said.out
    loose = vlprompt("calibrate", tmp_path / "run", noise, "--kept", "0.8", "--json").json
    assert loose["threshold"] is not None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--coverage", "1"], "--coverage = 1 (allowed: more than 0 and less than 1)"),
        (["--coverage", "-0.1"], "--coverage = -0.1"),
        (["--kept", "1.5"], "--kept = 1.5"),
        (["--split", "train"], "'train' is not one of 'val', 'test'"),
        (["--split", "test"], "has no test images to calibrate on"),
    ],
)
def test_what_calibrate_refuses(run: Path, noise: Path, arguments: list[str], says: str) -> None:
    refuses(run, noise, *arguments, says=says)


def refuses(run: Path, data: Path, *arguments: str, says: str) -> None:
    before = tree(run)
    done = vlprompt("calibrate", run, data, *arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert says in done.err
    assert tree(run) == before


def test_calibrate_refuses_images_that_were_trained_on(run: Path, noise: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    for name in ("cat", "dog", "sea horse"):
        for i in range(4):
            target = copied / "val" / name / f"renamed{i}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((noise / "train" / name / f"{i}.png").read_bytes())
    refuses(run, copied, says="12 of 12 images were trained on")
    refuses(run, noise / "train", "--split", "test", says="6 of 6 images were trained on")


def test_calibrate_refuses_too_little(run: Path, tmp_path: Path) -> None:
    one = make_photos(tmp_path / "one", val=1)
    refuses(
        run, one, says="has no val images of the model's classes (cat, dog, sea horse): its classes are blue, green"
    )
    single = make_pictures(tmp_path / "single", val=1)
    assert vlprompt("train", "zero_shot", single, "--backbone", TINY, "--out", tmp_path / "few").code == 0
    refuses(tmp_path / "few", single, says="calibration needs two held-out images of a class, and there are 3 images")
    for name in ("dog", "sea horse"):
        for part in ("train", "val"):
            for file in (single / part / name).iterdir():
                file.unlink()
            (single / part / name).rmdir()
    refuses(run, single, says="at least two classes are needed (found: cat)")


def test_predict_refuses_a_coverage_outside_0_to_1(run: Path, noise: Path) -> None:
    for sets in ("0", "1", "1.5", "-0.5"):
        done = vlprompt("predict", run, noise / "val", "--sets", sets)
        assert (done.code, done.out) == (2, "")
        assert f"--sets = {sets} (allowed: more than 0 and less than 1)" in done.err
    done = vlprompt("predict", run, noise / "val", "--by-class")
    assert "--by-class is about --sets" in done.err


def test_a_damaged_calibration_is_told(run: Path, noise: Path) -> None:
    config = read_artefact_config(run)
    for values in ({"temperature": -1}, {"score": "entropy"}, {"threshold": "high"}):
        sealed.change(run / "config.json", calibration={**config["calibration"], **values})
        done = vlprompt("predict", run, noise / "val")
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert f"cannot read the tuned model in {run}" in done.err


def test_python(noise: Path, tmp_path: Path, tiny: Any) -> None:
    paths = sorted((noise / "val").rglob("*.png"))
    labels = [path.parent.name for path in paths]
    model = PromptedModel(build_method("zero_shot", tiny, ["cat", "dog", "sea horse"]))
    before = model.predict(paths)
    with pytest.raises(ConfigError, match=r"sets = 0\.9: they need a calibrated model"):
        model.predict(paths, sets=0.9)
    worth = model.calibrate(paths, labels, kept=0.8)
    assert worth.images == 24
    after = model.predict(paths, sets=0.9)
    assert (before.none_of_these, before.sets) == (None, None)
    assert after.none_of_these is not None
    assert after.none_of_these.sum() == 4  # the 5th smallest of 24 is the threshold
    assert after.sets is not None
    assert len(after.sets) == 24
    model.save_pretrained(tmp_path)
    loaded = PromptedModel.from_pretrained(tmp_path, backbone=tiny)
    assert loaded.calibration == model.calibration
    np.testing.assert_array_equal(loaded.predict(paths).probabilities, after.probabilities)
    with pytest.raises(DataError, match="calibration needs two held-out images of a class, and there are 2 images"):
        model.calibrate(paths[:9:8], ["cat", "dog"])


def test_class_names_not_tuned_on_are_less_sure_the_further_they_moved(tiny: Any, noise: Path) -> None:
    names, others = ["cat", "dog", "sea horse"], ("otter", "cat")
    paths = sorted((noise / "train").rglob("*.png"))
    method = build_method("coop", tiny, names, n_ctx=2)
    fit(method, paths, [path.parent.name for path in paths], epochs=2, lr=0.1, batch_size=4)
    calibration = Calibration(2.0, ((), (), ()), "energy", None, 0.95)
    factors = class_factors(method, others)
    assert factors is not None
    assert factors[1] == 1  # tuned on
    assert factors[0] != 1
    logits = torch.tensor([[3.0, 1.0], [1.0, 3.0]])
    expected = torch.stack([logits[0] * factors[0], logits[1]]) / 2
    torch.testing.assert_close(calibration.logits(method, logits, others), expected.double())
    own = calibration.logits(method, torch.ones(1, 3), names)
    torch.testing.assert_close(own, torch.full((1, 3), 0.5, dtype=torch.double))
    # Rows of this head are no text features, and these features depend on the image: the temperature alone.
    head = build_method("gda", tiny, names)
    head.fit_features(torch.randn(6, tiny.embed_dim), torch.tensor([0, 0, 1, 1, 2, 2]))
    for method in (head, build_method("cocoop", tiny, names)):
        assert class_factors(method.eval(), others) is None
    # Of a part of its own classes, which a probe may be asked for, it has no texts either.
    assert class_factors(build_method("linear_probe", tiny, names), names[:2]) is None
