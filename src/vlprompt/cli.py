"""The command line: commands only, no logic. Heavy libraries are imported by the commands that need them."""

from __future__ import annotations

import json
import os
import sys
from errno import EACCES, EDQUOT, ENOSPC, EPERM, EROFS
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlprompt.bank_cli import bank_app
from vlprompt.bench_cli import bench, report
from vlprompt.data_cli import data_app
from vlprompt.errors import ConfigError, DataError, Interrupted, VlpromptError
from vlprompt.options import (
    DATA,
    OUTPUT,
    AllowFewer,
    Classes,
    ClassNames,
    ClassNamesFile,
    ConfigFile,
    Data,
    Device,
    DryRun,
    Epochs,
    Json,
    Listing,
    MethodName,
    OtherBackbone,
    Out,
    Part,
    Precision,
    Preset,
    Report,
    Resume,
    Root,
    RunFolder,
    Seed,
    Selection,
    Settings,
    Shots,
    SkipBad,
    SplitFile,
    TeacherBackbone,
    TrainBackbone,
    TrainBank,
    TrainClasses,
    TrainData,
    TrainDevice,
    TrainPrecision,
    TrainViews,
    ValFraction,
    WhichClasses,
    say,
)

if TYPE_CHECKING:
    from vlprompt.methods import Method
    from vlprompt.training.config import RunConfig

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Adapt a frozen vision-language model (CLIP and relatives) to your classes by learning a few prompt tokens.",
    epilog="Example: vlprompt train promptsrc ./photos --shots 16 --out runs/photos",
)

app.add_typer(bank_app, name="bank")
app.add_typer(data_app, name="data")

INTERRUPTED = 130


