"""``vlprompt train``: command only, no logic."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vlprompt.cli.options import (
    AllowFewer,
    ConfigFile,
    Descriptions,
    DryRun,
    Epochs,
    Json,
    MethodName,
    Out,
    Preset,
    ReportTo,
    Resume,
    Root,
    Seed,
    Select,
    Settings,
    Shots,
    SkipBad,
    SplitFile,
    TeacherBackbone,
    TrainBackbone,
    TrainBank,
    TrainClasses,
    TrainClassNamesFile,
    TrainData,
    TrainDevice,
    TrainPrecision,
    TrainPrior,
    TrainViews,
    ValEvery,
    ValFraction,
    WarmStart,
    first_process,
    say,
)
from vlprompt.errors import ConfigError

if TYPE_CHECKING:
    from vlprompt.config.schema import RunConfig

train_app = typer.Typer()


@train_app.command(
    epilog="Example: vlprompt train coop caltech101 --root data --shots 16 --classes base n_ctx=4 lr=0.001"
)
def train(
    method: MethodName = None,
    data: TrainData = None,
    settings: Settings = None,
    root: Root = None,
    shots: Shots = None,
    allow_fewer: AllowFewer = False,
    classes: TrainClasses = None,
    split_file: SplitFile = None,
    class_names_file: TrainClassNamesFile = None,
    descriptions: Descriptions = None,
    prior: TrainPrior = None,
    val_fraction: ValFraction = None,
    skip_bad: SkipBad = False,
    bank: TrainBank = None,
    views: TrainViews = None,
    backbone: TrainBackbone = None,
    teacher: TeacherBackbone = None,
    device: TrainDevice = None,
    precision: TrainPrecision = None,
    seed: Seed = None,
    epochs: Epochs = None,
    preset: Preset = None,
    select: Select = None,
    val_every: ValEvery = None,
    warm_start: WarmStart = None,
    config: ConfigFile = None,
    resume: Resume = None,
    report_to: ReportTo = None,
    out: Out = None,
    dry_run: DryRun = False,
    json_output: Json = False,
) -> None:
    """Tune prompts on images and save a folder that predicts elsewhere.

    Settings, each overriding those before it: defaults, the method's official ones, --preset, --config, options and
    KEY=VALUE.

    Every epoch is saved: `vlprompt train --resume RUN` resumes a stopped run. Started by `torchrun --nproc-per-node N
    -m vlprompt train …` or `accelerate launch`, N processes share each batch.
    """
    from vlprompt.config.schema import agreed, build_config, parse_override, read_config

    given = {
        "data.name": data,
        "data.root": root and str(root),
        "data.split_file": split_file and str(split_file),
        "data.class_names_file": class_names_file and str(class_names_file),
        "data.descriptions": descriptions and str(descriptions),
        "data.prior": prior and str(prior),
        "data.val_fraction": val_fraction,
        "data.allow_fewer": allow_fewer or None,
        "data.skip_bad": skip_bad or None,
        "data.shots": shots,
        "data.classes": classes,
        "data.bank": bank and str(bank),
        "data.views": views,
        "backbone": backbone,
        "teacher.backbone": teacher,
        "train.device": device,
        "train.precision": precision,
        "seed": seed,
        "train.epochs": epochs,
        "train.select": select,
        "train.val_every": val_every,
        "train.warm_start": warm_start,
        "train.report_to": report_to,
    }
    if resume is not None:
        from dataclasses import replace

        from vlprompt.training.run import saved_config

        # Where the data has moved: the first word is DATA then, as the run has its method.
        moved: dict[str, Any] = {
            "name": method,
            "root": given.pop("data.root"),
            "split_file": given.pop("data.split_file"),
        }
        others = [*(given | {"preset": preset, "config": config, "out": out}).values(), settings]
        strange = method is not None and not Path(method).expanduser().exists()
        if dry_run or strange or any(value is not None for value in others if value != []):
            raise ConfigError("--resume takes everything from the run's config.yaml: give nothing else but --json")
        saved = saved_config(resume)
        now = replace(saved.data, **{key: place for key, place in moved.items() if place is not None})
        _train(replace(saved, data=now), resume, json_output, resume=True)
        return
    if method is None or data is None:
        raise ConfigError("missing METHOD and DATA (or --resume RUN)")
    overrides = agreed(
        method, dict(parse_override(s) for s in settings or []), {k: v for k, v in given.items() if v is not None}
    )
    merged = build_config(method, preset, read_config(config) if config else None, overrides)
    if dry_run:
        print(json.dumps(merged.to_dict()) if json_output else merged.to_yaml(), end="\n" if json_output else "")
        return
    name = os.path.basename(os.path.realpath(data)).removesuffix(".csv")  # of "." too
    _train(merged, out or Path("runs") / f"{name}-{method}-seed{merged.seed}", json_output)


def _train(config: RunConfig, out: Path, json_output: bool, resume: bool = False) -> None:
    from vlprompt.cli.progress import Bar
    from vlprompt.training.run import train as train_run

    _, result = train_run(config, out, [Bar()], say, resume=resume)
    if not first_process():
        return
    if json_output:
        print(json.dumps(vars(result)))
        return
    val = "" if result.val_accuracy is None else f", val {result.val_accuracy:.1f} %"
    on_train = "trained without labels" if result.train_accuracy is None else f"train {result.train_accuracy:.1f} %"
    say(f"{on_train}{val} in {result.seconds:.0f} s; saved in {result.run}")
