"""``vlprompt bench``: which runs a protocol has, and that a sweep loses nothing whatever happens to it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kit import REPOSITORY, TINY, sealed
from tests.kit.command import environment
from tests.kit.known import build
from tests.kit.marks import slow, sweep
from tests.kit.pictures import CLASSES, make_pictures
from vlprompt.bank.build import build_bank
from vlprompt.bank.config import bank_config
from vlprompt.bench import launch, on_ray
from vlprompt.bench import results as results_module
from vlprompt.bench import runs as runs_module
from vlprompt.bench.bench import LOCK
from vlprompt.bench.figures import group_figures
from vlprompt.bench.launch import COMMAND, Outcome, Process, spread
from vlprompt.bench.protocols import PROTOCOLS, Asked, Run, plan, take_shard
from vlprompt.bench.results import Row, read_results, to_csv
from vlprompt.bench.rows import fingerprint, read_rows
from vlprompt.config.schema import build_config
from vlprompt.data.known.table import DATASETS
from vlprompt.data.reading import CACHE_BYTES
from vlprompt.data.splits import long_tail
from vlprompt.errors import ConfigError, DataError, OutputError
from vlprompt.files import held
from vlprompt.methods import METHODS, Method
from vlprompt.training.evaluate import Evaluation, EvaluationImages, evaluate, predict_logits
from vlprompt.training.run import saved_config

QUICK = ("--backbone", str(TINY), "epochs=1", "warmup_epochs=0", "data.workers=0", "data.batch_size=2")
ABLATIONS = sorted((REPOSITORY / "tools" / "ablations").glob("*.yaml"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """4 training, 2 val and 2 test pictures of three classes."""
    folder = make_pictures(tmp_path_factory.mktemp("data") / "photos")
    for name in CLASSES:
        (folder / "test" / name).mkdir(parents=True)
        for i, file in enumerate(sorted((folder / "val" / name).iterdir())):
            (folder / "test" / name / f"{i}.png").write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def bench(vlprompt, tmp_path: Path):
    """The command with quick settings, into tmp_path/out."""

    def run(protocol: str, *given: object, out: Path = tmp_path / "out") -> tuple[int, str, str]:
        return vlprompt("bench", protocol, *given, *QUICK, "--out", out)

    return run


def asked(protocol: str, methods: str = "coop", data: tuple[str, ...] = ("x",), **more) -> Asked:
    return Asked(protocol, {m: (m, {}) for m in methods.split(",")}, data, **{"seeds": [1], **more})


def measured(run) -> list[tuple[str, str]]:
    return [(m.data, m.classes) for m in run.measurements]


# --- plans ----------------------------------------------------------------------------------------


def test_base_to_novel_trains_on_base_and_measures_both() -> None:
    runs = plan(asked("base-to-novel", "coop,maple", ("dtd", "./some/photos.csv"), seeds=[1, 2]))
    assert len(runs) == 8
    assert runs[0].folder == Path("base-to-novel/dtd/coop/mini/shots_16/seed_1")
    assert runs[-1].folder == Path("base-to-novel/photos/maple/mini/shots_16/seed_2")
    for run in runs:
        assert (run.config.data.classes, run.config.data.shots) == ("base", 16)
        assert measured(run) == [(run.config.data.name, "base"), (run.config.data.name, "novel")]
        assert run.config == build_config(
            run.config.method,
            "base-to-novel" if run.config.method == "coop" else None,
            overrides={"data.name": run.config.data.name, "classes": "base", "shots": 16, "seed": run.config.seed},
        )


def test_few_shot_has_five_numbers_of_shots_and_its_preset() -> None:
    runs = plan(asked("few-shot", "promptsrc,kgcoop"))
    assert [r.config.data.shots for r in runs] == [1, 2, 4, 8, 16] * 2
    assert {r.config.train.epochs for r in runs if r.name == "promptsrc"} == {50}
    assert [r.config.train.epochs for r in plan(asked("few-shot", "coop"))] == [50, 100, 100, 200, 200]
    assert {r.config.train.epochs for r in runs if r.name == "kgcoop"} == {100}  # it has no preset
    assert [r.config.data.shots for r in plan(asked("few-shot", shots=[3]))] == [3]


def test_a_data_set_may_have_a_preset_of_its_own() -> None:
    for name in ("imagenet", "ImageNet"):
        assert {r.config.train.epochs for r in plan(asked("few-shot", data=(name,)))} == {50}
    runs = plan(asked("base-to-novel", "drople", ("imagenet", "dtd")))
    assert [(r.data, r.config.train.epochs) for r in runs] == [("imagenet", 5), ("dtd", 20)]
    (run,) = plan(asked("cross-dataset", "drople", ("imagenet", "dtd")))
    assert run.config.train.epochs == 3


@pytest.mark.parametrize("protocol", ["cross-dataset", "domain-generalization"])
def test_the_first_data_set_is_trained_on_and_all_are_measured(protocol: str) -> None:
    (run,) = plan(asked(protocol, "maple", ("imagenet", "dtd", "Flowers102")))
    assert (run.data, run.config.train.epochs, run.config.options.depth) == ("imagenet", 2, 3)
    assert measured(run) == [("imagenet", "all"), ("dtd", "all"), ("Flowers102", "all")]


def test_domains_of_a_data_set_are_known() -> None:
    (run,) = plan(asked("domain-generalization", data=("ImageNet",)))
    assert [d for d, _ in measured(run)[1:]] == ["imagenet_v2", "imagenet_sketch", "imagenet_a", "imagenet_r"]
    (run,) = plan(asked("domain-generalization", data=("openmoji",)))
    assert len(measured(run)) == 6


def test_a_long_tail() -> None:
    (run,) = plan(asked("long-tail", "drople"))
    assert (run.config.data.shots, run.config.data.imbalance) == (16, 10)
    (run,) = plan(asked("long-tail", "drople", settings={"imbalance": 5}, shots=[8]))
    assert (run.config.data.shots, run.config.data.imbalance) == (8, 5)


def test_groups_are_thirds_of_the_classes_most_frequent_first() -> None:
    assert long_tail(16, 4, 10) == sorted(long_tail(16, 4, 10), reverse=True)
    confusion = [(0, 0, 3), (0, 1, 1), (1, 1, 2), (2, 0, 4), (3, 3, 5)]
    groups = group_figures(confusion, 4)
    assert groups["many"] == {"n": 6, "accuracy": pytest.approx(500 / 6), "macro_accuracy": pytest.approx(87.5)}
    assert groups["medium"]["accuracy"] == 0
    assert groups["few"] == {"n": 5, "accuracy": 100, "macro_accuracy": 100}
    assert "medium" not in group_figures([(0, 0, 1)], 3)


def test_settings_come_from_options_and_rows_in_that_order() -> None:
    rows = {"slow": ("coop", {"lr": 0.5}), "plain": ("coop", {}), "taught": ("kdpl_coop", {})}
    runs = plan(Asked("base-to-novel", rows, ["x"], [1], settings={"lr": 0.1, "backbone": "mini"}, teacher="mini"))
    assert [r.config.optim.lr for r in runs] == [0.5, 0.1, 0.1]
    assert [r.config.teacher.backbone for r in runs] == [None, None, "mini"]
    assert runs[0].folder.parts[2] == "slow"
    with pytest.raises(ConfigError, match=r"teacher.backbone is not given: method 'kdpl_coop' learns from a teacher"):
        plan(Asked("base-to-novel", rows, ["x"], [1]))
    plan(Asked("base-to-novel", rows, ["x"], [1], settings={"data.bank": "a bank of labels"}))


def test_fingerprints_tell_settings_apart_but_not_seeds_and_places() -> None:
    def of(**settings):
        (run,) = plan(asked("base-to-novel", settings={k.replace("__", "."): v for k, v in settings.items()}))
        return fingerprint(run.config)

    assert of() == of(data__root="/elsewhere") == of(data__workers=0)
    assert len({of(), of(lr=1), of(n_ctx=8), of(backbone="y"), of(precision="bf16")}) == 5
    one, two = plan(asked("base-to-novel", seeds=[1, 2]))
    assert fingerprint(one.config) == fingerprint(two.config)


def test_where_files_lie_is_no_setting(tmp_path: Path, monkeypatch) -> None:
    """The same weights, split file or bank elsewhere, or by another way of writing the path."""
    monkeypatch.chdir(tmp_path)

    def of(**settings) -> str:
        given = {"teacher.backbone": "mini"} | {k.replace("__", "."): str(v) for k, v in settings.items()}
        (run,) = plan(Asked("base-to-novel", {"k": ("kdpl_coop", {})}, ["x"], [1], settings=given))
        return fingerprint(run.config)

    for folder in ("one", "two"):
        shutil.copytree(TINY, tmp_path / folder / "clip")
    for key in ("backbone", "teacher__backbone"):
        assert len({of(**{key: p}) for p in ("one/clip", "./one/clip", tmp_path / "two" / "clip")}) == 1, key
        assert of(**{key: "one/clip"}) != of(**{key: "mini"})
    for key in ("split_file", "data__bank"):
        assert of(**{key: "one/file"}) == of(**{key: tmp_path / "two" / "file"}) != of(**{key: "one/other"})


def test_shards_are_disjoint_and_together_all() -> None:
    runs = plan(asked("few-shot", seeds=[1, 2, 3]))
    parts = [take_shard(runs, f"{i}/4") for i in range(1, 5)]
    assert sorted(str(r.folder) for part in parts for r in part) == sorted(str(r.folder) for r in runs)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for bad in ("0/2", "3/2", "1", "a/b", "1/0"):
        with pytest.raises(ConfigError, match="shard = "):
            take_shard(runs, bad)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (asked("base-to-new"), "unknown protocol 'base-to-new': did you mean 'base-to-novel'"),
        (asked("few-shot", "cop"), "unknown method 'cop'"),
        (asked("few-shot", settings={"n_ctz": 1}), "unknown key 'n_ctz'"),
        (asked("few-shot", settings={"shots": 3}), "data.shots = 3: the protocol and what is asked of bench decide it"),
        (asked("few-shot", settings={"classes": "base"}), "data.classes = base: the protocol"),
        (asked("few-shot", seeds=[]), "seeds: there must be at least one"),
        (asked("few-shot", data=("a/x", "b/x")), "two runs would be few-shot/x/coop"),
        (asked("cross-dataset", data=("x", "a/y", "b/y")), "two data sets would be 'y' in the tables"),
        (asked("cross-dataset", data=("dtd", "DTD", "x")), "two data sets would be 'dtd' in the tables"),
        (asked("cross-dataset"), "data: cross-dataset needs the data sets to test on after x"),
        (asked("domain-generalization", data=("dtd",)), "known without: those of imagenet, openmoji"),
        (Asked("few-shot", {"a/b": ("coop", {})}, ["x"], [1]), "row 'a/b' is no name of a folder"),
    ],
)
def test_plans_that_are_refused(given: Asked, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan(given)
    assert message in str(error.value)


ROWS = """
method: dpl
set: {carry: add}
rows:
  exact: {instance_to_prompt: exact}
  of its own: {carry: replace}
  frozen: {method: zero_shot}
