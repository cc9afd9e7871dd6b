"""Images, regions, splits and data sets, against transformers' preprocessing and CoOp's files."""

from __future__ import annotations

import json
import math
import os
import random
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.kit import SHARED
from tests.kit.checks import fails
from vlprompt.data.datasets import load_dataset, read_known
from vlprompt.data.folders import from_csv, from_folder
from vlprompt.data.images import Preprocess, load_image, pixel_box, random_regions, to_rgb
from vlprompt.data.known.table import DATASETS, Dataset
from vlprompt.data.splits import Item, Split, read_split, write_split
from vlprompt.errors import OutputError

DATA = SHARED / "data"
needs_shared = pytest.mark.skipif(not DATA.is_dir(), reason="the shared benchmark files are not here")

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
PLAIN = Preprocess(16, (0, 0, 0), (1, 1, 1))

# Width × height: landscape, portrait, square, tiny, thin, exact, and offsets that are odd.
SIZES = [
    (97, 61), (61, 97), (50, 50), (3, 2), (2, 3), (1, 1), (1, 37), (37, 1),
    (224, 300), (227, 224), (640, 427),
]  # fmt: skip


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# --- preprocessing --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 65, 224])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_shortest_equals_transformers_clip(width, height, size):
    processors = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    image = noise(width, height)
    processor = processors.CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    actual = Preprocess(size, MEAN, STD)(image)
    assert actual.shape == (3, size, size)
    assert actual.dtype == torch.float32
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [32, 65])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_squash_equals_transformers_siglip(width, height, size):
    processors = pytest.importorskip("transformers.models.siglip.image_processing_pil_siglip")
    image = noise(width, height)
    processor = processors.SiglipImageProcessorPil(size={"height": size, "width": size})
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    actual = Preprocess(size, HALF, HALF, resize="squash")(image)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_other_filters_differ():
    image = noise(40, 30)
    names = ("nearest", "bilinear", "bicubic", "lanczos")
    views = [replace(PLAIN, interpolation=name)(image) for name in names]
    assert all(not torch.equal(a, b) for i, a in enumerate(views) for b in views[:i])


def test_extreme_strips_do_not_fill_the_memory():
    strip = Image.new("RGB", (1, 200_000), "red")
    assert torch.equal(replace(PLAIN, image_size=224)(strip)[:, 100, 100], torch.tensor([1.0, 0, 0]))


def test_preprocess_reads_any_mode_and_keeps_equal_settings_equal():
    grey = Image.new("L", (20, 20), 255)
    assert torch.equal(PLAIN(grey), torch.ones(3, 16, 16))
    assert Preprocess(16, [0, 0, 0], [1, 1, 1]) == PLAIN
    assert repr(Preprocess(16, [0, 0, 0], [1, 1, 1])) == repr(PLAIN)
    assert hash(Preprocess(16, [0, 0, 0], [1, 1, 1])) == hash(PLAIN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resize": "short"}, "unknown resize 'short': did you mean 'shortest'"),
        ({"interpolation": "cubic"}, "unknown interpolation 'cubic': did you mean 'bicubic'"),
        ({"image_size": 0}, "positive image_size"),
        ({"mean": (0.5,)}, "three values"),
    ],
)
def test_preprocess_refuses(change, message):
    with fails(message):
        replace(PLAIN, **change)


# --- image files ----------------------------------------------------------------------------------


def saved(path: Path, image: Image.Image, **options) -> Image.Image:
    image.save(path, **options)
    return load_image(path)


