"""Known data sets: miniatures of every layout load, are checked, and the page's commands mend wrong layouts."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kit import REPOSITORY, TINY
from tests.kit.checks import fails
from tests.kit.known import BENCHMARKS, CLASSES, IDS, PARTS, PATTERNS, PHOTOGRAPHS, build, draw, write_class_names
from vlprompt.data.datasets import load_dataset
from vlprompt.data.known.table import DATASETS
from vlprompt.provision.check import HELP, check

PAGE = REPOSITORY / "docs" / "datasets.md"
DOMAINS = ("imagenet_v2", "imagenet_sketch", "imagenet_a", "imagenet_r")


@pytest.fixture
def sized(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks' published sizes are those of the miniatures."""
    for name in BENCHMARKS:
        sizes = (9, 3, 6) if name in PATTERNS else (9, 0, 6) if name == "imagenet" else (0, 0, 6)
        classes = 2 if name in ("imagenet_a", "imagenet_r") else 3
        sizes = (0, 0, 4) if classes == 2 else sizes
        monkeypatch.setitem(DATASETS, name, replace(DATASETS[name], sizes=sizes, classes=classes))


# --- the table ------------------------------------------------------------------------------------


def test_the_fifteen_benchmarks() -> None:
    titles = (
        "ImageNet", "Caltech101", "OxfordPets", "StanfordCars", "Flowers102", "Food101", "FGVCAircraft", "SUN397",
        "DTD", "EuroSAT", "UCF101", "ImageNet-V2", "ImageNet-Sketch", "ImageNet-A", "ImageNet-R",
    )  # fmt: skip
    assert tuple(DATASETS[name].title for name in BENCHMARKS) == titles
    for dataset in (DATASETS[name] for name in BENCHMARKS):
        assert dataset.template.count("{}") == 1
        assert bool(dataset.split_file) != bool(dataset.read)
        assert dataset.licence
        assert dataset.homepage.startswith("https://")
        assert dataset.by_hand or dataset.sources
        assert dataset.classes > 1
        assert sum(dataset.sizes) > 1000
        for source in dataset.sources:
            kind, _, digits = source.checksum.partition(":")
            assert len(digits) == {"md5": 32, "sha256": 64, "": 0}[kind]
            assert "/" not in source.name
            assert source.name
    assert [name for name in BENCHMARKS if DATASETS[name].domain_of == "imagenet"] == list(DOMAINS)


# As CoOp's DATASETS.md and its zero-shot trainer have them; written out, since the miniatures are made from the table.
COOP = {
    "imagenet": ("imagenet/images", "", "a photo of a {}."),
    "caltech101": ("caltech-101/101_ObjectCategories", "Caltech101", "a photo of a {}."),
    "oxford_pets": ("oxford_pets/images", "OxfordPets", "a photo of a {}, a type of pet."),
    "stanford_cars": ("stanford_cars", "StanfordCars", "a photo of a {}."),
    "oxford_flowers": ("oxford_flowers/jpg", "OxfordFlowers", "a photo of a {}, a type of flower."),
    "food101": ("food-101/images", "Food101", "a photo of {}, a type of food."),
    "fgvc_aircraft": ("fgvc_aircraft/images", "", "a photo of a {}, a type of aircraft."),
    "sun397": ("sun397/SUN397", "SUN397", "a photo of a {}."),
    "dtd": ("dtd/images", "DescribableTextures", "{} texture."),
    "eurosat": ("eurosat/2750", "EuroSAT", "a centered satellite photo of {}."),
    "ucf101": ("ucf101/UCF-101-midframes", "UCF101", "a photo of a person doing {}."),
    "imagenet_v2": ("imagenetv2/imagenetv2-matched-frequency-format-val", "", "a photo of a {}."),
    "imagenet_sketch": ("imagenet-sketch/images", "", "a photo of a {}."),
    "imagenet_a": ("imagenet-adversarial/imagenet-a", "", "a photo of a {}."),
    "imagenet_r": ("imagenet-rendition/imagenet-r", "", "a photo of a {}."),
}


def test_folders_split_files_and_templates_are_those_of_coop() -> None:
    found = {name: DATASETS[name] for name in BENCHMARKS}
    assert {name: (Path(d.folder, d.images).as_posix(), d.split_file, d.template) for name, d in found.items()} == {
        name: (place, f"split_zhou_{split}.json" if split else "", template)
        for name, (place, split, template) in COOP.items()
    }