"""


def test_rows_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "rows.yaml").write_text(ROWS)
    assert read_rows(tmp_path / "rows.yaml") == {
        "exact": ("dpl", {"carry": "add", "instance_to_prompt": "exact"}),
        "of its own": ("dpl", {"carry": "replace"}),
        "frozen": ("zero_shot", {}),
    }


def test_words_in_rows_are_those_of_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "rows.yaml").write_text("method: fdbpl_coop\nrows:\n  plain: {pcd: off}\n")
    rows = read_rows(tmp_path / "rows.yaml")
    assert rows == {"plain": ("fdbpl_coop", {"pcd": "off"})}
    (run,) = plan(Asked("base-to-novel", rows, ["x"], [1], teacher="mini"))
    assert run.config.options.pcd == "off"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "must hold rows: names with settings"),
        ("method: dpl\nrows: {}", "must hold rows: names with settings"),
        ("method: dpl\nrow: {}\nrows: {a: {}}", "unknown key 'row': did you mean 'rows'"),
        ("rows: {a: {lr: 1}}", "row 'a' names no method"),
        ("rows: {a: coop}", "row 'a' must hold settings"),
        ("rows: {a: {", "cannot read rows from"),
        ("rows: {a: {method: 3}}", "row 'a': method = 3 (allowed: a name)"),
        ("method: [coop]\nrows: {a: {}}", "row 'a': method = ['coop'] (allowed: a name)"),
        ("rows: {a: {method: coop, preset: [1]}}", "row 'a': preset = [1] (allowed: a name)"),
        ("method: coop\nset: {preset: 1}\nrows: {a: {}}", "set: preset = 1 (allowed: a name)"),
        ("method: coop\nset: 3\nrows: {a: {}}", "set = 3 (allowed: settings, {key: value})"),
        ("method: coop\nset: [n_ctx]\nrows: {a: {}}", "set = ['n_ctx'] (allowed: settings, {key: value})"),
    ],
)
def test_rows_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "rows.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        read_rows(tmp_path / "rows.yaml")
    assert message in str(error.value)


def test_a_row_with_a_preset_of_its_own() -> None:
    rows = {"a": ("coop", {"preset": "few-shot-4", "n_ctx": 2}), "b": ("coop", {})}
    (own, protocols) = plan(Asked("few-shot", rows, ["x"], [1], [16]))
    assert (own.config.train.epochs, own.config.options.n_ctx, protocols.config.train.epochs) == (100, 2, 200)
    (none,) = plan(Asked("base-to-novel", {"a": ("coop", {"preset": None})}, ["x"], [1]))
    assert (none.config.options.n_ctx, none.config.options.init) == (16, None)
    with pytest.raises(ConfigError, match="unknown preset of coop 'fewshot': did you mean 'few-shot'"):
        plan(Asked("few-shot", {"a": ("coop", {"preset": "fewshot"})}, ["x"], [1]))


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Methods of files are forgotten afterwards."""
    before = set(METHODS)
    yield
    for name in METHODS.keys() - before:
        del sys.modules[METHODS.pop(name).__module__]


@pytest.mark.parametrize("file", ABLATIONS, ids=lambda f: f.stem)
def test_ablations_are_settings_that_the_methods_know(file: Path, forgotten: None) -> None:
    rows = read_rows(file)
    assert any(name.startswith(file.stem.split("-")[0]) for name in METHODS)
    assert len({json.dumps(row) for row in rows.values()}) == len(rows) > 3  # no row twice
    assert len(plan(Asked("base-to-novel", rows, ["x"], [1], teacher="efficientnet-lite0"))) == len(rows)


# --- runs -----------------------------------------------------------------------------------------


