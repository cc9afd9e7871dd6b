"""Class-incremental, robustness and unlabelled: what is trained, what the figures are, and who is refused."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.kit import TINY
from tests.kit.marks import slow, sweep
from tests.kit.pictures import make_pictures, paint
from vlprompt.api import PromptedModel
from vlprompt.artefact.artefact import load_artefact
from vlprompt.backbones.backbone import Backbone
from vlprompt.bench import runs as runs_module
from vlprompt.bench.figures import read_figures
from vlprompt.bench.protocols import Asked, Measurement, Run, attack_of, plan, seen
from vlprompt.bench.report.report import markdown, read_sections
from vlprompt.bench.report.tables import studies, tables
from vlprompt.bench.results import Row, read_results
from vlprompt.bench.stages import stages, why_not_attacked
from vlprompt.data.datasets import load_dataset
from vlprompt.data.splits import Item, Split
from vlprompt.errors import DataError
from vlprompt.methods import METHODS, Can
from vlprompt.methods.heads.common import Searched
from vlprompt.training.attack import Attack
from vlprompt.training.run import saved_config, train
from vlprompt.training.watchers import EachEpoch, EpochLog

QUICK = ("--backbone", str(TINY), "warmup_epochs=0", "data.workers=0", "data.batch_size=2")


COLOURS = {
    "blue": (30, 30, 220), "green": (30, 200, 30), "red": (220, 30, 30),
    "white": (230, 230, 230), "black": (25, 25, 25), "yellow": (220, 220, 30),
}  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """4 training and 2 test pictures of six classes."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    for c, (name, colour) in enumerate(COLOURS.items()):
        for part, n in (("train", 4), ("test", 2)):
            for i in range(n):
                paint(folder / part / name / f"{i}.png", colour, seed=100 * c + 10 * n + i)
    return folder


@pytest.fixture
def bench(vlprompt, tmp_path: Path):
    """The command with quick settings and one seed, into tmp_path/out."""

    def run(protocol: str, *given: object, seeds: str = "1", out: Path = tmp_path / "out") -> tuple[int, str, str]:
        return vlprompt("bench", protocol, *given, "--seeds", seeds, "--shots", "2", *QUICK, "--out", out)

    return run


def accuracies(out: Path, name: str, seed: int = 1) -> dict[str, float | None]:
    rows = read_results(out / "results.csv")
    return {r.classes: r.accuracy for r in rows if (r.name, r.seed) == (name, seed)}


# --- classes in tasks -----------------------------------------------------------------------------


def test_tasks_part_the_classes_in_an_order_by_the_seed() -> None:
    names = tuple("abcdefg")
    split = Split(Path(), names, tuple(Item(f"{n}/{i}", c) for c, n in enumerate(names) for i in range(2)))
    orders = set()
    for seed in (1, 2, 3):
        tasks = [split.of_task(f"{t}/3", seed) for t in (1, 2, 3)]
        arrived = [name for task in tasks for name in task.class_names]
        assert [len(task.class_names) for task in tasks] == [2, 2, 3]
        assert sorted(arrived) == list(names)
        orders.add(tuple(arrived))
        for t in (1, 2, 3):
            known = split.of_task(f"{t}/3", seed, seen=True)
            assert list(known.class_names) == arrived[: len(known.class_names)]
            assert all(item.path.startswith(known.class_names[item.label]) for item in known.train)
            assert len(known.train) == 2 * len(known.class_names)
    assert len(orders) == 3
    shuffled = Split(Path(), names[::-1], tuple(Item(i.path, 6 - i.label) for i in split.train))
    assert shuffled.of_task("1/3", 1).class_names == split.of_task("1/3", 1).class_names
    with pytest.raises(DataError, match=r"^8 tasks of 7 classes: each needs one at least \(allowed: 2 to 7\)$"):
        split.of_task("1/8", 1)


