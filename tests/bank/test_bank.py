"""The region bank: what is drawn and stored, builds that are killed or shared, what is refused, training from it."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.kit import REPOSITORY, TINY, sealed
from tests.kit.checks import flipped
from tests.kit.command import environment, processes
from tests.kit.marks import slow, sweep
from tests.kit.pictures import CLASSES, make_pictures
from tests.kit.runs import TEACHER, StopsAfter, arguments, configured, log, prompts
from vlprompt import PromptClassifier, build_method, fit
from vlprompt.backbones.load import load_backbone
from vlprompt.bank.build import build_bank
from vlprompt.bank.config import bank_config
from vlprompt.bank.manifest import SHARD_IMAGES, BankSettings, Features, Labels, describe, read_manifest
from vlprompt.bank.records import FLOOR, Bank, top_k, verify
from vlprompt.bank.regions import Crops, restored, stored
from vlprompt.bank.views import BankViews
from vlprompt.config.schema import OptimConfig, TrainConfig
from vlprompt.config.teacher import Teacher
from vlprompt.data.augment import augment_patches
from vlprompt.data.batches import Batch
from vlprompt.data.datasets import load_dataset
from vlprompt.data.files import content_hash
from vlprompt.data.images import load_image, pixel_box, random_regions
from vlprompt.data.reading import ImageReader
from vlprompt.errors import ArtefactError, ConfigError, DataError, Interrupted
from vlprompt.files import is_unfinished, write_atomically
from vlprompt.methods import METHODS, Can
from vlprompt.training.loop import Training
from vlprompt.training.prepare import find_sources, prepare
from vlprompt.training.run import saved_config, train

REGIONS, TOP_K, BATCH = 6, 2, 4
FITTED = {"linear_probe", "gda", "lp_plus_plus", "ss_text", "ss_text_plus", "tip_adapter", "tip_adapter_f"}
TRAINED = sorted(set(METHODS) - {"zero_shot"} - FITTED)
GIVEN = ["--teacher", TEACHER, "--backbone", str(TINY), "--regions", str(REGIONS), "--top-k", "2", "--batch-size", "4"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"), train=6, size=40)


def build(pictures: Path, out: Path, progress=lambda done, of: None, **more: Any):
    """A bank of six regions, with labels and features unless told otherwise."""
    given = {"data.name": str(pictures), "data.workers": 0, "teacher.backbone": TEACHER, "backbone": str(TINY)}
    given |= {"regions": REGIONS, "batch_size": BATCH} | more
    given |= {"top_k": TOP_K} if given["teacher.backbone"] and "top_k" not in more else {}
    return build_bank(bank_config({k: v for k, v in given.items() if v is not None}), out, progress=progress)


@pytest.fixture(scope="module")
def bank(pictures, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("banks") / "bank"
    build(pictures, folder)
    return folder


@pytest.fixture(scope="module")
def other_bank(pictures, tmp_path_factory) -> Path:
    """Of the same images, with other regions."""
    folder = tmp_path_factory.mktemp("banks") / "other"
    build(pictures, folder, **{"crops.seed": 2})
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def from_bank(pictures: Path, bank: Path, method: str = "coop", **more: Any):
    settings = {"data.bank": str(bank), "teacher.backbone": None, "train.epochs": 2}
    settings |= {"method.average_mean": 2} if "promptsrc" in method else {}
    settings |= {"data.min_scale": 0.08} if method in ("mmrl", "prolip") else {}  # the bank's
    return configured(pictures, method, **{**settings, **more})


# --- regions --------------------------------------------------------------------------------------


def test_storing_a_region_moves_no_pixel() -> None:
    rng = np.random.default_rng(0)
    for width, height in [(1, 1), (7, 3), (224, 224), (500, 375), (6000, 4000), (60000, 50000)]:
        drawn = random_regions(rng, width, height, 300, scale=(0.0001, 1.0))
        kept = restored(stored(drawn))
        for a, b in zip(drawn, kept, strict=True):
            assert pixel_box(a, width, height) == pixel_box(b, width, height)
        assert set(kept[:, 4]) <= {0.0, 1.0}
        assert np.array_equal(stored(kept), stored(drawn))


def test_regions_depend_on_content_and_seed_alone() -> None:
    a, b = (format(i, "064x") for i in (1, 2))
    crops = Crops()
    whole = crops.draw(a, 300, 200, 40)
    assert np.array_equal(whole[:7], crops.draw(a, 300, 200, 7))  # the first of many are the few
    assert not np.array_equal(whole, crops.draw(b, 300, 200, 40))
    assert not np.array_equal(whole, Crops(seed=2).draw(a, 300, 200, 40))
    areas = restored(crops.draw(a, 3000, 3000, 2000))[:, 2:4].prod(1)
    assert 0.079 < areas.min() < 0.1
    assert 0.9 < areas.max() < 0.937
    assert 0.45 < restored(crops.draw(a, 300, 200, 2000))[:, 4].mean() < 0.55


# --- labels ---------------------------------------------------------------------------------------


def labelled(p: torch.Tensor, k: int) -> torch.Tensor:
    """Distributions p [n, C], stored as a bank does it and read again."""
    n_classes = p.shape[1]
    settings = BankSettings(1, teacher=Labels("t", "f", "{}", 1.0, tuple(map(str, range(n_classes))), k))
    records = np.zeros(len(p), settings.record)
    records["classes"], records["probabilities"], records["rest"] = top_k(p, k)
    reader = Bank.__new__(Bank)
    reader.settings = settings
    return reader.probabilities(records)


def test_all_classes_give_the_distribution_back() -> None:
    p = (4 * torch.randn(50, 300, generator=torch.Generator().manual_seed(0))).softmax(-1)
    torch.testing.assert_close(labelled(p, 300), p, rtol=2**-10, atol=2 * FLOOR)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_classes_that_are_not_kept_share_what_is_left(k) -> None:
    p = (2 * torch.randn(50, 9, generator=torch.Generator().manual_seed(k))).softmax(-1)
    read = labelled(p, k)
    torch.testing.assert_close(read.sum(-1), torch.ones(50))
    best = p.topk(k)
    torch.testing.assert_close(read.gather(1, best.indices), best.values, rtol=1e-3, atol=0)
    others = read.scatter(1, best.indices, torch.nan)
    rest = others.nanmean(1)
    torch.testing.assert_close(rest, (1 - best.values.sum(-1)) / (9 - k), rtol=2e-3, atol=1e-6)
    assert (others - rest[:, None]).nan_to_num().abs().max() < 1e-7


def test_a_teacher_that_is_nearly_sure_leaves_the_others_possible() -> None:
    read = labelled(torch.tensor([[1 - 3e-5, 1e-5, 1e-5, 1e-5], [1.0, 0, 0, 0]]), 1)
    assert read[0, 1:].tolist() == pytest.approx([1e-5] * 3, rel=1e-2)  # 1 − 0.99997 would be 0 in fp16
    assert (read[1, 1:] > 0).all()
    assert read[1, 1:].sum() < 1e-6


def test_many_classes_share_a_small_rest() -> None:
    p = torch.zeros(2, 20_000)
    p[0] = 1e-6 / 19_999  # each share is far below what fp16 can tell from 0
    p[0, 7] = 1 - 1e-6
    p[1, 7] = 1
    read = labelled(p, 10)
    assert 1 - read[0, 7] == pytest.approx(1e-6, rel=0.5)
    assert (read > 0).all()
    assert read[1].sum() - read[1, 7] < 1e-6
    torch.testing.assert_close(read.sum(-1), torch.ones(2))


def test_bytes_per_image() -> None:
    def size(n_classes: int, features: str | None = None) -> int:
        labels = Labels("t", "f", "{}", 100.0, tuple(map(str, range(n_classes))), 10)
        kept = Features("s", "f", 512, features) if features else None
        return BankSettings(teacher=labels, features=kept).bytes_per_image

    assert (size(256), size(257)) == (21_000, 26_000)
    assert (size(100, "fp32"), size(100, "fp16")) == (1_045_000, 533_000)
    page = (REPOSITORY / "docs" / "bank.md").read_text("utf-8")
    for number in ("21,000", "26,000", "1,045,000", "533,000"):
        assert number in page


# --- what a build stores --------------------------------------------------------------------------


@pytest.mark.parametrize("features", sweep(["fp32", "fp16"], "fp32"))
def test_a_bank_holds_what_teacher_and_student_say_about_its_regions(features, pictures, tiny, tmp_path) -> None:
    build(pictures, tmp_path / "bank", top_k=9, features=features)
    opened = Bank(tmp_path / "bank")
    mini = load_backbone(TEACHER)
    teacher = Teacher(mini, CLASSES, "a photo of a {}.", tiny.logit_scale)
    assert opened.settings.teacher.top_k == len(CLASSES)  # no more than there are
    assert [c for c, _ in opened.manifest.images] == sorted(c for c, _ in opened.manifest.images)
    for row, (digest, path) in enumerate(opened.manifest.images):
        assert content_hash(pictures / path) == digest
        image = load_image(pictures / path)
        records = opened.read(np.full(REGIONS, row), np.arange(REGIONS))
        assert np.array_equal(records["region"], Crops().draw(digest, 40, 40, REGIONS))
        for i in range(0, REGIONS, BATCH):
            part = records[i : i + BATCH]
            views = [
                torch.stack([p.region(image, r) for r in restored(part["region"])])
                for p in (tiny.preprocess, mini.preprocess)
            ]
            own = tiny.encode_images(views[0])
            assert torch.equal(opened.features(part), own if features == "fp32" else own.half().float())
            torch.testing.assert_close(
                opened.probabilities(part), teacher.probabilities(views[1]), rtol=2**-10, atol=2 * FLOOR
            )


def test_numbers_of_equal_images_are_stored_once(pictures, tmp_path) -> None:
    shutil.copytree(pictures, tmp_path / "p")
    shutil.copy(tmp_path / "p/train/cat/0.png", tmp_path / "p/train/cat/9.png")
    shutil.copy(tmp_path / "p/train/cat/0.png", tmp_path / "p/train/dog/9.png")
    assert build(tmp_path / "p", tmp_path / "bank").images == 18
    rows = Bank(tmp_path / "bank").rows([tmp_path / f"p/train/{name}.png" for name in ("cat/0", "cat/9", "dog/9")])
    assert len(set(rows.tolist())) == 1


def test_images_that_are_new_are_added(pictures, bank, tmp_path) -> None:
    few, grown = {"data.shots": 2}, tmp_path / "grown"
    assert build(pictures, grown, **few).images == 6
    before = content(grown)
    assert build(pictures, grown, **few, seed=2).built > 0
    built = build(pictures, grown)
    assert built.finished
    assert (built.images, built.images - built.built) == (18, len(read_manifest(grown).images) - built.built)
    after = content(grown)
    assert all(after[name] == before[name] for name in before if name != "manifest.json")
    assert {c for c, _ in read_manifest(grown).images} == {c for c, _ in read_manifest(bank).images}
    verify(grown, pictures)
    one, other = Bank(grown), Bank(bank)
    files = load_dataset(pictures).split.paths("train")
    for r in range(REGIONS):  # the same numbers, wherever they lie
        a, b = (x.read(x.rows(files), np.full(18, r)) for x in (one, other))
        assert np.array_equal(a, b)
    untouched = content(bank)
    assert build(pictures, bank).built == 0
    assert content(bank) == untouched


# --- killed and shared builds ---------------------------------------------------------------------


@slow
def test_a_killed_build_resumes_to_the_same_bytes(pictures, tmp_path) -> None:
    rng = random.Random(0)
    deaths = {
        "whole": [],
        "times": [rng.uniform(0.05, 0.2) for _ in range(6)],
        # Before its 1st file, the manifest; after manifest and a file of regions; behind the next; before the last.
        "files": [1, 3, -1, 2],
    }

    def run(name: str, deaths: list, *more: str) -> dict[str, Any]:
        out = str(tmp_path / name)
        return {"out": out, "deaths": deaths, "argv": ["bank", "build", str(pictures), "--out", out, *GIVEN, *more]}

    runs = [run(name, d) for name, d in deaths.items()]
    runs += [run("parts", [1, -1], "--part", "2/2"), run("parts", [1, 2, -2], "--part", "1/2")]
    runs += [run(name, [], "--shots", "3") for name in ("grown", "grown often")]
    runs += [run("grown", []), run("grown often", [1, -1, 2])]
    helper = [sys.executable, "-m", "tests.kit.kill_often", json.dumps(runs)]
    done = subprocess.run(helper, env=environment(), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    none, times, files, *others = json.loads(done.stdout)
    assert (none, files) == (0, len(deaths["files"]))
    assert times >= 2
    assert others == [2, 3, 0, 0, 0, 3]
    for name in ("times", "files", "parts"):
        assert content(tmp_path / name) == content(tmp_path / "whole")
    assert content(tmp_path / "grown often") == content(tmp_path / "grown")


@slow
def test_parts_in_several_processes_give_the_same_bytes(pictures, bank, tmp_path) -> None:
    out = tmp_path / "shared"
    command = [sys.executable, "-m", "vlprompt", "bank", "build", str(pictures), "--out", str(out), *GIVEN]
    started = [
        subprocess.Popen([*command, "--part", f"{i}/3"], env=environment(), stderr=subprocess.PIPE, text=True)
        for i in (1, 2, 3)
    ]
    said = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], said
    assert all(f"(part {i}/3)" in text for i, text in enumerate(said, 1))
    assert any("is complete" in text for text in said)
    assert content(out) == content(bank)


def test_a_bank_without_all_its_parts_is_not_read(pictures, bank, tmp_path) -> None:
    out = tmp_path / "bank"
    assert not build(pictures, out, part=(1, 2)).finished
    with pytest.raises(
        DataError, match=r"bank is not finished \(3 of 3 files\): give the `vlprompt bank build` command"
    ):
        train(from_bank(pictures, out), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert not describe(read_manifest(out))["finished"]
    assert build(pictures, out, part=(2, 2)).finished
    assert content(out) == content(bank)


def test_a_part_with_nothing_to_do(pictures, tmp_path) -> None:
    built = build(pictures, tmp_path / "bank", part=(7, 7))
    assert (built.built, built.finished) == (0, False)


def test_processes_of_one_number_on_two_machines_write_beside_each_other(tmp_path, monkeypatch) -> None:
    written: list[Path] = []
    replace = os.replace

    def other_machine(unfinished: Path, file: Path) -> None:
        written.append(unfinished)
        if len(written) == 1:
            write_atomically(file, "other")
        assert unfinished.read_text() == ("own" if unfinished == written[0] else "other")
        replace(unfinished, file)

    monkeypatch.setattr(os, "getpid", lambda: 1)
    monkeypatch.setattr(os, "replace", other_machine)
    write_atomically(tmp_path / "file", "own")
    assert content(tmp_path) == {"file": b"own"}
    assert len(set(written)) == 2
    assert all(map(is_unfinished, written))
    assert not is_unfinished(tmp_path / "file")


def same_numbers(one: Path, other: Path) -> bool:
    """Whether all images of a bank are in another one with the same numbers, wherever they lie."""
    a, b = Bank(one), Bank(other)
    contents = [content for content, _ in a.manifest.images]
    read = ([x.read(np.full(REGIONS, x._row[c]), np.arange(REGIONS)) for c in contents] for x in (a, b))
    return all(np.array_equal(m, n) for m, n in zip(*read, strict=True))


def cut_off(file: Path, images: list[Path], shard: int) -> None:
    """Take so much of an image away that it cannot be read and comes, by its new content, into a bank's i-th file."""
    whole, others = file.read_bytes(), [content_hash(image) for image in images if image != file]
    for n in range(40, 1000):
        file.write_bytes(whole[:-n])
        if sum(other < content_hash(file) for other in others) // SHARD_IMAGES == shard:
            return
    raise AssertionError("no such place")