# --- layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATTERNS)
def test_miniatures_with_lists_load(tmp_path: Path, name: str) -> None:
    build(tmp_path, name)
    loaded = load_dataset(DATASETS[name].title, tmp_path)
    split = loaded.split
    assert (loaded.name, split.class_names, loaded.template) == (name, CLASSES, DATASETS[name].template)
    for part, n in PARTS.items():
        assert split.labels(part) == [label for label in range(3) for _ in range(n)]
        assert all(path.is_file() for path in split.paths(part))
    assert len(split.few_shot(2, seed=1).train) == 6


@pytest.mark.parametrize("name", ["imagenet", *DOMAINS])
def test_miniatures_of_class_folders_load(tmp_path: Path, name: str) -> None:
    build(tmp_path, name)
    split = load_dataset(name, tmp_path).split
    n = 2 if name in ("imagenet_a", "imagenet_r") else 3
    assert split.class_names == CLASSES[:n]
    assert split.labels("test") == [label for label in range(n) for _ in range(2)]
    assert split.labels("train") == ([0, 0, 0, 1, 1, 1, 2, 2, 2] if name == "imagenet" else [])
    assert split.val == ()  # nothing can be selected on what is tested
    assert all(path.is_file() for path in split.paths("train") + split.paths("test"))


def test_class_names_of_imagenet_serve_its_domains(tmp_path: Path) -> None:
    for name in DOMAINS:
        (build(tmp_path, name) / "classnames.txt").unlink()
    with fails(r"file .*imagenetv2/classnames\.txt does not exist"):
        load_dataset("imagenetv2", tmp_path)
    write_class_names(tmp_path / "imagenet")
    for name in DOMAINS:
        assert set(load_dataset(name, tmp_path).split.class_names) <= set(CLASSES)


def test_labels_follow_the_class_names_and_not_the_folders_that_are_there(tmp_path: Path) -> None:
    folder = tmp_path / "imagenet-adversarial"
    write_class_names(folder)
    for key in (IDS[2], IDS[0]):
        draw(folder / "imagenet-a" / key / "1.png")
    (folder / "imagenet-a" / "README.txt").write_text("not a class")
    (folder / "imagenet-a" / IDS[0] / ".hidden.png").write_text("not an image")
    (folder / "imagenet-a" / IDS[1]).mkdir()
    split = load_dataset("imagenet_a", tmp_path).split
    assert split.class_names == ("cat", "sea horse")
    assert [item.path for item in split.test] == [f"{IDS[0]}/1.png", f"{IDS[2]}/1.png"]


