"""Image settings of checkpoints: the same pixels as transformers makes of them, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.backbones.test_backbones import clip, refused, write_hf, write_open_clip, write_siglip
from vlprompt.backbones.load import load_backbone
from vlprompt.backbones.processors import hf_preprocess

SIZE = 32
SQUARE = {"height": SIZE, "width": SIZE}
CLIP = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": SIZE}, "crop_size": SQUARE}
SIGLIP = {"image_processor_type": "SiglipImageProcessor", "size": SQUARE}
HONOURED = [
    {},
    {"size": SIZE, "crop_size": SIZE},
    {"size": 40},
    {"size": {"shortest_edge": 37}},
    {"size": {"shortest_edge": 45, "longest_edge": None}, "do_center_crop": True},
    {"size": {"height": 40, "width": 36}},
    {"size": {"height": 36, "width": 47}},
    {"size": [40, 36]},
    {"size": SQUARE, "do_center_crop": False},
    {"size": SQUARE},
    {"do_normalize": False},
    {"do_normalize": False, "image_mean": [0.1, 0.2, 0.3]},
    {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.3, 0.2, 0.1]},
    *({"resample": n} for n in range(4)),
    {"resample": 0, "size": 50},
    {"rescale_factor": 0.00392156862745098},
    {"do_convert_rgb": False},
]


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


def written(folder: Path, settings: dict) -> Path:
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("base", [CLIP, SIGLIP], ids=["clip", "siglip"])
@pytest.mark.parametrize("own", HONOURED, ids=json.dumps)
def test_pixels_are_those_of_transformers(tmp_path: Path, base: dict, own: dict) -> None:
    settings = {**base, **own}
    if base is SIGLIP and "size" in own and own["size"] is not SQUARE:
        settings["do_center_crop"], settings["crop_size"] = True, SQUARE
    kind = "clip" if base is CLIP else "siglip"
    module = pytest.importorskip(f"transformers.models.{kind}.image_processing_pil_{kind}")
    cls = getattr(module, f"{settings['image_processor_type']}Pil")
    theirs = cls(**{k: v for k, v in settings.items() if k != "image_processor_type"})
    ours = hf_preprocess(written(tmp_path, settings), SIZE, siglip=base is SIGLIP)
    for width, height in ((70, 41), (41, 70), (33, 37), (20, 25), (32, 32), (200, 31)):
        image = picture(width, height)
        (expected,) = theirs(image, return_tensors="pt").pixel_values
        assert expected.shape == (3, SIZE, SIZE)
        torch.testing.assert_close(ours(image), expected.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("own", "match"),
    [
        ({"do_resize": False}, "do_resize = False (allowed: true)"),
        ({"do_rescale": False}, "do_rescale = False (allowed: true)"),
        ({"do_pad": True}, "do_pad = True (allowed: false)"),
        ({"rescale_factor": 0.5}, "rescale_factor = 0.5 (allowed: 1/255)"),
        ({"rescale_factor": "x"}, "rescale_factor = x (allowed: 1/255)"),
        ({"resample": 4}, "resample = 4 (allowed: 0 nearest, 1 lanczos, 2 bilinear, 3 bicubic)"),
        ({"resample": [3]}, "resample = [3] (allowed:"),
        ({"crop_size": 30}, "crop_size = 30 (allowed: 32, what the image tower reads)"),
        ({"crop_size": {"height": 32, "width": 40}}, "crop_size = {'height': 32, 'width': 40} (allowed: 32"),
        ({"size": 30}, "size = 30 (allowed: a height and width or a shortest_edge of at least 32 with do_center_crop"),
        ({"size": {"height": 40, "width": 30}}, "size = {'height': 40, 'width': 30} (allowed: a height and width or"),
        ({"size": {"shortest_edge": 40, "longest_edge": 60}}, "size = {'shortest_edge': 40, 'longest_edge': 60}"),
        ({"size": {"longest_edge": 40}}, "size = {'longest_edge': 40}"),
        ({"size": "big"}, "size = big"),
        ({"size": 32.5}, "size = 32.5"),
        ({"do_center_crop": False}, "size = {'shortest_edge': 32} (allowed: height and width 32 with do_center_crop ="),
        ({"do_center_crop": "no"}, "do_center_crop = no (allowed: true or false)"),
        (
            {"image_std": [0.1, 0.2, 0]},
            "preprocessing needs a positive image_size and three values for mean and std, none of std",
        ),
        ({"image_mean": [0.1, 0.2]}, "preprocessing needs a positive image_size and three values for mean and std"),
        ({"image_std": ["a", 1, 1]}, "could not convert string to float: 'a'"),
        ({"image_processor_type": "BitImageProcessor"}, "image_processor_type = BitImageProcessor (allowed: CLIPImage"),
        ({"feature_extractor_type": "X", "image_processor_type": None}, "image_processor_type = X"),
    ],
    ids=json.dumps,
)
def test_what_is_not_honoured_is_refused_by_name(tmp_path: Path, own: dict, match: str) -> None:
    folder = written(write_hf(tmp_path), {**CLIP, **own})
    refused(str(folder), match=f"{folder / 'preprocessor_config.json'}: {match}")


def test_the_processor_decides_its_own_defaults(tmp_path: Path) -> None:
    """Also where it is not the one that the model usually has, and where there is none."""
    folder = write_hf(tmp_path / "clip", clip())
    assert load_backbone(folder).preprocess.mean[0] == pytest.approx(0.48145466)
    preprocess = load_backbone(written(folder, SIGLIP)).preprocess
    assert (preprocess.resize, preprocess.mean) == ("squash", (0.5,) * 3)
    folder = write_siglip(tmp_path / "siglip")
    preprocess = load_backbone(written(folder, {})).preprocess
    assert (preprocess.resize, preprocess.resized, preprocess.std) == ("squash", (), (0.5,) * 3)
    preprocess = load_backbone(written(folder, {**CLIP, "size": 40})).preprocess
    assert (preprocess.resize, preprocess.resized) == ("shortest", (40,))


def test_fingerprint_tells_other_pixels_apart(tmp_path: Path) -> None:
    """And stays what it was where the settings say what was always done."""
    folder = write_hf(tmp_path)
    plain = load_backbone(folder).fingerprint
    assert load_backbone(written(folder, CLIP)).fingerprint == plain
    assert load_backbone(written(folder, {**CLIP, "size": 40})).fingerprint != plain
    assert load_backbone("mini").fingerprint.startswith("69e9a270aae6")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"size": 48}, "unsupported open_clip preprocess_cfg with size = 48 (the tower's: 32)"),
        ({"size": [32, 48]}, "unsupported open_clip preprocess_cfg with size = [32, 48]"),
        ({"interpolation": "random"}, "unsupported open_clip preprocess_cfg: unknown interpolation 'random'"),
        ({"mean": [0.5]}, "unsupported open_clip preprocess_cfg: preprocessing needs"),
    ],
)
def test_open_clip_settings_refused(tmp_path: Path, settings: dict, match: str) -> None:
    refused(str(write_open_clip(tmp_path, preprocess=settings)), match=match)