@pytest.mark.parametrize(
    ("shard", "remedy"),
    sweep(
        [(0, "repaired"), (1, "repaired"), (0, "removed"), (1, "removed"), (2, "removed"), (1, "skipped")],
        (1, "repaired"),
    ),
)
def test_a_build_that_an_image_stopped_goes_on(shard, remedy, pictures, bank, tmp_path) -> None:
    images, out = damaged(pictures, tmp_path / "p"), tmp_path / "bank"
    file = images / "train" / "dog" / "3.png"
    cut_off(file, load_dataset(images).split.paths("train"), shard)
    with pytest.raises(DataError, match=r"dog/3\.png"):
        build(images, out)
    assert len(list(out.glob("*.npy"))) == shard
    if remedy != "skipped":
        file.unlink()
    if remedy == "repaired":
        shutil.copy(pictures / "train" / "dog" / "3.png", file)
    more = {"data.skip_bad": remedy == "skipped"}
    built = build(images, out, **more)
    assert (built.finished, built.images) == (True, 18 if remedy == "repaired" else 17)
    verify(out, images)
    assert same_numbers(out, bank)
    assert build(images, out, **more).built == 0


def test_other_seeds_of_a_half_built_bank_go_on_with_it(pictures, bank, tmp_path) -> None:
    out, seeds = tmp_path / "bank", [{"data.shots": 4, "seed": seed} for seed in (1, 2)]
    assert not build(pictures, out, part=(1, 2), **seeds[0]).finished
    assert build(pictures, out, **seeds[1]).finished
    assert build(pictures, out, **seeds[0]).finished
    assert build(pictures, out).images == 18
    assert same_numbers(out, bank)