def pixel(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    assert image.mode == "RGB"
    value = image.getpixel((x, y))
    assert isinstance(value, tuple)
    return value


def test_palette_grey_bilevel_and_cmyk(tmp_path):
    palette = Image.new("RGB", (4, 4), (10, 200, 30)).quantize()
    assert pixel(saved(tmp_path / "p.png", palette)) == (10, 200, 30)
    assert pixel(saved(tmp_path / "l.png", Image.new("L", (4, 4), 77))) == (77, 77, 77)
    assert pixel(saved(tmp_path / "1.png", Image.new("1", (4, 4), 1))) == (255, 255, 255)
    red = pixel(saved(tmp_path / "cmyk.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=100))
    assert np.abs(np.subtract(red, (255, 0, 0))).max() <= 8


def test_transparency_is_white(tmp_path):
    assert pixel(saved(tmp_path / "rgba.png", Image.new("RGBA", (4, 4), (255, 0, 0, 0)))) == (255, 255, 255)
    assert pixel(saved(tmp_path / "half.png", Image.new("RGBA", (4, 4), (0, 0, 0, 127)))) == (128, 128, 128)
    assert pixel(saved(tmp_path / "la.png", Image.new("LA", (4, 4), (0, 0)))) == (255, 255, 255)
    palette = Image.new("RGB", (4, 4), (9, 9, 9)).quantize()
    assert pixel(saved(tmp_path / "p.png", palette, transparency=0)) == (255, 255, 255)
    key = Image.new("RGB", (4, 4), (9, 9, 9))
    assert pixel(saved(tmp_path / "key.png", key, transparency=(9, 9, 9))) == (255, 255, 255)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    ramp = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    image = saved(tmp_path / f"grey.{suffix}", Image.fromarray(ramp))
    assert [pixel(image, x)[0] for x in range(4)] == [0, 1, 128, 255]
    assert pixel(to_rgb(Image.fromarray(ramp.astype(np.int32))), 2) == (128, 128, 128)


@pytest.mark.parametrize("pixels", [np.ones((4, 4), np.float32), np.full((4, 4), 70_000, np.int32)])
def test_pixels_of_unknown_range_are_refused(tmp_path, pixels):
    with fails("x.tiff: .* no known range"):
        saved(tmp_path / "x.tiff", Image.fromarray(pixels))


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_first_frame_of_an_animation(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    lossless = {"lossless": True} if suffix == "webp" else {}
    image = saved(tmp_path / f"a.{suffix}", frames[0], save_all=True, append_images=frames[1:], **lossless)
    assert pixel(image) == (255, 0, 0)


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (32, 16), "black")
    image.paste("white", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn 90° clockwise
    upright = saved(tmp_path / "turned.jpg", image, exif=exif, quality=100)
    assert upright.size == (16, 32)
    assert pixel(upright, 8, 2)[0] > 240
    assert pixel(upright, 8, 29)[0] < 15


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"MM\x00*\xff\xff\xff\xff", b"no TIFF header"])
def test_damaged_exif_does_not_spoil_an_image(tmp_path, exif):
    image = saved(tmp_path / "damaged.jpg", Image.new("RGB", (32, 16)), exif=b"Exif\x00\x00" + exif)
    assert image.size == (32, 16)


def test_unreadable_files(tmp_path):
    whole = tmp_path / "whole.png"
    noise(64, 64).save(whole)
    noise(64, 64).save(tmp_path / "whole.jpg")
    for name in ("png", "jpg"):
        bytes_ = (tmp_path / f"whole.{name}").read_bytes()
        (tmp_path / f"cut.{name}").write_bytes(bytes_[: len(bytes_) // 2])
        with fails(rf"cannot read image .*cut\.{name}: \S"):
            load_image(tmp_path / f"cut.{name}")
    (tmp_path / "empty.jpg").touch()
    with fails(r"empty\.jpg: the file is empty"):
        load_image(tmp_path / "empty.jpg")
    (tmp_path / "text.jpg").write_text("no image\nat all")
    with fails(r"text\.jpg: not an image"):
        load_image(tmp_path / "text.jpg")
    with fails(r"none\.jpg: No such file"):
        load_image(tmp_path / "none.jpg")
    with fails("Is a directory"):
        load_image(tmp_path)


def test_decompression_bomb(tmp_path, monkeypatch):
    noise(64, 64).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with fails(r"bomb\.png: .*decompression bomb"):
        load_image(tmp_path / "bomb.png")


# --- regions --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [*SIZES, (4032, 3024), (1, 3000), (5000, 7)])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_regions_round_trip_to_whole_pixels(width, height, dtype):
    for top, left, h, w, flip in random_regions(np.random.default_rng(1), width, height, 200).astype(dtype):
        box = pixel_box((top, left, h, w, flip), width, height)
        assert 0 <= box[0] < box[2] <= width
        assert 0 <= box[1] < box[3] <= height
        exact = np.array([left * width, top * height, (left + w) * width, (top + h) * height])
        np.testing.assert_allclose(box, exact, atol=2e-3)


@pytest.mark.parametrize("region", [(0, 0, 0, 0, 0), (1, 1, 1, 1, 1), (0.999, 0.999, 0.001, 0.001, 0)])
def test_boxes_stay_inside_and_are_never_empty(region):
    left, top, right, bottom = pixel_box(region, 7, 5)
    assert 0 <= left < right <= 7
    assert 0 <= top < bottom <= 5


def test_region_crops_then_resizes_then_flips():
    image = noise(45, 31)
    region = np.array([4 / 31, 7 / 45, 20 / 31, 33 / 45, 0])
    crop = image.crop((7, 4, 40, 24)).resize((16, 16), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(crop)).permute(2, 0, 1) / 255
    assert torch.equal(PLAIN.region(image, region), expected)
    region[4] = 1
    assert torch.equal(PLAIN.region(image, region), expected.flip(-1))
    normalised = Preprocess(16, MEAN, STD).region(image, region)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(normalised, (expected.flip(-1) - mean) / std)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_region_never_reads_outside_its_box(interpolation):
    image = Image.new("RGB", (40, 30), "white")
    image.paste("black", (11, 5, 24, 18))
    view = replace(PLAIN, interpolation=interpolation).region(image, (5 / 30, 11 / 40, 13 / 30, 13 / 40, 0))
    assert not view.any()


def test_random_regions_have_the_distribution_of_random_resized_crop():
    width, height, n = 1000, 800, 4000
    regions = random_regions(np.random.default_rng(0), width, height, n)
    assert regions.shape == (n, 5)
    h, w = regions[:, 2] * height, regions[:, 3] * width
    area, aspect = regions[:, 2] * regions[:, 3], np.log(w / h)
    assert area.min() >= 0.079
    assert area.max() <= 1
    assert np.abs(aspect).max() <= math.log(4 / 3) + 0.01
    # Small areas always fit, so among them area and log ratio are uniform and centres do not lean to a side.
    small = area < 0.5
    assert abs(area[small].mean() - 0.29) < 0.01
    assert abs(aspect[small].mean()) < 0.02
    assert abs(aspect[small].std() - 2 * math.log(4 / 3) / math.sqrt(12)) < 0.01
    space = 1 - regions[small, 2:4]
    assert np.abs((regions[small, :2] / space).mean(0) - 0.5).max() < 0.03
    assert set(regions[:, 4]) == {0, 1}
    assert abs(regions[:, 4].mean() - 0.5) < 0.03


def test_random_regions_repeat_and_obey_their_settings():
    def draw(**settings):
        return random_regions(np.random.default_rng(3), 90, 60, 50, **settings)

    assert np.array_equal(draw(), draw())
    assert not draw(flip=0)[:, 4].any()
    assert draw(flip=1)[:, 4].all()
    whole = random_regions(np.random.default_rng(3), 60, 60, 5, scale=(1, 1), ratio=(1, 1))
    assert np.array_equal(whole[:, :4], np.tile([0, 0, 1, 1], (5, 1)))


def test_strips_fall_back_to_the_longest_centre_crop():
    rng = np.random.default_rng(0)
    assert pixel_box(random_regions(rng, 300, 3, scale=(0.9, 1))[0], 300, 3) == (148, 0, 152, 3)
    assert pixel_box(random_regions(rng, 3, 300, scale=(0.9, 1))[0], 3, 300) == (0, 148, 3, 152)


# --- few shots, base and novel --------------------------------------------------------------------


def toy(classes: int = 5, images: int = 20, val: int = 6) -> Split:
    def items(part: str, n: int) -> tuple[Item, ...]:
        return tuple(Item(f"{part}/{c}/{i:03}.jpg", c) for i in range(n) for c in range(classes))

    names = tuple(f"class {c}" for c in range(classes))
    return Split(Path("root"), names, items("train", images), items("val", val), items("test", 3))


def shuffled(items: tuple[Item, ...]) -> tuple[Item, ...]:
    return tuple(random.Random(0).sample(items, len(items)))


def test_few_shot_counts():
    for shots, val in [(1, 1), (4, 4), (16, 4)]:
        few = toy().few_shot(shots, seed=1)
        assert np.array_equal(np.bincount([item.label for item in few.train]), [shots] * 5)
        assert np.array_equal(np.bincount([item.label for item in few.val]), [val] * 5)
        assert few.test == toy().test
        assert few.class_names == toy().class_names
    assert len(toy(val=2).few_shot(4, 1).val) == 10
    assert toy(val=0).few_shot(4, 1).val == ()


def test_few_shot_depends_on_seed_and_names_only():
    split = toy()
    few = split.few_shot(4, seed=1)
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002
    assert split.few_shot(4, seed=1) == few
    other_order = replace(split, train=shuffled(split.train), val=shuffled(split.val))
    assert other_order.few_shot(4, seed=1) == few
    assert replace(split, root=Path("elsewhere")).few_shot(4, seed=1).train == few.train
    assert set(split.few_shot(4, seed=2).train) != set(few.train)


def test_few_shot_is_nested_and_fixed_for_ever():
    split = toy()
    for seed in (1, 2, 3):
        assert set(split.few_shot(4, seed).train) < set(split.few_shot(16, seed).train)
    # A change here would change every published number. From: printf 1:train/0/011.jpg | sha256sum
    assert [item.path for item in split.few_shot(2, seed=1).train[:4]] == [
        "train/0/011.jpg", "train/0/012.jpg", "train/1/007.jpg", "train/1/014.jpg",
    ]  # fmt: skip


def test_few_shot_commutes_with_subset():
    for classes in ("base", "novel"):
        assert toy().subset(classes).few_shot(4, 1) == toy().few_shot(4, 1).subset(classes)


def test_few_shot_refuses():
    with fails("class 'class 0' has 20 training images, too few for 32 shots"):
        toy().few_shot(32, 1)
    without = replace(toy(), train=tuple(item for item in toy().train if item.label != 3))
    with fails("class 'class 3' has 0 training images, too few for 1 shots"):
        without.few_shot(1, 1)
    with fails("shots must be at least 1, not 0"):
        toy().few_shot(0, 1)


def test_base_and_novel_classes():
    split = toy(classes=5)
    base, novel = split.subset("base"), split.subset("novel")
    assert base.class_names == ("class 0", "class 1", "class 2")
    assert novel.class_names == ("class 3", "class 4")
    assert {item.label for item in novel.test} == {0, 1}
    assert {item.path.split("/")[1] for item in novel.train if item.label == 0} == {"3"}
    assert len(base.train) + len(novel.train) == len(split.train)
    assert split.subset("all") == split
    with fails("unknown classes 'nvel': did you mean 'novel'"):
        split.subset("nvel")
    with fails("no novel classes among 1"):
        toy(classes=1).subset("novel")


def test_paths_are_below_the_root():
    assert toy().paths("test")[0] == Path("root/test/0/000.jpg")
    with fails("unknown part 'tst': did you mean 'test'"):
        toy().paths("tst")


# --- split files ----------------------------------------------------------------------------------


def test_split_file_round_trip(tmp_path):
    file = tmp_path / "new" / "split.json"
    split = replace(toy(), class_names=("a", "sea horse", "é", 'quo"te', "e"), val=())
    write_split(split, file)
    assert read_split(file, "root") == split
    assert json.loads(file.read_text())["train"][1] == ["train/1/000.jpg", 1, "sea horse"]
    write_split(split.few_shot(1, 1), file)
    assert len(read_split(file, "root").train) == 5
    assert os.listdir(file.parent) == ["split.json"]


def test_failed_write_keeps_the_old_split(tmp_path, monkeypatch):
    file = tmp_path / "split.json"
    write_split(toy(), file)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match=r"cannot write .*split\.json: No space left on device"):
        write_split(toy(classes=2), file)
    assert read_split(file, "root") == toy()
    assert os.listdir(tmp_path) == ["split.json"]


def test_split_class_names_are_words(tmp_path):
    file = tmp_path / "split.json"
    file.write_text(json.dumps({"test": [["a.jpg", 1, "sea_horse"], ["b.jpg", 0, "Cup"]]}))
    split = read_split(file, tmp_path)
    assert split.class_names == ("Cup", "sea horse")
    assert split.train == split.val == ()
    assert split.test[0] == Item("a.jpg", 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read split file"),
        ("[]", "must hold lists named train, val, test"),
        ('{"train": {}}', "must hold lists"),
        ("{}", "it lists no images"),
        ('{"train": [["a.jpg", 0]]}', r"train\[0\] is not \[path, label, class name\]"),
        ('{"val": [["a.jpg", 0, "x"], ["a.jpg", true, "y"]]}', r"val\[1\] is not"),
        ('{"train": [["a.jpg", 0, "x"]], "test": [["b.jpg", 0, "y"]]}', "label 0 is both 'x' and 'y'"),
        ('{"train": [["a.jpg", 0, "x"], ["b.jpg", 2, "y"]]}', "without gaps, but 1 is missing"),
        ('{"train": [["a.jpg", -1, "x"]]}', "without gaps, but 0 is missing"),
        ('{"train": [["a.jpg", 0, " "]]}', r"train\[0\]: label 0 has no class name"),
    ],
)
def test_bad_split_files(tmp_path, content, message):
    (tmp_path / "split.json").write_text(content)
    with fails(message):
        read_split(tmp_path / "split.json", tmp_path)


def test_missing_split_file(tmp_path):
    (tmp_path / "split.json").touch()
    with fails(r"splt\.json does not exist: did you mean 'split\.json'\?"):
        read_split(tmp_path / "splt.json", tmp_path)


# --- folders --------------------------------------------------------------------------------------


def touch(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def test_plain_folder_is_divided_by_name(tmp_path):
    names = [f"{folder}/{i}.JPG" for folder, n in (("sea_horse", 10), ("cup", 1)) for i in range(n)]
    others = ("cup/.hidden.png", "cup/.thumbs/1.png", "cup/notes.txt", ".git/a.png", "loose.png")
    split = from_folder(touch(tmp_path, *names, *others))
    assert split.class_names == ("cup", "sea horse")
    assert [len(split.items(part)) for part in ("train", "val", "test")] == [1 + 5, 2, 3]
    assert {item.path for part in ("train", "val", "test") for item in split.items(part)} == set(names)
    assert all(path.is_file() for path in split.paths("train"))
    assert from_folder(tmp_path) == split


@pytest.mark.parametrize(("n", "counts"), [(1, (1, 0, 0)), (2, (1, 0, 1)), (3, (2, 0, 1)), (5, (3, 1, 1))])
def test_small_classes_have_train_before_test_before_val(tmp_path, n, counts):
    split = from_folder(touch(tmp_path, *(f"{c}/{i}.png" for c in "ab" for i in range(n))))
    assert tuple(len(split.items(part)) // 2 for part in ("train", "val", "test")) == counts


@pytest.mark.parametrize("val", ["val", "valid", "Validation", None])
def test_folder_with_parts(tmp_path, val):
    touch(tmp_path, "train/b/1.png", "train/a/deep/er/2.png", "test/b/3.png", "extra/readme.txt")
    if val:
        touch(tmp_path, f"{val}/a/4.png")
    split = from_folder(tmp_path)
    assert split.class_names == ("a", "b")
    assert split.train == (Item("train/a/deep/er/2.png", 0), Item("train/b/1.png", 1))
    assert split.val == ((Item(f"{val}/a/4.png", 0),) if val else ())
    assert split.test == (Item("test/b/3.png", 1),)


def test_folder_with_a_test_part_only(tmp_path):
    split = from_folder(touch(tmp_path, "test/a/1.png", "test/b/1.png"))
    assert (split.train, len(split.test)) == ((), 2)


def test_a_class_may_be_called_train(tmp_path):
    split = from_folder(touch(tmp_path, "train/1.png", "bus/1.png"))
    assert split.class_names == ("bus", "train")


def test_bad_folders(tmp_path):
    touch(tmp_path, "good/a/1.png", "good/b/1.png", "one/images/a/1.png", "file")
    with fails("god does not exist: did you mean 'good'"):
        from_folder(tmp_path / "god")
    with fails("file is not a folder"):
        from_folder(tmp_path / "file")
    with fails(r"at least two classes are needed \(found: images\)"):
        from_folder(tmp_path / "one")
    with fails(r"at least two classes are needed \(found: none\)"):
        from_folder(tmp_path / "good" / "a")
    (tmp_path / "good" / "c").mkdir()
    with fails("class folder .*c holds no images"):
        from_folder(tmp_path / "good")
    with fails("classes 'a b' and 'a_b' have the same name"):
        from_folder(touch(tmp_path / "same", "a_b/1.png", "a b/1.png"))
    with fails("unknown class 'bs': did you mean 'bus'"):
        from_folder(touch(tmp_path / "typo", "train/bus/1.png", "train/car/1.png", "test/bs/1.png"))
    with fails("two folders for 'val'"):
        from_folder(touch(tmp_path / "two", "train/a/1.png", "val/a/1.png", "valid/a/1.png"))


# --- CSV files ------------------------------------------------------------------------------------


def csv(folder: Path, *lines: str, encoding: str = "utf-8") -> Path:
    file = folder / "data.csv"
    file.write_text("\n".join(lines), encoding=encoding)
    return file


def test_csv_with_a_split_column(tmp_path):
    touch(tmp_path, "x/1.png", "x/2.png", "x/a,b.png")
    lines = ("Path, Label ,SPLIT", "x/1.png,sea_horse,train", f"{tmp_path}/x/2.png,cup,Test", "")
    split = from_csv(csv(tmp_path, *lines, '"./x/a,b.png",cup,valid', encoding="utf-8-sig"))
    assert split.root == tmp_path
    assert split.class_names == ("cup", "sea horse")
    assert split.train == (Item("x/1.png", 1),)
    assert split.val == (Item("x/a,b.png", 0),)
    assert split.test == (Item("x/2.png", 0),)


def test_csv_without_a_split_column_is_divided_like_a_folder(tmp_path):
    names = [f"{c}/{i}.png" for c in ("b", "a") for i in range(10)]
    split = from_folder(touch(tmp_path, *names))
    assert from_csv(csv(tmp_path, "path,label", *(f"{name},{name[0]}" for name in names))) == split


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], r"no column 'path' \(found: \)"),
        (["path;label", "1.png;a"], r"no column 'path' \(found: path;label\)"),
        (["path,class", "1.png,a"], "no column 'label'"),
        (["path,label", "1.png,a", "3.png,b"], r"line 3: image .*3\.png does not exist: did you mean"),
        (["path,label", "1.png,a", "./1.png,b"], r"line 3: 1\.png is listed twice"),
        (["path,label", "1.png,a,b"], "line 2: more values than columns"),
        (["path,label,split", "1.png,a,trian"], "line 2: unknown split 'trian': did you mean 'train'"),
        (["path,label,split", "1.png,a"], "line 2: unknown split ''"),
        (["path,label", "1.png,a", "2.png,"], "a class has no name"),
        (["path,label", "1.png,a", "2.png,a"], r"two classes are needed \(found: a\)"),
    ],
)
def test_bad_csv_files(tmp_path, lines, message):
    touch(tmp_path, "1.png", "2.png")
    with fails(message):
        from_csv(csv(tmp_path, *lines))


