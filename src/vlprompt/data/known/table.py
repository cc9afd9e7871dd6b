"""The known data sets as one table: where each lies, which split and class names it has, and where it comes from.

Folders are those of CoOp (Zhou et al., IJCV 2022), so that existing data folders work unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from vlprompt.data.folders import from_folder
from vlprompt.data.known.domains import DOMAINS
from vlprompt.data.known.layouts import (
    CLASS_NAMES,
    class_folders,
    read_aircraft,
    read_imagenette,
    read_tiny_imagenet,
)
from vlprompt.data.splits import PARTS, Split

DEFAULT_TEMPLATE = "a photo of a {}."


@dataclass(frozen=True)
class Source:
    """A file on the network, and what of it goes where."""

    urls: tuple[str, ...]
    """The same file at several places; the first that answers is used."""
    moves: dict[str, str]
    """What is in the archive → its place below the data set's folder; of a file that is no archive: "" → its place."""
    checksum: str = ""
    """``md5:…`` or ``sha256:…``; empty where none is known."""
    inner: str = ""
    """An archive in the archive that holds what is moved."""
    file: str = ""
    """What it is called, where the URL does not say it."""

    @property
    def name(self) -> str:
        """What the downloaded file is called."""
        return self.file or self.urls[0].partition("?")[0].rpartition("/")[2]


@dataclass(frozen=True)
class Dataset:
    """A known data set: where it lies below the root, or how it is made."""

    name: str
    folder: str
    """Below the root."""
    images: str = ""
    """Below the folder; the split's paths start here."""
    split_file: str = ""
    """Below the folder: a file in CoOp's format."""
    template: str = DEFAULT_TEMPLATE
    """A class name in words; a method may bring its own."""
    make: Callable[[Path], Split] | None = None
    """For a data set that is made on this machine: writes the folder if it has to, and gives its split."""
    read: Callable[[Path, Path], Split] | None = None
    """For one without a split file: the split of (folder, images)."""
    title: str = ""
    """As papers print it; accepted as a name too."""
    domain_of: str = ""
    """The data set whose classes, or some of them, it shows in another look."""
    needs: tuple[str, ...] = ()
    """Files below the folder that ``read`` reads."""
    subfolders: tuple[str, ...] = ("",)
    """Below ``images``: the folders that must be there."""
    classes: int = 0
    """As published; 0 if that is not fixed."""
    sizes: tuple[int, int, int] = (0, 0, 0)
    """Train, val and test images, as published."""
    licence: str = ""
    homepage: str = ""
    sources: tuple[Source, ...] = field(default=(), repr=False)
    by_hand: str = ""
    """What has no public mirror, and how to get it."""

    @property
    def from_folders(self) -> bool:
        """Whether its split is what lies in class folders, and not a list that images can be missing from."""
        return CLASS_NAMES in self.needs


def _openmoji(folder: Path, domain: str | None = None) -> Split:
    from vlprompt.data.known.openmoji import make_openmoji

    return from_folder(make_openmoji(folder, domain))


PHOTOGRAPHS = Path(__file__).parent / "clothing"
"""Photographs of ten kinds of clothes that come with the package."""


def _made(name: str, domain: str | None = None) -> Dataset:
    return Dataset(
        name, name, template="a picture of a {}.", make=partial(_openmoji, domain=domain), title=name,
        domain_of="openmoji" if domain else "", classes=52, sizes=(746, 144, 370),
        licence="CC BY-SA 4.0", homepage="https://openmoji.org",
    )  # fmt: skip


def _drive(key: str, file: str, checksum: str = "", moves: dict[str, str] | None = None) -> Source:
    """A file that CoOp's authors publish on Google Drive; one without ``moves`` is no archive."""
    url = f"https://drive.usercontent.google.com/download?id={key}&export=download&confirm=t"
    return Source((url,), moves or {"": file}, checksum, file=file)


_CLASS_NAMES = _drive("1-61f_ol79pViBFDG_IDlUQSwoLcn2XXF", CLASS_NAMES)
_OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"
_BERKELEY = "https://people.eecs.berkeley.edu/~hendrycks"
_HUB = "https://huggingface.co/datasets"