def test_a_refused_command_leaves_a_half_built_bank_as_it_was(pictures, bank, tmp_path) -> None:
    out = tmp_path / "bank"
    build(pictures, out, part=(2, 3))
    (out / ".lock").unlink()
    before = content(out)
    for more in ({"batch_size": 5}, {"top_k": 1, "data.shots": 1}):
        with pytest.raises(ConfigError, match="cannot be continued: it was begun with"):
            build(pictures, out, **more)
        assert content(out) == before
    assert build(pictures, out).finished
    assert content(out) == content(bank)


@pytest.mark.parametrize(
    "more", sweep([{"batch_size": 5}, {"teacher.backbone": None}, {"data.shots": 1}], {"batch_size": 5})
)
def test_a_bank_without_any_file_is_not_begun(more, pictures, bank, tmp_path) -> None:
    assert build(pictures, tmp_path / "bank", part=(7, 7), **more).built == 0
    assert build(pictures, tmp_path / "bank").finished
    assert content(tmp_path / "bank") == content(bank)


@slow
def test_a_file_whose_images_are_all_gone_is_empty(pictures, bank, tmp_path) -> None:
    images, out = damaged(pictures, tmp_path / "p"), damaged(bank, tmp_path / "bank")
    one, other = (images / "train" / "cat" / name for name in ("one.png", "other.png"))
    Image.new("RGB", (40, 40), "red").save(one)
    build(images, out, part=(9, 9))
    Image.new("RGB", (40, 40), "blue").save(other)
    assert not build(images, out, part=(5, 5)).finished
    one.unlink()
    assert build(images, out).finished
    assert [shard.images for shard in verify(out, images).shards] == [8, 8, 2, 0, 1]
    build(images, tmp_path / "fresh")
    assert same_numbers(out, tmp_path / "fresh")
    train(from_bank(images, out, **{"train.epochs": 1}), tmp_path / "run")


def test_a_lost_file_of_images_that_are_gone_is_named(pictures, bank, tmp_path) -> None:
    images, out = damaged(pictures, tmp_path / "p"), damaged(bank, tmp_path / "bank")
    (out / "regions-00001.npy").unlink()
    path = read_manifest(bank).images[9][1]
    Image.new("RGB", (40, 40)).save(images / path)
    before = content(out)
    says = rf"be continued: regions-00001.npy is lost, and image {path} of it is not among the data, or has changed$"
    with pytest.raises(DataError, match=says):
        build(images, out)
    assert content(out) == before
    shutil.copy(pictures / path, images / path)
    assert build(images, out).finished
    assert content(out) == content(bank)


@pytest.mark.parametrize("more", sweep([{"seed": 2}, {"batch_size": 5}, {"teacher.template": "one {}."}], {"seed": 2}))
def test_of_two_builds_that_differ_and_begin_together_one_is_refused(more, pictures, tmp_path) -> None:
    out, few = tmp_path / "bank", {"data.shots": 3}

    def meanwhile(done: int, of: int) -> None:
        if done == 1:
            build(pictures, out, part=(2, 2), **few, **more)

    with pytest.raises(
        ConfigError, match=r"cannot be continued: another build has begun there meanwhile, with other images or"
    ):
        build(pictures, out, meanwhile, part=(1, 2), **few)
    with pytest.raises(DataError, match="is not finished"):
        Bank(out)
    assert build(pictures, out, part=(1, 2), **few, **more).finished
    build(pictures, tmp_path / "alone", **few, **more)
    assert content(out) == content(tmp_path / "alone")


@slow
def test_other_images_while_a_bank_is_built_do_not_mix_with_it(pictures, bank, tmp_path) -> None:
    out, seeds = tmp_path / "bank", [{"data.shots": 4, "seed": seed} for seed in (1, 2)]

    def meanwhile(done: int, of: int) -> None:
        if done == 9:  # after its first file
            with pytest.raises(ConfigError, match="it was begun with batch_size = 4, not 5"):
                build(pictures, out, batch_size=5, **seeds[0])
            build(pictures, out, **seeds[1])

    with pytest.raises(ConfigError, match="cannot be continued: another build has begun there meanwhile"):
        build(pictures, out, meanwhile, **seeds[0])
    assert Bank(out)  # the other one's
    build(pictures, out, **seeds[0])
    assert build(pictures, out).images == 18
    assert same_numbers(out, bank)


def test_builds_write_one_at_a_time(pictures, tmp_path, monkeypatch) -> None:
    out, replace, written = tmp_path / "bank", os.replace, []

    def alone(unfinished: Path, file: Path) -> None:
        with (out / ".lock").open("w") as stream, pytest.raises(BlockingIOError):
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        written.append(file.name)
        replace(unfinished, file)

    monkeypatch.setattr(os, "replace", alone)
    build(pictures, out, **{"data.shots": 1})
    assert written == ["manifest.json", "regions-00000.npy", "manifest.json"]
    assert {file.name for file in out.iterdir()} == set(written)


def test_what_killed_parts_left_is_gone_when_the_bank_is_complete(pictures, bank, tmp_path) -> None:
    out = tmp_path / "bank"
    build(pictures, out, part=(1, 2))
    for name in (".manifest.json.vlprompt-0123456789abcdef", ".regions-00001.npy.vlprompt-fedcba9876543210"):
        (out / name).write_text("half")
    build(pictures, out, part=(2, 2))
    assert content(out) == content(bank)


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"regions": 12}, "regions = 6, not 12"),
        ({"crops.min_scale": 0.1}, "crops.min_scale = 0.08, not 0.1"),
        ({"crops.seed": 5}, "crops.seed = 1, not 5"),
        ({"top_k": 1}, "teacher.top_k = 2, not 1"),
        ({"teacher.template": "one {}."}, "teacher.template = 'a photo of a {}.', not 'one {}.'"),
        ({"teacher.backbone": None}, "teacher = 'mini', not none"),
        ({"backbone": None, "teacher.logit_scale": 100.02986145019531}, "features = 'backbone', not none"),
        ({"features": "fp16"}, "features.dtype = 'fp32', not 'fp16'"),
        ({"batch_size": 5}, "batch_size = 4, not 5"),
    ],
)
def test_a_bank_is_not_gone_on_with_otherwise(more, says, pictures, bank) -> None:
    before = content(bank)
    with pytest.raises(ConfigError) as error:
        build(pictures, bank, **more)
    assert str(error.value) == f"{bank} cannot be continued: it was begun with {says}"
    assert content(bank) == before