def test_csv_in_another_encoding_or_missing(tmp_path):
    with fails("cannot read CSV file .*decode"):
        from_csv(csv(tmp_path, "path,label", "é.png,a", encoding="latin-1"))
    with fails(r"dat\.csv does not exist: did you mean 'data\.csv'"):
        from_csv(tmp_path / "dat.csv")


# --- data sets ------------------------------------------------------------------------------------


def test_folder_and_csv_data_sets(tmp_path):
    touch(tmp_path / "pets", "cat/1.png", "dog/1.png")
    loaded = load_dataset(str(tmp_path / "pets"))
    assert (loaded.name, loaded.template) == ("pets", "a photo of a {}.")
    assert loaded.split == from_folder(tmp_path / "pets")
    loaded = load_dataset(csv(tmp_path, "path,label", "pets/cat/1.png,cat", "pets/dog/1.png,dog"))
    assert (loaded.name, loaded.split.class_names) == ("data", ("cat", "dog"))


def test_data_set_made_on_the_fly(tmp_path, monkeypatch):
    def make(folder: Path) -> Split:
        return from_folder(touch(folder, "a/1.png", "b/1.png"))

    drawn = Dataset("drawn", "drawn-1", template="a drawing of {}.", make=make)
    monkeypatch.setitem(DATASETS, "drawn", drawn)
    loaded = load_dataset("Drawn", tmp_path)
    assert (loaded.split.root, loaded.template) == (tmp_path / "drawn-1", "a drawing of {}.")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert load_dataset("drawn").split.root == tmp_path / "cache" / "vlprompt" / "drawn-1"