def test_train_and_evaluate_by_name(vlprompt, tmp_path: Path) -> None:
    for name in ("imagenet", "imagenet_r"):
        build(tmp_path, name)
    run, given = tmp_path / "run", ("--root", tmp_path)
    code, _, err = vlprompt("train", "zero_shot", "imagenet", *given, "--shots", 2, "--backbone", TINY, "--out", run)
    assert code == 0, err
    code, out, err = vlprompt("evaluate", run, "imagenet_r", *given, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert (result["classes"], result["n"]) == (["cat", "dog"], 4)
    code, _, err = vlprompt("train", "zero_shot", "imagenet_r", *given, "--backbone", TINY, "--out", tmp_path / "r")
    assert (code, err) == (2, "error: data set 'imagenet_r' has no training images\n")


# --- bad input ------------------------------------------------------------------------------------


def test_a_split_that_names_missing_files(tmp_path: Path) -> None:
    build(tmp_path, "dtd")
    split = load_dataset("dtd", tmp_path).split
    paths = split.paths("train") + split.paths("val") + split.paths("test")
    paths[0].unlink()
    advice = f"see `vlprompt data check dtd --root {tmp_path}`"
    with fails(rf"split_zhou_DescribableTextures\.json: image {paths[0]} does not exist.*{advice}"):
        load_dataset("dtd", tmp_path)
    for path in paths[1:9]:
        path.unlink()
    first = ", ".join(item.path for item in split.train[:5])
    with fails(rf"9 of 18 images do not exist in {tmp_path}/dtd/images: {first} and 4 more; {advice}"):
        load_dataset("dtd", tmp_path)


@pytest.mark.parametrize("name", ["dtd", "fgvc_aircraft"])
def test_classes_that_differ_between_train_and_test(tmp_path: Path, name: str) -> None:
    folder = build(tmp_path, name)
    if name == "dtd":
        file = folder / DATASETS[name].split_file
        rows = json.loads(file.read_text())
        rows["test"] = [row for row in rows["test"] if row[1] != 1]
        rows["train"] = [row for row in rows["train"] if row[1] != 2]
        file.write_text(json.dumps(rows))
    else:
        for part, gone in (("test", "dog"), ("train", "sea horse")):
            file = folder / f"images_variant_{part}.txt"
            file.write_text("".join(line for line in file.read_text().splitlines(True) if gone not in line))
    said = r"train and test have different classes: 1 only in train \(dog\); 1 only in test \(sea horse\)"
    with fails(said):
        load_dataset(name, tmp_path)


def test_class_folders_that_differ_between_train_and_val(tmp_path: Path) -> None:
    images = build(tmp_path, "imagenet") / "images"
    (images / "val" / IDS[1]).rename(tmp_path / "elsewhere")
    with fails(r"'imagenet': train and test have different classes: 1 only in train \(dog\)"):
        load_dataset("imagenet", tmp_path)
    draw(images / "val" / "n00000000" / "1.png")
    with fails(r"val/n00000000: class 'n00000000' is not in classnames\.txt"):
        load_dataset("imagenet", tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "content", "says"),
    [
        ("fgvc_aircraft", "images_variant_val.txt", "0000001 bat", "line 1: variant 'bat' is not in variants.txt"),
        ("fgvc_aircraft", "variants.txt", b"\xff\xfe\xff", "cannot read .*variants.txt"),
        ("imagenet", "classnames.txt", f"{IDS[0]} cat\n{IDS[1]}\n", "line 2: there is no class name"),
        ("imagenet", "classnames.txt", f"{IDS[0]} cat\n{IDS[0]} dog\n", f"line 2: {IDS[0]} comes twice"),
        ("imagenet_v2", "classnames.txt", f"{IDS[0]} cat\n{IDS[1]} dog\n", "/2: class '2' is not in classnames.txt"),
    ],
)
def test_bad_lists(tmp_path: Path, name: str, file: str, content: str | bytes, says: str) -> None:
    folder = build(tmp_path, name)
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with fails(says):
        load_dataset(name, tmp_path)


def test_missing_lists_and_folders(tmp_path: Path) -> None:
    folder = build(tmp_path, "fgvc_aircraft")
    (folder / "images_variant_test.txt").unlink()
    with fails(r"file .*images_variant_test\.txt does not exist: did you mean"):
        load_dataset("fgvc_aircraft", tmp_path)
    (build(tmp_path, "imagenet") / "images" / "val").rename(tmp_path / "imagenet" / "images" / "test")
    with fails(r"'imagenet': folder .*images/val does not exist"):
        load_dataset("imagenet", tmp_path)


# --- check ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BENCHMARKS)
def test_miniatures_are_in_order(tmp_path: Path, sized: None, name: str) -> None:
    build(tmp_path, name)
    report = check(name, tmp_path)
    assert (report.fault, report.advice) == ("", [])
    assert [row["class"] for row in report.classes] == list(CLASSES[: DATASETS[name].classes])
    assert all(row["test"] == 2 for row in report.classes)
    assert report.to_dict()["ok"]


def test_check_counts_and_names_what_is_wrong(vlprompt, tmp_path: Path, sized: None) -> None:
    build(tmp_path, "eurosat")
    split = load_dataset("eurosat", tmp_path).split
    paths = split.paths("train")
    for path in paths[:7]:
        path.unlink()
    for path in paths[7:9]:
        path.write_bytes(b"no picture")
    code, out, err = vlprompt("data", "check", "eurosat", "--root", tmp_path, "--json")
    result = json.loads(out)
    assert code == 2
    assert err == "error: data set 'eurosat': 7 of 18 images are missing; 2 of 18 images cannot be read\n"
    assert result["missing"] == {"count": 7, "first": [str(path) for path in paths[:5]]}
    assert result["unreadable"]["count"] == 2
    assert str(paths[7]) in result["unreadable"]["first"][0]
    assert result["classes"][2] == {"class": "sea horse", "train": 3, "val": 1, "test": 2}
    assert not result["ok"]
    code, out, err = vlprompt("data", "check", "eurosat", "--root", tmp_path, "--quick")
    assert code == 2
    assert "unreadable" not in out
    assert "7 missing:" in out
    assert "… and 2 more" in out
    assert "sea horse       3 train       1 val       2 test" in out


def test_check_compares_with_the_published_numbers(tmp_path: Path) -> None:
    build(tmp_path, "imagenet_a")
    assert check("imagenet_a", tmp_path).fault == (
        "4 test images instead of the published 7500; 2 classes instead of the published 200"
    )


