"""``vlprompt explain``: a picture of what patches say for every method, and of drople's dropout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.kit.marks import image_sides, sweep
from tests.kit.pictures import make_pictures
from tests.kit.plain import small_backbone
from vlprompt.artefact.artefact import load_artefact, save_artefact, write_calibration
from vlprompt.artefact.calibration import Calibration
from vlprompt.backbones.backbone import Backbone, unit
from vlprompt.cli.explain import draw_explanation, explain, patch_features
from vlprompt.errors import ConfigError
from vlprompt.methods import METHODS, find_method
from vlprompt.methods.drople.dropout import token_maps

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
    with Image.open(out) as image:
        assert image.format == "PNG"
        assert image.width > image.height > 400
        assert len(np.unique(np.asarray(image).reshape(-1, 3), axis=0)) > 200
    told = json.loads(text)
    assert set(told) == {"class", "probability", "patches", "relevance", "contribution", "blocks"}
    assert err == f"{told['class']} in {picture} drawn in {out}\n"
    assert told["class"] in NAMES
    assert told["patches"] == [4, 4]
    assert [b["block"] for b in told["blocks"]] == [1, 2, 3, 4, 5, 6]
    method = load_artefact(run)
    pixels = method.backbone.preprocess(Image.open(picture))[None]
    for block, truth in zip(told["blocks"], method.dropout_of(pixels), strict=True):
        assert len(block["importance"]) == len(block["probability"]) == 16 + 4
        assert block["importance"] == pytest.approx(truth.importance[0].tolist(), abs=1e-6)
        assert block["probability"] == pytest.approx(truth.p[0].tolist(), abs=1e-6)
        assert max(block["hit"]) < truth.reach, "prompts that are replaced are not drawn"


def test_an_image_is_read_as_predict_reads_it(tiny, tmp_path, picture, vlprompt):
    run, dark = saved(tiny, tmp_path / "run", "zero_shot"), tmp_path / "dark.png"
    Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20)).save(dark)
    code, _, err = vlprompt("explain", run, dark, "--out", tmp_path / "dark-why.png")
    assert code == 0, err
    assert "1 of 1 images of more than 8 bits look dark" in err
    code, _, err = vlprompt("explain", run, picture, "--max-pixels", 9, "--out", tmp_path / "out.png")
    assert code == 2
    assert "2500 pixels; data.max_pixels = 9 is the limit" in err


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
    blocks = method.dropout_of(method.backbone.preprocess(Image.open(picture))[None])
    several = [token_maps(blocks, method.config, seed)[2].values[5] for seed in range(400)]
    often, p = torch.stack(several).float().mean(0), blocks[5].p[0]
    assert ((often - p).abs() < 4.5 * (p * (1 - p) / 400).sqrt()).all()


@pytest.mark.parametrize("kind", ["uniform", "none"])
def test_other_kinds_of_dropout(kind, tiny, tmp_path, picture):
    method = load_artefact(saved(tiny, tmp_path / "run", dropout=kind, depth_vision=1))
    importance, probability, _ = explain(method, picture).maps
    assert len(importance.values) == len(probability.values) == 1
    p = probability.values[0]
    assert torch.equal(p, torch.full_like(p, 0.3 if kind == "uniform" else 0))
    assert importance.values[0].max() == 1
    sheet = draw_explanation(explain(method, picture), "x\n" + "x" * 500)
    edge = np.asarray(sheet)[:, -24:]
    assert (edge == 255).all(), "a long title stays within the margin"


@pytest.mark.parametrize("name", sweep(sorted(METHODS), *image_sides()))
def test_every_method_is_explained(name, tiny, tmp_path, picture, vlprompt):
    run, out = saved(tiny, tmp_path / "run", name), tmp_path / "out.png"
    code, text, err = vlprompt("explain", run, picture, "--out", out, "--json")
    assert code == 0, err
    told, method = json.loads(text), load_artefact(run)
    logits = method.predict(method.backbone.preprocess(Image.open(picture))[None], NAMES)
    assert told["class"] == NAMES[logits.argmax()]
    assert told["probability"] == pytest.approx(logits.softmax(-1).max().item(), abs=1e-6)
    assert len(told["contribution"]) == len(told["relevance"]) == 16
    fitted = name not in ("linear_probe", "lp_plus_plus")
    assert sum(told["relevance"]) == pytest.approx(float(fitted), abs=1e-4)
    assert all(abs(x) <= 1 + 1e-6 for x in told["contribution"])
    assert (len(set(told["contribution"])) > 1) == fitted
    assert bool(told["blocks"]) == (name == "drople")
    with Image.open(out) as image:
        assert image.format == "PNG"


@pytest.mark.parametrize(
    ("name", "settings"),
    [("zero_shot", {}), ("ivlp", {}), ("dpl", {}), ("drople", {"lora_rank": 2}), ("vpt", {})],
)
def test_patches_are_read_as_the_method_reads_the_class_token(name, settings, tiny, picture):
    """Under its own prompts, attention and adapters: with the class token asked in each patch's place, all agree."""
    torch.manual_seed(0)
    cls = find_method(name)
    method = cls(tiny, NAMES, cls.Config(**settings)).eval()
    if name == "drople":
        torch.nn.init.normal_(method.lora.b, std=0.1)
    images = tiny.preprocess(Image.open(picture))[None]
    with torch.no_grad():
        patches = patch_features(method, images)
        assert patches.shape == (1, 16, tiny.embed_dim)
        pooled: list[torch.Tensor] = []
        first = tiny.image_tower.blocks[-1].register_forward_pre_hook(
            lambda block, given: pooled.append(block.forward(*given[:2])[:, 0])
        )
        v = method.encode_images(images)
        first.remove()
        torch.testing.assert_close(unit(tiny.image_tower.read(pooled[0][:, None])[:, 0]), v, rtol=0, atol=1e-5)
        other = find_method("zero_shot")(tiny, NAMES)
        assert torch.equal(patches, patch_features(other, images)) == (name == "zero_shot")