def figures(rows: list[Row]) -> dict[tuple, float | None]:
    return {(r.name, r.shots, r.seed, r.measured_on, r.classes): r.accuracy for r in rows}


def test_a_bench_from_end_to_end(bench, vlprompt, photos: Path, tmp_path: Path) -> None:
    given = ["--methods", "zero_shot,coop,linear_probe", "--data", photos, "--seeds", "1,2", "--shots", "2"]
    code, out, err = bench("base-to-novel", *given)
    assert (code, out) == (0, "")
    assert "[6/6] photos linear_probe, 2 shots, seed 2: base " in err
    rows = read_results(tmp_path / "out" / "results.csv")
    assert len(rows) == 12
    by = figures(rows)
    run = tmp_path / "out" / "base-to-novel" / "photos" / "coop" / "backbone" / "shots_2" / "seed_2"
    for classes in ("base", "novel"):
        _, printed, _ = vlprompt("evaluate", run, photos, "--classes", classes, "--json")
        expected = json.loads(printed)
        (row,) = (r for r in rows if (r.name, r.seed, r.classes) == ("coop", 2, classes))
        assert row.accuracy == pytest.approx(expected["accuracy"])
        assert row.calibration_error == pytest.approx(expected["calibration_error"], abs=1e-5)
        assert row.macro_accuracy == pytest.approx(sum(expected["per_class"].values()) / len(expected["per_class"]))
        assert (row.images, row.epochs, row.learned_parameters) == (expected["n"], 1, 4 * 128)
    assert by["linear_probe", 2, 1, "photos", "novel"] is None
    assert by["zero_shot", 2, 1, "photos", "novel"] == by["zero_shot", 2, 2, "photos", "novel"]
    assert len({r.settings for r in rows}) == 3
    assert {r.code for r in rows} == {runs_module.code_version()}
    content = json.loads((run / "figures.json").read_text())
    confusion = content["measured"][0]["confusion"]
    assert sum(n for _, _, n in confusion) == content["measured"][0]["n"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [LOCK, "base-to-novel", "results.csv"]


def test_targets_and_groups(bench, photos: Path, tmp_path: Path) -> None:
    other = make_pictures(tmp_path / "other", val=0)
    shutil.rmtree(other / "val")
    (other / "train").rename(other / "test")
    (other / "train").symlink_to(photos / "train")
    common = ["--methods", "zero_shot", "--seeds", "1", "--shots", "4"]
    assert bench("cross-dataset", *common, "--data", f"{photos},{other}")[0] == 0
    assert bench("long-tail", *common, "--data", photos)[0] == 0
    keys = {(r.protocol, r.measured_on, r.classes, r.images) for r in read_results(tmp_path / "out" / "results.csv")}
    assert keys == {
        ("cross-dataset", "photos", "all", 6), ("cross-dataset", "other", "all", 12), ("long-tail", "photos", "all", 6),
        ("long-tail", "photos", "many", 2), ("long-tail", "photos", "medium", 2), ("long-tail", "photos", "few", 2),
    }  # fmt: skip


def test_zero_shot_reads_the_template_of_what_is_measured(bench, vlprompt, tmp_path: Path, monkeypatch) -> None:
    def classify(method: Method, images: EvaluationImages, class_names) -> Evaluation:
        score = evaluate(method, images, class_names)
        read.append((method.name, method.template))
        return score

    read: list[tuple[str, str]] = []
    monkeypatch.setattr(runs_module, "evaluate", classify)
    for name in ("caltech101", "dtd", "eurosat"):
        build(tmp_path, name)
    given = ("--root", tmp_path, "--seeds", "1", "--shots", "2")
    names = "caltech101,dtd,eurosat"
    assert bench("cross-dataset", "--methods", "zero_shot,coop", "--data", names, *given)[0] == 0
    own = [DATASETS[name].template for name in names.split(",")]
    assert read == [("zero_shot", template) for template in own] + [("coop", own[0])] * 3
    read.clear()
    run = tmp_path / "out/cross-dataset/caltech101/zero_shot/backbone/shots_2/seed_1"

    def logits(method: Method, *given):
        read.append((method.name, method.template))
        return predict_logits(method, *given)

    monkeypatch.setattr("vlprompt.evaluation.measure.predict_logits", logits)
    assert vlprompt("evaluate", run, "dtd", "--root", tmp_path)[0] == 0
    assert read == [("zero_shot", own[1])]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Notes the runs that are trained, and whether they are gone on with."""
    noted: list[tuple[str, bool]] = []

    def train(config, folder, **more):
        noted.append((f"{config.method} {config.seed}", more["resume"]))
        return original(config, folder, **more)

    original = runs_module.train
    monkeypatch.setattr(runs_module, "train", train)
    return noted


GIVEN = ("--methods", "coop", "--seeds", "1,2,3", "--shots", "2")


def test_finished_runs_are_kept(bench, photos: Path, trained, tmp_path: Path) -> None:
    assert bench("base-to-novel", *GIVEN, "--data", photos)[0] == 0
    before = (tmp_path / "out" / "results.csv").read_text()
    (tmp_path / "out" / "results.csv").unlink()
    code, _, err = bench("base-to-novel", *GIVEN, "--data", photos)
    assert code == 2
    assert "--skip-existing keeps what is finished" in err
    assert bench("base-to-novel", *GIVEN, "--data", photos, "--skip-existing")[0] == 0
    assert (tmp_path / "out" / "results.csv").read_text() == before
    assert len(trained) == 3
    assert bench("base-to-novel", *GIVEN, "--data", photos, "--skip-existing", "--split", "val")[0] == 0
    assert len(trained) == 3  # other images, the same runs
    assert len(read_results(tmp_path / "out" / "results.csv")) == 12


def test_each_measurement_has_the_code_version_that_made_it(bench, photos: Path, tmp_path: Path, monkeypatch) -> None:
    given = ("--methods", "zero_shot", "--seeds", "1", "--shots", "2", "--data", photos, "--skip-existing")
    assert bench("few-shot", *given)[0] == 0
    first = runs_module.code_version()
    monkeypatch.setattr(runs_module, "code_version", lambda: "0.2.0+changed")
    assert bench("few-shot", *given, "--split", "val")[0] == 0
    rows = read_results(tmp_path / "out" / "results.csv")
    assert {r.split: r.code for r in rows} == {"test": first, "val": "0.2.0+changed"}
    file = next((tmp_path / "out").glob("*/*/*/*/*/*/figures.json"))
    content = json.loads(file.read_text())
    assert content["code"] == first  # what trained it


def test_a_changed_file_changes_the_code_version(tmp_path: Path, monkeypatch) -> None:
    version = runs_module.code_version.__wrapped__
    package = tmp_path / "package"
    (package / "part").mkdir(parents=True)
    for name in ("__init__.py", "part/one.py"):
        (package / name).write_text("a = 1\n")
    monkeypatch.setattr("vlprompt.__file__", str(package / "__init__.py"))
    seen = [version()]
    for change in (
        lambda: (package / "part" / "one.py").write_text("a = 2\n"),
        lambda: (package / "part" / "two.py").write_text(""),
        lambda: (package / "part" / "two.py").unlink(),
    ):
        change()
        seen.append(version())
    assert len(set(seen)) == 3
    assert seen[1] == seen[3]
    (package / "notes.txt").write_text("no code")
    assert version() == seen[3]


def test_results_from_other_settings_are_refused(bench, photos: Path, trained) -> None:
    assert bench("base-to-novel", *GIVEN, "--data", photos)[0] == 0
    code, _, err = bench("base-to-novel", *GIVEN, "--data", photos, "--skip-existing", "lr=1", "n_ctx=8")
    assert code == 2
    assert "seed_1 holds results from other settings (method.n_ctx = 4, now 8; optim.lr = 0.002, now 1.0)" in err
    assert len(trained) == 3


def test_results_from_other_images_are_refused(bench, photos: Path, trained, tmp_path: Path) -> None:
    """Of the same name and place: what has been added, taken away, or moved to another class since."""
    data = tmp_path / "pictures"
    shutil.copytree(photos, data)
    given = ("base-to-novel", "--methods", "zero_shot", "--seeds", "1", "--shots", "4", "--data", data)
    assert bench(*given)[0] == 0
    assert bench(*given, "--skip-existing")[0] == 0
    folder = "base-to-novel/pictures/zero_shot/backbone/shots_4/seed_1"
    picture = data / "train" / "cat" / "0.png"
    for new, message in (
        (data / "train" / "cat" / "extra.png", "was trained on other images than pictures has now"),
        (data / "test" / "cat" / "extra.png", "was measured on other images than pictures has now"),
        (data / "test" / "sea horse" / "extra.png", "was measured on other images than pictures has now"),
    ):
        for _ in range(2):  # a draw of 4 of 6 is another one than that of 4, whatever the names
            shutil.copy(picture, new.with_stem(new.stem + str(_)))
        code, out, err = bench(*given, "--skip-existing")
        assert (code, out) == (2, ""), new
        assert f"{folder} {message}: choose another folder" in err
        for _ in range(2):
            new.with_stem(new.stem + str(_)).unlink()
    assert bench(*given, "--skip-existing")[0] == 0
    (data / "test" / "cat" / "0.png").rename(data / "test" / "dog" / "9.png")
    assert "was measured on other images" in bench(*given, "--skip-existing")[2]
    assert len(trained) == 1


def test_an_edited_split_file_is_other_data(bench, photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "split.json"

    def write(first: int) -> None:
        rows = {
            part: [[f"{part}/{name}/{i}.png", c, name] for c, name in enumerate(CLASSES) for i in images]
            for part, images in (("train", range(first, first + 2)), ("test", range(2)))
        }
        file.write_text(json.dumps(rows))

    write(0)
    given = ("few-shot", "--methods", "zero_shot", "--seeds", "1", "--shots", "2", "--data", photos)
    assert bench(*given, f"split_file={file}")[0] == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(file, elsewhere)
    code, out, _ = bench(*given, f"split_file={elsewhere / 'split.json'}", "--skip-existing", "--json")
    assert (code, json.loads(out)["kept"]) == (0, 1)  # where it lies does not count
    write(1)
    code, _, err = bench(*given, f"split_file={file}", "--skip-existing")
    assert code == 2
    assert "was trained on other images than photos has now" in err


def test_another_bank_of_the_same_name_is_other_data(bench, photos: Path, tmp_path: Path) -> None:
    for folder, regions in (("one", 2), ("two", 3)):
        given = {"data.name": str(photos), "regions": regions, "data.workers": 0, "backbone": str(TINY)}
        build_bank(bank_config(given), tmp_path / folder / "b")
    given = ("few-shot", "--methods", "coop", "--seeds", "1", "--shots", "2", "--data", photos)
    assert bench(*given, f"bank={tmp_path / 'one' / 'b'}")[0] == 0
    shutil.copytree(tmp_path / "one" / "b", tmp_path / "moved" / "b")
    assert bench(*given, f"bank={tmp_path / 'moved' / 'b'}", "--skip-existing")[0] == 0
    code, _, err = bench(*given, f"bank={tmp_path / 'two' / 'b'}", "--skip-existing")
    assert code == 2
    assert f"was trained on another region bank than {tmp_path / 'two' / 'b'}" in err


def test_other_texts_in_a_file_of_the_same_name_are_other_data(bench, photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "texts.json"
    given = ("few-shot", "--methods", "zero_shot", "--shots", "2", "--data", photos, f"descriptions={file}")
    for text, code in (("a cat or so", 0), ("a dog or so", 2), ("a cat or so", 0)):
        file.write_text(json.dumps({name: [text] for name in CLASSES}))
        done = bench(*given, "--seeds", "1,2" if code else "1", "--skip-existing")
        assert done[0] == code
        assert ("seed_1 was trained with another content of descriptions: choose" in done[2]) == bool(code)


def test_another_model_to_begin_from_at_the_same_place_is_other_data(
    bench, vlprompt, photos: Path, tmp_path: Path
) -> None:
    given = ("few-shot", "--methods", "coop", "--seeds", "1", "--shots", "2", "--data", photos)
    begun = (f"warm_start={tmp_path / 'w'}", "--skip-existing")
    for epochs, code in ((1, 0), (2, 2)):
        shutil.rmtree(tmp_path / "w", ignore_errors=True)
        assert vlprompt("train", "coop", photos, "--out", tmp_path / "w", *QUICK, f"train.epochs={epochs}")[0] == 0
        done = bench(*given, *begun)
        assert done[0] == code, done
        assert ("was trained with another content of warm_start: choose" in done[2]) == bool(code)
    shutil.rmtree(tmp_path / "w")
    assert bench(*given, *begun)[0] == 0  # it is not needed any more


def test_images_that_are_not_measured_are_told(bench, vlprompt, photos: Path, tmp_path: Path) -> None:
    data = tmp_path / "pictures"
    shutil.copytree(photos, data)
    good = (data / "test" / "cat" / "0.png").read_bytes()
    (data / "test" / "cat" / "0.png").write_bytes(b"none")
    given = ("few-shot", "--methods", "zero_shot", "--shots", "2", "--data", data, "skip_bad=true", "--skip-existing")
    code, _, err = bench(*given, "--seeds", "1")
    assert code == 0
    assert "; 1 test images of all left out, unreadable" in err
    (data / "test" / "cat" / "0.png").write_bytes(good)
    runs_module._readable.cache_clear()  # as in another process
    assert bench(*given, "--seeds", "1,2")[0] == 0
    text = vlprompt("report", tmp_path / "out")[1]
    assert "Numbers of test images of pictures, all classes, differ between runs: 5, 6." in text


def test_test_images_that_are_trained_on_are_told(bench, photos: Path, tmp_path: Path) -> None:
    data = tmp_path / "pictures"
    shutil.copytree(photos, data)
    shutil.copy(data / "train" / "cat" / "0.png", data / "test" / "cat" / "9.png")
    err = bench("few-shot", "--methods", "zero_shot", "--seeds", "1", "--shots", "2", "--data", data)[2]
    assert "note: 1 of 7 test images are among the training images too: test/cat/9.png" in err


def test_the_report_tells_settings_that_rows_should_share(bench, vlprompt, photos: Path, tmp_path: Path) -> None:
    given = ("few-shot", "--seeds", "1", "--shots", "2", "--data", photos)
    assert bench(*given, "--methods", "zero_shot")[0] == 0
    assert bench(*given, "--methods", "coop", "train.select=val")[0] == 0
    text = vlprompt("report", tmp_path / "out")[1]
    assert "Of coop the epoch that is best on val images is kept." in text
    assert "differs between runs" not in text
    assert bench(*given, "--methods", "linear_probe", "skip_bad=true")[0] == 0
    assert "data.skip_bad differs between runs: False, True." in vlprompt("report", tmp_path / "out")[1]


def test_the_report_tells_other_weights_and_images(bench, vlprompt, photos: Path, tmp_path: Path) -> None:
    given = ("--methods", "zero_shot", "--seeds", "1,2", "--shots", "2", "--data", photos)
    assert bench("base-to-novel", *given)[0] == 0
    assert "differ between runs" not in vlprompt("report", tmp_path / "out")[1]
    file = next((tmp_path / "out").glob("*/*/*/*/*/seed_2/figures.json"))
    content = sealed.read(file)
    content["weights"]["backbone"] = "0"
    content["measured"][0]["images_fingerprint"] = "0"
    sealed.write(file, content)
    text = vlprompt("report", tmp_path / "out")[1]
    assert "Weights of the backbone differ between runs." in text
    assert "Test images of photos, base classes, differ between runs." in text
    assert text.count("differ between runs") == 2


def test_a_failed_run_is_reported_and_the_rest_goes_on(bench, photos: Path, trained, tmp_path: Path) -> None:
    bad = make_pictures(tmp_path / "bad")
    (bad / "val").rename(bad / "test")
    whole = (bad / "train" / "cat" / "0.png").read_bytes()
    (bad / "train" / "cat" / "0.png").write_bytes(b"no picture")
    given = ["--methods", "coop,zero_shot", "--seeds", "1", "--shots", "4", "--data", f"{bad},{photos}"]
    code, out, err = bench("base-to-novel", *given, "--json")
    assert code == 1
    failed = json.loads(out)["failed"]
    assert list(failed) == [f"base-to-novel/bad/{m}/backbone/shots_4/seed_1" for m in ("coop", "zero_shot")]
    assert all("0.png" in reason for reason in failed.values())
    assert err.count("failed: base-to-novel/bad/") == 2
    assert {r.data for r in read_results(tmp_path / "out" / "results.csv")} == {"photos"}
    (bad / "train" / "cat" / "0.png").write_bytes(whole)
    del trained[:]
    assert bench("base-to-novel", *given, "--skip-existing")[0] == 0
    assert trained == [("coop 1", False), ("zero_shot 1", False)]


def test_our_own_fault_in_a_run_keeps_its_trace(bench, photos: Path, monkeypatch) -> None:
    def train(config, folder, **more):
        raise RuntimeError("broken")

    monkeypatch.setattr(runs_module, "train", train)
    code, _, err = bench("base-to-novel", *GIVEN, "--data", photos)
    assert code == 1
    assert err.count("Traceback") == 3
    assert "seed 1: FAILED: RuntimeError: broken" in err


def test_a_bench_that_is_interrupted_goes_on(bench, photos: Path, trained, monkeypatch) -> None:
    """Ctrl-C in the second run's first step: a checkpoint is saved, and no other run begins."""
    from vlprompt.training.checkpoints import Keeper

    original, count = Keeper.start, []

    def start(self, training):
        count.append(1)
        if len(count) == 2:
            self.step = lambda: signal.raise_signal(signal.SIGINT)
        original(self, training)

    monkeypatch.setattr(Keeper, "start", start)
    code, _, err = bench("base-to-novel", *GIVEN, "--data", photos)
    assert code == 130
    assert err.splitlines()[-1] == "interrupted; 1 of 3 runs are finished; to continue: --skip-existing"
    assert bench("base-to-novel", *GIVEN, "--data", photos, "--skip-existing")[0] == 0
    assert trained == [("coop 1", False), ("coop 2", False), ("coop 2", True), ("coop 3", False)]


@pytest.mark.parametrize("file", ["figures.json", "results.csv", "prompts.safetensors", "last.safetensors"])
def test_a_full_disk_loses_nothing(bench, photos: Path, trained, monkeypatch, tmp_path: Path, file: str) -> None:
    """The disk fills up when the second run writes ``file``."""
    from vlprompt import documents
    from vlprompt.artefact import artefact
    from vlprompt.training import checkpoints

    written_by = {"figures.json": documents, "results.csv": results_module}
    written_by |= {"prompts.safetensors": artefact, "last.safetensors": checkpoints}
    module = written_by[file]
    original, count = module.write_atomically, []

    def write(path: Path, content) -> None:
        if path.name == file:
            count.append(path)
            if (2 if file != "figures.json" else 3) <= len(count) <= 4:
                raise OutputError(f"cannot write {path}: No space left on device")
        original(path, content)

    monkeypatch.setattr(module, "write_atomically", write)
    code, _, err = bench("base-to-novel", *GIVEN, "--data", photos)
    assert code == 1
    assert "No space left on device" in err.splitlines()[-2]
    assert err.splitlines()[-2].startswith("failed: ")
    monkeypatch.setattr(module, "write_atomically", original)
    assert bench("base-to-novel", *GIVEN, "--data", photos, "--skip-existing")[0] == 0
    assert len(read_results(tmp_path / "out" / "results.csv")) == 6
    again = [name for name, resumed in trained[3:]]
    assert again == (["coop 2", "coop 3"] if file.endswith(".safetensors") else [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-9], "cannot read "),
        (
            lambda text: text.replace('"format_version": 2', '"format_version": 3'),
            "has format_version 3; this vlprompt",
        ),
        (lambda text: text.replace('"format_version": 2', '"format_version": 1'), "has format_version 1; remove it"),
        (lambda text: text.replace('"measured"', '"measures"'), "its content is not what was saved"),
        (lambda text: "[1]", "has format_version None; remove it"),
        (lambda text: "[" * 100_000, "it is nested too deeply"),
    ],
)
def test_figures_that_are_corrupt(bench, photos: Path, trained, tmp_path: Path, change, message: str) -> None:
    """They stop a bench before it begins; one beside them goes on, and tells what hinders results.csv."""
    given = ("--methods", "zero_shot", "--seeds", "1", "--shots", "2", "--data", photos)
    assert bench("base-to-novel", *given)[0] == 0
    file = next((tmp_path / "out").glob("*/*/*/*/*/*/figures.json"))
    file.write_text(change(file.read_text()))
    code, out, err = bench("base-to-novel", *given, "--skip-existing")
    assert (code, out) == (2, "")
    assert message in err
    assert str(file) in err
    code, _, err = bench("few-shot", *given)
    assert code == 1
    assert [name for name, _ in trained] == ["zero_shot 1", "zero_shot 1"]
    assert "failed: results.csv: " in err
    assert message in err