def _imagenet_in_another_look(
    name: str, title: str, folder: str, images: str, classes: int, n: int, homepage: str,
    packed: str, url: str, checksum: str = "",
) -> Dataset:  # fmt: skip
    """Test images of some of ImageNet's classes; ``packed`` is what their folder is called in the archive."""
    return Dataset(
        name, folder, images, title=title, domain_of="imagenet", read=class_folders, needs=(CLASS_NAMES,),
        classes=classes, sizes=(0, 0, n), licence="MIT; images belong to their owners", homepage=homepage,
        sources=(_CLASS_NAMES, Source((url,), {packed: images}, checksum)),
    )  # fmt: skip


_AIRCRAFT = ("variants.txt", *(f"images_variant_{part}.txt" for part in PARTS))

_COOP = (
    Dataset(
        "imagenet", "imagenet", "images", title="ImageNet", needs=(CLASS_NAMES,),
        read=partial(class_folders, train="train", test="val"), subfolders=("train", "val"),
        classes=1000, sizes=(1281167, 0, 50000), licence="non-commercial research, on registration",
        homepage="https://image-net.org/download.php", sources=(_CLASS_NAMES,),
        by_hand="the images are given to registered users only: unpack ILSVRC2012_img_train.tar into images/train and "
        "ILSVRC2012_img_val.tar into images/val, each class in its folder",
    ),
    Dataset(
        "caltech101", "caltech-101", "101_ObjectCategories", "split_zhou_Caltech101.json", title="Caltech101",
        classes=100, sizes=(4128, 1649, 2465), licence="CC BY 4.0",
        homepage="https://data.caltech.edu/records/mzrjq-6wc02",
        sources=(
            Source(
                ("https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip?download=1",),
                {"101_ObjectCategories": "101_ObjectCategories"}, "md5:3138e1922a9193bfa496528edbbc45d0",
                inner="caltech-101/101_ObjectCategories.tar.gz",
            ),
            _drive(
                "1hyarUivQE36mY6jSomru6Fjd-JzwcCzN", "split_zhou_Caltech101.json",
                "sha256:52ce83205ff8ff8a1a18119aad6376120ae35c36e783a984bc560cbf10e73fa5",
            ),
        ),
    ),
    Dataset(
        "oxford_pets", "oxford_pets", "images", "split_zhou_OxfordPets.json", "a photo of a {}, a type of pet.",
        title="OxfordPets", classes=37, sizes=(2944, 736, 3669), licence="CC BY-SA 4.0",
        homepage=f"{_OXFORD}/pets",
        sources=(
            Source(
                (f"{_OXFORD}/pets/data/images.tar.gz",), {"images": "images"}, "md5:5c4f3ee8e5d25df40f4fd59a7f44e54c",
            ),
            _drive(
                "1501r8Ber4nNKvmlFVQZ8SeUHTcdTTEqs", "split_zhou_OxfordPets.json",
                "sha256:d7f3ffe65b3919f95132e51422894ae18686b83c331fd8c0adcdc3dc2de6301e",
            ),
        ),
    ),
    Dataset(
        "stanford_cars", "stanford_cars", "", "split_zhou_StanfordCars.json", title="StanfordCars",
        subfolders=("cars_train", "cars_test"), classes=196, sizes=(6509, 1635, 8041),
        licence="non-commercial research", homepage="https://github.com/pytorch/vision/issues/7545",
        sources=(
            _drive(
                "1ObCFbaAgVu0I-k_Au-gIUcefirdAuizT", "split_zhou_StanfordCars.json",
                "sha256:40acee7aa65c8e4727a32d90e884b7c3f8960b523422317e163f7af65432959d",
            ),
        ),
        by_hand="the authors' server no longer has the images: put copies of cars_train and cars_test there",
    ),
    Dataset(
        "oxford_flowers", "oxford_flowers", "jpg", "split_zhou_OxfordFlowers.json",
        "a photo of a {}, a type of flower.", title="Flowers102", classes=102, sizes=(4093, 1633, 2463),
        licence="none stated; images belong to their owners", homepage=f"{_OXFORD}/flowers/102",
        sources=(
            Source(
                (f"{_OXFORD}/flowers/102/102flowers.tgz",), {"jpg": "jpg"}, "md5:52808999861908f626f3c1f4e79d11fa",
            ),
            _drive(
                "1Pp0sRXzZFZq15zVOzKjKBu4A9i01nozT", "split_zhou_OxfordFlowers.json",
                "sha256:2f50c42fc1a17ca13c271cb4269b1347bdb43d2be672e34f74a4e4cbfbcca794",
            ),
        ),
    ),
    Dataset(
        "food101", "food-101", "images", "split_zhou_Food101.json", "a photo of {}, a type of food.",
        title="Food101", classes=101, sizes=(50500, 20200, 30300),
        licence="research; images belong to their owners",
        homepage="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101",
        sources=(
            Source(
                ("http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",), {"food-101/images": "images"},
                "md5:85eeb15f3717b99a5da872d97d918f87",
            ),
            _drive("1QK0tGi096I0Ba6kggatX1ee6dJFIcEJl", "split_zhou_Food101.json"),
        ),
    ),
    Dataset(
        "fgvc_aircraft", "fgvc_aircraft", "images", template="a photo of a {}, a type of aircraft.",
        title="FGVCAircraft", read=read_aircraft, needs=_AIRCRAFT, classes=100, sizes=(3334, 3333, 3333),
        licence="non-commercial research", homepage=f"{_OXFORD}/fgvc-aircraft",
        sources=(
            Source(
                (f"{_OXFORD}/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz",),
                {f"fgvc-aircraft-2013b/data/{name}": name for name in (*_AIRCRAFT, "images")},
                "md5:d4acdd33327262359767eeaa97a4f732",
            ),
        ),
    ),
    Dataset(
        "sun397", "sun397", "SUN397", "split_zhou_SUN397.json", title="SUN397", classes=397,
        sizes=(15880, 3970, 19850), licence="none stated; images belong to their owners",
        homepage="https://vision.princeton.edu/projects/2010/SUN",
        sources=(
            Source(
                (
                    "http://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz",
                    "https://3dvision.princeton.edu/projects/2010/SUN/SUN397.tar.gz",
                ),
                {"SUN397": "SUN397"}, "md5:8ca2778205c41d23104230ba66911c7a",
            ),
            _drive("1y2RD81BYuiyvebdN-JymPfyWYcd8_MUq", "split_zhou_SUN397.json"),
        ),
    ),
    Dataset(
        "dtd", "dtd", "images", "split_zhou_DescribableTextures.json", "{} texture.", title="DTD", classes=47,
        sizes=(2820, 1128, 1692), licence="research", homepage=f"{_OXFORD}/dtd",
        sources=(
            Source(
                (f"{_OXFORD}/dtd/download/dtd-r1.0.1.tar.gz",), {"dtd/images": "images"},
                "md5:fff73e5086ae6bdbea199a49dfb8a4c1",
            ),
            _drive(
                "1u3_QfB467jqHgNXC00UIzbLZRQCg2S7x", "split_zhou_DescribableTextures.json",
                "sha256:f26ebeccd2b58e68d70f07a0dc39fe49bf7b69024bac34396b954dfd87969c38",
            ),
        ),
    ),
    Dataset(
        "eurosat", "eurosat", "2750", "split_zhou_EuroSAT.json", "a centered satellite photo of {}.",
        title="EuroSAT", classes=10, sizes=(13500, 5400, 8100), licence="MIT; Sentinel data are free to use",
        homepage="https://github.com/phelber/EuroSAT",
        sources=(
            Source(
                (
                    f"{_HUB}/torchgeo/eurosat/resolve/c877bcd43f099cd0196738f714544e355477f3fd/EuroSAT.zip",
                    "https://madm.dfki.de/files/sentinel/EuroSAT.zip",
                ),
                {"2750": "2750"}, "md5:c8fa014336c82ac7804f0398fcb19387",
            ),
            _drive(
                "1Ip7yaCWFi0eaOFUGga0lUdVi_DDQth1o", "split_zhou_EuroSAT.json",
                "sha256:541503a77d0b26b735d85ec7a3e672804fe0aa466c2e5f07da772cc6c0af8ad2",
            ),
        ),
    ),
    Dataset(
        "ucf101", "ucf101", "UCF-101-midframes", "split_zhou_UCF101.json", "a photo of a person doing {}.",
        title="UCF101", classes=101, sizes=(7639, 1898, 3783), licence="none stated; frames of others' videos",
        homepage="https://www.crcv.ucf.edu/data/UCF101.php",
        sources=(
            _drive(
                "10Jqome3vtUA2keJkNanAiFpgbyC9Hc2O", "UCF-101-midframes.zip",
                moves={"UCF-101-midframes": "UCF-101-midframes"},
            ),
            _drive(
                "1I0S0q91hJfsV9Gf4xDIjgDq4AqBNJb1y", "split_zhou_UCF101.json",
                "sha256:d78cb834f7c5792ceaff2c5ee2d7c76a9e4086e48a3a6b01232989d29cbefdd8",
            ),
        ),
    ),
    _imagenet_in_another_look(
        "imagenet_v2", "ImageNet-V2", "imagenetv2", "imagenetv2-matched-frequency-format-val", 1000, 10000,
        "https://github.com/modestyachts/ImageNetV2", "imagenetv2-matched-frequency-format-val",
        f"{_HUB}/vaishaal/ImageNetV2/resolve/main/imagenetv2-matched-frequency.tar.gz",
        "sha256:f0c37fdf925916b19ea1323cd9a2208cdb6959ba2c32eef2a7fc393835c9ca7c",
    ),
    _imagenet_in_another_look(
        "imagenet_sketch", "ImageNet-Sketch", "imagenet-sketch", "images", 1000, 50889,
        "https://github.com/HaohanWang/ImageNet-Sketch", "sketch",
        f"{_HUB}/songweig/imagenet_sketch/resolve/main/data/ImageNet-Sketch.zip",
    ),
    _imagenet_in_another_look(
        "imagenet_a", "ImageNet-A", "imagenet-adversarial", "imagenet-a", 200, 7500,
        "https://github.com/hendrycks/natural-adv-examples", "imagenet-a", f"{_BERKELEY}/imagenet-a.tar",
        "md5:c3e55429088dc681f30d81f4726b6595",
    ),
    _imagenet_in_another_look(
        "imagenet_r", "ImageNet-R", "imagenet-rendition", "imagenet-r", 200, 30000,
        "https://github.com/hendrycks/imagenet-r", "imagenet-r", f"{_BERKELEY}/imagenet-r.tar",
        "md5:a61312130a589d0ca1a8fca1f2bd3337",
    ),
)  # fmt: skip