def test_a_template_has_room_for_the_name(monkeypatch):
    monkeypatch.setitem(DATASETS, "drawn", Dataset("drawn", "drawn-1", template="a drawing"))
    with fails(r"data set 'drawn': template = a drawing \(allowed: text with \{\} in it\)"):
        load_dataset("drawn")


def test_bad_data_sets(tmp_path):
    accepted = r"a folder of class folders or a \.csv file of path,label is accepted too"
    with fails("unknown data set 'caltech11': did you mean 'caltech101'.*" + accepted):
        load_dataset("Caltech11")
    with fails(f"pest does not exist: did you mean 'pets'.*{accepted}"):
        load_dataset(touch(tmp_path, "pets/cat/1.png") / "pest")
    with fails(rf"x\.txt is not a \.csv file; {accepted}"):
        load_dataset(touch(tmp_path, "x.txt") / "x.txt")
    with fails("'dtd' needs --root"):
        load_dataset("dtd")
    with fails(f"'dtd': folder {tmp_path}/dtd does not exist"):
        load_dataset("DTD", tmp_path)
    (tmp_path / "dtd").mkdir()
    with fails(f"folder {tmp_path}/dtd/images does not exist"):
        load_dataset("dtd", tmp_path)
    (tmp_path / "dtd" / "images").mkdir()
    with fails(f"split file {tmp_path}/dtd/split_zhou_DescribableTextures.json does not exist"):
        load_dataset("dtd", tmp_path)