def test_another_teacher_and_other_classes_are_named(pictures, bank, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"it was begun with teacher 'mini' \(\w{12}…\), not 'backbone' \(\w{12}…\)$"):
        build(pictures, bank, **{"teacher.backbone": str(TINY)})
    words = tmp_path / "words.txt"
    for names, says in [
        ("cat\ndog\nsea hors\n", "'sea hors' is not among its 3, the nearest is 'sea horse'"),
        ("cat\ndog\n", "it has 3, not 2: 'sea horse' is one more"),
        ("dog\ncat\nsea horse\n", "the same in another order"),
    ]:
        words.write_text(names)
        with pytest.raises(ConfigError, match=rf"begun with other classes \({says}\)$"):
            build(pictures, bank, **{"teacher.class_names_file": str(words)})


@pytest.mark.parametrize(
    ("method", "more", "says"),
    [
        ("kdpl_coop", {"teacher.backbone": str(TINY)}, r"built with teacher 'mini' \(\w{12}…\), not 'backbone' \("),
        ("kdpl_coop", {"teacher.template": "a {}."}, r"with teacher.template = 'a photo of a \{\}.', not 'a \{\}.'"),
        ("kdpl_coop", {"teacher.logit_scale": 1.0}, r"built with teacher.logit_scale = [\d.]+, not 1.0"),
        ("kdpl_coop", {"data.classes": "base"}, r"other classes \(it has 3, not 2: 'sea horse' is one more\)"),
        ("coop", {"data.min_scale": 0.5}, r"built with crops.min_scale = 0.08, not 0.5"),
        ("coop", {"backbone": TEACHER}, r"built with features 'backbone' \(\w{12}…\), not 'mini' \(\w{12}…\)"),
        ("coop", {"data.regions_per_image": 3}, r"data.regions_per_image = 3 \(allowed with batches of 4: 1, 2, 4\)"),
        ("coop", {"data.bank": None, "data.regions_per_image": 3}, r"= 3: there is no region bank \(--bank\)"),
        ("coop", {"data.views": 2, "data.regions_per_image": 4}, r"data.regions_per_image = 4 \(allowed .*: 1, 2\)"),
        ("coop", {"data.views": 7}, r"^data.views = 7 \(allowed with region bank .*/bank: 1 to 6\)$"),
        ("coop", {"data.views": "random"}, r"^data.views = random \(allowed with region bank .*/bank: 1 to 6\)$"),
        ("coop", {"data.bank": None, "data.views": 3}, r"^data.views = 3: there is no region bank \(--bank\)$"),
        ("coop", {"data.bank": "nowhere"}, r"region bank nowhere does not exist"),
        ("zero_shot", {}, r"method 'zero_shot' takes no training steps: it reads no region bank"),
    ],
)  # fmt: skip
def test_a_run_that_does_not_fit_is_refused(method, more, says, pictures, bank, tmp_path) -> None:
    with pytest.raises((ConfigError, DataError), match=says):
        train(from_bank(pictures, bank, method, **more), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_a_method_does_not_read_of_a_bank_need_not_fit(pictures, bank, tmp_path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("owl\nfox\n")
    build(pictures, tmp_path / "words", **{"teacher.class_names_file": str(words)})
    once = {"train.epochs": 1}
    train(from_bank(pictures, tmp_path / "words", "coop", **once), tmp_path / "labels")
    train(from_bank(pictures, bank, "vpt", backbone=TEACHER, **once), tmp_path / "features")
    one_branch = {"backbone": TEACHER, "method.branches": "textual", **once}
    with pytest.raises(ConfigError, match="built with features 'backbone'"):
        train(from_bank(pictures, bank, "dpl", **one_branch), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("given", ["0", "-1", "1.5", "all", "3x", "true"])
def test_a_number_of_views_that_is_none_is_one_line(given, vlprompt, pictures, bank, tmp_path) -> None:
    for option in (["--views", given], [f"views={given}"]):
        code, out, err = vlprompt(*arguments("coop", pictures, tmp_path / "run", "--bank", str(bank), *option))
        assert (code, out) == (2, "")
        assert err == f"error: data.views = {given} (allowed: random, center, or a number from 1 on)\n"


def test_more_views_than_the_bank_has_are_one_line(vlprompt, pictures, bank, tmp_path) -> None:
    code, out, err = vlprompt(*arguments("coop", pictures, tmp_path / "run", "--bank", str(bank), "--views", "7"))
    assert (code, out) == (2, "")
    assert err == f"error: data.views = 7 (allowed with region bank {bank}: 1 to 6)\n"
    assert not (tmp_path / "run").exists()


def test_images_that_the_bank_does_not_have_are_named(pictures, bank, tmp_path) -> None:
    shutil.copytree(pictures, tmp_path / "p")
    changed, new = tmp_path / "p/train/dog/3.png", tmp_path / "p/train/dog/99.png"
    Image.new("RGB", (40, 40)).save(new)
    with pytest.raises(DataError, match=rf"lacks 1 of the run's 19 training images: {new}: it is not among the bank's"):
        train(from_bank(tmp_path / "p", bank), tmp_path / "run")
    new.rename(changed)
    with pytest.raises(
        DataError, match=rf"lacks 1 of the run's 18 .*: {changed}: its content was another when the bank"
    ):
        train(from_bank(tmp_path / "p", bank), tmp_path / "run")


def test_a_bank_without_labels_serves_any_classes_but_no_student_of_a_teacher(pictures, tmp_path) -> None:
    build(pictures, tmp_path / "bank", **{"teacher.backbone": None})
    train(from_bank(pictures, tmp_path / "bank", **{"data.classes": "base", "train.epochs": 1}), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"bank has no teacher's labels, which method 'kdpl_coop' learns from: build"):
        train(from_bank(pictures, tmp_path / "bank", "kdpl_coop"), tmp_path / "other")


def test_bad_settings_of_a_build_are_all_named(vlprompt, pictures, tmp_path) -> None:
    out = str(tmp_path / "bank")
    code, _, err = vlprompt("bank", "build", str(pictures), "--out", out)
    assert code == 2
    assert (
        err == "error: a bank keeps a teacher's labels, a student's features, or both: give --teacher or --backbone\n"
    )
    bad = ["--regions", "0", "--min-scale", "2", "--top-k", "0", "--features", "fp23"]
    towers = ["--backbone", "mini", "--teacher", "mini"]
    code, _, err = vlprompt("bank", "build", str(pictures), *towers, "--out", out, *bad)
    assert code == 2
    assert err.count("\n") == 1
    for says in ("regions = 0 (allowed", "min_scale = 2.0 (allowed", "top_k = 0", "features = fp23"):
        assert says in err
    for part in ("3/2", "0/2", "x"):
        code, _, err = vlprompt("bank", "build", str(pictures), "--backbone", "mini", "--out", out, "--part", part)
        assert (code, err) == (2, f"error: part = {part} (allowed: I/N with I from 1 to N)\n")
    crossed = ["--min-scale", "0.5", "--max-scale", "0.4"]
    code, _, err = vlprompt("bank", "build", str(pictures), "--backbone", "mini", "--out", out, *crossed)
    assert (code, err) == (2, "error: crops.min_scale = 0.5 (allowed: at most max_scale = 0.4)\n")
    unread = ["--template", "one {}.", "--logit-scale", "3", "--class-names-file", "words.txt"]
    code, _, err = vlprompt("bank", "build", str(pictures), "--backbone", "mini", "--out", out, *unread)
    assert code == 2
    assert err.count("\n") == 1
    for says in ("template = one {}.", "logit_scale = 3.0", "class_names_file = words.txt"):
        assert f"teacher.{says}: there is no teacher (--teacher)" in err
    code, _, err = vlprompt("bank", "build", str(pictures), "--backbone", "mini", "--out", out, "--top-k", "3")
    assert (code, err) == (2, "error: top_k = 3: there is no teacher (--teacher)\n")
    code, _, err = vlprompt("bank", "build", str(pictures), "--teacher", "mini", "--out", out, "--features", "fp16")
    assert (code, err) == (2, "error: features = fp16: there is no student whose features to keep (--backbone)\n")
    assert not Path(out).exists()
    code, _, err = vlprompt("bank", "build", str(pictures), "--backbone", "mini", "--out", str(pictures))
    assert (code, err) == (2, f"error: output folder {pictures} is already in use: choose another with --out\n")


# --- info, verify, damage -------------------------------------------------------------------------


def test_info_says_what_a_bank_holds(vlprompt, bank, tiny) -> None:
    code, out, _ = vlprompt("bank", "info", str(bank), "--json")
    said = json.loads(out)
    assert code == 0
    assert (said["images"], said["regions"], said["finished"], said["files"]) == (18, REGIONS, True, 3)
    assert said["bytes_per_image"] == REGIONS * (10 + 2 + 2 * 2 + 2 + 4 * tiny.embed_dim)
    assert said["bytes"] == 18 * said["bytes_per_image"]
    assert said["features"]["fingerprint"] == tiny.fingerprint
    assert said["teacher"]["class_names"] == list(CLASSES)
    held = sum(np.load(file, mmap_mode="r").nbytes for file in bank.glob("*.npy"))
    assert held == said["bytes"]
    code, out, _ = vlprompt("bank", "info", str(bank))
    assert code == 0
    assert f"18, {said['bytes_per_image']:,} bytes each" in out
    assert "teacher   mini (" in out


def damaged(bank: Path, out: Path) -> Path:
    shutil.copytree(bank, out)
    return out


def test_verify_names_the_first_bad_file(vlprompt, pictures, bank, tmp_path) -> None:
    code, out, _ = vlprompt("bank", "verify", str(bank), str(pictures), "--json")
    assert (code, json.loads(out)) == (0, {"bank": str(bank), "files": 3, "images_compared": 18})
    code, out, err = vlprompt("bank", "verify", str(bank), "--root", str(pictures))
    assert (code, out, err) == (2, "", "error: --root is where DATA lies: give DATA too, or no image is compared\n")
    copy = damaged(bank, tmp_path / "bank")
    file = copy / "regions-00001.npy"
    whole = bytearray(file.read_bytes())
    whole[-5] ^= 1
    file.write_bytes(whole)
    code, _, err = vlprompt("bank", "verify", str(copy))
    assert (code, err) == (2, f"error: {file} is damaged: its sha256 is not the one in manifest.json\n")
    shutil.copytree(pictures, tmp_path / "p")
    _, path = read_manifest(bank).images[4]
    Image.new("RGB", (40, 40)).save(tmp_path / "p" / path)
    code, _, err = vlprompt("bank", "verify", str(bank), str(tmp_path / "p"))
    assert (code, err) == (
        2,
        f"error: image {tmp_path / 'p' / path} has changed since the region bank {bank} was built\n",
    )


HOLDS = r"regions-00001.npy does not hold what manifest.json says: found"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:-7]), HOLDS),
        (lambda f: f.write_bytes(b""), HOLDS),
        (lambda f: f.unlink(), r"file of the region bank .*regions-00001.npy does not exist"),
        (lambda f: np.save(f, np.zeros((8, REGIONS))), HOLDS),
        (lambda f: np.save(f, np.array([{}]), allow_pickle=True), HOLDS),
        (lambda f: (f.unlink(), f.mkdir()), r"cannot read .*regions-00001.npy: "),
    ],
)
def test_a_damaged_file_is_found_before_training(change, says, pictures, bank, tmp_path) -> None:
    copy = damaged(bank, tmp_path / "bank")
    change(copy / "regions-00001.npy")
    with pytest.raises(DataError, match=says):
        train(from_bank(pictures, copy), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seed", range(6))
def test_a_changed_bit_is_never_trained_on(seed, pictures, bank, tmp_path) -> None:
    copy = damaged(bank, tmp_path / "bank")
    file = copy / f"regions-0000{seed % 3}.npy"
    file.write_bytes(flipped(file.read_bytes(), seed))
    with pytest.raises(DataError, match=rf"{file.name}( is damaged: its sha256 is not| does not hold|: )"):
        train(from_bank(pictures, copy), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("part", "value", "says"),
    [
        ("classes", 3, r"is damaged: class 3 of 3"),
        ("probabilities", 0.75, r"is damaged: probabilities that do not sum to 1"),
        ("probabilities", np.nan, r"is damaged: probabilities that do not sum to 1"),
        ("rest", -0.5, r"is damaged: probabilities that do not sum to 1"),
        ("features", np.inf, r"is damaged: features that are not finite"),
    ],
)
def test_values_that_no_teacher_and_no_tower_gives_are_refused(part, value, says, pictures, bank, tmp_path) -> None:
    """Though the checksums say that they were written so."""
    copy = damaged(bank, tmp_path / "bank")
    file = copy / "regions-00001.npy"
    records = np.load(file)
    records[part][2, 3] = value
    np.save(file, records)
    shards = sealed.read(copy / "manifest.json")["shards"]
    shards[1]["sha256"] = content_hash(file)
    sealed.change(copy / "manifest.json", shards=shards)
    with pytest.raises(DataError, match=says):
        train(from_bank(pictures, copy), tmp_path / "run")
    with pytest.raises(DataError, match=says):
        verify(copy)


@pytest.mark.parametrize("size", [0, 64, -1])
def test_a_file_that_a_power_cut_left_short_is_built_again(size, pictures, bank, tmp_path, vlprompt) -> None:
    copy = damaged(bank, tmp_path / "bank")
    file = copy / "regions-00002.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:size])
    with pytest.raises(DataError, match=r"regions-00002.npy"):
        Bank(copy)
    build(pictures, copy)
    assert file.read_bytes() == whole
    verify(copy)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"format_version": 2', '"format_version": 9', r"has format_version 9; this vlprompt reads up to 2: update it"),
        ('"format_version": 2', '"format_version": 1', r"has format_version 1, of before 0.1: it has no checksum"),
        ('"regions": 6', '"regions": "six"', r"cannot read .*manifest.json: it is damaged or was changed"),
        ("{", "[", r"cannot read .*manifest.json: "),
        ("{", "[" * 100_000, r"cannot read .*manifest.json: it is nested too deeply"),
        ('"seed"', '"flip"', r"cannot read .*manifest.json: 'flip' is in it twice"),
    ],
)
def test_a_damaged_manifest_is_one_line(old, new, says, bank, tmp_path) -> None:
    copy = damaged(bank, tmp_path / "bank")
    text = (copy / "manifest.json").read_text()
    assert old in text
    (copy / "manifest.json").write_text(text.replace(old, new, 1))
    with pytest.raises(DataError, match=says) as error:
        Bank(copy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("section", "value", "says"),
    [
        ("settings", {"regions": "six"}, r"cannot read .*manifest.json: settings.regions: "),
        ("settings", {"regions": 7}, r"does not hold what manifest.json says"),
        ("shards", [{"images": 9, "sha256": None}], r"cannot read .*manifest.json: 18 images, 9 in its files"),
        ("images", "none", r"cannot read .*manifest.json: images: input should be a valid tuple"),
    ],
)
def test_a_manifest_that_says_other_things_is_one_line(section, value, says, bank, tmp_path) -> None:
    copy = damaged(bank, tmp_path / "bank")
    before = sealed.read(copy / "manifest.json")[section]
    sealed.change(copy / "manifest.json", **{section: before | value if isinstance(value, dict) else value})
    with pytest.raises(DataError, match=says) as error:
        Bank(copy)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_bank(pictures) -> None:
    with pytest.raises(DataError, match=r"is no region bank: it has no manifest.json"):
        Bank(pictures)


