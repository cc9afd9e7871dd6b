"""The recipe of the embedded backbone, from drawings to a loaded model, on a handful of pictures."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import normalize

from tests.kit import REPOSITORY
from tests.kit.marks import slow
from vlprompt import load_backbone
from vlprompt.backbones.packing import pack
from vlprompt.backbones.towers import ImageConfig, TextConfig

RECIPE = REPOSITORY / "tools" / "mini"
CIRCLE = '<circle cx="8" cy="8" r="6" fill="{}"/>'
SQUARE = '<rect x="2" y="2" width="12" height="12" fill="{}"/>'


@pytest.fixture(scope="module", autouse=True)
def modules():
    """The recipe's files import each other by name, as when they are run."""
    sys.path.insert(0, str(RECIPE))
    yield
    sys.path.remove(str(RECIPE))


def of(module: str):
    return importlib.import_module(module)


def write(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def write_font(package: Path) -> None:
    """Two glyphs, a cat and a letter that is no emoji."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    for point in ((100, 0), (100, 800), (900, 800), (900, 0)):
        (pen.moveTo if point == (100, 0) else pen.lineTo)(point)
    pen.closePath()
    glyph = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "cat", "A"])
    builder.setupCharacterMap({0x1F408: "cat", 0x41: "A"})
    builder.setupGlyf({".notdef": glyph, "cat": glyph, "A": glyph})
    builder.setupHorizontalMetrics(dict.fromkeys((".notdef", "cat", "A"), (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupPost()
    builder.font.flavor = "woff2"
    for part in (0, 1):  # the same glyph in two parts of the font
        (package / "files").mkdir(parents=True, exist_ok=True)
        builder.save(package / "files" / f"noto-emoji-{part}-300-normal.woff2")


@pytest.fixture(scope="module")
def packages(modules, tmp_path_factory) -> Path:
    """What npm brings, with a few icons."""
    data = of("data")
    folder = tmp_path_factory.mktemp("pretraining")
    icons, names, font, words = (data.package_folder(p, folder / "packages") for p in data.PACKAGES.values())

    def collection(licence: str, category: str, icons_: dict[str, str], **more: object) -> tuple[dict, dict]:
        about = {
            "name": "Some icons",
            "author": {"name": "A. Drawer"},
            "license": {"spdx": licence},
            "category": category,
        }
        return about, {"width": 16, "height": 16, "icons": {k: {"body": v} for k, v in icons_.items()}, **more}

    fills = ("red", "blue", "green", "orange", "purple", "brown")
    sets = {
        "twemoji": collection(
            "CC-BY-4.0",
            "Emoji",
            {"cat": CIRCLE.format("red"), "cat-dark-skin-tone": CIRCLE.format("black"), "flag-for-france": SQUARE},
            chars={"1f354": "burger"},
            aliases={"kitty": {"parent": "cat"}, "turned": {"parent": "cat", "hFlip": True}},
        ),
        "noto": collection("Apache-2.0", "Emoji", {"hamburger": SQUARE.format("red"), "cat-2": CIRCLE.format("tan")}),
        "fxemoji": collection(
            "Apache-2.0", "Emoji", {"cat": SQUARE.format("pink"), "hamburger": CIRCLE.format("teal")}
        ),
        "openmoji": collection("CC-BY-SA-4.0", "Emoji", {"cat": CIRCLE.format("gold")}),
        "tabler": collection(
            "MIT",
            "UI 24px",
            {"anchor": SQUARE.format("currentColor"), "cat-filled": CIRCLE.format("currentColor"), "web": CIRCLE},
        ),
        "lucide": collection("ISC", "UI 24px", {"anchor-bold-24": CIRCLE.format("navy"), "xyzzy": SQUARE}),
        "copyleft": collection("GPL-3.0", "UI 24px", {"anchor": CIRCLE.format("olive")}),
        "brands": collection("MIT", "Logos", {"anchor": CIRCLE.format("lime")}),
        "game-icons": collection(
            "CC-BY-3.0", "Thematic", {f"thing-{i}": CIRCLE.format(f) for i, f in enumerate(fills)}
        ),
    }
    sets["twemoji"][1]["icons"]["burger"] = {"body": SQUARE.format("brown")}
    write(icons / "collections.json", {name: about for name, (about, _) in sets.items()})
    for name, (_, content) in sets.items():
        write(icons / "json" / f"{name}.json", content)
    emoji = [
        {"label": "cat", "hexcode": "1F408", "tags": ["pet", "feline"], "group": 3, "subgroup": 34},
        {"label": "hamburger", "hexcode": "1F354", "tags": ["food"], "group": 4, "subgroup": 44},
        {"label": "flag: France", "hexcode": "1F1EB-1F1F7", "group": 9, "subgroup": 98},
    ]
    write(names / "en" / "data.json", emoji)
    write(names / "meta" / "groups.json", {"subgroups": {"34": "animal-mammal", "44": "food-prepared"}})
    for source in ("cldr", "emojibase", "iamcal", "github"):
        write(names / "en" / "shortcodes" / f"{source}.json", {"1F408": ["cat2"]} if source == "github" else {})
    index = "  1 licence\nanchor n 1\nthing n 1\nweb n 1\n"
    write(words / "dict" / "index.noun", index)
    write(words / "dict" / "index.verb", "swim v 1\n")
    write(words / "dict" / "index.adj", "small a 1\nold a 1\n")
    write(words / "dict" / "index.sense", "anchor%1:06:00:: 1 1 3\nsmall%3:00:00:: 1 1 90\n")
    write_font(font)
    return folder


def write_kinds(folder: Path) -> None:
    """Three kinds that photographs show, and one that is kept unseen."""
    kinds = [
        {"id": "n1", "text": "tench", "names": ["tench"], "gloss": "a fish", "above": ["animal"], "unseen": True},
        {"id": "n2", "text": "ox, bovine", "names": ["ox", "bull"], "gloss": "a beast", "above": ["animal"]},
        {"id": "n3", "text": "cup", "names": ["cup"], "gloss": "a thing to drink from", "above": ["thing"]},
        {"id": "n4", "text": "cat", "names": ["cat", "true cat"], "gloss": "a pet", "above": ["animal"]},
    ]
    write(folder / "kinds.json", [{"unseen": False} | kind for kind in kinds])


def write_photos(folder: Path) -> None:
    """Photographs of two sources in one colour a kind, and what a classifier says of them."""
    rng = np.random.default_rng(0)
    for source, n in (("train", 24), ("val", 10)):
        kind = rng.integers(1, 4, n)
        pixels = rng.integers(0, 60, (n, 64, 64, 3)) + 60 * kind[:, None, None, None]
        of("photos").write_array(folder / "photos" / f"{source}-pixels.npy", pixels.astype(np.uint8))
        write(folder / "photos" / f"{source}-labels.json", [f"n{k + 1}" if i % 2 else "" for i, k in enumerate(kind)])
        top = np.stack([kind, kind % 3 + 1], 1).astype(np.int16)
        of("photos").write_array(folder / "photos" / f"{source}-top.npy", top)
        chance = np.tile(np.array([0.6, 0.2], np.float16), (n, 1))
        of("photos").write_array(folder / "photos" / f"{source}-chance.npy", chance)
        grid = 20 * kind[:, None, None, None] * np.ones((5, 5, of("photos").AXES)) + 10 * np.arange(5)[:, None, None]
        of("photos").write_array(folder / "photos" / f"{source}-grid.npy", grid.astype(np.int8))


@pytest.fixture(scope="module")
def pretraining(packages) -> Path:
    """The folder after data preparation; sentence embeddings are random, one direction a word."""
    data, embed = of("data"), of("embed")
    run(data, "--out", packages, "--size", 72)
    write_kinds(packages)
    write_photos(packages)
    texts = embed.all_texts(packages)[:400]
    words = sorted({word for text in texts for word in text.split()})
    rows = torch.randn(len(words), 384, generator=torch.Generator().manual_seed(0))
    vectors = torch.stack([sum(rows[words.index(word)] for word in text.split()) for text in texts])
    np.save(packages / "texts.npy", normalize(vectors, dim=-1).half().numpy())
    write(packages / "texts.json", texts)
    return packages


def run(module, *given: object) -> None:
    before = sys.argv
    sys.argv = [module.__name__, *map(str, given)]
    try:
        module.main()
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Path:
    """A tiny model, trained for ten steps in three stages."""
    file = tmp_path_factory.mktemp("settings") / "tiny.yaml"
    rates = {"learning_rate": 0.002, "weight_decay": 0.1, "warmup": 2, "cooldown": 0.5}
    image = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 4, "heads": 2, "mlp_width": 64, "embed_dim": 16}
    content = {
        "image": {**image, "activation": "gelu"},
        "render": 72,
        "seed": 0,
        "batch": 8,
        "photographs": 0.5,
        **rates,
        "stages": [
            {"steps": 4, "layers": 2, "keep": 8},
            {"steps": 4, "layers": 4, "keep": 10},
            {"steps": 2, "layers": 4, "keep": 16},
        ],
        "text": {"context_length": 40, "width": 16, "layers": 2, "heads": 2, "mlp_width": 32, "activation": "gelu"},
        "text_training": {"steps": 10, "batch": 8, **rates},
    }
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def trained(pretraining, settings, tmp_path_factory) -> Path:
    """Tokenizer, image tower and text tower after their short runs."""
    out = tmp_path_factory.mktemp("trained")
    run(of("tokenizer"), "--data", pretraining, "--out", out, "--size", 560)
    run(of("image"), settings, "--data", pretraining, "--out", out)
    text = of("text")
    text.embed = lambda texts: normalize(torch.randn(len(texts), 384), dim=-1)
    run(text, settings, "--data", pretraining, "--out", out)
    return out


def test_pictures_are_chosen_by_licence_and_by_what_they_show(pretraining):
    captions = json.loads((pretraining / "captions.json").read_text())
    shown = [
        (captions[p["caption"]]["text"], p["set"], p["name"])
        for p in json.loads((pretraining / "pictures.json").read_text())
    ]
    assert sorted(shown) == sorted(
        [
            ("cat", "twemoji", "kitty"),
            ("hamburger", "twemoji", "burger"),  # by its code point alone
            ("hamburger", "noto", "hamburger"),
            ("cat", "noto", "cat-2"),
            ("cat", "fxemoji", "cat"),
            ("hamburger", "fxemoji", "hamburger"),
            ("cat", "tabler", "cat-filled"),
            ("anchor", "tabler", "anchor"),  # drawn by two
            ("anchor", "lucide", "anchor-bold-24"),
            *[("thing", "game-icons", f"thing-{i}") for i in range(1, 6)],  # the first is drawn like a cat above
            ("cat", "noto-emoji-font", "1f408-300"),  # once, though the font's parts overlap
        ]
    )
    assert captions[0] == {"text": "cat", "tags": ["pet", "feline"], "subgroup": "animal-mammal"}
    sources = (pretraining / "sources.tsv").read_text().splitlines()
    assert "tabler\tSome icons\tA. Drawer\tMIT\t2" in sources
    assert not {line.split("\t")[0] for line in sources} & {"openmoji", "copyleft", "brands"}


def test_rendered_pixels_are_multiplied_by_alpha(pretraining):
    pixels = np.load(pretraining / "pictures-72.npy")
    assert pixels.shape == (15, 72, 72, 4)
    assert pixels.dtype == np.uint8
    assert (pixels[..., :3] <= pixels[..., 3:]).all()
    red = pixels[0]  # a red circle on nothing
    assert red[36, 36].tolist() == [255, 0, 0, 255]
    assert red[0, 0].tolist() == [0, 0, 0, 0]


def test_a_second_call_renders_nothing_again(pretraining, monkeypatch):
    data = of("data")
    before = (pretraining / "pictures.json").read_bytes()
    monkeypatch.setattr(data, "render_all", None)
    run(data, "--out", pretraining)
    assert (pretraining / "pictures.json").read_bytes() == before


WORDNET = """\
  1 licence
00000001 03 n 02 entity 0 thing 1 000 | that which is perceived; an existence
00000002 05 n 02 crane 0 wading_bird 0 001 @ 00000001 n 0000 | large bird; long-necked
00000003 06 n 01 crane 0 002 @ 00000001 n 0000 ~ 00000002 n 0000 | lifts heavy objects
"""


def test_wordnet_tells_kinds_apart(tmp_path, monkeypatch):
    kinds, lite0 = of("kinds"), importlib.import_module("vlprompt.backbones.lite0")
    write(tmp_path / "data.noun", WORDNET)
    write(tmp_path / "index.noun", "  1 licence\ncrane n 2 1 @ 2 1 00000003 00000002  \nentity n 1 0 1 0 00000001  \n")
    bird, machine = (lite0.Kind(f"n0000000{i}", "", ("",), "") for i in (2, 3))
    monkeypatch.setattr(lite0, "kinds", lambda: [bird, machine])
    monkeypatch.setattr(kinds, "UNSEEN", ("n00000003",))
    run(kinds, "--out", tmp_path, "--wordnet", tmp_path, "--table", tmp_path / "kinds.tsv")
    first, second = json.loads((tmp_path / "kinds.json").read_text())
    assert first == {
        "id": "n00000002", "text": "crane, entity", "names": ["crane", "wading bird"], "gloss": "large bird",
        "above": ["entity"], "unseen": False,
    }  # fmt: skip
    assert (second["text"], second["unseen"]) == ("crane", True)
    assert (tmp_path / "kinds.tsv").read_text().splitlines()[1:] == [
        "n00000002\tcrane, entity\tcrane; wading bird\tlarge bird",
        "n00000003\tcrane\tcrane\tlifts heavy objects",
    ]


def test_the_table_is_what_wordnet_says():
    if not (of("kinds").WORDNET / "data.noun").is_file():
        pytest.skip("the system's package wordnet-base is not installed")
    lite0 = importlib.import_module("vlprompt.backbones.lite0")
    found = of("kinds").kinds(of("kinds").WORDNET)
    assert [lite0.Kind(k["id"], k["text"], tuple(k["names"]), k["gloss"]) for k in found] == lite0.kinds()
    assert [kind["names"][0] for kind in found if kind["unseen"]] == [
        "tench", "English springer", "cassette player", "chain saw", "church",
        "French horn", "garbage truck", "gas pump", "golf ball", "parachute",
    ]  # fmt: skip


@slow
def test_photographs_are_read_and_classified(tmp_path):
    photos, lite0 = of("photos"), importlib.import_module("vlprompt.backbones.lite0")
    tiny, more, samples, thousand, trash = (
        tmp_path / name for name in ("tiny", "more", "samples", "thousand", "trash")
    )
    shoes = sorted((lite0.Path(lite0.__file__).parents[1] / "data" / "known" / "clothing" / "test" / "shoes").iterdir())
    names = ["train/n01443537/images/n01443537_0.JPEG", "val/images/val_0.JPEG", "test/images/test_0.JPEG"]
    for file, place in zip(shoes, [tiny / name for name in names], strict=False):
        place.parent.mkdir(parents=True)
        place.write_bytes(file.read_bytes())
    write(tiny / "val" / "val_annotations.txt", "val_0.JPEG\tn01629819\t0\t0\t9\t9\n")
    for name in ("train/n01532829/1.jpg", "val/n01532829/2.jpg", "train/n03417042/3.jpg"):
        (more / name).parent.mkdir(parents=True)
        (more / name).write_bytes(shoes[0].read_bytes())
    samples.mkdir()
    for file, name in zip(shoes, ("n03680355_Loafer.JPEG", "n01440764_tench.JPEG"), strict=False):
        (samples / name).write_bytes(file.read_bytes())
    for name in ("train/n03680355/1.JPEG", "val/n03680355/2.JPEG", "train/n01440764/3.JPEG"):
        (thousand / name).parent.mkdir(parents=True)
        (thousand / name).write_bytes(shoes[2].read_bytes())
    (trash / "glass").mkdir(parents=True)
    (trash / "glass" / "glass1.jpg").write_bytes(shoes[3].read_bytes())
    given = (
        "--tiny",
        tiny,
        "--more",
        more,
        "--samples",
        samples,
        "--thousand",
        thousand,
        "--trash",
        trash,
        "--out",
        tmp_path,
        "--processes",
        1,
    )
    run(photos, *given)
    found = {file.name.partition("-")[0]: np.load(file) for file in (tmp_path / "photos").glob("*-pixels.npy")}
    assert {source: len(pixels) for source, pixels in found.items()} == {
        "train": 1, "val": 1, "test": 1, "more": 2, "samples": 32, "thousand": 2 * 4, "trash": 1,
    }  # fmt: skip
    assert all(pixels.shape[1:] == (64, 64, 3) for pixels in found.values())
    labels = json.loads((tmp_path / "photos" / "samples-labels.json").read_text())
    assert labels == ["n03680355"] * 32, "the tench is kept unseen"
    chance, top = (np.load(tmp_path / "photos" / f"train-{what}.npy") for what in ("chance", "top"))
    hidden = {i for i, kind in enumerate(lite0.kinds()) if kind.id in of("kinds").UNSEEN}
    assert not hidden & set(top.flatten().tolist())
    assert (np.diff(chance.astype(float)) <= 0).all()
    before = (tmp_path / "photos" / "train-chance.npy").stat().st_mtime_ns
    run(photos, *given)
    assert (tmp_path / "photos" / "train-chance.npy").stat().st_mtime_ns == before


def test_chances_of_photographs(pretraining):
    images, names = of("images"), of("names")
    kinds, unseen = names.listed_kinds(pretraining)
    assert ([kind["at"] for kind in kinds], [kind["id"] for kind in unseen]) == ([1, 2, 3], ["n1"])
    photographs = images.Photographs(pretraining, [1, 2, 3], ["n2", "n3", "n4"])
    labels = json.loads((pretraining / "photos" / "train-labels.json").read_text())
    top = np.load(pretraining / "photos" / "train-top.npy") - 1
    chances = photographs.chances(torch.arange(photographs.size))
    torch.testing.assert_close(chances.sum(-1), torch.ones(photographs.size))
    for row, label, (best, second) in zip(chances, labels, top.tolist(), strict=True):
        own = 0.4 if label else 0.0
        assert row[best].item() == pytest.approx(own + (1 - own) * 0.75, abs=1e-3)
        assert row[second].item() == pytest.approx((1 - own) * 0.25, abs=1e-3)
    assert images.Photographs(pretraining, [1, 2, 3], ["n2", "n3", "n4"], validation=True).size == 10

    index = torch.arange(8)
    seen = photographs.seen(index)
    kind = top[:8, 0] + 1
    torch.testing.assert_close(
        seen[:, 0, :, 3] * 32, torch.from_numpy(20.0 * kind[:, None] + 10 * np.arange(5)).float()
    )

    def shown(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        return images.photo_view(photographs.read(index), seen, 32, 4, torch.Generator().manual_seed(seed))

    def views(seed: int) -> torch.Tensor:
        return shown(seed)[0]

    there = shown(1)[1]  # in the part that the view shows, from above to below
    assert there.shape == (8, 16, seen.shape[1])
    rows = there[..., 0].unflatten(1, (4, 4)).mean(2)
    assert (rows.diff(dim=1) > 0).all()
    assert (rows.mean(1) * 32 - 20 * torch.from_numpy(kind)).sub(20).abs().max() < 15
    assert views(1).shape == (8, 3, 32, 32)
    assert views(1).isfinite().all()
    assert torch.equal(views(1), views(1))
    assert (views(1) != views(2)).flatten(1).any(1).all()


def test_nouns_above_kinds_are_classes_of_their_own():
    names = of("names")
    kinds = [{"above": ["dog", "animal", "thing"]}] * 4 + [{"above": ["cat", "animal", "thing"]}] * 3
    kinds += [{"above": ["thing"]}] * names.MOST
    assert names.kinds_above(kinds) == {"dog": [0, 1, 2, 3], "animal": list(range(7))}


def test_training_goes_on_from_a_shipped_backbone(pretraining, settings, trained, tmp_path):
    folder = tmp_path / "backbone"
    run(of("export"), settings, "--out", trained, "--to", folder)
    image, text, steps = of("image"), of("text"), of("steps")
    words = text.unscaled_tower(load_backbone(str(folder)).text_tower)
    for name, value in steps.part(load_file(trained / "text.safetensors"), "tower").items():
        torch.testing.assert_close(words.state_dict()[name], value, rtol=2e-3, atol=1e-3)  # fp16 in between
    assert words.config.eps == steps.EPS

    tower, names = (
        image.new_tower(ImageConfig(32, 8, 32, 4, 2, 64, 16, "gelu"), 0),
        of("names").Names(pretraining, 16, 32),
    )
    texts = json.loads((pretraining / "texts.json").read_text())
    backbone = load_backbone(str(folder))
    image.begin_from(backbone, tower, names, texts)
    assert torch.equal(tower.positions, backbone.image_tower.positions)
    assert names.log_scale.exp().item() == pytest.approx(backbone.logit_scale, rel=1e-5)
    said = backbone.encode_texts([texts[row] for row in names.parts["captions"]])
    assert (names()["captions"] * said).sum(-1).mean() > 0.5


def test_views_are_random_finite_and_repeatable(pretraining):
    images = of("images")
    pictures = images.Pictures(pretraining, 72)
    validation = images.Pictures(pretraining, 72, validation=True)
    assert (len(pictures.rows), len(validation.rows)) == (13, 2)
    assert not set(pictures.rows.tolist()) & set(validation.rows.tolist())
    index = pictures.draw(64, torch.Generator().manual_seed(0))
    rgba, mono, mirror = pictures.read(index), pictures.mono[index], torch.ones(64)

    def views(seed: int) -> torch.Tensor:
        return images.view(rgba, mono, mirror, 32, torch.Generator().manual_seed(seed))

    assert views(1).shape == (64, 3, 32, 32)
    assert views(1).isfinite().all()
    assert torch.equal(views(1), views(1))
    assert (views(1) != views(2)).flatten(1).any(1).all()
    assert (views(1).flatten(1).std(1) > 0.05).all(), "something is seen in every view"


def test_tokens_of_every_byte_are_in_the_vocabulary(trained):
    from vlprompt.backbones.tokenizer import load_clip_tokenizer

    tokenizer = load_clip_tokenizer(trained, 64)
    text = "".join(chr(c) for c in range(33, 127)) + " é № 日本 ñ ß €"
    pieces = tokenizer.tokenizer.encode(text, add_special_tokens=False).tokens
    assert "".join(pieces).count("</w>") >= 6
    shown = tokenizer.tokenizer.decode(tokenizer.tokenizer.encode(text, add_special_tokens=False).ids)
    assert shown.replace("</w>", "").replace(" ", "") == text.lower().replace(" ", "")


def test_training_and_using_a_tower_are_one_computation(monkeypatch):
    image, text = of("image"), of("text")
    torch.manual_seed(0)
    tower = image.new_tower(ImageConfig(32, 8, 32, 3, 2, 64, 16, "gelu"), 0)
    pictures = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(image.encode(tower, pictures, [0, 1, 2], None)[0], tower(pictures), rtol=1e-4, atol=1e-5)

    monkeypatch.setattr(text, "embed", lambda texts: torch.randn(len(texts), 384))
    tokenizer = of("tokenizer").bpe_from_merges(["c a", "ca t</w>", "d o", "do g</w>"])
    words = text.new_tower(TextConfig(tokenizer.get_vocab_size(), 12, 32, 3, 2, 64, 16, "gelu"), tokenizer, 0)
    tokens = [[512, 5, 9, 513], [512, 7, 513], [512, 1, 2, 3, 4, 513]]
    ids, ends = text.padded(tokens)
    plain = words(pack(tokens, causal=True))[0]
    torch.testing.assert_close(text.encode(words, ids, ends), plain, rtol=1e-4, atol=1e-5)


def test_blocks_that_join_change_nothing_at_first():
    image = of("image")
    tower = image.new_tower(ImageConfig(32, 8, 32, 4, 2, 64, 16, "gelu"), 0)
    pictures = torch.randn(5, 3, 32, 32)
    before = image.encode(tower, pictures, [1, 3], None)[0]
    image.grow(tower, [1, 3], [0, 1, 2, 3])
    torch.testing.assert_close(image.encode(tower, pictures, [0, 1, 2, 3], None)[0], before, rtol=1e-4, atol=1e-5)
    assert any(p.abs().max() > 0 for p in tower.blocks[2].fc_1.parameters())


@pytest.mark.parametrize("tower", ["image", "text"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(tower, pretraining, settings, trained, tmp_path, monkeypatch):
    module, steps = of(tower), of("steps")
    whole = (trained / f"{tower}.safetensors").read_bytes()
    for name in ("tokenizer.json", "image.safetensors"):
        if (tower, name) != ("image", "image.safetensors"):
            (tmp_path / name).write_bytes((trained / name).read_bytes())

    class Stopped(Exception):
        pass

    go_on = steps.Training.train_step

    def stop(training, loss_of):
        if training.step == 5:
            raise Stopped
        return go_on(training, loss_of)

    given = (settings, "--data", pretraining, "--out", tmp_path, "--save-every", 5)
    monkeypatch.setattr(steps.Training, "train_step", stop)
    with pytest.raises(Stopped):
        run(module, *given)
    assert int(load_file(tmp_path / f"{tower}.safetensors")["step"]) == 5
    monkeypatch.setattr(steps.Training, "train_step", go_on)
    run(module, *given)
    assert (tmp_path / f"{tower}.safetensors").read_bytes() == whole


def test_training_brings_pictures_to_their_names(pretraining, settings, tmp_path, monkeypatch, capsys):
    longer = yaml.safe_load(settings.read_text())
    longer |= {"stages": [{"steps": 60, "layers": 2, "keep": 12}], "batch": 16}
    file = tmp_path / "longer.yaml"
    file.write_text(yaml.safe_dump(longer))
    run(of("image"), file, "--data", pretraining, "--out", tmp_path)
    losses = [float(line.split()[3]) for line in capsys.readouterr().out.splitlines() if " loss " in line]
    assert losses[-1] < losses[0]


@slow
def test_two_processes_train_as_one_model(pretraining, settings, tmp_path):
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", RECIPE / "image.py"),
        *(settings, "--data", pretraining, "--out", tmp_path),
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(load_file(tmp_path / "image.safetensors")["step"]) == 10


def test_the_exported_backbone_is_what_was_trained(trained, pretraining, settings, tmp_path):
    from transformers import CLIPModel

    folder = tmp_path / "backbone"
    run(of("export"), settings, "--out", trained, "--to", folder, "--data", pretraining)
    assert (folder / "sources.tsv").read_bytes() == (pretraining / "sources.tsv").read_bytes()
    backbone = load_backbone(str(folder))
    image, text, steps = of("image"), of("text"), of("steps")
    state = load_file(trained / "image.safetensors")
    tower = image.ImageTower(backbone.image_tower.config)
    tower.load_state_dict(steps.part(state, "tower"))
    pictures = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(backbone.image_tower(pictures), tower(pictures), rtol=2e-2, atol=2e-2)  # fp16
    assert backbone.logit_scale == pytest.approx(steps.part(state, "rest")["log_scale"].exp().item(), rel=1e-2)

    words = text.TextTower(TextConfig(560, embed_dim=16, **yaml.safe_load(settings.read_text())["text"]))
    words.load_state_dict(steps.part(load_file(trained / "text.safetensors"), "tower"))
    tokens = backbone.tokenize(["a photo of a cat.", "anchor"])
    said = words(pack(tokens, causal=True))[0]
    torch.testing.assert_close(backbone.text_tower(pack(tokens, causal=True))[0], said, rtol=2e-2, atol=2e-2)
    assert backbone.text_tower.token_embedding.weight.std() == pytest.approx(0.02, rel=1e-2)  # as in CLIP

    theirs = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        features = theirs.get_image_features(pixel_values=pictures).pooler_output
        torch.testing.assert_close(features, backbone.image_tower(pictures), rtol=1e-4, atol=1e-4)
        ids, _ = text.padded(backbone.tokenize(["a photo of a cat."]))
        features = theirs.get_text_features(input_ids=ids).pooler_output
    torch.testing.assert_close(
        normalize(features, dim=-1), backbone.encode_texts(["a photo of a cat."]), rtol=1e-4, atol=1e-4
    )


def test_a_larger_image_tower_points_where_the_text_tower_does(pretraining, settings, trained, tmp_path):
    image, text, steps = of("image"), of("text"), of("steps")
    larger = yaml.safe_load(settings.read_text())
    larger["image"]["image_size"] = 48
    larger["stages"] = [{"steps": 2, "layers": 4, "keep": 20}]
    file = tmp_path / "larger.yaml"
    file.write_text(yaml.safe_dump(larger))
    given = ("--weights", trained / "image.safetensors", "--names", trained / "names.safetensors")
    run(image, file, "--data", pretraining, "--out", tmp_path, *given)
    before, after = (load_file(folder / "image.safetensors") for folder in (trained, tmp_path))
    assert after["tower.positions"].shape == (37, 32)  # interpolated
    assert not torch.equal(after["tower.blocks.0.fc_1.weight"], before["tower.blocks.0.fc_1.weight"])
    for name in ("map.weight", "shift"):
        assert torch.equal(after[f"rest.{name}"], before[f"rest.{name}"]), "directions are the text tower's"

    tokenizer = text.Tokenizer.from_file(str(trained / "tokenizer.json"))
    config = TextConfig(tokenizer.get_vocab_size(), embed_dim=16, **larger["text"])
    words = text.TextTower(config)
    words.load_state_dict(steps.part(load_file(trained / "text.safetensors"), "tower"))
    said = []
    for template in text.SAID:
        packed = pack([tokenizer.encode(template.format("cat")).ids], causal=True)
        said.append(normalize(words(packed)[0], dim=-1))
    expected = normalize(torch.stack(said).sum(0), dim=-1)[0]
    directions = load_file(trained / "names.safetensors")
    torch.testing.assert_close(directions["captions"][0], expected, rtol=1e-4, atol=1e-4)
    assert set(directions) == {"captions", "groups", "classes", "tags", "kinds", "above"}


def test_half_of_the_mean_feature_of_photographs_goes(pretraining, settings, trained, tmp_path, capsys):
    centre, image, images, steps = of("centre"), of("image"), of("images"), of("steps")
    file = tmp_path / "image.safetensors"
    file.write_bytes((trained / "image.safetensors").read_bytes())
    photographs = images.Photographs(pretraining, [1, 2, 3], ["n2", "n3", "n4"])
    shown = images.plain_photo(photographs.read(torch.arange(photographs.size)), 32)

    def features() -> torch.Tensor:
        tower = image.ImageTower(ImageConfig(**yaml.safe_load(settings.read_text())["image"]))
        tower.load_state_dict(steps.part(load_file(file), "tower"))
        return tower(shown)

    before = features()
    run(centre, settings, "--data", pretraining, "--out", tmp_path)
    change = before - features()
    torch.testing.assert_close(change, change[:1].expand_as(change), rtol=1e-3, atol=1e-4)  # the same for every image
    torch.testing.assert_close(change[0], before.mean(0) / 2, rtol=0.2, atol=0.2)  # photographs were drawn at random
    whole = file.read_bytes()
    run(centre, settings, "--data", pretraining, "--out", tmp_path)
    assert file.read_bytes() == whole
    assert "centred already" in capsys.readouterr().out


def test_kinds_lie_where_a_linear_discriminant_says():
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    nearest = of("nearest")
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat_interleave(50)
    features = torch.randn(4, 6, generator=rng)[labels] + torch.randn(200, 6, generator=rng) @ torch.diag(
        torch.tensor([0.1, 0.5, 1.0, 1.0, 2.0, 3.0])
    )
    found = nearest.discriminants(features, labels, 4)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=nearest.SHRUNK).fit(features.numpy(), labels.numpy())
    expected = torch.from_numpy(theirs.coef_).float()  # of means as they are: the mean's own direction goes
    expected = normalize(expected - expected.mean(0), dim=-1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)

    kinds = normalize(torch.randn(4, 8, generator=rng), dim=-1)
    towards = nearest.nearby(kinds, kinds, found)
    assert ((towards @ found.T).argmax(-1) == torch.arange(4)).all(), "a kind's own name points to it most"
    weights = (nearest.SHARPNESS * kinds[:1] @ kinds.T).exp()
    torch.testing.assert_close(towards[:1], normalize(weights @ found, dim=-1))


def test_the_text_tower_learns_where_the_nearest_kinds_lie(
    pretraining, settings, trained, tmp_path, monkeypatch, capsys
):
    nearest = of("nearest")
    before = tmp_path / "before"
    run(of("export"), settings, "--out", trained, "--to", before)
    for folder, places in (("thousand", "n1 n2 n3 n4"), ("tiny", "n2/images n3/images n4/images")):
        for i, place in enumerate(places.split()):
            for j in range(4):
                pixels = np.random.default_rng(10 * i + j).integers(0, 60, (40, 40, 3)) + 60 * int(place[1])
                (tmp_path / folder / place).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / folder / place / f"{j}.JPEG")
    write(tmp_path / "data.noun", WORDNET.replace("00000001", "00001930"))
    monkeypatch.setattr(nearest, "WORDNET", tmp_path)
    monkeypatch.setattr(nearest, "UNSEEN", ("n1",))
    monkeypatch.setattr(nearest, "HELD_OUT", 1)
    monkeypatch.setattr(nearest, "EACH", 3)
    monkeypatch.setattr(nearest, "RECIPE", nearest.RECIPE | {"warmup": 2})
    monkeypatch.setattr(nearest, "STEPS", 60)
    monkeypatch.setattr(nearest, "BATCH", 16)
    given = (
        *(before, "--data", pretraining, "--out", tmp_path / "state", "--to", tmp_path / "after"),
        *("--photographs", tmp_path / "thousand", tmp_path / "tiny"),
    )
    run(nearest, *given)
    features, _ = nearest.features_of(load_backbone(before), [tmp_path / "thousand"], tmp_path / "few.safetensors")
    assert len(features) == 9, "three of each kind but the one that is kept unseen"
    assert len(load_file(tmp_path / "state" / "features.safetensors")["features"]) == 18

    found = [json.loads(line.split(" ", 2 if "step" in line else 1)[-1].replace("'", '"'))
             for line in capsys.readouterr().out.splitlines() if "{" in line]  # fmt: skip
    assert found[-1]["kinds"] > found[0]["kinds"], "nearer to where they shall point"
    weights, others = (load_file(folder / "model.safetensors") for folder in (before, tmp_path / "after"))
    assert weights.keys() == others.keys()
    changed = {name for name in weights if not torch.equal(weights[name], others[name])}
    assert changed
    assert all(name.startswith("text_") for name in changed), "the image tower stays as it was"
    assert load_backbone(tmp_path / "after").encode_texts(["a cat"]).isfinite().all()

    whole = (tmp_path / "after" / "model.safetensors").read_bytes()
    run(nearest, *given)
    assert (tmp_path / "after" / "model.safetensors").read_bytes() == whole


def test_the_scale_is_the_one_that_labels_were_drawn_with():
    torch.manual_seed(0)
    cosines = normalize(torch.randn(4000, 16), dim=-1) @ normalize(torch.randn(10, 16), dim=-1).T
    labels = torch.multinomial((20 * cosines).softmax(-1), 1)[:, 0]
    assert of("scale").best_scale(cosines, labels) == pytest.approx(20, rel=0.05)


def test_a_backbone_gets_the_scale_of_photographs_it_never_saw(trained, settings, tmp_path, monkeypatch, capsys):
    folder, tiny, module = tmp_path / "backbone", tmp_path / "tiny-imagenet-200", of("scale")
    run(of("export"), settings, "--out", trained, "--to", folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    kinds = {"n01440764": "tench, Tinca tinca", "n02123394": "Persian cat", "n04146614": "school bus, bus"}
    write(tiny / "wnids.txt", "\n".join(kinds))
    write(tiny / "words.txt", "\n".join(f"{key}\t{names}" for key, names in kinds.items()))
    (tiny / "val" / "images").mkdir(parents=True)
    for i, key in enumerate(kinds):
        Image.new("RGB", (64, 64), (80 * i, 100, 50)).save(tiny / "val" / "images" / f"val_{i}.JPEG")
        (tiny / "train" / key / "images").mkdir(parents=True)
    write(
        tiny / "val" / "val_annotations.txt",
        "\n".join(f"val_{i}.JPEG\t{key}\t0\t0\t1\t1" for i, key in enumerate(kinds)),
    )
    asked = {}

    def best(cosines, labels):
        asked.update(cosines=cosines, labels=labels.tolist())
        return 27.0

    monkeypatch.setattr(module, "best_scale", best)
    run(module, folder, "--tiny", tiny)
    # Imagenette's tench is neither among the images nor among the names.
    texts = load_backbone(str(folder)).encode_texts(["a photo of a Persian cat.", "a photo of a school bus."])
    features = of("evaluate").image_features(
        load_backbone(str(folder)), [tiny / "val" / "images" / f"val_{i}.JPEG" for i in (1, 2)]
    )
    assert asked["labels"] == [0, 1]
    torch.testing.assert_close(asked["cosines"], features @ texts.T)
    after = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert {name for name in after if after[name] != before[name]} == {"model.safetensors"}
    assert load_backbone(str(folder)).logit_scale == pytest.approx(27, rel=1e-2)
    assert capsys.readouterr().out.endswith("-> 27.0\n")


def test_figures_go_into_the_card(tmp_path):
    evaluate = of("evaluate")
    card = tmp_path / "README.md"
    card.write_text(
        f"---\nlicense: apache-2.0\n---\n\n# mini\n\nAbove.\n{evaluate.BEGIN}\nold\n{evaluate.END}\nBelow.\n",
        encoding="utf-8",
    )
    figures = {"openmoji_classes": 61.25, "openmoji_pictures": 1260, "openmoji_different_names": 1259}
    evaluate.into_card(card, figures)
    evaluate.into_card(card, figures)
    written = card.read_text(encoding="utf-8")
    assert yaml.safe_load(written.split("---\n")[1]) == {"license": "apache-2.0", "figures": figures}
    assert "| OpenMoji, zero-shot over 52 classes | 61.2 % | 1.9 % |" in written
    assert "old" not in written
    assert written.index("Above.") < written.index("| 61.2 %") < written.index("Below.")
