"""Where an export goes, and what 8 bits cost it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vlprompt.artefact.export import Pixels, as_read, check_new, check_onnx, onnx_session
from vlprompt.config.schema import read_config
from vlprompt.data.batches import evaluation_batches
from vlprompt.data.datasets import LoadedDataset, load_dataset
from vlprompt.data.reading import ImageReader
from vlprompt.data.splits import find_classes
from vlprompt.errors import ArtefactError, ConfigError, DataError, first_few
from vlprompt.methods import Method

FORMATS = ("onnx", "safetensors")
MOST = 1000
"""Images that 8 bits are measured on, evenly from all."""


def choose_file(run: str, out: Path | None, format_: str | None, whole_only: Mapping[str, object]) -> Path:
    """The new file to write, by its name or the format.

    Raises an error if the two do not fit together, nor with an option that is for ONNX files alone, if the file is
    there, and if what writes ONNX files is not installed.
    """
    if out is None:  # a model of the hub has no folder of its own here
        folder = Path(run).expanduser()
        out = (folder if folder.is_dir() else Path()) / f"model.{format_ or FORMATS[0]}"
    if out.suffix not in {f".{name}" for name in ([format_] if format_ else FORMATS)}:
        allowed = f".{format_} (--format {format_})" if format_ else " or ".join(f".{name}" for name in FORMATS)
        raise ArtefactError(f"{out} must end in {allowed}")
    if out.suffix == ".onnx":
        check_onnx()
    elif option := given_option(whole_only):
        raise ConfigError(f"{option} is for .onnx files, and {out} is none")
    check_new(out, out.suffix)
    return out


def given_option(options: Mapping[str, object]) -> str | None:
    """The first of some options that is given."""
    return next((name for name, value in options.items() if value), None)


def measured_on(run: str, data: str | None, root: Path | None, split_file: Path | None) -> LoadedDataset:
    """The data set with labelled images that ``--int8`` is measured on: the one given, or the run's own."""
    if data:
        return load_dataset(data, root, split_file)
    file = Path(run).expanduser() / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"--int8 is measured on labelled images, and {run} names none: say which with --data")
    config = read_config(file)
    try:
        # The run holds its split, and the file that this was read from may be gone.
        own_root, own_split = config.get("data.root"), config.get("data.split_file") and file.with_name("split.json")
        return load_dataset(config["data.name"], root or own_root, split_file or own_split)
    except DataError as error:
        raise DataError(f"--int8 is measured on the run's images, or those of --data: {error}") from None


def measure(
    content: bytes, small: bytes, method: Method, class_names: Sequence[str], pixels: Pixels, dataset: LoadedDataset
) -> str:
    """How accurate two ONNX files are on test images (or val images) of the classes, in a line.

    Raises DataError where there are none.
    """
    split, place = dataset.split, find_classes(dataset.split.class_names, class_names)
    part = "test" if split.items("test") else "val"
    labelled = zip(split.paths(part), split.labels(part), strict=True)
    found = [(path, c) for path, label in labelled if (c := place[label]) is not None]
    if not found:
        raise DataError(
            f"data set '{dataset.name}' has no test or val images of {first_few(class_names)} to measure --int8 on: "
            "--data names another"
        )
    chosen = [found[i] for i in np.linspace(0, len(found) - 1, min(len(found), MOST)).round().astype(int)]
    paths, labels = [path for path, _ in chosen], np.array([label for _, label in chosen])
    preprocess, sessions = method.backbone.preprocess, (onnx_session(content), onnx_session(small))
    right, done = np.zeros(2), 0
    with ImageReader(white=method.white) as reader:
        for views in evaluation_batches(paths, preprocess, reader, batch_size=25):
            images = as_read(preprocess, views, pixels).numpy()
            for i, session in enumerate(sessions):
                predicted = session.run(["probabilities"], {"images": images})[0].argmax(-1)
                right[i] += (predicted == labels[done : done + len(views)]).sum()
            done += len(views)
    before, after = 100 * right / done
    return (
        f"accuracy on {done} {part} images of {dataset.name}: {before:.2f} % in fp32, {after:.2f} % in int8 "
        f"({after - before:+.2f}); {100 * len(small) / len(content):.0f} % of the size"
    )
