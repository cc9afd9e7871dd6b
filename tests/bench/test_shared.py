"""Images that the runs of a bench share: decoded once, read back as they were, done without on a full disk."""

from __future__ import annotations

import errno
import time
from collections import namedtuple
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.kit import TINY
from tests.kit.pictures import CLASSES
from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.load import load_backbone
from vlprompt.bench import shared
from vlprompt.bench.results import read_results
from vlprompt.bench.shared import SHARED, SharedImages, computed_once, decoded_once
from vlprompt.data import reading
from vlprompt.data.datasets import load_dataset
from vlprompt.data.images import load_image
from vlprompt.data.reading import ImageReader
from vlprompt.errors import DataError
from vlprompt.methods import Method, find_method
from vlprompt.training.evaluate import EvaluationImages, predict_logits


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes each file that is decoded, as PART/CLASS/FILE."""
    noted: list[str] = []

    def load(source):
        if isinstance(source, Path):
            noted.append("/".join(source.parts[-3:]))
        return original(source)

    original = reading.load_image
    for module in (reading, shared):
        monkeypatch.setattr(module, "load_image", load)
    return noted


def images_of(photos: Path, folder: Path | None = None) -> EvaluationImages:
    split = load_dataset(str(photos)).split
    paths, labels = split.paths("test"), split.labels("test")
    if folder is None:
        return EvaluationImages(paths, labels, ImageReader(2))
    return SharedImages(paths, labels, ImageReader(2), folder=folder)


def logits_of(method: Method, images: EvaluationImages) -> torch.Tensor:
    return predict_logits(method, images, CLASSES)


@pytest.mark.parametrize("name", ["coop", "maple"])
def test_what_is_shared_equals_what_is_computed(tiny: Backbone, photos: Path, tmp_path: Path, decoded, name) -> None:
    method = find_method(name)(tiny, CLASSES).eval()
    expected = logits_of(method, images_of(photos))
    decoded.clear()
    assert torch.equal(logits_of(method, images_of(photos, tmp_path / "s")), expected)
    assert torch.equal(logits_of(method, images_of(photos, tmp_path / "s")), expected)  # read back
    assert sorted(decoded) == sorted(f"test/{c}/{i}.png" for c in CLASSES for i in range(2))


def test_other_images_and_backbones_are_not_taken_for_the_same(tiny: Backbone, photos: Path, tmp_path: Path) -> None:
    method, folder = find_method("zero_shot")(tiny, CLASSES), tmp_path / "s"
    before = logits_of(method, images_of(photos, folder))
    (photos / "test" / CLASSES[0] / "0.png").write_bytes((photos / "test" / CLASSES[1] / "1.png").read_bytes())
    after = logits_of(method, images_of(photos, folder))
    assert torch.equal(after, logits_of(method, images_of(photos)))
    assert not torch.equal(after, before)
    n = len(list(folder.glob("*.npy")))
    method = find_method("zero_shot")(load_backbone(str(TINY)).to(dtype=torch.bfloat16), CLASSES)
    assert torch.equal(logits_of(method, images_of(photos, folder)), logits_of(method, images_of(photos)))
    assert len(list(folder.glob("*.npy"))) == n + 1  # the features; the views serve any precision


def test_the_runs_of_a_bench_decode_images_once(vlprompt, photos: Path, tmp_path: Path, decoded) -> None:
    given = ["--methods", "zero_shot,coop,maple", "--data", photos, "--seeds", "1,2", "--shots", "2"]
    quick = ["--backbone", TINY, "epochs=1", "warmup_epochs=0", "data.workers=0", "data.batch_size=2"]
    assert vlprompt("bench", "few-shot", *given, *quick, "--out", tmp_path / "out")[0] == 0
    assert sorted(file for file in decoded if file.startswith("test/")) == sorted(
        f"test/{c}/{i}.png" for c in CLASSES for i in range(2)
    )
    trained = [file for file in decoded if file.startswith("train/")]
    assert len(trained) == len(set(trained)) > 2 * len(CLASSES)  # two seeds draw others
    assert not (tmp_path / "out" / SHARED).exists()


def test_the_runs_of_a_bench_encode_images_once(vlprompt, photos: Path, tmp_path: Path, monkeypatch) -> None:
    encoded, encode = [], Backbone.encode_images
    monkeypatch.setattr(Backbone, "encode_images", lambda self, x: encoded.append(len(x)) or encode(self, x))
    given = ["--methods", "zero_shot,linear_probe", "--data", photos, "--seeds", "1", "--shots", "2"]
    assert vlprompt("bench", "few-shot", *given, "--backbone", TINY, "--out", tmp_path / "out")[0] == 0
    assert sum(encoded) == 2 * len(CLASSES) + 2 * len(CLASSES)  # training and test images


def test_decoded_images_are_read_back_as_they_were(photos: Path, tmp_path: Path, decoded, monkeypatch) -> None:
    files, folder = sorted((photos / "train").glob("*/*.png")), tmp_path / "s"
    Image.new("LA", (3, 5), (7, 128)).save(files[0])
    once, again = ([decoded_once(folder)(file) for file in files] for _ in range(2))
    assert len(decoded) == len(files)
    for file, first, second in zip(files, once, again, strict=True):
        assert second.mode == "RGB"
        assert second.size == first.size
        assert second.tobytes() == first.tobytes() == load_image(file).tobytes()
    Image.new("RGB", (9, 4)).save(files[0])
    assert decoded_once(folder)(files[0]).size == (9, 4)
    usage = namedtuple("usage", "free total")
    monkeypatch.setattr(shared.shutil, "disk_usage", lambda folder: usage(10**6, 10**7))
    assert decoded_once(tmp_path / "full")(files[0]).size == (9, 4)
    assert not list((tmp_path / "full").iterdir())


def test_unreadable_test_images_are_looked_for_once(vlprompt, photos: Path, tmp_path: Path, decoded) -> None:
    (photos / "test" / CLASSES[0] / "0.png").write_bytes(b"no picture")
    given = ["--methods", "zero_shot", "--data", photos, "--seeds", "1,2,3", "--shots", "2", "--backbone", TINY]
    assert vlprompt("bench", "few-shot", *given, "skip_bad=true", "--out", tmp_path / "out")[0] == 0
    assert {row.images for row in read_results(tmp_path / "out" / "results.csv")} == {5}
    tested = [file for file in decoded if file.startswith("test/")]
    assert len(tested) == 6 + 5  # once to see whether they can be read, once to be measured


def test_what_is_shared_stays_until_all_runs_are_finished(vlprompt, photos: Path, tmp_path: Path, decoded) -> None:
    given = ["--methods", "zero_shot", "--data", photos, "--seeds", "1,2", "--shots", "2", "--backbone", TINY]
    begin = ["bench", "few-shot", *given, "--out", tmp_path / "out", "--skip-existing"]
    assert vlprompt(*begin, "--shard", "1/2")[0] == 0
    assert list((tmp_path / "out" / SHARED).glob("features-*.npy"))
    n = len([file for file in decoded if file.startswith("test/")])
    assert vlprompt(*begin, "--shard", "2/2")[0] == 0
    assert len([file for file in decoded if file.startswith("test/")]) == n
    assert not (tmp_path / "out" / SHARED).exists()


def test_an_image_that_is_missing_is_named(tiny: Backbone, photos: Path, tmp_path: Path) -> None:
    images = images_of(photos)
    (photos / "test" / CLASSES[0] / "0.png").unlink()
    ours = SharedImages(images.images, images.labels.tolist(), ImageReader(2), folder=tmp_path / "s")
    with pytest.raises(DataError, match=r"0\.png: No such file"):
        logits_of(find_method("zero_shot")(tiny, CLASSES), ours)
    assert not list((tmp_path / "s").glob("*.npy"))


# --- files ----------------------------------------------------------------------------------------


def parts() -> Iterator[np.ndarray]:
    yield np.arange(6, dtype=np.uint8).reshape(2, 3)
    yield np.arange(6, 9, dtype=np.uint8).reshape(1, 3)


def test_of_several_at_once_one_computes(tmp_path: Path) -> None:
    calls = []

    def slow() -> Iterator[np.ndarray]:
        calls.append(1)
        time.sleep(0.1)
        yield from parts()

    with ThreadPoolExecutor(4) as pool:
        arrays = list(pool.map(lambda _: computed_once(tmp_path / "x.npy", (3, 3), np.uint8, slow), range(4)))
    assert len(calls) == 1
    assert all(array is not None and array.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]] for array in arrays)


@pytest.mark.parametrize("left", [0, 60, -2])
def test_files_that_a_machine_left_unfinished_are_made_again(photos: Path, tmp_path: Path, left: int) -> None:
    image = next((photos / "train").glob("*/*.png"))
    first = decoded_once(tmp_path)(image)
    (file,) = tmp_path.glob("*.npy")
    whole = file.read_bytes()
    file.write_bytes(whole[:left])
    assert decoded_once(tmp_path)(image).tobytes() == first.tobytes()
    assert file.read_bytes() == whole
    computed_once(tmp_path / "x.npy", (3, 3), np.uint8, parts)
    whole = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(whole[:left])
    array = computed_once(tmp_path / "x.npy", (3, 3), np.uint8, parts)
    assert array is not None
    assert array.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert (tmp_path / "x.npy").read_bytes() == whole


def test_without_room_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shared.shutil, "disk_usage", lambda folder: usage(17))
    assert computed_once(tmp_path / "x.npy", (3, 3), np.uint8, parts) is None
    monkeypatch.setattr(shared.shutil, "disk_usage", lambda folder: usage(18))
    assert computed_once(tmp_path / "x.npy", (3, 3), np.uint8, parts) is not None


def test_a_disk_that_fills_up_costs_time_only(tiny: Backbone, photos: Path, tmp_path: Path, monkeypatch) -> None:
    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    method = find_method("maple")(tiny, CLASSES).eval()
    monkeypatch.setattr(shared.os, "replace", full)
    assert torch.equal(logits_of(method, images_of(photos, tmp_path / "s")), logits_of(method, images_of(photos)))
    assert [file.suffix for file in (tmp_path / "s").iterdir()] == [".lock"]