OWN = """
from vlprompt.methods import register
from vlprompt.methods.coop import CoOp

@register("own_coop")
class Own(CoOp):
    pass
"""


@pytest.fixture
def own_file(tmp_path: Path, own_sources, monkeypatch) -> Path:
    """A method of one's own, in a file of the folder where commands run."""
    (tmp_path / "a_file.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "a_file.py"
    METHODS.pop("own_coop", None)


def test_a_method_in_a_file(bench, vlprompt, photos: Path, tmp_path: Path, own_file: Path) -> None:
    """With several workers, in shards, kept and reported like any other; its file is known by its whole path."""
    given = ["base-to-novel", "--methods", "./a_file.py,coop", "--data", photos, "--seeds", "1", "--shots", "2"]
    for shard in ("1/2", "2/2"):
        code, _, err = bench(*given, "--workers", "2", "--shard", shard)
        assert code == 0, err
    rows = read_results(tmp_path / "out" / "results.csv")
    assert {(r.name, r.method) for r in rows} == {("own_coop", "own_coop"), ("coop", "coop")}
    by = figures(rows)
    assert all(by["own_coop", *key] == by["coop", *key] for _, *key in by)  # it is CoOp
    run = tmp_path / "out/base-to-novel/photos/own_coop/backbone/shots_2/seed_1"
    assert saved_config(run).method == str(own_file)
    code, out, _ = bench(*given, "--skip-existing", "--json")
    assert (code, json.loads(out)["kept"]) == (0, 2)
    assert "| own_coop |" in vlprompt("report", tmp_path / "out")[1]
    own_file.write_text(OWN.replace("pass", "changed = True"))
    code, _, err = bench(*given, "--skip-existing")
    assert code == 2
    assert f"{run} holds results from other settings (method file = " in err
    own_file.unlink()
    code, _, err = bench(*given, "--skip-existing")
    assert (code, err) == (2, f"error: method file {own_file}: No such file or directory\n")


def test_two_methods_of_one_name(bench, photos: Path, tmp_path: Path, own_file: Path) -> None:
    for methods in ("./a_file.py,a_file.py", "a_file.py,own_coop"):
        code, _, err = bench("base-to-novel", "--methods", methods, "--data", photos)
        first, second = methods.split(",")
        assert (code, err) == (2, f"error: --methods: {first} and {second} are both called 'own_coop'\n")
    (tmp_path / "other.py").write_text(OWN)
    code, _, err = bench("base-to-novel", "--methods", "a_file.py,other.py", "--data", photos)
    assert code == 2
    assert "there is a method 'own_coop' already" in err


def test_two_shards_share_a_folder(bench, photos: Path, tmp_path: Path) -> None:
    for part in ("1/2", "2/2"):
        assert bench("base-to-novel", *GIVEN, "--data", photos, "--shard", part)[0] == 0
    assert len(read_results(tmp_path / "out" / "results.csv")) == 6


def test_shards_that_write_results_at_the_same_moment(bench, photos: Path, tmp_path: Path, monkeypatch) -> None:
    """The other shard ends a run and writes its results between this one's look at the folder and its file."""
    given = ("--methods", "zero_shot", "--seeds", "1,2", "--shots", "2", "--data", photos)
    assert bench("few-shot", *given)[0] == 0
    out = tmp_path / "out"
    file = out / "results.csv"
    both = file.read_text()
    run = next(out.glob("*/*/*/*/*/seed_2"))
    run.rename(tmp_path / "other")

    def write(path: Path, content: str) -> None:
        if not run.exists():
            (tmp_path / "other").rename(run)
            file.write_text(both)
        original(path, content)

    original = results_module.write_atomically
    monkeypatch.setattr(results_module, "write_atomically", write)
    assert len(results_module.Results(out).write()) == 2
    assert file.read_text() == both


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--methods", "coop", "--backbone", "nowhere"), "no backbone 'nowhere'"),
        (("--methods", "coop", "--device", "cuda:99"), "cannot use device 'cuda:99'"),
        (("--methods", "coop", "--device", "meta"), "cannot use device 'meta' (allowed: cpu, cuda or cuda:N)"),
        (("--methods", "kdpl_coop", "--teacher", "nowhere"), "no backbone 'nowhere'"),
        (("--methods", "maple", "depth=99"), "depth"),
        (("--methods", "zero_shot", "data.bank=nowhere"), "region bank nowhere does not exist"),
    ],
)
def test_models_that_do_not_do_are_found_before_the_first_run(
    vlprompt, photos: Path, trained, tmp_path: Path, given: tuple[str, ...], says: str
) -> None:
    whole = [*QUICK, "--seeds", "1,2", "--shots", "1", "--data", photos, "--out", tmp_path / "out", *given]
    code, out, err = vlprompt("bench", "base-to-novel", *whole)
    assert (code, out, trained) == (2, "", [])
    assert says in err
    assert err.count("\n") == 1