# --- views ----------------------------------------------------------------------------------------


def views(pictures: Path, bank: Path, preprocess=None, batch_size=8, m=4, seed=3, **more: Any) -> BankViews:
    split = load_dataset(pictures).split
    given = {"features": True, "probabilities": True, "reader": ImageReader(more.pop("workers", 0)), **more}
    return BankViews(
        Bank(bank), split.paths("train"), split.labels("train"), preprocess, batch_size, seed,
        regions_per_image=m, **given,
    )  # fmt: skip


def same(one, other) -> bool:
    a, b = one.tensors(), other.tensors()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_holds_several_regions_of_each_image_that_is_decoded(workers, pictures, bank, tiny) -> None:
    made = views(pictures, bank, tiny.preprocess, workers=workers)
    decoded = []
    original = made.reader.image
    made.reader.image = lambda path: decoded.append(path) or original(path)
    batches = list(made.epoch(0))
    assert len(made) == len(batches) == 18 // 8
    assert len(decoded) == 2 * len(batches)
    opened, files = made.bank, made.files
    for batch in batches:
        images, labels, features, p = batch.tensors().values()
        assert images.shape == (8, 3, tiny.image_size, tiny.image_size)
        torch.testing.assert_close(tiny.encode_images(images), features, rtol=0, atol=1e-5)
        torch.testing.assert_close(p.sum(-1), torch.ones(8))
        assert labels.tolist() == [labels[0]] * 4 + [labels[4]] * 4
        for v, y in zip(features, labels, strict=True):  # features, labels and images belong together
            found = [
                row
                for row in range(len(opened))
                if (opened.features(opened.read(np.full(REGIONS, row), np.arange(REGIONS))) == v).all(1).any()
            ]
            assert [row for row in found if made.labels[list(made.rows).index(row)] == y]
    assert len(files) == 18