@needs_shared
@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("caltech101", "face"),
        ("dtd", "banded"),
        ("eurosat", "Annual Crop Land"),
        ("oxford_flowers", "pink primrose"),
        ("oxford_pets", "abyssinian"),
        ("stanford_cars", "2000 AM General Hummer SUV"),
        ("ucf101", "Apply Eye Makeup"),
    ],
)
def test_published_splits(tmp_path, name, first):
    dataset = DATASETS[name]
    for sub in dataset.subfolders:
        (tmp_path / dataset.folder / dataset.images / sub).mkdir(parents=True)
    (tmp_path / dataset.folder / dataset.split_file).symlink_to(DATA / "splits" / dataset.split_file)
    split, _ = read_known(dataset, tmp_path / dataset.folder)
    assert (len(split.class_names), split.class_names[0]) == (dataset.classes, first)
    assert tuple(len(split.items(part)) for part in ("train", "val", "test")) == dataset.sizes
    write_split(split, tmp_path / "again.json")
    assert read_split(tmp_path / "again.json", split.root) == split
    file = (DATA / "splits" / dataset.split_file).read_bytes()
    assert dataset.sources[-1].checksum == f"sha256:{sha256(file).hexdigest()}"


@needs_shared
def test_caltech_is_complete_and_readable():
    loaded = load_dataset("Caltech-101", DATA)
    split = loaded.split
    assert len(split.class_names) == 100
    assert all(path.is_file() for part in ("train", "val", "test") for path in split.paths(part))
    assert len(split.few_shot(16, 1).train) == 1600
    assert (len(split.subset("base").class_names), len(split.subset("novel").class_names)) == (50, 50)
    for path in split.paths("test")[::250]:
        assert PLAIN(load_image(path)).shape == (3, 16, 16)