def test_a_teacher_that_no_row_uses_is_told(bench, photos: Path) -> None:
    given = ("--methods", "zero_shot", "--teacher", "mini", "--seeds", "1", "--shots", "1", "--data", photos)
    code, _, err = bench("base-to-novel", *given)
    assert code == 0
    assert err.splitlines()[0] == "--teacher mini is not used: no row learns from one"


def test_figures_of_another_shard_that_are_corrupt(bench, photos: Path, tmp_path: Path) -> None:
    """They hinder results.csv, as is told; what this shard did is done."""
    assert bench("base-to-novel", *GIVEN, "--data", photos, "--shard", "1/2")[0] == 0
    next((tmp_path / "out").glob("*/*/*/*/*/*/figures.json")).write_text("{")
    code, out, _ = bench("base-to-novel", *GIVEN, "--data", photos, "--shard", "2/2", "--json")
    assert code == 1
    assert json.loads(out)["done"] == 1
    assert list(json.loads(out)["failed"]) == ["results.csv"]


def at_work() -> list[int]:
    """The processes that do this bench's runs."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()[1:]]
    return [int(pid) for pid, parent, args in rows if int(parent) == os.getpid() and f"-m vlprompt {COMMAND}" in args]


@pytest.fixture
def own_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that are started use this checkout."""
    for key, value in environment().items():
        monkeypatch.setenv(key, value)


