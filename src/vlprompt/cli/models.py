"""``vlprompt evaluate``, ``calibrate``, ``predict``, ``export``, ``explain``, ``convert``: commands only, no logic."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vlprompt.cli.options import (
    DATA,
    MODEL,
    OUTPUT,
    AttackName,
    AttackSteps,
    ClassNames,
    ClassNamesFile,
    Data,
    Device,
    Eps,
    Json,
    MaxPixels,
    OtherBackbone,
    OtherDescriptions,
    OtherPrior,
    OtherTeacher,
    Precision,
    Root,
    RunFolder,
    SkipBad,
    SplitFile,
    WhichClasses,
    say,
)
from vlprompt.errors import ConfigError

if TYPE_CHECKING:
    from vlprompt.data.reading import ImageReader
    from vlprompt.methods import Method

models_app = typer.Typer()


@contextmanager
def reading(method: Method, skip_bad: bool, max_pixels: int | None) -> Iterator[ImageReader]:
    """Reads images as the model's were, and says at the end which look dark."""
    from vlprompt.data.reading import CACHE_BYTES, ImageReader

    room = CACHE_BYTES if skip_bad else 0
    with ImageReader(room=room, white=method.white, max_pixels=max_pixels) as reader:
        yield reader
        for note in reader.range_notes():
            say(note)