_PHOTOGRAPHS = (
    Dataset(
        "clothing-demo", "clothing-demo", title="Clothes", make=lambda folder: from_folder(PHOTOGRAPHS),
        classes=10, sizes=(160, 40, 179), licence="CC0 1.0",
        homepage="https://github.com/alexeygrigorev/clothing-dataset-small",
    ),
    Dataset(
        "clothing", "clothing", title="ClothingSmall", read=lambda folder, images: from_folder(images),
        subfolders=("train", "test"), classes=10, sizes=(3068, 341, 372), licence="CC0 1.0",
        homepage="https://github.com/alexeygrigorev/clothing-dataset-small",
        sources=(
            Source(
                ("https://github.com/alexeygrigorev/clothing-dataset-small/archive/refs/heads/master.zip",),
                {f"clothing-dataset-small-master/{theirs}": ours
                 for theirs, ours in (("train", "train"), ("validation", "val"), ("test", "test"))},
                file="clothing-dataset-small.zip",
            ),
        ),
    ),
    Dataset(
        "imagenette", "imagenette", title="Imagenette", read=read_imagenette, subfolders=("train", "val"),
        classes=10, sizes=(8526, 943, 3925), licence="non-commercial research; images belong to their owners",
        homepage="https://github.com/fastai/imagenette",
        sources=(
            Source(
                ("https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz",),
                {"imagenette2-160/train": "train", "imagenette2-160/val": "val"},
                "md5:e793b78cc4c9e9a4ccc0c1155377a412",
            ),
        ),
    ),
    Dataset(
        "tiny_imagenet", "tiny-imagenet-200", title="TinyImageNet", read=read_tiny_imagenet,
        needs=("words.txt", "wnids.txt", "val/val_annotations.txt"), subfolders=("train", "val"),
        classes=200, sizes=(90000, 10000, 10000), licence="non-commercial research; images belong to their owners",
        homepage="http://cs231n.stanford.edu/reports/2015/pdfs/yle_project.pdf",
        sources=(
            Source(
                ("http://cs231n.stanford.edu/tiny-imagenet-200.zip",),
                {f"tiny-imagenet-200/{name}": name for name in ("words.txt", "wnids.txt", "train", "val")},
                "md5:90528d7ca1a48142e341f4ef8d21d0de",
            ),
        ),
    ),
)  # fmt: skip

_DRAWINGS = (_made("openmoji"), *(_made(f"openmoji-{domain}", domain) for domain in DOMAINS))

DATASETS: dict[str, Dataset] = {dataset.name: dataset for dataset in (*_COOP, *_PHOTOGRAPHS, *_DRAWINGS)}


def find_dataset(name: str) -> Dataset | None:
    """The data set of that name or title; case, "-" and "_" do not matter."""
    return next((d for d in DATASETS.values() if _plain(name) in (_plain(d.name), _plain(d.title or d.name))), None)


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