def test_a_plan_of_tasks() -> None:
    (run,) = plan(Asked("class-incremental", {"coop": ("coop", {})}, ["x"], [3], tasks=4))
    assert run.folder == Path("class-incremental/x/coop/mini/shots_16/seed_3")
    assert (run.config.data.task, run.config.options.init) == ("1/4", "a photo of a")
    assert [m.classes for m in run.measurements] == [f"seen-{t}-of-4" for t in (1, 2, 3, 4)]
    assert Run.from_json(run.to_json()) == run
    parts = stages(run, Path("/out"))
    assert [(s.folder.name, s.config.data.task) for s in parts] == [(f"task_{t}", f"{t}/4") for t in (1, 2, 3, 4)]
    (run,) = plan(Asked("class-incremental", {"coop": ("coop", {})}, ["x"], [3]))
    assert run.config.data.task == "1/5"
    (run,) = plan(Asked("class-incremental", {"tip_adapter": ("tip_adapter", {})}, ["x"], [3]))
    assert run.name == "tip_adapter-memory"
    (run,) = plan(Asked("few-shot", {"tip_adapter": ("tip_adapter", {})}, ["x"], [3], [1]))
    assert (run.name, run.config.data.task) == ("tip_adapter", None)


def test_classes_in_tasks_from_end_to_end(bench, photos: Path, tmp_path: Path) -> None:
    given = ["--methods", "zero_shot,coop,task_res,tip_adapter", "--data", photos, "--tasks", "3", "epochs=1"]
    code, out, err = bench("class-incremental", *given)
    assert (code, out) == (0, ""), err
    out = tmp_path / "out"
    dataset = load_dataset(str(photos))
    order = dataset.split.of_task("3/3", 1, seen=True).class_names
    run = out / "class-incremental" / "photos" / "coop" / "backbone" / "shots_2" / "seed_1"
    for t in (1, 2, 3):
        config = saved_config(run / f"task_{t}")
        assert config.data.task == f"{t}/3"
        assert config.train.warm_start == (str(run / f"task_{t - 1}") if t > 1 else None)
        content = json.loads((run / f"task_{t}" / "split.json").read_text())
        assert {row[2] for row in content["train"]} == set(order[2 * t - 2 : 2 * t])
        assert len(content["train"]) == 4  # two of each class, none of earlier tasks
        (measured,) = (
            m for m in json.loads((run / "figures.json").read_text())["measured"] if f"seen-{t}-" in m["classes"]
        )
        assert tuple(measured["class_names"]) == order[: 2 * t]
        assert measured["n"] == 4 * t
        model = PromptedModel.from_pretrained(run / f"task_{t}")
        items = dataset.split.of_task(f"{t}/3", 1, seen=True)
        named = model.predict(items.paths("test"), class_names=order[: 2 * t]).names
        right = sum(name == order[label] for name, label in zip(named, items.labels("test"), strict=True))
        assert measured["accuracy"] == pytest.approx(100 * right / (4 * t))
    first, second = (load_file(run / f"task_{t}" / "prompts.safetensors")["context.vectors"] for t in (1, 2))
    assert not torch.equal(first, second)
    (section,) = read_sections(out)
    (table,) = section.tables
    assert table.head == ("last", "average", "average − zero_shot", "train, s")
    assert list(table.lines) == ["zero_shot", "coop", "task_res", "tip_adapter-memory"]
    for name, (last, average, *_) in table.lines.items():
        own = accuracies(out, name)
        assert last.mean == own["seen-3-of-3"]
        assert average.mean == pytest.approx(statistics.mean(own.values()))
    text = markdown([section])
    assert "## class-incremental, backbone, 2 shots, 3 tasks" in text
    assert f"photos, seed 1: {' | '.join(', '.join(order[i : i + 2]) for i in (0, 2, 4))}." in text


