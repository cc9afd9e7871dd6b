"""``data.template``: a text of one's own for the classes, for every method."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.kit import TINY
from tests.kit.command import vlprompt
from vlprompt import build_method
from vlprompt.artefact.artefact import load_artefact
from vlprompt.config.schema import build_config
from vlprompt.errors import ConfigError
from vlprompt.methods import METHODS, find_method
from vlprompt.methods.zero_shot import frozen_class_features

OWN, NAMES = "a sketch of a {}.", ("blue", "green", "red")
GIVEN = ["--backbone", TINY, "data.workers=0", f"data.template={OWN}"]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_takes_it(name):
    config = build_config(name, overrides={"data.template": OWN, "backbone": "mini"})
    assert config.data.template == OWN
    if hasattr(config.options, "template"):
        assert config.options.template == OWN
    assert build_config(name, file=config.flat()) == config  # saved, and read again


def test_what_reads_texts_reads_it(tiny):
    texts = frozen_class_features(tiny, NAMES, [OWN])
    for name in ("zero_shot", "vpt"):
        assert torch.equal(build_method(name, tiny, NAMES, template=OWN).class_features(NAMES), texts)
    plain, own = (build_method("kgcoop", tiny, NAMES, template=t) for t in (None, OWN))
    assert (plain.template, own.template) == ("a photo of a {}.", OWN)


def test_a_contradiction_is_refused():
    with pytest.raises(
        ConfigError, match=r"^data.template = a sketch of a \{\}. and method.template = a \{\} contradict"
    ):
        build_config("vpt", overrides={"data.template": OWN, "method.template": "a {}"})
    with pytest.raises(ConfigError, match=r"^data.template = sketch \(allowed: text with \{\} for the class name\)$"):
        build_config("zero_shot", overrides={"data.template": "sketch"})
    with pytest.raises(
        ConfigError, match=r"key 'template' is not clear \(write one of data.template, teacher.template"
    ):
        build_config("coop", overrides={"template": OWN})


def test_it_stays_with_the_tuned_model(photos: Path, tmp_path: Path):
    done = vlprompt("train", "zero_shot", photos, *GIVEN, "--out", tmp_path / "run")
    assert (done.code, "no effect" in done.err) == (0, False)
    method = load_artefact(tmp_path / "run")
    method.take_template("{}")  # what evaluation on another data set does
    assert torch.equal(method.class_features(NAMES), frozen_class_features(method.backbone, NAMES, [OWN]))
    assert OWN in json.loads((tmp_path / "run" / "config.json").read_text("utf-8"))["template"]


def test_it_is_told_where_it_does_nothing(photos: Path, tmp_path: Path):
    for name in ("coop", "maple"):
        done = vlprompt("train", name, photos, *GIVEN, "--epochs", 1, "batch_size=4", "--out", tmp_path / name)
        told = f"data.template = {OWN} has no effect: {name} learns the words around the class name"
        assert (done.code, told in done.err) == (0, True)
    taught = ["--teacher", "mini", "--epochs", 1, "batch_size=4"]
    done = vlprompt("train", "coop", photos, *GIVEN, *taught, "--out", tmp_path / "taught")
    assert (done.code, "no effect" in done.err) == (0, False)
    assert f"taught by mini: 3 classes, '{OWN}'" in done.err


def test_methods_that_say_so_read_none(tiny):
    """Two templates give the same class features, and training the same losses, exactly where it is declared."""
    for name in sorted(METHODS):
        one, other = (build_method(name, tiny, NAMES, template=t, seed=1) for t in (None, OWN))
        if find_method(name).reads_template or one.image_dependent:
            continue
        assert torch.equal(one.class_features(NAMES), other.class_features(NAMES))