def test_check_of_ones_own_folder_and_split_file(vlprompt, tmp_path: Path) -> None:
    folder = build(tmp_path, "food101") / "images"
    code, out, _ = vlprompt("data", "check", folder)
    assert code == 0
    assert out.startswith(f"images in {folder}: 3 classes; images: 9 train, 3 val, 6 test\n")
    part = tmp_path / "part.json"
    part.write_text(json.dumps({"train": [["cat/1.jpg", 0, "cat"]], "test": [["cat/1000.jpg", 0, "cat"]]}))
    code, _, err = vlprompt("data", "check", "food101", "--root", tmp_path, "--split-file", part)
    assert (code, err) == (2, "error: data set 'food101': 1 of 2 images are missing\n")


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if DATASETS[name].sizes[0]])
def test_a_published_split_of_any_benchmark_reads_back(vlprompt, tmp_path: Path, name: str) -> None:
    """Without its root in it: the file serves wherever the data set lies."""
    build(tmp_path, name)
    given = (name, "--root", tmp_path, "--shots", 2, "--classes", "base")
    code, _, err = vlprompt("data", "split", *given, "--out", tmp_path / "few.json")
    assert code == 0, err
    assert str(tmp_path) not in (tmp_path / "few.json").read_text("utf-8")
    expected = load_dataset(name, tmp_path).split.subset("base").few_shot(2, 1)
    moved = tmp_path / "moved"
    build(moved, name)
    assert load_dataset(name, moved, tmp_path / "few.json").split == replace(
        expected, root=moved / expected.root.relative_to(tmp_path)
    )


def nest(place: Path) -> None:
    """``x`` becomes ``x/x``."""
    place.rename(place.with_name("inner"))
    place.mkdir()
    place.with_name("inner").rename(place / place.name)


def spill(place: Path) -> None:
    """What is in ``x`` lies beside it, and ``x`` is gone."""
    for path in list(place.iterdir()):
        path.rename(place.parent / path.name)
    place.rmdir()


def move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)


def flatten(val: Path) -> None:
    """As ImageNet's archive of val images is unpacked."""
    for image in list(val.glob("*/*.JPEG")):
        image.rename(val / image.name)
    for folder in list(val.iterdir()):
        if folder.is_dir():
            folder.rmdir()