def test_every_image_and_every_region_comes_equally_often(pictures, bank) -> None:
    made = views(pictures, bank, m=2, batch_size=6)  # 3 steps an epoch, 3 images each: 18 visits in 2 epochs
    turns = np.concatenate([made._samples(step) for step in range(3 * 2 * REGIONS)])  # as many rounds of 2 regions
    assert len(np.unique(turns, axis=0)) == len(turns)
    samples = turns[:, :2]
    pairs, count = np.unique(samples, axis=0, return_counts=True)
    assert len(pairs) == 18 * REGIONS
    assert set(count) == {2}
    one_round = samples[: 18 * 2]
    assert np.unique(one_round[:, 0], return_counts=True)[1].tolist() == [2] * 18
    assert len(np.unique(one_round, axis=0)) == 36
    again, other = views(pictures, bank, m=2, batch_size=6), views(pictures, bank, m=2, batch_size=6, seed=4)
    assert np.array_equal(again._samples(5), made._samples(5))
    assert not np.array_equal(other._samples(5), made._samples(5))


def test_fewer_views_are_the_first_regions_equally_often(pictures, bank) -> None:
    made = views(pictures, bank, m=2, batch_size=6, regions=3)
    samples = np.concatenate([made._samples(step) for step in range(3 * 2 * 9)])  # 9 rounds of 2 regions
    assert len(np.unique(samples, axis=0)) == len(samples)
    pairs, count = np.unique(samples[:, :2], axis=0, return_counts=True)
    assert set(pairs[:, 1]) == {0, 1, 2}
    assert set(count) == {6}


def test_an_epoch_can_begin_anywhere_and_be_shared(pictures, bank, tiny) -> None:
    given = {"batch_size": 6, "m": 2, "patch_size": 8}
    made = views(pictures, bank, tiny.preprocess, **given)
    whole = list(made.epoch(3))
    assert len(whole) == 3
    later = list(views(pictures, bank, tiny.preprocess, **given).epoch(3, 1))
    assert all(same(a, b) for a, b in zip(whole[1:], later, strict=True))
    pieces = [list(made.epoch(3, 0, (k, 4))) for k in range(4)]
    for i, batch in enumerate(whole):
        joined = {name: torch.cat([piece[i].tensors()[name] for piece in pieces]) for name in batch.tensors()}
        assert same(batch, Batch(**joined))


class ByHand:
    """The same views as ``made`` gives, one after the other from the pictures; features only if they are ``read``."""

    def __init__(self, made: BankViews, preprocess, patch_size: int | None = None, read: bool = False) -> None:
        self.made, self.preprocess, self.patch_size, self.read = made, preprocess, patch_size, read
        self.seed, self.images_per_batch = made.seed, made.images_per_batch

    def __len__(self) -> int:
        return len(self.made)

    def epoch(self, epoch: int, start: int = 0, shard: tuple[int, int] = (0, 1)):
        for step in range(len(self) * epoch, len(self) * (epoch + 1)):
            images, labels, seconds, records = [], [], [], []
            for i, region, turn in self.made._samples(step):
                records.append(self.made.bank.read(self.made.rows[[i]], np.array([region])))
                crop = self.preprocess.cropped(load_image(self.made.files[i]), restored(records[-1]["region"])[0])
                rng = np.random.default_rng([self.seed, i, region, turn])
                images.append(self.preprocess.tensor(crop))
                labels.append(CLASSES.index(self.made.files[i].parent.name))
                if self.patch_size:
                    seconds.append(self.preprocess.tensor(augment_patches(crop, self.patch_size, rng)))
            known = np.concatenate(records)
            yield Batch(
                torch.stack(images),
                torch.tensor(labels),
                frozen_image_features=self.made.bank.features(known) if self.read else None,
                teacher_probabilities=self.made.bank.probabilities(known) if self.made.probabilities else None,
                second_view=torch.stack(seconds) if seconds else None,
            )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_view_is_of_the_same_pixels_in_a_draw_of_its_own(workers, pictures, bank, tiny) -> None:
    made = views(pictures, bank, tiny.preprocess, batch_size=6, m=2, patch_size=8, workers=workers)
    alone = views(pictures, bank, tiny.preprocess, batch_size=6, m=2)
    hand = ByHand(made, tiny.preprocess, patch_size=8, read=True)
    for epoch in (0, 7):
        for batch, plain, expected in zip(made.epoch(epoch), alone.epoch(epoch), hand.epoch(epoch), strict=True):
            assert same(batch, expected)
            assert same(replace(batch, second_view=None), plain)
            assert not any(torch.equal(a, b) for a, b in zip(batch.images, batch.second_view, strict=True))


def test_few_images_make_one_batch(pictures, bank) -> None:
    made = views(pictures, bank, batch_size=64, m=2)
    assert (len(made), made.images_per_batch) == (1, 36)
    (batch,) = made.epoch(0)
    assert len(batch.labels) == 36


# --- training -------------------------------------------------------------------------------------


def trained(
    method: str, made: BankViews | ByHand, tiny, teacher: Teacher | None = None, epochs: int = 3
) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    cls = METHODS[method]
    own = cls(tiny, CLASSES, cls.Config())
    job = Training(own, made, OptimConfig(lr=0.01, warmup_epochs=0), TrainConfig(epochs=epochs), teacher=teacher)
    assert job.run()
    return own.state_dict()