def test_a_class_is_asked_about(tiny, tmp_path, picture, vlprompt):
    run = saved(tiny, tmp_path / "run", "coop")
    told = {}
    for given in ("cat", "dog", "Sea_Horse"):
        code, text, err = vlprompt(
            "explain", run, picture, "--class", given, "--out", tmp_path / f"{given}.png", "--json"
        )
        assert code == 0, err
        told[given] = json.loads(text)
    assert [x["class"] for x in told.values()] == list(NAMES)
    assert sum(x["probability"] for x in told.values()) == pytest.approx(1, abs=1e-6)
    for key in ("relevance", "contribution"):
        assert told["cat"][key] != told["dog"][key]
    for given, hint in (("sea hors", ": did you mean 'sea horse'?"), ("xyz", "")):
        code, text, err = vlprompt("explain", run, picture, "--class", given, "--out", tmp_path / "no.png")
        assert (code, text) == (2, "")
        assert err == f"error: the model has no class '{given}'{hint} (its classes: cat, dog, sea horse)\n"
    assert not (tmp_path / "no.png").exists()


def test_probabilities_are_calibrated_as_predict_prints_them(tiny, tmp_path, picture, vlprompt):
    run = saved(tiny, tmp_path / "run", "zero_shot")
    plain = json.loads(vlprompt("explain", run, picture, "--out", tmp_path / "1.png", "--json")[1])
    write_calibration(run, Calibration(7.0, ((0.1,), (0.2,), (0.3,)), "energy", None, 0.95))
    found = json.loads(vlprompt("explain", run, picture, "--out", tmp_path / "2.png", "--json")[1])
    predicted = json.loads(vlprompt("predict", run, picture, "--json")[1])["predictions"][0]["top"][0]
    assert found["probability"] == pytest.approx(predicted["probability"], abs=1e-5)
    assert found["probability"] < plain["probability"]
    assert found["relevance"] == plain["relevance"]


def test_a_method_that_runs_the_tower_twice_is_refused(tiny, picture):
    class Twice(find_method("zero_shot")):
        def encode_images(self, images):
            return unit(super().encode_images(images) + super().encode_images(images.flip(-1)))

    with pytest.raises(ConfigError, match="cannot explain method 'zero_shot': it runs the image tower 2 times"):
        explain(Twice(tiny, NAMES), picture)


def test_a_tower_with_a_pooling_head_reads_each_patch_alone(picture):
    backbone = small_backbone(causal=False, pool="map")
    method = find_method("coop")(backbone, NAMES).double()
    images = torch.randn(2, 3, 16, 16, dtype=torch.double)
    with torch.no_grad():
        patches = patch_features(method, images)
        tokens = backbone.image_tower.run(backbone.image_tower.embed(images))
        assert patches.shape == (2, 16, 24)
        for b, n in ((0, 0), (1, 15)):
            alone = backbone.image_tower.read(tokens[b : b + 1, n : n + 1])[0, 0]
            torch.testing.assert_close(patches[b, n], alone, rtol=0, atol=1e-12)


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
        (run, picture, tmp_path / "out.jpg"): f"{tmp_path / 'out.jpg'} must end in .png",
        (run, picture, folder): f"{folder} is there already: delete it, or choose another name",
        (run, picture, damaged): f"{damaged} is there already: delete it, or choose another name",
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