@models_app.command(epilog="Example: vlprompt evaluate runs/x caltech101 --root data --classes novel")
def evaluate(
    run: RunFolder,
    data: Data,
    root: Root = None,
    classes: WhichClasses = "all",
    split: Annotated[
        Literal["all", "train", "val", "test"] | None,
        typer.Option(
            help="Images to measure on; default: test, or all of a folder that is only evaluated.", rich_help_panel=DATA
        ),
    ] = None,
    among: Annotated[
        Literal["model", "folder"] | None,
        typer.Option(
            help="Whose classes each image is scored among, the model's or those of DATA; default: the model's, where "
            "DATA is a folder or CSV file with no other classes.",
            rich_help_panel=DATA,
        ),
    ] = None,
    split_file: SplitFile = None,
    descriptions: OtherDescriptions = None,
    prior: OtherPrior = None,
    teacher: OtherTeacher = None,
    skip_bad: SkipBad = False,
    max_pixels: MaxPixels = None,
    backbone: OtherBackbone = None,
    device: Device = "cpu",
    precision: Precision = "fp32",
    attack: AttackName = None,
    eps: Eps = None,
    attack_steps: AttackSteps = None,
    json_output: Json = False,
    csv: Annotated[
        bool, typer.Option("--csv", help="Print image,truth,prediction,probability rows.", rich_help_panel=OUTPUT)
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Also write a new .html page: confusions, reliability, mistakes, near-duplicates of training images, "
            "doubtful labels.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
) -> None:
    """Measure a tuned model's accuracy and calibration on a data set's images and class names.

    A folder or CSV file that names no train, val and test images is measured whole, unless RUN was trained on it. With
    --attack also how many images are still told right after each pixel may have changed by EPS.
    """
    from vlprompt.artefact.export import check_new
    from vlprompt.artefact.hub import load_model
    from vlprompt.cli.evaluate import per_image, summary
    from vlprompt.evaluation.measure import Asked, measure
    from vlprompt.files import write_atomically
    from vlprompt.training.attack import find_attack
    from vlprompt.training.prepare import describe_others

    if json_output and csv:
        raise ConfigError("--json and --csv exclude each other")
    if html:
        check_new(html, ".html")
    under = find_attack(attack, eps, attack_steps)
    asked = Asked(data, root, split_file, classes, split, among, skip_bad, under)
    images = asked.dataset()  # before the model is loaded, which takes longer
    method, folder = load_model(run, backbone, device, precision)
    describe_others(method, descriptions, prior, teacher)
    with reading(method, skip_bad, max_pixels) as reader:
        measured = measure(method, folder, asked, images, reader, say)
        if html:
            from vlprompt.evaluation.page import page

            # Names of files that are no UTF-8 are spelt out.
            write_atomically(html, page(method, folder, measured).encode("utf-8", "backslashreplace"))
            say(f"page written to {html}")
    if json_output:
        print(json.dumps(measured.to_dict()))
    elif csv:
        print(per_image(measured))
        say(summary(measured).splitlines()[-1])
    else:
        print(summary(measured))


@models_app.command(epilog="Example: vlprompt calibrate runs/x photos --split test")
def calibrate(
    run: RunFolder,
    data: Data,
    root: Root = None,
    split: Annotated[
        Literal["val", "test"], typer.Option(help="Held-out images to calibrate on.", rich_help_panel=DATA)
    ] = "val",
    split_file: SplitFile = None,
    skip_bad: SkipBad = False,
    max_pixels: MaxPixels = None,
    backbone: OtherBackbone = None,
    device: Device = "cpu",
    precision: Precision = "fp32",
    kept: Annotated[
        float,
        typer.Option(help="Share of images of known classes above the threshold of none.", rich_help_panel=OUTPUT),
    ] = 0.95,
    coverage: Annotated[
        float, typer.Option(help="Coverage that sets of classes are checked at.", rich_help_panel=OUTPUT)
    ] = 0.9,
    json_output: Json = False,
) -> None:
    """Fit probabilities, sets of classes and "none of these" on held-out images; the tuned model keeps them.

    Images of classes that the model does not know, if DATA has any, say how well it tells them.
    """
    from vlprompt.artefact.artefact import load_artefact, write_calibration
    from vlprompt.artefact.calibration import check_share
    from vlprompt.data.datasets import load_dataset
    from vlprompt.data.reading import readable
    from vlprompt.training.calibrate import calibrate as fit
    from vlprompt.training.calibrate import check_not_trained_on, held_out, report
    from vlprompt.training.evaluate import EvaluationImages

    check_share("--kept", kept)
    check_share("--coverage", coverage)
    dataset = load_dataset(data, root, split_file)
    for note in dataset.notes:
        say(note)
    folder = Path(run)  # what was calibrated must stay: none from the hub
    method = load_artefact(folder, backbone, device, precision)
    known, labels, novel = held_out(method, dataset, split)
    if not check_not_trained_on(folder, known):
        say(f"note: {run} does not say where its training images are: none of these may be among them")
    with reading(method, skip_bad, max_pixels) as reader:
        kept_known, kept_novel = readable(known, reader, skip_bad, say), readable(novel, reader, skip_bad, say)
        images = EvaluationImages([known[i] for i in kept_known], [labels[i] for i in kept_known], reader)
        others = EvaluationImages([novel[i] for i in kept_novel], [], reader)
        calibration, worth = fit(method, images, others, kept, coverage)
    write_calibration(folder, calibration)
    skipped = len(known) + len(novel) - len(kept_known) - len(kept_novel)
    if json_output:
        summary = {k: v for k, v in calibration.to_dict().items() if k != "misfit"}
        print(json.dumps({"run": run, **summary, **vars(worth), "skipped": skipped}))
    else:
        print(report(calibration, worth, split))


@models_app.command(epilog='Example: vlprompt predict runs/x photo.jpg more/ --class-names "cat,dog,horse" --top 3')
def predict(
    run: RunFolder,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Image files, or folders of them.")],
    class_names: ClassNames = None,
    class_names_file: ClassNamesFile = None,
    descriptions: OtherDescriptions = None,
    prior: OtherPrior = None,
    teacher: OtherTeacher = None,
    skip_bad: SkipBad = False,
    max_pixels: MaxPixels = None,
    backbone: OtherBackbone = None,
    device: Device = "cpu",
    precision: Precision = "fp32",
    top: Annotated[int, typer.Option(help="Classes shown for each image.", min=1, rich_help_panel=OUTPUT)] = 5,
    sets: Annotated[
        float | None,
        typer.Option(
            help="Also a set of classes that holds the right one for this share of images, e.g. 0.9.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    by_class: Annotated[
        bool, typer.Option("--by-class", help="Sets for this share of every class's images.", rich_help_panel=OUTPUT)
    ] = False,
    json_output: Json = False,
    csv: Annotated[
        bool, typer.Option("--csv", help="Print image,class,probability rows.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Classify images with a tuned model, under its own class names or any others.

    Of a calibrated model (`vlprompt calibrate`) probabilities are calibrated, and "none of these" is said below its
    threshold.
    """
    from vlprompt.artefact.artefact import load_calibration
    from vlprompt.artefact.hub import load_model
    from vlprompt.cli.predict import check_sets, find_images, predict_images, read_class_names, show
    from vlprompt.data.reading import readable
    from vlprompt.prompting.text import partly_known
    from vlprompt.training.prepare import describe_others

    if json_output and csv:
        raise ConfigError("--json and --csv exclude each other")
    paths = find_images(images, say)
    method, folder = load_model(run, backbone, device, precision)
    describe_others(method, descriptions, prior, teacher)
    calibration = load_calibration(folder)
    names = read_class_names(class_names, class_names_file) or method.class_names
    check_sets(run, calibration, names == method.class_names, sets, by_class)
    if names != method.class_names and (note := partly_known(method.backbone, names)):
        say(note)
    with reading(method, skip_bad, max_pixels) as reader:
        kept = [paths[i] for i in readable(paths, reader, skip_bad, say)]
        predictions = predict_images(method, kept, names, top, reader, calibration, sets, by_class)
    result = {"predictions": predictions, "skipped": len(paths) - len(kept)}
    print(json.dumps(result) if json_output else show(predictions, csv))


@models_app.command(
    epilog='Example: vlprompt export runs/x --format onnx --class-names "cat,dog,horse" --out pets.onnx'
)
def export(
    run: RunFolder,
    class_names: ClassNames = None,
    class_names_file: ClassNamesFile = None,
    descriptions: OtherDescriptions = None,
    prior: OtherPrior = None,
    teacher: OtherTeacher = None,
    backbone: OtherBackbone = None,
    format_: Annotated[
        Literal["onnx", "safetensors"] | None,
        typer.Option(
            "--format",
            help="onnx: the whole model, of any method. safetensors: class features, of methods that leave images "
            "alone. Default: as --out ends, or onnx.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    pixels: Annotated[
        Literal["float32", "uint8"],
        typer.Option(
            "--input",
            help="What an .onnx file reads: float32 preprocessed images [B, 3, S, S], or uint8 pixels [B, S, S, 3].",
            rich_help_panel=OUTPUT,
        ),
    ] = "float32",
    int8: Annotated[
        bool,
        typer.Option(
            "--int8",
            help="Write the .onnx file's matrices in 8 bits, and print what that costs in accuracy.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            help="Data set whose images --int8 is measured on; the run's own if not given.", rich_help_panel=DATA
        ),
    ] = None,
    root: Root = None,
    split_file: SplitFile = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The new file; default: model.FORMAT in RUN, or here for one of the hub.", rich_help_panel=OUTPUT
        ),
    ] = None,
) -> None:
    """Write one file for use without vlprompt: images in, probabilities out; or class features."""
    from vlprompt.artefact.artefact import load_calibration
    from vlprompt.artefact.export import export_classes, onnx_model, quantised
    from vlprompt.artefact.hub import load_model
    from vlprompt.cli.export import choose_file, given_option, measure, measured_on
    from vlprompt.cli.predict import read_class_names
    from vlprompt.files import write_atomically
    from vlprompt.prompting.text import partly_known
    from vlprompt.training.prepare import describe_others

    given = read_class_names(class_names, class_names_file)
    file = choose_file(run, out, format_, whole_only={"--int8": int8, "--input": pixels != "float32"})
    if not int8 and (option := given_option({"--data": data, "--root": root, "--split-file": split_file})):
        raise ConfigError(f"{option} says what --int8 is measured on: give both, or neither")
    images = measured_on(run, data, root, split_file) if int8 else None
    method, folder = load_model(run, backbone)
    describe_others(method, descriptions, prior, teacher)
    names = given or method.class_names
    if names != method.class_names and (note := partly_known(method.backbone, names)):
        say(note)
    if file.suffix == ".safetensors":
        export_classes(method, names, file)
    else:
        content = onnx_model(method, names, pixels, load_calibration(folder))
        if images:
            small = quantised(content)
            say(measure(content, small, method, names, pixels, images))
            content = small
        write_atomically(file, content)
    say(f"{len(names)} classes of {method.name} on {method.backbone.name} written to {file}")


@models_app.command(epilog="Example: vlprompt explain runs/x photo.jpg --out photo.png")
def explain(
    run: RunFolder,
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="An image file.")],
    *,
    max_pixels: MaxPixels = None,
    backbone: OtherBackbone = None,
    device: Device = "cpu",
    precision: Precision = "fp32",
    class_name: Annotated[
        str | None,
        typer.Option("--class", help="The class to ask about; default: the predicted one.", rich_help_panel=OUTPUT),
    ] = None,
    out: Annotated[Path, typer.Option(help="The new .png file.", rich_help_panel=OUTPUT)],
    seed: Annotated[
        int, typer.Option(help="Decides the dropout draw to show.", min=0, max=2**32 - 1, rich_help_panel=OUTPUT)
    ] = 0,
    json_output: Json = False,
) -> None:
    """Draw which patches of an image speak for a class; of drople, also which tokens its dropout would hit."""
    from vlprompt.artefact.artefact import load_calibration
    from vlprompt.artefact.export import check_new
    from vlprompt.artefact.hub import load_model
    from vlprompt.cli.explain import explain as explain_image
    from vlprompt.cli.explain import write_explanation

    check_new(out, ".png")
    method, folder = load_model(run, backbone, device, precision)
    with reading(method, False, max_pixels) as reader:
        explanation = explain_image(method, reader.image(image), seed, class_name, load_calibration(folder))
    write_explanation(explanation, out, image.name)
    if json_output:
        print(json.dumps(explanation.to_dict()))
    say(f"{explanation.class_name} in {image} drawn in {out}")


@models_app.command(epilog="Example: vlprompt convert pytorch_model.bin clip/model.safetensors")
def convert(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .bin or .pt state dict, or CoOp's model.pth.tar-N.")],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The .safetensors file to write; of CoOp's prompts, a new folder.")
    ],
    backbone: Annotated[
        str | None, typer.Option(help="Of CoOp's prompts: the backbone they were tuned on.", rich_help_panel=MODEL)
    ] = None,
    class_names: Annotated[
        str | None, typer.Option(help="Of CoOp's prompts: their classes, separated by commas.", rich_help_panel=DATA)
    ] = None,
    class_names_file: Annotated[
        Path | None, typer.Option(help="File of these classes, one per line.", rich_help_panel=DATA)
    ] = None,
    position: Annotated[
        Literal["end", "middle", "front"],
        typer.Option(help="Of CoOp's prompts: where the class name stands.", rich_help_panel=MODEL),
    ] = "end",
) -> None:
    """Convert an older checkpoint to safetensors, or CoOp's and CoCoOp's prompts to a tuned model.

    No code that the file may hold is run. OpenAI's loads as it is; weights of open_clip need their
    open_clip_config.json beside them.
    """
    from vlprompt.artefact.coop import NAME, import_prompts
    from vlprompt.backbones.convert import convert as convert_file
    from vlprompt.backbones.load import load_backbone
    from vlprompt.cli.predict import read_class_names

    names = read_class_names(class_names, class_names_file)
    if backbone is None and names is None and not NAME.fullmatch(file.name):
        say(f"{convert_file(file, out)} tensors written to {out}")
        return
    if backbone is None or names is None:
        raise ConfigError(f"{file}: CoOp's prompts name no backbone and no classes: --backbone, --class-names-file")
    method = import_prompts(file, out, load_backbone(backbone), names, position)
    say(f"{method.name} with {len(names)} classes on {backbone} written to {out}")