@pytest.mark.parametrize("method", sweep(TRAINED, "coop", "dpl", "drople", "fdbpl_coop", "promptsrc", "vpt"))
def test_two_steps_from_a_bank_are_those_online_on_the_same_regions(method, pictures, bank, tiny) -> None:
    """Bit by bit with the bank's features; nearly with those that the image tower gives in batches of another size."""
    own = METHODS[method](tiny, CLASSES, METHODS[method].Config())
    read, side, taught = tiny.preprocess, own.patch_size, "teacher_probabilities" in own.needs
    pixels = Can.USE_FROZEN_FEATURES not in own.config.can
    features = "frozen_image_features" in own.needs or not pixels
    made = views(pictures, bank, read if pixels else None, features=features, probabilities=taught, patch_size=side)
    banked = trained(method, made, tiny, epochs=1)
    same_features = trained(method, ByHand(made, read, side, read=features), tiny, epochs=1)
    online = trained(method, ByHand(made, read, side), tiny, epochs=1)
    start = own.state_dict()
    for key in online:
        assert torch.equal(banked[key], same_features[key])
        torch.testing.assert_close(banked[key], online[key], rtol=0, atol=1e-5)
    assert any((start[key] - online[key]).abs().max() > 1e-4 for key in online if online[key].numel())


def test_labels_from_a_bank_train_as_the_teacher_on_the_same_regions(pictures, tiny, tmp_path) -> None:
    build(pictures, tmp_path / "bank", **{"teacher.backbone": str(TINY), "top_k": 3, "teacher.logit_scale": 5.0})
    teacher = Teacher(tiny, CLASSES, "a photo of a {}.", 5.0)
    banked = trained("kdpl_coop", views(pictures, tmp_path / "bank", tiny.preprocess), tiny)
    online = trained(
        "kdpl_coop", views(pictures, tmp_path / "bank", tiny.preprocess, probabilities=False), tiny, teacher
    )
    for key in online:
        torch.testing.assert_close(banked[key], online[key], rtol=0, atol=1e-3)


@pytest.mark.parametrize("method", sweep(TRAINED, "coop", "drople", "fdbpl_promptsrc"))
def test_any_method_trains_from_a_bank(method, pictures, bank, tiny, tmp_path, monkeypatch) -> None:
    said: list[str] = []
    seen: list[Batch] = []
    cls, losses = METHODS[method], METHODS[method].losses
    monkeypatch.setattr(cls, "losses", lambda self, batch: seen.append(batch) or losses(self, batch))
    tuned, result = train(from_bank(pictures, bank, method), tmp_path / "run", say=said.append)
    said = [line for line in said if "has no class descriptions" not in line]
    taught = "teacher_probabilities" in METHODS[method].needs
    assert result.teacher == (TEACHER if taught else None)
    scale = Bank(bank).settings.teacher.logit_scale
    taught_by = f", labelled by {TEACHER} with 'a photo of a {{}}.' and logit scale {scale:g}, "
    assert (taught_by in said[0]) == taught
    assert "6 regions of each image, " in said[0]
    assert "| views | fixed regions, of region bank `bank` |" in (tmp_path / "run" / "README.md").read_text("utf-8")
    assert "bank_fingerprint" in (tmp_path / "run" / "environment.json").read_text()
    plain = views(pictures, bank, tiny.preprocess, batch_size=4, m=1, seed=1, features=False)
    shown = [step.images for epoch in range(2) for step in plain.epoch(epoch)]
    pixels = Can.USE_FROZEN_FEATURES not in tuned.config.can
    reads = "frozen_image_features" in cls.needs or not pixels
    for batch, images in zip(seen, shown, strict=True):
        assert batch.images is None or torch.equal(batch.images, images)
        assert (batch.images is not None) == pixels
        assert (batch.second_view is not None) == ("second_view" in cls.needs)
        assert (batch.frozen_image_features is not None) == reads
        if reads:
            torch.testing.assert_close(batch.frozen_image_features, tiny.encode_images(images), rtol=0, atol=1e-6)


def fitted(pictures: Path, bank: Path, name: str, /, backbone: str = str(TINY), **settings: Any):
    split = load_dataset(pictures).split
    method = build_method(name, load_backbone(backbone), settings.pop("class_names", split.class_names))
    images = settings.pop("images", split.paths("train"))
    given = {"bank": bank, "epochs": 2, "batch_size": 4, "warmup_epochs": 0, "workers": 0, **settings}
    return fit(method, images, split.labels("train"), **given)


@pytest.mark.parametrize("name", ["coop", "kdpl_coop", "drople"])
def test_fit_trains_from_a_bank_as_the_command_line_does(name, pictures, bank, tmp_path) -> None:
    reference, _ = train(from_bank(pictures, bank, name), tmp_path / "run")
    ours, theirs = fitted(pictures, bank, name).inference_state(), reference.inference_state()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("method", sweep(["coop", "drople"], "coop"))
def test_some_of_a_banks_regions_train_as_a_bank_of_so_many(method, vlprompt, pictures, bank, tmp_path) -> None:
    build(pictures, tmp_path / "small", regions=4, **{"teacher.backbone": None})
    train(from_bank(pictures, tmp_path / "small", method), tmp_path / "one")
    given = ["--bank", str(bank), "--views", "4", "--epochs", "2"]
    code, _, err = vlprompt(*arguments(method, pictures, tmp_path / "other", *given))
    assert code == 0, err
    assert "4 of 6 regions of each image, with frozen features" in err
    card = (tmp_path / "other" / "README.md").read_text("utf-8")
    assert "| views | fixed regions, 4 of each image, of region bank `bank` |" in card
    ours, theirs = prompts(tmp_path / "other"), prompts(tmp_path / "one")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    train(from_bank(pictures, bank, method), tmp_path / "all")
    every = prompts(tmp_path / "all")
    assert not all(torch.equal(every[key], theirs[key]) for key in theirs)


def test_views_are_random_without_a_bank(vlprompt, pictures, tmp_path) -> None:
    for run, more in (("said", ["--views", "random"]), ("not", [])):
        code, _, err = vlprompt(*arguments("coop", pictures, tmp_path / run, "--epochs", "1", *more))
        assert code == 0, err
    said, unsaid = prompts(tmp_path / "said"), prompts(tmp_path / "not")
    assert all(torch.equal(said[key], unsaid[key]) for key in said)


def test_the_scikit_learn_shell_trains_from_a_bank(pictures, bank) -> None:
    split = load_dataset(pictures).split
    paths, labels = [str(path) for path in split.paths("train")], split.labels("train")
    settings = {"bank": bank, "warmup_epochs": 0, "workers": 0}
    given = {"class_names": dict(enumerate(CLASSES)), "epochs": 2, "batch_size": 4, "settings": settings}
    shell = PromptClassifier("coop", str(TINY), **given).fit(paths, labels)
    ours, theirs = shell.model_.method.state_dict(), fitted(pictures, bank, "coop").state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    with pytest.raises(ConfigError, match=r"built with other classes \('0' is not among its 3\)$"):
        PromptClassifier("kdpl_coop", str(TINY), settings=settings).fit(paths, labels)


