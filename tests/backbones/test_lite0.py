"""The classifier that teaches: what it says of photographs, and its way into runs and banks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.kit import TINY
from tests.kit.marks import slow
from tests.kit.pictures import make_pictures
from tests.kit.runs import configured
from vlprompt.backbones import lite0
from vlprompt.backbones.lite0 import Lite0, kinds
from vlprompt.config.teacher import Teacher, load_teacher_model
from vlprompt.data.datasets import load_dataset
from vlprompt.data.images import load_image
from vlprompt.data.known.table import PHOTOGRAPHS
from vlprompt.errors import BackboneError
from vlprompt.training.run import train

CLOTHES = ["dress", "hat", "longsleeve", "outwear", "pants", "shirt", "shoes", "shorts", "skirt", "t-shirt"]


@pytest.fixture(scope="module")
def model() -> Lite0:
    return Lite0()


@pytest.fixture(scope="module")
def shoes(model: Lite0) -> torch.Tensor:
    """Preprocessed photographs of shoes."""
    files = sorted((PHOTOGRAPHS / "test" / "shoes").iterdir())
    return torch.stack([model.preprocess(load_image(file)) for file in files])


def test_its_kinds_are_imagenets() -> None:
    listed = kinds()
    assert len(listed) == 1000
    assert [kind.id for kind in listed] == sorted({kind.id for kind in listed})
    assert listed[0].names[0] == "tench"
    assert listed[134].text == "crane, wading bird"
    assert listed[517].text == "crane, lifting device"
    assert all(kind.names and kind.gloss for kind in listed)


def test_it_reads_what_it_was_trained_on(model: Lite0) -> None:
    pixels = np.array([[[0] * 3, [127] * 3, [255] * 3]], np.uint8)  # three pixels in a row
    shown = model.preprocess.tensor(pixels)
    torch.testing.assert_close(shown[0, 0], torch.tensor([-127.0, 0.0, 128.0]) / 128)


@slow
def test_where_its_kinds_point_is_written_down(model: Lite0) -> None:
    torch.testing.assert_close(model.names, lite0.directions(kinds(), model.embed), rtol=0, atol=1e-6)


def test_another_encoder_leads_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    few = kinds()[:4]
    monkeypatch.setattr(lite0, "kinds", lambda: few)
    monkeypatch.setattr(lite0, "sentence_encoder", lambda: lambda texts: torch.eye(384)[[len(t) for t in texts]])
    assert torch.equal(lite0.kind_directions.__wrapped__(), lite0.directions(few, lite0.sentence_encoder()))


def test_folding_changes_nothing(model: Lite0, shoes: torch.Tensor) -> None:
    from efficientnet_lite_pytorch import EfficientNet

    plain = EfficientNet.from_name(lite0.NAME)
    plain.load_state_dict(torch.load(lite0.classifier_file(), weights_only=True))
    with torch.no_grad():
        expected = plain.eval()(shoes[:2]).softmax(-1)
    torch.testing.assert_close(model.class_probabilities(shoes[:2]), expected, rtol=1e-3, atol=1e-5)


def test_it_sees_shoes(model: Lite0, shoes: torch.Tensor) -> None:
    p = model.class_probabilities(shoes)
    torch.testing.assert_close(p.sum(-1), torch.ones(len(p)))
    worn = {i for i, kind in enumerate(kinds()) if {"Loafer", "clog", "running shoe", "sandal"} & set(kind.names)}
    assert sum(best in worn for best in p.argmax(-1).tolist()) > len(shoes) / 2


def test_its_directions_mix_the_names_of_the_likeliest(model: Lite0, shoes: torch.Tensor) -> None:
    found = model.encode_images(shoes[:3])
    p = model.class_probabilities(shoes[:3])
    for row, chances in zip(found, p, strict=True):
        best = chances.argsort(descending=True)[: lite0.LIKELIEST]
        mixed = sum(chances[i].sqrt() * model.names[i] for i in best)
        torch.testing.assert_close(row, F.normalize(mixed, dim=-1), rtol=1e-4, atol=1e-5)


def test_a_teacher_takes_any_names(model: Lite0, shoes: torch.Tensor) -> None:
    teacher = Teacher(model, CLOTHES, "{}", model.logit_scale)
    p = teacher.probabilities(shoes)
    assert p.shape == (len(shoes), len(CLOTHES))
    torch.testing.assert_close(p.sum(-1), torch.ones(len(p)))
    assert (p.argmax(-1) == CLOTHES.index("shoes")).float().mean() > 0.6
    assert Teacher(model, ["cat", "dog"], "{}", 12.0).fingerprint != teacher.fingerprint


@slow
def test_it_tells_photographs_of_clothes_apart(model: Lite0) -> None:
    split = load_dataset("clothing-demo").split
    teacher = Teacher(model, split.class_names, "{}", model.logit_scale)
    images = torch.stack([model.preprocess(load_image(file)) for file in split.paths("test")[::3]])
    right = teacher.probabilities(images).argmax(-1) == torch.tensor(split.labels("test")[::3])
    assert right.float().mean() > 0.2, "twice as often as chance"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lite0, "PACKAGES", ("not_there", "torch"))
    with pytest.raises(BackboneError, match=r"^teacher 'efficientnet-lite0' needs not-there: pip install 'vlp"):
        load_teacher_model("efficientnet-lite0")
    monkeypatch.undo()
    with pytest.raises(BackboneError, match=r"^cannot use device 'cpu:nowhere'"):
        load_teacher_model("efficientnet-lite0", "cpu:nowhere")
    with pytest.raises(BackboneError, match=r"^no backbone 'efficientnet-lite': did you mean 'efficientnet-lite0'"):
        load_teacher_model("efficientnet-lite")


@slow
def test_it_teaches_online_and_through_a_bank(vlprompt, tmp_path: Path, model: Lite0) -> None:
    pictures = make_pictures(tmp_path / "pictures")
    said: list[str] = []
    taught = {"teacher.backbone": "efficientnet-lite0", "train.epochs": 1}
    _, result = train(configured(pictures, "kdpl_coop", **taught), tmp_path / "online", say=said.append)
    assert "taught by efficientnet-lite0: 3 classes, '{}'" in said[0].splitlines()
    assert result.teacher == "efficientnet-lite0"
    environment = json.loads((tmp_path / "online" / "environment.json").read_text())
    assert environment["teacher_fingerprint"] == model.fingerprint

    bank = tmp_path / "bank"
    given = ("--teacher", "efficientnet-lite0", "--backbone", TINY, "--regions", 3, "--out", bank)
    code, _, err = vlprompt("bank", "build", pictures, *given)
    assert code == 0, err
    code, out, _ = vlprompt("bank", "info", bank)
    assert "efficientnet-lite0" in out
    assert "logit scale 12" in out
    run = ("train", "kdpl_coop", pictures, "--backbone", TINY, "--bank", bank, "--epochs", 1)
    code, _, err = vlprompt(*run, "--teacher", "efficientnet-lite0", "--out", tmp_path / "banked")
    assert code == 0, err
    code, _, err = vlprompt(*run, "--teacher", "mini", "--out", tmp_path / "other")
    assert code == 2
    assert "does not fit this run" in err


def test_a_bank_without_a_student_keeps_its_own_scale(vlprompt, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("cat\ndog\nsea horse\nship\n")
    given = ("--teacher", "efficientnet-lite0", "--regions", 2, "--class-names-file", tmp_path / "words.txt")
    code, _, err = vlprompt("bank", "build", make_pictures(tmp_path / "pictures"), *given, "--out", tmp_path / "bank")
    assert code == 0, err
    assert "4 classes" in err + vlprompt("bank", "info", tmp_path / "bank")[1]
