"""``vlprompt evaluate``, ``predict``, ``export``, ``explain`` and ``convert``: commands only, no logic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from vlprompt.cli.options import (
    DATA,
    OUTPUT,
    ClassNames,
    ClassNamesFile,
    Data,
    Device,
    Json,
    MaxPixels,
    OtherBackbone,
    Precision,
    Root,
    RunFolder,
    SkipBad,
    SplitFile,
    WhichClasses,
    say,
)
from vlprompt.errors import ConfigError, DataError, printable

models_app = typer.Typer()


@models_app.command(epilog="Example: vlprompt evaluate runs/x caltech101 --root data --classes novel")
def evaluate(
    run: RunFolder,
    data: Data,
    root: Root = None,
    classes: WhichClasses = "all",
    split: Annotated[Literal["test", "val"], typer.Option(help="Images to measure on.", rich_help_panel=DATA)] = "test",
    split_file: SplitFile = None,
    skip_bad: SkipBad = False,
    max_pixels: MaxPixels = None,
    backbone: OtherBackbone = None,
    device: Device = "cpu",
    precision: Precision = "fp32",
    json_output: Json = False,
) -> None:
    """Measure a tuned model's accuracy and calibration on a data set's images and class names."""
    from vlprompt.artefact.artefact import load_artefact
    from vlprompt.data.datasets import load_dataset
    from vlprompt.data.reading import CACHE_BYTES, ImageReader, readable
    from vlprompt.training.evaluate import EvaluationImages
    from vlprompt.training.evaluate import evaluate as evaluate_method

    dataset = load_dataset(data, root, split_file)
    chosen = dataset.split.subset(classes)
    items, paths = chosen.items(split), chosen.paths(split)
    if not items:
        raise DataError(f"data set '{dataset.name}' has no {split} images")
    for note in filter(None, [*dataset.notes, dataset.gap(split, classes)]):
        say(note)
    method = load_artefact(run, backbone, device, precision)
    method.take_template(dataset.template)
    room = CACHE_BYTES if skip_bad else 0
    with ImageReader(room=room, white=method.white, max_pixels=max_pixels) as reader:
        kept = readable(paths, reader, skip_bad, say)
        images = EvaluationImages([paths[i] for i in kept], [items[i].label for i in kept], reader)
        result = evaluate_method(method, images, chosen.class_names)
        for note in reader.range_notes():
            say(note)
    if json_output:
        print(json.dumps({**result.to_dict(), "skipped": len(paths) - len(kept)}))
        return
    for name, accuracy in sorted(result.per_class.items(), key=lambda x: x[1]):
        print(printable(f"{accuracy:6.1f} %  {name}"))
    print(
        f"accuracy {result.accuracy:.2f} % on {result.n} {split} images of {len(result.classes)} classes "
        f"({classes}); calibration error {result.calibration_error:.3f}"
    )


@models_app.command(epilog='Example: vlprompt predict runs/x photo.jpg more/ --class-names "cat,dog,horse" --top 3')
def predict(
    run: RunFolder,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Image files, or folders of them.")],
    class_names: ClassNames = None,
    class_names_file: ClassNamesFile = None,
    skip_bad: SkipBad = False,
    max_pixels: MaxPixels = None,
    backbone: OtherBackbone = None,
    device: Device = "cpu",
    precision: Precision = "fp32",
    top: Annotated[int, typer.Option(help="Classes shown for each image.", min=1, rich_help_panel=OUTPUT)] = 5,
    json_output: Json = False,
    csv: Annotated[
        bool, typer.Option("--csv", help="Print image,class,probability rows.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Classify images with a tuned model, under its own class names or any others."""
    from vlprompt.artefact.artefact import load_artefact
    from vlprompt.cli.predict import find_images, predict_images, read_class_names, show
    from vlprompt.data.reading import CACHE_BYTES, ImageReader, readable
    from vlprompt.prompting.text import partly_known

    if json_output and csv:
        raise ConfigError("--json and --csv exclude each other")
    paths = find_images(images, say)
    method = load_artefact(run, backbone, device, precision)
    names = read_class_names(class_names, class_names_file) or method.class_names
    if names != method.class_names and (note := partly_known(method.backbone, names)):
        say(note)
    room = CACHE_BYTES if skip_bad else 0
    with ImageReader(room=room, white=method.white, max_pixels=max_pixels) as reader:
        kept = [paths[i] for i in readable(paths, reader, skip_bad, say)]
        predictions = predict_images(method, kept, names, top, reader)
        for note in reader.range_notes():
            say(note)
    result = {"predictions": predictions, "skipped": len(paths) - len(kept)}
    print(json.dumps(result) if json_output else show(predictions, csv))


@models_app.command(epilog='Example: vlprompt export runs/x --class-names "cat,dog,horse" --out pets.safetensors')
def export(
    run: RunFolder,
    *,
    class_names: ClassNames = None,
    class_names_file: ClassNamesFile = None,
    backbone: OtherBackbone = None,
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.", rich_help_panel=OUTPUT)],
) -> None:
    """Write class features and scale for use without vlprompt; for methods that leave the image tower alone."""
    from vlprompt.artefact.artefact import load_artefact
    from vlprompt.artefact.export import export_classes
    from vlprompt.cli.predict import read_class_names

    method = load_artefact(run, backbone)
    names = read_class_names(class_names, class_names_file) or method.class_names
    export_classes(method, names, out)
    say(f"{len(names)} classes of {method.name} on {method.backbone.name} written to {out}")


@models_app.command(epilog="Example: vlprompt explain runs/x photo.jpg --out photo.png")
def explain(
    run: RunFolder,
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="An image file.")],
    *,
    backbone: OtherBackbone = None,
    device: Device = "cpu",
    precision: Precision = "fp32",
    out: Annotated[Path, typer.Option(help="The .png file to write.", rich_help_panel=OUTPUT)],
    seed: Annotated[
        int, typer.Option(help="Decides the dropout draw to show.", min=0, max=2**32 - 1, rich_help_panel=OUTPUT)
    ] = 0,
    json_output: Json = False,
) -> None:
    """Draw which patches of an image speak for its class; of drople, also which tokens its dropout would hit."""
    from vlprompt.artefact.artefact import load_artefact
    from vlprompt.cli.explain import explain as explain_image
    from vlprompt.cli.explain import write_explanation

    explanation = explain_image(load_artefact(run, backbone, device, precision), image, seed)
    write_explanation(explanation, out, image.name)
    if json_output:
        print(json.dumps(explanation.to_dict()))
    say(f"{explanation.class_name} in {image} drawn in {out}")


@models_app.command(epilog="Example: vlprompt convert pytorch_model.bin clip/model.safetensors")
def convert(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .bin or .pt state dict.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The .safetensors file to write.")],
) -> None:
    """Convert an older checkpoint to safetensors, without running code that it may hold.

    OpenAI's loads as it is; weights of open_clip need their open_clip_config.json beside them.
    """
    from vlprompt.backbones.convert import convert as convert_file

    say(f"{convert_file(file, out)} tensors written to {out}")