@pytest.mark.parametrize(
    ("name", "more", "says"),
    [
        ("kdpl_coop", {"teacher": str(TINY)}, r"built with teacher 'mini' \(\w{12}…\), not 'backbone' \("),
        ("kdpl_coop", {"class_names": ("cat", "dog", "owl")}, r"built with other classes \('owl' is not among its 3"),
        ("coop", {"min_scale": 0.5}, r"built with crops.min_scale = 0.08, not 0.5$"),
        ("coop", {"backbone": TEACHER}, r"built with features 'backbone' \(\w{12}…\), not 'mini' \(\w{12}…\)$"),
        ("coop", {"regions_per_image": 3}, r"^data.regions_per_image = 3 \(allowed with batches of 4: 1, 2, 4\)$"),
        ("coop", {"bank": None, "regions_per_image": 2}, r"= 2: there is no region bank \(--bank\)$"),
        ("coop", {"views": 7}, r"^data.views = 7 \(allowed with region bank .*/bank: 1 to 6\)$"),
        ("coop", {"views": 0}, r"^data.views = 0 \(allowed: random, center, or a number from 1 on\)$"),
        ("coop", {"bank": "nowhere"}, r"^region bank nowhere does not exist"),
        ("coop", {"images": [Image.new("RGB", (40, 40))] * 18}, r"knows images by their files: it has none that"),
        ("coop", {"images": [TINY / "config.json"] * 18}, r"lacks 18 of the run's 18 training images: .*config.json"),
        ("linear_probe", {}, r"^method 'linear_probe' takes no training steps: it reads no region bank"),
    ],
)  # fmt: skip
def test_a_bank_that_does_not_fit_is_refused_by_fit_too(name, more, says, pictures, bank) -> None:
    with pytest.raises((ConfigError, DataError), match=says) as refused:
        fitted(pictures, bank, name, **more)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("method", ["coop", "fdbpl_coop"])
def test_text_methods_train_without_images_image_tower_and_teacher(method, pictures, bank, tiny, monkeypatch) -> None:
    config = from_bank(pictures, bank, method)
    split = load_dataset(pictures).split
    own = METHODS[method](tiny, CLASSES, METHODS[method].Config())
    reader = ImageReader(0)
    sources = find_sources(config, CLASSES, "{}", tiny)
    assert sources.teacher is None
    job = prepare(config, sources, own, split.paths("train"), split.labels("train"), config.seed, reader)
    monkeypatch.setattr(reader, "image", None)
    monkeypatch.setattr(tiny, "image_tower", None)
    assert job.run()


def test_a_method_that_prompts_images_decodes_them(pictures, bank, tiny) -> None:
    with pytest.raises(AssertionError):
        trained("vpt", views(pictures, bank, None, features=False), tiny)


def test_a_second_view_is_decoded_even_where_features_are_all_else_that_is_read(pictures, bank, tiny) -> None:
    class Twice(METHODS["coop"]):
        """Reads a second view of images that it does not prompt."""

        needs = frozenset({"second_view"})

        def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
            seen.append(batch)
            return super().losses(batch)

    seen: list[Batch] = []
    split, reader = load_dataset(pictures).split, ImageReader(0)
    own = Twice(tiny, CLASSES, Twice.Config())
    config = from_bank(pictures, bank)
    images, labels = split.paths("train"), split.labels("train")
    assert prepare(config, find_sources(config, CLASSES, "{}", tiny), own, images, labels, config.seed, reader).run()
    assert all(batch.second_view.shape == batch.images.shape for batch in seen)
    assert all(batch.frozen_image_features is not None for batch in seen)


def test_the_rule_for_regions_of_an_image(pictures, bank, tiny) -> None:
    from vlprompt.bank.use import _regions_per_image

    data = from_bank(pictures, bank).data
    found = {size: _regions_per_image(replace(data, batch_size=size), 500) for size in (1, 4, 16, 20, 28, 32, 128)}
    assert found == {1: 1, 4: 1, 16: 2, 20: 2, 28: 2, 32: 4, 128: 4}
    assert _regions_per_image(replace(data, batch_size=32), 3) == 2


@pytest.mark.parametrize("method", sweep(["coop", "kdpl_promptsrc", "drople"], "kdpl_promptsrc"))
def test_a_stopped_run_goes_on_with_its_bank_and_no_other(method, pictures, bank, other_bank, tmp_path) -> None:
    own = damaged(bank, tmp_path / "bank")
    config = from_bank(pictures, own, method, **{"data.regions_per_image": 2})
    train(config, tmp_path / "whole")
    run = tmp_path / "stopped"
    with pytest.raises(Interrupted):
        train(config, run, [StopsAfter(6)])
    shutil.rmtree(own)
    damaged(other_bank, own)
    with pytest.raises(ArtefactError, match="was begun with another region bank than it has now"):
        train(saved_config(run), run, resume=True)
    shutil.rmtree(own)
    damaged(bank, own)
    train(saved_config(run), run, resume=True)
    ours, theirs = prompts(run), prompts(tmp_path / "whole")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert log(run) == log(tmp_path / "whole")


@slow
def test_processes_share_a_batch_of_regions(pictures, bank, tmp_path) -> None:
    more = ["--bank", str(bank), "train.epochs=1", "lr=0.0005", "regions_per_image=2"]
    results = processes(["-m", "vlprompt", *arguments("kdpl_coop", pictures, tmp_path / "two", *more)])
    assert [code for code, *_ in results] == [0, 0], results
    settings = {"train.epochs": 1, "optim.lr": 0.0005, "data.regions_per_image": 2}
    train(from_bank(pictures, bank, "kdpl_coop", **settings), tmp_path / "one")
    ours, alone = (prompts(tmp_path / name)["context.vectors"] for name in ("two", "one"))
    torch.testing.assert_close(ours, alone, atol=1e-5, rtol=0)


def test_the_whole_way_on_the_command_line(vlprompt, pictures, tmp_path) -> None:
    folder, run = str(tmp_path / "bank"), str(tmp_path / "run")
    code, out, err = vlprompt("bank", "build", str(pictures), "--out", folder, *GIVEN, "--shots", "2", "--json")
    assert code == 0, err
    assert json.loads(out)["images"] == 6
    code, out, err = vlprompt(
        "train", "kdpl_coop", str(pictures), "--bank", folder, "--backbone", str(TINY), "--shots", "2", "--epochs", "1",
        "--out", run, "--json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["teacher"] == TEACHER
    split = ["--split", str(Path(run) / "split.json")]
    code, out, err = vlprompt("bank", "build", str(pictures), "--out", folder, *GIVEN, *split, "--json")
    assert (code, json.loads(out)["built"]) == (0, 0), err


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_towers_of_other_precisions_fill_a_bank(precision, pictures, bank, tmp_path) -> None:
    build(pictures, tmp_path / "bank", precision=precision, **{"data.shots": 1})
    rough, exact = Bank(tmp_path / "bank"), Bank(bank)
    file = [pictures / rough.manifest.images[0][1]]
    one, other = (x.read(x.rows(file).repeat(REGIONS), np.arange(REGIONS)) for x in (rough, exact))
    assert np.array_equal(one["region"], other["region"])
    torch.testing.assert_close(rough.features(one), exact.features(other), rtol=0, atol=0.05)
    assert not torch.equal(rough.features(one), exact.features(other))


def test_fingerprints_cover_every_setting() -> None:
    base = BankSettings(teacher=Labels("t", "f", "{}", 1.0, ("a", "b"), 1), features=Features("s", "f", 4))
    teacher, features = base.teacher, base.features
    others = [
        replace(base, regions=1), replace(base, crops=Crops(flip=0)), replace(base, teacher=None),
        replace(base, features=None), replace(base, batch_size=1), replace(base, precision="fp16"),
        *(replace(base, teacher=replace(teacher, **{key: value})) for key, value in [
            ("fingerprint", "g"), ("template", "a {}"), ("logit_scale", 2.0), ("class_names", ("b", "a")), ("top_k", 2),
        ]),
        *(replace(base, features=replace(features, **{key: value})) for key, value in [
            ("fingerprint", "g"), ("embed_dim", 5), ("dtype", "fp16"),
        ]),
    ]  # fmt: skip
    assert len({s.fingerprint for s in (base, *others)}) == 15


def test_a_fingerprint_does_not_cover_under_which_names_models_lie() -> None:
    base = BankSettings(teacher=Labels("t", "f", "{}", 1.0, ("a", "b"), 1), features=Features("s", "f", 4))
    moved = replace(base, teacher=replace(base.teacher, name="u"), features=replace(base.features, name="v"))
    assert moved.fingerprint == base.fingerprint