def test_prompts_of_a_task_are_those_of_a_run_that_goes_on_from_the_one_before(bench, photos: Path, tmp_path) -> None:
    """The bench's chain by hand: bit by bit the same prompts."""
    assert bench("class-incremental", "--methods", "coop", "--data", photos, "--tasks", "2", "epochs=1")[0] == 0
    run = tmp_path / "out" / "class-incremental" / "photos" / "coop" / "backbone" / "shots_2" / "seed_1"
    config = saved_config(run / "task_2")
    train(config, tmp_path / "by hand")
    both = (
        load_file(folder / "prompts.safetensors")["context.vectors"]
        for folder in (run / "task_2", tmp_path / "by hand")
    )
    assert torch.equal(*both)


def test_rows_of_earlier_tasks_stay_as_they_were_fitted(bench, photos: Path, tmp_path: Path) -> None:
    """SS-Text's weights of a class read its own images alone: in tasks they are those of all classes at once."""
    assert bench("class-incremental", "--methods", "ss_text", "--data", photos, "--tasks", "3")[0] == 0
    assert bench("few-shot", "--methods", "ss_text", "--data", photos)[0] == 0
    whole = accuracies(tmp_path / "out", "ss_text")
    assert whole["seen-3-of-3"] == whole["all"]
    (row,) = (r for r in read_results(tmp_path / "out" / "results.csv") if r.classes == "seen-3-of-3")
    assert row.images == 12


def test_caches_of_earlier_tasks_vote_with_one_weight(bench, photos: Path, tmp_path: Path) -> None:
    """With α and β given, keys of all tasks side by side are the cache of all classes at once."""
    given = ["--methods", "tip_adapter", "--data", photos, "method.search=false", "views=center"]
    assert bench("class-incremental", *given, "--tasks", "2")[0] == 0
    assert bench("few-shot", *given)[0] == 0
    by = {r.classes: r for r in read_results(tmp_path / "out" / "results.csv")}
    assert (by["seen-2-of-2"].name, by["all"].name) == ("tip_adapter-memory", "tip_adapter")
    assert by["seen-2-of-2"].accuracy == by["all"].accuracy
    assert by["seen-2-of-2"].calibration_error == pytest.approx(by["all"].calibration_error, abs=1e-6)