def main() -> None:
    """Run the command line; bad input ends in one line on standard error and exit code 2."""
    try:
        code = app(standalone_mode=False, prog_name="vlprompt")
        if code == INTERRUPTED:  # typer turns an interrupt into a silent exit
            raise KeyboardInterrupt
    except Interrupted as stop:
        if _first():
            print(f"interrupted; {stop}", file=sys.stderr)
        code = INTERRUPTED
    except VlpromptError as error:
        process = "" if _first() else f"process {os.environ['RANK']}: "
        print(f"{process}error: {error}", file=sys.stderr)
        code = 2
    except typer.TyperException as error:  # unknown option, missing argument, …
        print(f"error: {error.format_message().replace('Value error, ', '')}", file=sys.stderr)
        code = error.exit_code
    except OSError as error:
        if error.errno not in (EACCES, EDQUOT, ENOSPC, EPERM, EROFS):
            raise
        print(f"error: {f'{error.filename}: ' if error.filename else ''}{error.strerror}", file=sys.stderr)
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    sys.exit(code)


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Adapt a frozen vision-language model (CLIP and relatives) to your classes by learning a few prompt tokens."""
    if version:
        from vlprompt import __version__

        print(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command(epilog="Example: vlprompt demo --out demo")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures and the tuned models.")] = Path("demo"),
    json_output: Json = False,
) -> None:
    """The whole job on the embedded backbone, offline, in under two minutes."""
    from vlprompt.demo import run_demo

    result = run_demo(out, say)
    if json_output:
        print(json.dumps(result))


@app.command("list", epilog="Example: vlprompt list methods --json")
def list_(
    what: Annotated[Listing, typer.Argument(help="What to list.")] = Listing.methods, json_output: Json = False
) -> None:
    """List methods, backbones or data sets."""
    from vlprompt.listing import listing, table

    rows = listing(what.value)
    print(json.dumps({what.value: rows}) if json_output else table(rows))


@app.command(epilog="Example: vlprompt train coop caltech101 --root data --shots 16 --classes base n_ctx=4 lr=0.001")
def train(
    method: MethodName = None,
    data: TrainData = None,
    settings: Settings = None,
    root: Root = None,
    shots: Shots = None,
    allow_fewer: AllowFewer = False,
    classes: TrainClasses = None,
    split_file: SplitFile = None,
    val_fraction: ValFraction = None,
    skip_bad: SkipBad = False,
    backbone: TrainBackbone = None,
    teacher: TeacherBackbone = None,
    bank: TrainBank = None,
    views: TrainViews = None,
    device: TrainDevice = None,
    precision: TrainPrecision = None,
    seed: Seed = None,
    epochs: Epochs = None,
    preset: Preset = None,
    select: Selection = None,
    config: ConfigFile = None,
    resume: Resume = None,
    report_to: Report = None,
    out: Out = None,
    dry_run: DryRun = False,
    json_output: Json = False,
) -> None:
    """Tune prompts on images and save a folder that predicts elsewhere.

    Defaults < the method's official settings < --preset < --config < options and KEY=VALUE.

    Every epoch is saved: `vlprompt train --resume RUN` goes on where a run was stopped. Started by `torchrun
    --nproc-per-node N -m vlprompt train …` or `accelerate launch`, N processes share each batch.
    """
    from vlprompt.training.config import build_config, parse_override, read_config

    given = {
        "data.name": data,
        "data.root": root and str(root),
        "data.split_file": split_file and str(split_file),
        "data.val_fraction": val_fraction,
        "data.allow_fewer": allow_fewer or None,
        "data.skip_bad": skip_bad or None,
        "data.shots": shots,
        "data.classes": classes and classes.value,
        "backbone": backbone,
        "teacher.backbone": teacher,
        "data.bank": bank and str(bank),
        "data.views": views,
        "train.device": device,
        "train.precision": precision,
        "seed": seed,
        "train.epochs": epochs,
        "train.select": select and select.value,
        "train.report_to": report_to and report_to.value,
    }
    if resume is not None:
        others = [*(given | {"method": method, "preset": preset, "config": config, "out": out}).values(), settings]
        if dry_run or any(value is not None for value in others if value != []):
            raise ConfigError("--resume takes everything from the run's config.yaml: give nothing else but --json")
        from vlprompt.training.run import saved_config

        _train(saved_config(resume), resume, json_output, resume=True)
        return
    if method is None or data is None:
        raise ConfigError("missing METHOD and DATA (or --resume RUN)")
    overrides = dict(parse_override(s) for s in settings or [])
    overrides |= {k: v for k, v in given.items() if v is not None}
    merged = build_config(method, preset, read_config(config) if config else None, overrides)
    if dry_run:
        print(json.dumps(merged.to_dict()) if json_output else merged.to_yaml(), end="\n" if json_output else "")
        return
    name = Path(data).resolve().name.removesuffix(".csv")  # of "." too
    _train(merged, out or Path("runs") / f"{name}-{method}-seed{merged.seed}", json_output)


@app.command(epilog="Example: vlprompt evaluate runs/x caltech101 --root data --classes novel")
def evaluate(
    run: RunFolder,
    data: Data,
    root: Root = None,
    classes: WhichClasses = Classes.all,
    split: Annotated[Part, typer.Option(help="Which images.", rich_help_panel=DATA)] = Part.test,
    split_file: SplitFile = None,
    skip_bad: SkipBad = False,
    backbone: OtherBackbone = None,
    device: Device = "cpu",
    precision: Precision = "fp32",
    json_output: Json = False,
) -> None:
    """Measure a tuned model's accuracy and calibration on a data set's images and class names."""
    from vlprompt.data.datasets import load_dataset
    from vlprompt.data.reading import CACHE_BYTES, ImageReader, readable
    from vlprompt.training.evaluate import EvaluationImages
    from vlprompt.training.evaluate import evaluate as evaluate_method

    dataset = load_dataset(data, root, split_file)
    chosen = dataset.split.subset(classes.value)  # type: ignore[arg-type]
    items, paths = chosen.items(split.value), chosen.paths(split.value)
    if not items:
        raise DataError(f"data set '{dataset.name}' has no {split.value} images")
    if note := dataset.gap(split.value, classes.value):  # type: ignore[arg-type]
        say(note)
    method = _load(run, backbone, device, precision)
    with ImageReader(room=CACHE_BYTES if skip_bad else 0) as reader:
        kept = readable(paths, reader, skip_bad, say)
        images = EvaluationImages([paths[i] for i in kept], [items[i].label for i in kept], reader=reader)
        method.take_template(dataset.template)
        result = evaluate_method(method, images, chosen.class_names)
    if json_output:
        print(json.dumps({**result.to_dict(), "skipped": len(paths) - len(kept)}))
        return
    for name, accuracy in sorted(result.per_class.items(), key=lambda x: x[1]):
        print(f"{accuracy:6.1f} %  {name}")
    print(
        f"accuracy {result.accuracy:.2f} % on {result.n} {split.value} images of {len(result.classes)} classes "
        f"({classes.value}); calibration error {result.calibration_error:.3f}"
    )


@app.command(epilog='Example: vlprompt predict runs/x photo.jpg more/ --class-names "cat,dog,horse" --top 3')
def predict(
    run: RunFolder,
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    class_names: ClassNames = None,
    class_names_file: ClassNamesFile = None,
    skip_bad: SkipBad = False,
    top: Annotated[int, typer.Option(help="Classes shown for each image.", min=1, rich_help_panel=OUTPUT)] = 5,
    backbone: OtherBackbone = None,
    device: Device = "cpu",
    precision: Precision = "fp32",
    json_output: Json = False,
    csv: Annotated[
        bool, typer.Option("--csv", help="Print image,class,probability rows.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Classify images with a tuned model, under its own class names or any others."""
    from vlprompt.data.reading import CACHE_BYTES, ImageReader, readable
    from vlprompt.predict import find_images, predict_images, read_class_names, show

    if json_output and csv:
        raise ConfigError("--json and --csv exclude each other")
    paths = find_images(images)
    method = _load(run, backbone, device, precision)
    names = read_class_names(class_names, class_names_file) or method.class_names
    with ImageReader(room=CACHE_BYTES if skip_bad else 0) as reader:
        kept = [paths[i] for i in readable(paths, reader, skip_bad, say)]
        predictions = predict_images(method, kept, names, top, reader)
    result = {"predictions": predictions, "skipped": len(paths) - len(kept)}
    print(json.dumps(result) if json_output else show(predictions, csv))