def flatten_with_table(root: Path) -> None:
    val = root / "imagenet/images/val"
    rows = [f"{image.stem},{image.parent.name} 1 2 3 4 \n" for image in sorted(val.glob("*/*"))]
    flatten(val)
    (root / "imagenet/LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(rows))


def flatten_with_script(root: Path) -> None:
    """The script, which a ``curl`` of ours prints, holds more than moves."""
    val, curl = root / "imagenet/images/val", root / "programs/curl"
    images = {image: val / f"ILSVRC2012_val_{i:08}.JPEG" for i, image in enumerate(sorted(val.glob("*/*")), 1)}
    lines = [f"mkdir -p {image.parent.name}\nmv {target.name} {image.parent.name}/" for image, target in images.items()]
    evil = ["touch evil", "mv ILSVRC2012_val_00000001.JPEG n01440764/; touch evil", "mv ../classnames.txt n01440764/"]
    for image, target in images.items():
        image.rename(target)
    flatten(val)
    curl.parent.mkdir()
    curl.write_text("\n".join(["#!/bin/sh", "cat <<'end'", *evil, *lines, "end\n"]))
    curl.chmod(0o755)


def pack_classes(root: Path) -> None:
    for folder in sorted((root / "imagenet/images/train").iterdir()):
        subprocess.run(["tar", "-cf", folder.with_suffix(".tar"), "-C", folder, "."], check=True)
        subprocess.run(["rm", "-r", folder], check=True)


MISTAKES = {  # in the order of the page
    "SUN397 in SUN397": ("sun397", lambda r: nest(r / "sun397/SUN397")),
    "SUN397 without SUN397": ("sun397", lambda r: spill(r / "sun397/SUN397")),
    "dtd in dtd": ("dtd", lambda r: nest(r / "dtd")),
    "cars in folders of folders": (
        "stanford_cars",
        lambda r: [nest(r / "stanford_cars" / part) for part in ("cars_train", "cars_test")],
    ),
    "flowers beside their list": ("oxford_flowers", lambda r: spill(r / "oxford_flowers/jpg")),
    "aircraft as unpacked": ("fgvc_aircraft", lambda r: move(r / "fgvc_aircraft", r / "fgvc-aircraft-2013b/data")),
    "another folder name": ("caltech101", lambda r: (r / "caltech-101").rename(r / "caltech101")),
    "split file elsewhere": (
        "oxford_pets",
        lambda r: move(r / "oxford_pets/split_zhou_OxfordPets.json", r / "split_zhou_OxfordPets.json"),
    ),
    "EuroSAT under another name": ("eurosat", lambda r: (r / "eurosat/2750").rename(r / "eurosat/EuroSAT_RGB")),
    "sketches as unpacked": (
        "imagenet_sketch", lambda r: (r / "imagenet-sketch/images").rename(r / "imagenet-sketch/sketch"),
    ),
    "ImageNet-A without its folder": ("imagenet_a", lambda r: spill(r / "imagenet-adversarial/imagenet-a")),
    "ImageNet-R beside its folder": (
        "imagenet_r", lambda r: (r / "imagenet-rendition/imagenet-r").rename(r / "imagenet-r"),
    ),
    "ImageNet as the competition unpacks it": (
        "imagenet", lambda r: move(r / "imagenet/images", r / "imagenet/ILSVRC/Data/CLS-LOC"),
    ),
    "ImageNet's train as archives": ("imagenet", pack_classes),
    "ImageNet's val in one folder, with the table": ("imagenet", flatten_with_table),
    "ImageNet's val in one folder, with the script": ("imagenet", flatten_with_script),
}  # fmt: skip


def commands() -> list[str]:
    """Those of the page's table of wrong layouts."""
    section = PAGE.read_text("utf-8").split("\n## Wrong layouts\n")[1]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [row.replace("\\|", "\0").split(" | ")[1].strip(" |`").replace("\0", "|") for row in rows]


@pytest.mark.parametrize(("mistake", "command"), list(zip(MISTAKES, commands(), strict=True)), ids=list(MISTAKES))
def test_the_pages_commands_mend_the_layout(vlprompt, tmp_path: Path, sized: None, mistake: str, command: str) -> None:
    name, spoil = MISTAKES[mistake]
    root = tmp_path / "my data"
    build(root, name)
    spoil(root)
    code, out, err = vlprompt("data", "check", name, "--root", root)
    assert code == 2
    assert err.startswith(f"error: data set '{name}': ")
    assert out.endswith(f"vlprompt data get {name} --root '{root}'\n{HELP}\n")
    search = f"{root / 'programs'}:{os.environ['PATH']}"
    subprocess.run(["sh", "-c", command], check=True, cwd=root, env={"PATH": search})
    code, out, err = vlprompt("data", "check", name, "--root", root)
    assert (code, err) == (0, ""), out
    assert HELP not in out
    assert not list(root.rglob("evil"))


def test_the_page_has_the_section_that_a_check_points_to() -> None:
    page, section = HELP.split(", ")[:2]
    head = section.split("'")[1]
    assert REPOSITORY / page == PAGE
    assert f"\n## {head}\n" in PAGE.read_text("utf-8")


def test_what_is_nowhere_is_to_be_fetched(tmp_path: Path) -> None:
    report = check("dtd", tmp_path)
    assert report.advice[0] == f"to fetch what is not there: vlprompt data get dtd --root {tmp_path}"
    assert report.fault == f"folder {tmp_path / 'dtd'} does not exist"


def test_a_root_that_is_the_data_sets_own_folder(tmp_path: Path) -> None:
    (advice,) = check("sun397", build(tmp_path, "sun397")).advice
    assert advice.endswith(f": vlprompt data check sun397 --root {tmp_path}")


def test_data_list_is_the_list_of_data_sets(vlprompt) -> None:
    code, out, _ = vlprompt("data", "list")
    assert (code, out) == (0, vlprompt("list", "datasets")[1])
    rows = {row["name"]: row for row in json.loads(vlprompt("data", "list", "--json")[1])["datasets"]}
    assert rows["imagenet_a"]["domain_of"] == "imagenet"
    assert (rows["oxford_pets"]["classes"], rows["oxford_pets"]["images"]) == (37, 7349)
    assert (rows["imagenet"]["get"], rows["dtd"]["get"]) == ("by hand", "vlprompt data get")


def test_the_page_says_how_to_get_each() -> None:
    fetching = PAGE.read_text("utf-8").split("## Fetching")[1]
    for name in (*BENCHMARKS, *PHOTOGRAPHS):
        assert DATASETS[name].by_hand or f"\n| `{name}` | " in fetching