@pytest.mark.parametrize("covariance", ["shrunk", "mean"])
def test_means_and_scatter_of_tasks_add_up(bench, photos: Path, tmp_path: Path, covariance: str) -> None:
    """With α given, gda's tasks side by side are gda of all classes at once, and no task keeps a sample."""
    given = ["--methods", "gda", "--data", photos, "alpha=0.5", f"covariance={covariance}", "views=center"]
    assert bench("class-incremental", *given, "--tasks", "3")[0] == 0
    assert bench("few-shot", *given)[0] == 0
    by = {r.classes: r for r in read_results(tmp_path / "out" / "results.csv")}
    assert by["seen-3-of-3"].name == "gda"
    assert by["seen-3-of-3"].accuracy == by["all"].accuracy
    assert by["seen-3-of-3"].calibration_error == pytest.approx(by["all"].calibration_error, abs=1e-5)
    run = tmp_path / "out" / "class-incremental" / "photos" / "gda" / "backbone" / "shots_2" / "seed_1"
    kept = load_file(run / "task_2" / "prompts.safetensors")
    assert {name: len(kept[name]) for name in ("support", "mu", "n")} == {"support": 0, "mu": 2, "n": 1}
    model = PromptedModel.from_pretrained(run / "task_2")
    before = read_figures(run)
    (run / "figures.json").unlink()
    assert bench("class-incremental", *given, "--tasks", "3", "--skip-existing")[0] == 0
    for a, b in zip(before["measured"], read_figures(run)["measured"], strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    with pytest.raises(DataError, match=r"^gda knows its own 2 classes alone"):
        model.predict([photos / "test" / "red" / "0.png"], ["pink", "grey"])


@pytest.mark.parametrize(("name", "options", "points"), [("gda", (), 7), ("tip_adapter", ("steps_beta=3",), 60)])
def test_what_weighs_all_classes_is_chosen_on_all_tasks(
    bench, photos: Path, tmp_path: Path, name: str, options: tuple[str, ...], points: int
) -> None:
    """Not by the first task alone, where all points may be equally good; a task whose images cannot say has no say."""
    given = ["--methods", name, "--data", photos, "--tasks", "3", "views=center", *options]
    assert bench("class-incremental", *given)[0] == 0
    row = name + "-memory" * (name == "tip_adapter")
    run = tmp_path / "out" / "class-incremental" / "photos" / row / "backbone" / "shots_2" / "seed_1"
    heads = [load_artefact(run / f"task_{t}") for t in (1, 2, 3)]
    assert all(isinstance(head, Searched) and len(head.right) == points for head in heads)
    tied, decides = torch.full((points,), 4), torch.arange(points) % 5
    heads[0].right, heads[1].right, heads[2].right = tied, None, decides
    for head in heads:
        head.in_tasks = True  # as those are that a bench has just trained
    for head in heads:
        head.join(heads)
    assert torch.equal(heads[0].right, tied), "a second task would count the first one twice"
    assert heads[1].right is None
    expected = heads[0].points()[4]  # the first of those that five points apart are as good
    assert [head.alpha.item() for head in heads] == pytest.approx([expected[-1]] * 3)
    if name == "tip_adapter":
        assert [head.beta.item() for head in heads] == pytest.approx([expected[0]] * 3)


class StoppedError(BaseException):
    """What stands for a kill."""


@pytest.mark.parametrize("method", sweep(["coop", "task_res", "promptkd"], "task_res"))
def test_a_stopped_bench_of_tasks_goes_on_to_the_same_table(
    bench, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    given = ["--methods", method, "--data", photos, "--tasks", "3", "epochs=2"]
    given += ["--teacher", TINY, "setting=inductive"] if method == "promptkd" else []
    assert bench("class-incremental", *given, out=tmp_path / "whole")[0] == 0
    original, calls = runs_module.train, 0

    def killed(config, folder, *more, **how):
        nonlocal calls
        calls += 1
        if calls == 2:  # in the second task, behind its first epoch

            def kill(log: EpochLog) -> None:
                raise StoppedError

            return original(config, folder, [EachEpoch(kill)], **how)
        return original(config, folder, *more, **how)

    with monkeypatch.context() as patch:
        patch.setattr(runs_module, "train", killed)
        with pytest.raises(StoppedError):
            bench("class-incremental", *given)
    out = tmp_path / "out"
    moved = out.rename(tmp_path / "moved")
    code, _, err = bench("class-incremental", *given, "--skip-existing", out=moved)
    assert code == 0, err
    assert accuracies(moved, method) == accuracies(tmp_path / "whole", method)
    place = Path(
        "class-incremental", "photos", method, "backbone", "shots_2", "seed_1", "task_3", "prompts.safetensors"
    )
    whole, again = load_file(tmp_path / "whole" / place), load_file(moved / place)
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    code, _, err = bench("class-incremental", *given, "--skip-existing", out=moved)
    assert (code, "0 runs done, 1 kept" in err) == (0, True)


def test_another_number_of_tasks_in_a_folder_is_refused(bench, photos: Path) -> None:
    given = ["--methods", "zero_shot", "--data", photos]
    assert bench("class-incremental", *given, "--tasks", "2")[0] == 0
    code, _, err = bench("class-incremental", *given, "--tasks", "3", "--skip-existing")
    assert code == 2
    assert "holds results from other settings (data.task = 1/2, now 1/3)" in err


def test_a_task_of_one_class_is_told(bench, photos: Path) -> None:
    code, _, err = bench("class-incremental", "--methods", "zero_shot", "--data", photos, "--tasks", "4")
    assert code == 0
    assert "note: 6 classes of photos for 4 tasks: a task of one class has nothing to tell it from" in err


# --- attacked and unlabelled ----------------------------------------------------------------------


def test_robustness_measures_clean_and_attacked(bench, vlprompt, photos: Path, tmp_path: Path) -> None:
    given = ["--methods", "zero_shot,linear_probe,vpt", "--data", photos, "epochs=1"]
    assert bench("robustness", *given, "--eps", "8/255", "--steps", "3")[0] == 0
    out = tmp_path / "out"
    run = out / "robustness" / "photos" / "vpt" / "backbone" / "shots_2" / "seed_1"
    attack = ["--attack", "pgd", "--eps", "8/255", "--attack-steps", "3"]
    _, printed, _ = vlprompt("evaluate", run, photos, *attack, "--json")
    own, expected = accuracies(out, "vpt"), json.loads(printed)
    assert own == {"all": expected["accuracy"], "pgd-8/255-3": expected["robust_accuracy"]}
    assert all(r.images == 12 for r in read_results(out / "results.csv"))
    before = (run / "prompts.safetensors").stat().st_mtime_ns
    assert bench("robustness", *given, "--eps", "0.5", "--steps", "3", "--skip-existing")[0] == 0
    assert (run / "prompts.safetensors").stat().st_mtime_ns == before
    (section,) = read_sections(out)
    head = ("clean", "pgd within 8/255, 3 steps", "pgd within 1/2, 3 steps")
    assert section.tables[0].head[:3] == head
    assert not any(str(cell) == "missing" for line in section.tables[0].lines.values() for cell in line)
    for _, (clean, small, large, *_) in section.tables[0].lines.items():
        assert clean.mean >= small.mean >= large.mean


def test_what_is_measured_is_in_its_name() -> None:
    (run,) = plan(Asked("robustness", {"coop": ("coop", {})}, ["x"], [1], eps=" 0.25 ", steps=7))
    assert [m.classes for m in run.measurements] == ["all", "pgd-1/4-7"]
    assert attack_of("pgd-1/4-7") == Attack("pgd", 0.25, 7)
    (run,) = plan(Asked("robustness", {"coop": ("coop", {})}, ["x"], [1]))
    assert attack_of(run.measurements[1].classes) == Attack()
    assert (seen("seen-2-of-5"), seen("all"), attack_of("all"), attack_of("pgd-0-3x")) == ((2, 5), None, None, None)
    assert not any(map(seen, ("seen-0-of-2", "seen-3-of-2", "seen-1-of-1")))
    assert not any(map(attack_of, ("pgd-0-1", "pgd-1/0-1", "pgd-1/2-0", "pgd-2-1")))
    names = [str(attack_of(f"pgd-{eps}-1")) for eps in ("1/255", "1/100", "1/30000", "1/50000")]
    assert names[:2] == ["pgd within 1/255, 1 steps", "pgd within 1/100, 1 steps"]
    assert len(set(names)) == 4, "each has a column of its own"
    assert Measurement("x", "seen-1-of-2", "test").half == Measurement("x", "pgd-1/255-3", "test").half == "all"


def test_unlabelled_images(bench, photos: Path, tmp_path: Path) -> None:
    teacher = ["--teacher", str(TINY)]
    rows = tmp_path / "rows.yaml"
    rows.write_text(
        f"rows:\n  zero_shot: {{method: zero_shot}}\n  pouf: {{method: pouf}}\n  kdpl_coop: {{method: kdpl_coop}}\n"
        f"  promptkd: {{method: promptkd}}\n  taught: {{method: coop, teacher.backbone: '{TINY}'}}\n"
    )
    code, _, err = bench("unlabelled", "--rows", rows, *teacher, "--data", photos, "epochs=1")
    assert code == 0, err
    (section,) = read_sections(tmp_path / "out")
    assert section.tables[0].head[0] == "accuracy"
    assert list(section.tables[0].lines) == ["zero_shot", "pouf", "kdpl_coop", "promptkd-transductive", "taught"]
    assert {(r.classes, r.images) for r in read_results(tmp_path / "out" / "results.csv")} == {("all", 12)}


# --- refused --------------------------------------------------------------------------------------

REFUSED = {
    "class-incremental --tasks 1 --methods coop": "--tasks 1 (allowed: 2 or more, up to the number of classes)",
    "class-incremental --tasks 0 --methods coop": "--tasks 0 (allowed: 2 or more",
    "class-incremental --tasks -3 --methods coop": "--tasks -3 (allowed: 2 or more",
    "class-incremental --tasks 7 --methods coop": "7 tasks of 6 classes: each needs one at least (allowed: 2 to 6)",
    "class-incremental --tasks 2 --methods coop task=2/3": "data.task = 2/3: the protocol and what is asked of bench",
    "class-incremental --tasks 2 --methods coop --eps 1/255": "--eps 1/255: it is of robustness, not of class-inc",
    "few-shot --tasks 2 --methods coop": "--tasks 2: it is of class-incremental, not of few-shot",
    "few-shot --methods coop task=1/2": "data.task = 1/2: the protocol and what is asked of bench decide it (None)",
    "class-incremental --tasks 2 --methods coop class_specific=true": "'coop' learns pieces of each class that it does",
    "class-incremental --tasks 2 --methods pouf learn=head": "method 'pouf' learns pieces of each class",
    "class-incremental --tasks 2 --methods promptkd --teacher T": "'promptkd' learns from images of all classes",
    "class-incremental --tasks 2 --methods coop --shots 9": "too few for 9 shots",
    "robustness --methods coop --eps 0": "--eps 0 (allowed: a number above 0, at most 1, as 0.01 or 1/255)",
    "robustness --methods coop --eps 8": "--eps 8 (allowed: a number above 0, at most 1",
    "robustness --methods coop --eps x": "--eps x (allowed: a number above 0",
    "robustness --methods coop --eps 1/0": "--eps 1/0 (allowed: a number above 0",
    "robustness --methods coop --steps 0": "--steps 0 (allowed: 1 or more)",
    "robustness --methods coop --steps 3 --tasks 2": "--tasks 2: it is of class-incremental, not of robustness",
    "unlabelled --methods coop": "row 'coop': method 'coop' learns from labels (allowed: one that reads none, or a te",
    "unlabelled --methods linear_probe": "method 'linear_probe' fits on labels (allowed: one that reads none)",
    "unlabelled --methods tip_adapter_f": "method 'tip_adapter_f' learns from labels",
    "unlabelled --methods pouf select=val": "train.select = val: the protocol and what is asked of bench decide it",
    "unlabelled --methods kdpl_coop": "teacher.backbone is not given: method 'kdpl_coop' learns from a teacher",
}


@pytest.mark.parametrize("given", REFUSED)
def test_what_cannot_be_asked_is_refused_in_a_line(vlprompt, photos: Path, tmp_path: Path, given: str) -> None:
    words = [str(TINY) if word == "T" else word for word in given.split()]
    shots = [] if "--shots" in words else ["--shots", "2"]
    code, out, err = vlprompt(
        "bench", *words, "--data", photos, "--seeds", "1", *shots, *QUICK, "--out", tmp_path / "out"
    )
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert REFUSED[given] in line
    assert not (tmp_path / "out").exists()


def test_methods_of_ones_own_that_cannot_be_asked_are_refused(bench, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "named.py").write_text(
        "import torch\nfrom vlprompt.methods import register\nfrom vlprompt.methods.coop import CoOp\n\n\n"
        '@register("named")\nclass Named(CoOp):\n    """Keeps a number of each class, and does not say so."""\n\n'
        "    def build(self):\n        super().build()\n"
        "        self.weight = torch.nn.Parameter(torch.zeros(len(self.class_names)))\n"
    )
    (tmp_path / "deaf.py").write_text(
        "import torch\nfrom vlprompt.methods import register\nfrom vlprompt.methods.zero_shot import ZeroShot\n\n\n"
        '@register("deaf")\nclass Deaf(ZeroShot):\n    """Says nothing of where its features come from."""\n\n'
        "    def encode_images(self, images):\n        return super().encode_images(images).detach()\n"
    )
    before = dict(METHODS)
    code, _, err = bench("robustness", "--methods", tmp_path / "deaf.py", "--data", photos)
    named = bench("class-incremental", "--methods", tmp_path / "named.py", "--data", photos, "--tasks", "2")
    METHODS.clear()
    METHODS.update(before)
    assert code == 2
    assert "row 'deaf': method 'deaf' has logits without a gradient by the image's pixels" in err
    assert named[0] == 2
    assert "method 'named' learns 'weight' for each of its classes: the next task has other classes" in named[2]


def test_data_with_too_few_classes_is_refused(vlprompt, tmp_path: Path) -> None:
    photos = make_pictures(tmp_path / "three", held_out="test")
    given = ("--methods", "coop", "--data", photos, "--seeds", "1", "--shots", "2", *QUICK, "--out", tmp_path / "out")
    code, _, err = vlprompt("bench", "class-incremental", *given)
    assert (code, "5 tasks of 3 classes: each needs one at least (allowed: 2 to 3)" in err) == (2, True)


def test_methods_that_keep_rows_say_so() -> None:
    """Prompts and adapters serve new classes; heads with a row for each class answer side by side."""
    joined = {name for name, cls in METHODS.items() if Can.JOIN_CLASSES in cls.Config().can}
    assert joined == {
        "linear_probe", "task_res", "clap", "zs_lp", "lp_plus_plus", "ss_text", "ss_text_plus", "tip_adapter",
        "tip_adapter_f", "gda",
    }  # fmt: skip


@slow
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_is_asked_in_tasks_or_refused_by_name(bench, photos: Path, name: str) -> None:
    """What may begin runs to the end."""
    given = ["--methods", name, "--data", photos, "--tasks", "2"]
    given += ["--teacher", TINY] if "teacher_probabilities" in METHODS[name].needs else []
    given += ["epochs=1"] if METHODS[name].official.get("train.epochs") else []
    code, _, err = bench("class-incremental", *given)
    refused = f"class-incremental cannot ask row '{name}" in err
    assert (code, refused) == ((2, True) if name == "promptkd" else (0, False)), err


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_can_be_attacked(name: str, tiny: Backbone) -> None:
    assert why_not_attacked(METHODS[name](tiny, ("a", "b"), METHODS[name].Config())) == ""


def test_averages_of_tasks_are_over_the_seeds_that_have_them_all() -> None:
    """And runs of another number of tasks stand in a table of their own."""

    def row(t: int, n: int, seed: int, accuracy: float) -> Row:
        return Row(
            "class-incremental", "dtd", "coop", "coop", "mini", 16, seed, "dtd", f"seen-{t}-of-{n}", "test",
            10, accuracy, 50.0, 0.1, 5, 8, 1.5, 0.1, f"f{n}", "0.1.0+abc",
        )  # fmt: skip

    rows = [row(1, 2, 1, 80), row(2, 2, 1, 60), row(1, 2, 2, 90), row(2, 2, 2, 50), row(1, 2, 3, 70)]
    study, other = studies([*rows, *(replace(row(t, 3, 1, 50), name="maple") for t in (1, 2, 3))])
    assert (study.title, study.tasks, other.tasks) == ("class-incremental, mini, 16 shots, 2 tasks", 2, 3)
    (table,) = tables(study)
    last, average, *_ = table.lines["coop"]
    assert str(last) == "55.00 ± 7.07 (2 of 3 seeds)"
    assert str(average) == "70.00 ± 0.00 (2 of 3 seeds)"