@app.command(epilog='Example: vlprompt export runs/x --class-names "cat,dog,horse" --out pets.safetensors')
def export(
    run: RunFolder,
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.", rich_help_panel=OUTPUT)],
    class_names: ClassNames = None,
    class_names_file: ClassNamesFile = None,
    backbone: OtherBackbone = None,
) -> None:
    """Write class features and scale for use without vlprompt; for methods that leave the image tower alone."""
    from vlprompt.predict import read_class_names
    from vlprompt.training.export import export_classes

    method = _load(run, backbone, "cpu", "fp32")
    names = read_class_names(class_names, class_names_file) or method.class_names
    export_classes(method, names, out)
    say(f"{len(names)} classes of {method.name} on {method.backbone.name} written to {out}")


@app.command(epilog="Example: vlprompt explain runs/x photo.jpg --out photo.png")
def explain(
    run: RunFolder,
    image: Annotated[Path, typer.Argument(help="An image file.")],
    out: Annotated[Path, typer.Option(help="The .png file to write.", rich_help_panel=OUTPUT)],
    seed: Annotated[
        int, typer.Option(help="Decides the draw that is shown.", min=0, max=2**63 - 1, rich_help_panel=OUTPUT)
    ] = 0,
    backbone: OtherBackbone = None,
    device: Device = "cpu",
    precision: Precision = "fp32",
    json_output: Json = False,
) -> None:
    """Draw which parts of an image matter to a model of drople, and what its token dropout would hit."""
    from vlprompt.explain import explain as explain_image
    from vlprompt.explain import write_explanation

    explanation = explain_image(_load(run, backbone, device, precision), image, seed)
    write_explanation(explanation, out, image.name, seed)
    if json_output:
        print(json.dumps(explanation.to_dict()))
    say(f"{len(explanation.blocks)} blocks of {image} drawn in {out}")


app.command(epilog="Example: vlprompt bench base-to-novel --methods coop,maple --data dtd --root data --out runs/b2n")(
    bench
)
app.command(epilog="Example: vlprompt report runs/b2n --reference coop")(report)


@app.command(epilog="Example: vlprompt convert pytorch_model.bin clip/model.safetensors")
def convert(
    file: Annotated[Path, typer.Argument(help="A .bin or .pt state dict.")],
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
) -> None:
    """Turn an old checkpoint into safetensors, without running code that it may hold."""
    from vlprompt.backbones.convert import convert as convert_file

    say(f"{convert_file(file, out)} tensors written to {out}")


def _train(config: RunConfig, out: Path, json_output: bool, resume: bool = False) -> None:
    from vlprompt.progress import Bar
    from vlprompt.training.run import train as train_run

    with Bar() as bar:
        _, result = train_run(config, out, bar, say, resume=resume)
    if not _first():
        return
    if json_output:
        print(json.dumps(vars(result)))
        return
    val = "" if result.val_accuracy is None else f", val {result.val_accuracy:.1f} %"
    say(f"train {result.train_accuracy:.1f} %{val} in {result.seconds:.0f} s; saved in {result.run}")


def _first() -> bool:
    """Whether this process prints: the first of those that train together."""
    return os.environ.get("RANK", "0") == "0"


def _load(run: Path, backbone: str | None, device: str, precision: str) -> Method:
    from vlprompt.training.artefact import load_artefact

    return load_artefact(run, backbone, device, precision)
