"""``vlprompt explain``: a picture for a model of drople, one line for everything else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.kit.pictures import make_pictures
from vlprompt.artefact.artefact import load_artefact, save_artefact
from vlprompt.backbones.backbone import Backbone
from vlprompt.explain import draw_explanation, explain
from vlprompt.methods import find_method

NAMES = ("cat", "dog", "sea horse")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"), train=1, val=0, size=50) / "train" / "cat" / "0.png"


def saved(backbone: Backbone, folder: Path, name: str = "drople", **settings: object) -> Path:
    torch.manual_seed(0)
    cls = find_method(name)
    save_artefact(cls(backbone, NAMES, cls.Config(**settings)), folder)
    return folder


def test_explain_draws_a_picture(tiny, tmp_path, picture, vlprompt):
    run, out = saved(tiny, tmp_path / "run"), tmp_path / "new" / "out.png"
    code, text, err = vlprompt("explain", run, picture, "--out", out, "--json")
    assert code == 0, err
    assert err == f"6 blocks of {picture} drawn in {out}\n"
    with Image.open(out) as image:
        assert image.format == "PNG"
        assert image.width > image.height > 400
        assert len(np.unique(np.asarray(image).reshape(-1, 3), axis=0)) > 200
    told = json.loads(text)
    assert set(told) == {"class", "probability", "patches", "blocks"}
    assert told["class"] in NAMES
    assert told["patches"] == [4, 4]
    assert [b["block"] for b in told["blocks"]] == [1, 2, 3, 4, 5, 6]
    method = load_artefact(run)
    pixels = method.backbone.preprocess(Image.open(picture))[None]
    for block, truth in zip(told["blocks"], method.explain(pixels), strict=True):
        assert len(block["importance"]) == len(block["probability"]) == 16 + 4
        assert block["importance"] == pytest.approx(truth.importance[0].tolist(), abs=1e-6)
        assert block["probability"] == pytest.approx(truth.p[0].tolist(), abs=1e-6)
        assert max(block["hit"]) < truth.reach, "prompts that are replaced are not drawn"


def test_the_seed_decides_the_draw(tiny, tmp_path, picture, vlprompt):
    run = saved(tiny, tmp_path / "run")
    pictures, hits = [], []
    for n, seed in enumerate((0, 0, 7)):
        out = tmp_path / f"{n}.png"
        _, text, _ = vlprompt("explain", run, picture, "--out", out, "--seed", seed, "--json")
        pictures.append(out.read_bytes())
        hits.append([b["hit"] for b in json.loads(text)["blocks"]])
    assert pictures[0] == pictures[1] != pictures[2]
    assert hits[0] == hits[1] != hits[2]
    method = load_artefact(run)
    several = [explain(method, picture, seed) for seed in range(400)]
    often = torch.stack([e.hit[5] for e in several]).float().mean(0)
    p = several[0].blocks[5].p[0]
    assert ((often - p).abs() < 4.5 * (p * (1 - p) / 400).sqrt()).all()


@pytest.mark.parametrize("kind", ["uniform", "none"])
def test_other_kinds_of_dropout(kind, tiny, tmp_path, picture):
    method = load_artefact(saved(tiny, tmp_path / "run", dropout=kind, depth_vision=1))
    (block,) = explain(method, picture).blocks
    assert torch.equal(block.p, torch.full_like(block.p, 0.3 if kind == "uniform" else 0))
    assert block.importance.max() == 1
    sheet = draw_explanation(explain(method, picture), "x" * 500, 0)
    edge = np.asarray(sheet)[:, -24:]
    assert (edge == 255).all(), "a long title stays within the margin"


@pytest.mark.parametrize("name", ["coop", "promptsrc", "zero_shot"])
def test_a_model_of_another_method_is_refused(name, tiny, tmp_path, picture, vlprompt):
    run = saved(tiny, tmp_path / "run", name)
    code, out, err = vlprompt("explain", run, picture, "--out", tmp_path / "out.png")
    assert (code, out) == (2, "")
    assert err == f"error: cannot explain a model of {name}: token importance belongs to drople\n"
    assert not (tmp_path / "out.png").exists()


def test_bad_input(tiny, tmp_path, picture, vlprompt):
    run = saved(tiny, tmp_path / "run")
    damaged, folder = tmp_path / "damaged.png", tmp_path / "folder.png"
    damaged.write_bytes(picture.read_bytes()[:80])
    folder.mkdir()
    (tmp_path / "file").write_text("")
    out = tmp_path / "out.png"
    refusals = {
        (run, tmp_path / "no.png", out): f"cannot read image {tmp_path / 'no.png'}: No such file or directory",
        (run, damaged, out): f"cannot read image {damaged}: ",
        (run, tmp_path, out): f"cannot read image {tmp_path}: Is a directory",
        (tmp_path / "none", picture, out): f"no tuned model in {tmp_path / 'none'}: ",
        (run, picture, tmp_path / "out.jpg"): f"cannot write {tmp_path / 'out.jpg'}: its name must end in .png",
        (run, picture, folder): f"cannot write {folder}: Is a directory",
        (run, picture, tmp_path / "file" / "out.png"): f"cannot write {tmp_path / 'file' / 'out.png'}: ",
    }
    for (model, image, to), says in refusals.items():
        code, text, err = vlprompt("explain", model, image, "--out", to)
        assert (code, text) == (2, ""), err
        assert err.startswith(f"error: {says}")
        assert err.count("\n") == 1
    for seed in ("-1", str(2**64), "x"):
        code, text, err = vlprompt("explain", run, picture, "--out", out, "--seed", seed)
        assert (code, text) == (2, "")
        assert err.startswith("error: Invalid value for '--seed': ")
        assert err.count("\n") == 1
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))