@slow
def test_workers_and_one_of_them_killed(bench, photos: Path, tmp_path: Path, own_sources) -> None:
    """Its run goes on in another process, and one run fewer is at work at once."""
    killed = []

    def kill_the_first_at_work() -> None:
        while not killed:
            if any((tmp_path / "out").glob("*/*/*/*/*/*/config.yaml")):
                for child in at_work():
                    os.kill(child, signal.SIGKILL)
                    killed.append(child)
                    return
            time.sleep(0.002)

    thread = threading.Thread(target=kill_the_first_at_work)
    thread.start()
    given = ["--methods", "coop", "--seeds", "1,2,3", "--shots", "2", "--data", photos, "--workers", "2"]
    code, out, err = bench("base-to-novel", *given, "epochs=30", "--json")
    killed.append(0)
    thread.join()
    assert killed[0]
    assert "begins again, with 1 at once: its process was killed (SIGKILL): was memory full?" in err
    assert code == 0
    assert json.loads(out)["done"] == 3
    assert len(read_results(tmp_path / "out" / "results.csv")) == 6


@pytest.mark.parametrize("when", sweep(["while they start", "at work"]))
def test_workers_that_are_interrupted_go_on(
    bench, photos: Path, tmp_path: Path, monkeypatch, own_sources, when: str
) -> None:
    """A terminal's Ctrl-C goes to all its processes; the runs' are in groups of their own and hear of it from us."""
    original, given = launch.wait, [*GIVEN, "--data", photos, "--workers", "2", "epochs=30"]

    def logs() -> list[Path]:
        return sorted((tmp_path / "out").glob("*/*/*/*/*/*/log.jsonl"))

    def wait(futures, *more):
        monkeypatch.setattr(launch, "wait", original)
        if when == "at work":
            ends = time.monotonic() + 120
            while len(logs()) < 2 and time.monotonic() < ends:
                time.sleep(0.002)
        else:
            for child in at_work():
                os.kill(child, signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return original(futures, *more)

    monkeypatch.setattr(launch, "wait", wait)
    code, _, err = bench("base-to-novel", *given)
    assert code == 130
    done = "[01]" if when == "at work" else "0"  # a fast one may end before another has begun
    told = rf"interrupted; {done} of 3 runs are finished; to continue: --skip-existing"
    assert re.fullmatch(told, err.splitlines()[-1])
    assert not [line for line in err.splitlines() if "FAILED" in line or "Traceback" in line]
    before = {log: log.read_text() for log in logs()}
    assert len(before) == (2 if when == "at work" else 0)
    if when == "at work":
        assert bench("base-to-novel", *given, "--skip-existing")[0] == 0
        assert len(logs()) == 3
        assert all(log.read_text().startswith(rows) for log, rows in before.items())
        assert len(read_results(tmp_path / "out" / "results.csv")) == 6


@slow
def test_runs_end_with_the_bench_that_started_them(photos: Path, tmp_path: Path, own_sources) -> None:
    """Killed, it can tell them nothing: a new bench may take over the folder, and nobody may write to it any more."""
    given = ["bench", "base-to-novel", "--methods", "coop", "--seeds", "1,2", "--shots", "2", "--data", str(photos)]
    given += ["--workers", "2", "--out", str(tmp_path / "out"), *QUICK, "epochs=3000"]
    process = subprocess.Popen([sys.executable, "-m", "vlprompt", *given], stderr=subprocess.DEVNULL)
    while not any((tmp_path / "out").glob("*/*/*/*/*/*/checkpoints/*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    log, ends = next((tmp_path / "out").glob("*/*/*/*/*/*/log.jsonl")), time.monotonic() + 30
    while time.monotonic() < ends:
        before = log.stat().st_mtime_ns
        time.sleep(1)
        if log.stat().st_mtime_ns == before:
            return
    raise AssertionError("a run goes on")


ENDS = """
import os, signal
import torch
from vlprompt.data.reading import ImageReader
from vlprompt.errors import DataError
from vlprompt.methods import Method, register

@register("ends")
class Ends(Method):
    paper, year, learns = "none", 2026, "nothing"
    settings = {"train.epochs": 1}
    def build(self):
        how = open(__file__ + ".how").read()
        print("a method may print")
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "gpu":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        elif how == "python":
            raise MemoryError
        elif how == "cpu":
            torch.empty(1 << 60, dtype=torch.uint8)
        elif how == "exit":
            os._exit(3)
        with ImageReader(0) as reader:
            raise DataError(f"{reader.room} bytes, {torch.get_num_threads()} threads")
    def class_features(self, class_names, image_features=None):
        raise NotImplementedError
"""


@pytest.fixture
def ending(tmp_path: Path, photos: Path, own_sources):
    """The outcome of a run, in a process of its own, that ends in the way asked for."""

    def end(how: str, workers: int = 1) -> Outcome:
        file = tmp_path / "ends.py"
        file.write_text(ENDS)
        file.with_suffix(".py.how").write_text(how)
        settings = {"data.workers": 0, "backbone": str(TINY)}
        (run,) = plan(Asked("few-shot", {"ends": (str(file), {})}, [str(photos)], [1], [2], settings))
        return Process(run.to_json(), tmp_path / "out", workers).outcome()

    yield end
    METHODS.pop("ends", None)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("killed", r"its process was killed \(SIGKILL\): was memory full\?"),
        pytest.param("gpu", r"OutOfMemoryError: CUDA out of memory\.", marks=slow),
        pytest.param("python", "MemoryError:", marks=slow),
        pytest.param("cpu", "RuntimeError: .*DefaultCPUAllocator.*", marks=slow),
    ],
)
def test_a_process_tells_that_memory_was_full(ending, how: str, reason: str) -> None:
    outcome = ending(how)
    assert outcome.memory_full
    assert re.fullmatch(reason, outcome.failure)
    assert not outcome.trace


def test_a_process_that_just_ends(ending) -> None:
    assert ending("exit") == Outcome(failure="its process ended with exit code 3")


@pytest.mark.parametrize(("workers", "share"), sweep([(1, CACHE_BYTES), (3, CACHE_BYTES // 3)], (3, CACHE_BYTES // 3)))
def test_workers_share_the_memory_for_images(ending, workers: int, share: int) -> None:
    """And each uses one thread. What its method prints is not taken for its outcome."""
    assert ending("", workers) == Outcome(failure=f"{share} bytes, 1 threads")


class Made:
    """A job that ends as told as soon as it is asked."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = lambda: time.sleep(0.05) or outcome
        self.interrupt = self.kill = lambda: None


def test_a_run_that_memory_does_not_do_for_fails_only_when_alone() -> None:
    full, good = Outcome(failure="memory", memory_full=True), Outcome("fine")
    runs = plan(asked("few-shot", seeds=[1, 2, 3, 4], shots=[1]))
    said: list[str] = []
    places: list[int] = []

    def begin(run: Run, place: int) -> Made:
        places.append(place)
        return Made(full if run.config.seed < 3 else good)

    ended = list(launch.outcomes(begin, runs, 3, said.append))
    assert sorted(run.config.seed for run, outcome in ended if outcome == full) == [1, 2]
    assert sorted(run.config.seed for run, outcome in ended if outcome == good) == [3, 4]
    assert re.fullmatch(r"x coop, 1 shots, seed \d begins again, with 1 at once: memory", said[-1])
    assert set(places) == {0, 1, 2}
    assert places[-1] == 0


def test_a_bench_gives_its_processes_their_number(bench, photos: Path, monkeypatch) -> None:
    """No more than there are runs."""
    seen = []

    def begin(run: str, out: Path, workers: int, place: int) -> Made:
        seen.append((workers, place))
        return Made(Outcome(failure="no"))

    monkeypatch.setattr("vlprompt.bench.bench.Process", begin)
    assert bench("base-to-novel", *GIVEN, "--data", photos, "--workers", "5")[0] == 1
    assert seen == [(3, 0), (3, 1), (3, 2)]


def test_tasks_of_ray_share_the_memory_for_images(tmp_path: Path, monkeypatch) -> None:
    """As many as a machine has CPUs, at most."""
    seen = []
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr(
        on_ray, "Process", lambda run, out, workers, folder: seen.append(workers) or Made(Outcome("done"))
    )
    for at_once in (2, 40):
        assert on_ray._task("", tmp_path, Path.cwd(), at_once) == Outcome("done")
    assert seen == [2, 4]
    assert "there is no such folder on machine" in on_ray._task("", tmp_path, tmp_path / "none", 2).failure


@pytest.mark.parametrize(
    ("device", "gpus", "chosen"),
    [("cuda", 3, [0, 1, 2, 0, 1]), ("cuda", 1, [0] * 5), ("cuda", 0, []), ("cuda:1", 3, []), ("cpu", 3, [])],
)
def test_workers_are_spread_over_gpus(monkeypatch, device: str, gpus: int, chosen: list[int]) -> None:
    used: list[int] = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.cuda.set_device", used.append)
    (run,) = plan(asked("base-to-novel", settings={"train.device": device}))
    for place in range(5):
        spread(run, place)
    assert used == chosen
    assert run.config.train.device == device  # a run can be resumed where there are fewer GPUs


def test_a_split_that_names_missing_files(bench, photos: Path, trained, tmp_path: Path) -> None:
    """The count and the first five, before any run begins."""
    rows = [[f"{name}/{i}.png", c, name] for c, name in enumerate(CLASSES) for i in range(4)]
    content = {part: [[f"{part}/{path}", c, name] for path, c, name in rows] for part in ("train", "test")}
    (tmp_path / "split.json").write_text(json.dumps(content))
    gone = [f"test/{name}/{i}.png" for name in CLASSES for i in (2, 3)]
    code, out, err = bench("base-to-novel", *GIVEN, "--data", photos, f"split_file={tmp_path / 'split.json'}")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].endswith(f"6 of 24 images do not exist in {photos}: {', '.join(gone[:5])} and 1 more")
    assert not trained
    assert not (tmp_path / "out").exists()


# --- one bench a folder ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "ours", "free"),
    [(None, None, False), (None, "1/2", False), ("1/2", None, False), ("1/2", "2/2", True), ("1/2", "1/2", True)],
)
def test_a_folder_in_use(bench, photos: Path, tmp_path: Path, theirs: str | None, ours: str | None, free: bool) -> None:
    """By a bench of its own; shards share it. Of a process that has ended only the file is left."""
    (tmp_path / "out").mkdir()
    given = ("base-to-novel", "--methods", "zero_shot", "--seeds", "1,2", "--shots", "2", "--data", photos)
    with held(tmp_path / "out" / LOCK, shared=theirs is not None) as taken:
        assert taken
        code, _, err = bench(*given, *(["--shard", ours] if ours else []))
    assert code == (0 if free else 2)
    assert f"error: {tmp_path / 'out'} is in use: another bench is at work there" in err or free
    assert bench(*given, "--skip-existing")[0] == 0


def test_a_folder_that_is_a_file(bench, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    code, _, err = bench("base-to-novel", *GIVEN, "--data", photos, out=tmp_path / "file")
    assert (code, err) == (2, f"error: cannot write {tmp_path / 'file'}: File exists\n")


@slow
def test_the_same_shard_twice_at_once(bench, photos: Path, tmp_path: Path, own_sources) -> None:
    """The run that one is at work on the other reports as in use; no run has two rows."""
    given = ["base-to-novel", *GIVEN, "--data", photos, "--shard", "1/1", "--skip-existing", "--workers", "2"]
    folder = tmp_path / "out" / "base-to-novel/photos/coop/backbone/shots_2/seed_2"
    folder.mkdir(parents=True)
    with held(folder):
        code, out, _ = bench(*given, "--json")
    assert (code, json.loads(out)["done"]) == (1, 2)
    ((run, reason),) = json.loads(out)["failed"].items()
    assert run.endswith("seed_2")
    assert "another process has begun a run there" in reason
    assert bench(*given)[0] == 0
    assert len(read_results(tmp_path / "out" / "results.csv")) == 6


# --- results.csv ----------------------------------------------------------------------------------

ROW = Row(
    "few-shot", "dtd", "coop", "coop", "mini", 1, 2, "dtd", "all", "test",
    10, 50.0, 40.0, None, 5, 8, 1.5, 0.1, "f", "1",
)  # fmt: skip
OTHER = replace(ROW, seed=3)


def test_results_read_back(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text(to_csv([ROW, OTHER]))
    assert read_results(tmp_path / "results.csv") == [ROW, OTHER]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.replace(",50.0,", ",5o,", 1), "line 2: accuracy = '5o' (allowed: a percentage)"),
        (lambda t: t.replace(",50.0,", ",500,", 1), "line 2: accuracy = '500' (allowed: a percentage)"),
        (lambda t: t.replace(",50.0,", ",nan,", 1), "line 2: accuracy = 'nan'"),
        (lambda t: t.removesuffix("0.1,f,1\n"), "line 3: 18 values instead of 20"),
        (lambda t: t.replace("mini,1,2", "mini,one,2"), "line 2: shots = 'one' (allowed: a whole number)"),
        (lambda t: t.replace("few-shot,", ",", 1), "line 2: protocol is empty"),
        (lambda t: t.replace("accuracy,", "", 1), "line 1: it lacks the columns accuracy"),
        (lambda t: "", "line 1: it lacks the columns protocol"),
        (lambda t: t.replace(",all,", ",pgd-1/0-1,", 1), "line 2: unknown classes 'pgd-1/0-1'"),
        (lambda t: t.replace(",all,", ",seen-0-of-0,", 1), "line 2: unknown classes 'seen-0-of-0'"),
        (lambda t: t + t.splitlines()[1].replace(",50.0,", ",60.0,"), "line 4: it is of the same run and images as"),
    ],
)
def test_corrupt_rows_are_named_by_line(tmp_path: Path, change, message: str) -> None:
    (tmp_path / "results.csv").write_text(change(to_csv([ROW, OTHER])))
    with pytest.raises(DataError) as error:
        read_results(tmp_path / "results.csv")
    assert message in str(error.value)


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["base-to-new", "--methods", "coop", "--data", "p"], "unknown protocol 'base-to-new'"),
        (["few-shot", "--data", "p"], "give either --methods or --rows"),
        (["few-shot", "--methods", "coop,coop", "--data", "p"], "--methods: given twice: coop"),
        (["few-shot", "--methods", "coop,", "--data", "p"], "--methods: there is an empty name"),
        (["few-shot", "--methods", "coop", "--data", "p", "--seeds", "1,x"], "--seeds x (allowed: whole numbers"),
        (["few-shot", "--methods", "coop", "--data", "p", "--shots", "0"], "data.shots = 0"),
        (["few-shot", "--methods", "coop", "--data", "p", "--shard", "3/2"], "--shard 3/2 (allowed: i/n"),
        (["few-shot", "--methods", "coop", "--data", "./none"], "folder none does not exist"),
        (["few-shot", "--methods", "coop", "--data", "p"], "too few for 8 shots"),
        (["few-shot", "--methods", "coop", "--shots", "1", "--data", "p", "bank=none"], "bank none does not exist"),
        (["few-shot", "--methods", "coop", "--data", "p", "--rows", "r"], "give either --methods or --rows"),
        (["few-shot", "--rows", "none.yaml", "--data", "p"], "cannot read rows from none.yaml"),
    ],
)
def test_bad_input(vlprompt, photos: Path, tmp_path: Path, monkeypatch, given: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p").symlink_to(photos)
    code, out, err = vlprompt("bench", *given, "--backbone", TINY, "--out", "out")
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert [p.name for p in tmp_path.iterdir()] == ["p"]


def test_only_some_rows_and_a_dry_run(vlprompt, tmp_path: Path) -> None:
    (tmp_path / "rows.yaml").write_text(ROWS)
    given = ["bench", "base-to-novel", "--rows", tmp_path / "rows.yaml", "--data", "x", "--out", tmp_path / "out"]
    code, out, _ = vlprompt(*given, "--only", "frozen", "--seeds", "7", "--dry-run")
    assert (code, out) == (0, "base-to-novel/x/frozen/mini/shots_16/seed_7\n")
    code, out, _ = vlprompt(*given, "--only", "of its own", "--only", "frozen,exact", "--dry-run", "--json")
    assert [run.split("/")[2] for run in json.loads(out)["runs"][::3]] == ["exact", "of its own", "frozen"]
    code, _, err = vlprompt(*given, "--only", "frosen")
    assert code == 2
    assert "--only: unknown row 'frosen': did you mean 'frozen'? (allowed: exact, frozen, of its own)" in err


def test_every_protocol_is_in_the_help(vlprompt) -> None:
    _, out, _ = vlprompt("bench", "--help")
    words = " ".join(out.replace("│", " ").split())
    assert all(protocol in words for protocol in PROTOCOLS)
