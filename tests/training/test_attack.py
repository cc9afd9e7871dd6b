"""Damaged files and power cuts: told, never trained on or predicted with."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file, save

from tests.kit import TINY, sealed
from tests.kit.checks import flipped
from tests.kit.results import PLAIN
from tests.kit.runs import RUN_FILES, StopsAfter, configured, prompts
from vlprompt.api import PromptedModel, build_method
from vlprompt.artefact.artefact import read_artefact_config
from vlprompt.backbones import backbone as backbone_module
from vlprompt.backbones.load import load_backbone
from vlprompt.bank.build import build_bank
from vlprompt.bank.config import bank_config
from vlprompt.bank.records import verify
from vlprompt.bench.results import read_results, to_csv
from vlprompt.bench.shared import computed_once
from vlprompt.config.schema import build_config, parse_override, read_config
from vlprompt.documents import MOST_NODES, parse_json, parse_yaml
from vlprompt.errors import ArtefactError, ConfigError, Interrupted, VlpromptError
from vlprompt.files import is_unfinished, write_atomically
from vlprompt.methods.zero_shot import frozen_class_features
from vlprompt.training.checkpoints import checkpoint_file
from vlprompt.training.run import saved_config, train


def test_no_changed_bit_of_a_checkpoint_goes_unnoticed(pictures: Path, tmp_path: Path) -> None:
    config, run = configured(pictures), tmp_path / "run"
    with pytest.raises(Interrupted):
        train(config, run, [StopsAfter(4)])
    file = checkpoint_file(run)
    whole = file.read_bytes()
    for seed in range(12):  # more of them with the fuzzers
        file.write_bytes(flipped(whole, seed))
        with pytest.raises(ArtefactError, match=r"^(cannot read checkpoint|checkpoint) .*last.safetensors"):
            train(config, run, resume=True)
    file.write_bytes(whole)
    with pytest.raises(ArtefactError, match=r"run was begun with other settings than its config.yaml has now$"):
        train(configured(pictures, **{"optim.lr": 0.003}), run, resume=True)
    train(replace(config, train=replace(config.train, report_to=None)), run, resume=True)


def test_prompts_that_are_not_finite_are_refused(pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(configured(pictures, **{"train.epochs": 1}), run)
    state = load_file(run / "prompts.safetensors")
    state["context.vectors"][0, 0] = float("nan")
    content = save(state)
    (run / "prompts.safetensors").write_bytes(content)
    prompts = sealed.read(run / "config.json")["prompts"]
    sealed.change(run / "config.json", prompts=prompts | {"sha256": sha256(content).hexdigest()})
    with pytest.raises(ArtefactError, match=r"tensor 'context.vectors' of prompts.safetensors is not finite$"):
        PromptedModel.from_pretrained(run)


def test_no_class_is_named_by_logits_that_are_not_finite(pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(configured(pictures, **{"train.epochs": 1}), run)
    model = PromptedModel.from_pretrained(run)
    model.method.context.vectors.data[:] = float("inf")
    with pytest.raises(VlpromptError, match=r"^logits of coop are not finite: its prompts, or .*, are damaged$"):
        model.predict(sorted((pictures / "train").rglob("*.png"))[:2])


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut leaves the old content or the new one: content, then name, then folder are synced in this order."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        done.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "content")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("name") or replace(a, b))
    write_atomically(tmp_path / "a" / "file", "text")
    assert done == ["content", "name", "folder"]


# --- artefacts ------------------------------------------------------------------------------------


class KilledError(BaseException):
    """What stands for a kill: no handler of errors sees it."""


def test_a_model_that_is_replaced_is_the_old_or_the_new_one_whenever_it_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = load_backbone(str(TINY))
    for seed, name in enumerate(("old", "new")):
        build = build_method("coop", tiny, ["blue", "green"], seed=seed, n_ctx=2)
        PromptedModel(build).save_pretrained(tmp_path / name)
    whole = {name: load_file(tmp_path / name / "prompts.safetensors")["context.vectors"] for name in ("old", "new")}
    new = PromptedModel.from_pretrained(tmp_path / "new", backbone=tiny)
    found, calls = [], 0
    for n in range(1, 100):
        folder, calls = tmp_path / f"killed-{n}", 0
        shutil.copytree(tmp_path / "old", folder)

        def killing(call, last=n):
            def killed(*given, **more):
                nonlocal calls
                calls += 1
                if calls >= last:
                    raise KilledError
                return call(*given, **more)

            return killed

        with monkeypatch.context() as patch:
            for place, call in ((os, "replace"), (os, "fsync"), (Path, "unlink")):
                patch.setattr(place, call, killing(getattr(place, call)))
            try:
                new.save_pretrained(folder)
            except KilledError:
                pass
            else:
                break
        vectors = PromptedModel.from_pretrained(folder, backbone=tiny).method.context.vectors
        found += [name for name, saved in whole.items() if vectors.equal(saved)]
        new.save_pretrained(folder)  # what the killed one left is in nobody's way, and does not stay
        assert sorted(f.name for f in folder.iterdir()) == ["README.md", "config.json", "prompts.safetensors"]
    assert len(found) == n - 1 > 16
    assert found == sorted(found, key=["old", "new"].index)


def test_no_changed_bit_of_an_artefact_changes_what_it_is(tmp_path: Path) -> None:
    """White space and the way that a number or text is written do not count."""
    tiny = load_backbone(str(TINY))
    PromptedModel(build_method("coop", tiny, ["blue", "green"], n_ctx=2)).save_pretrained(tmp_path)
    whole = json.loads((tmp_path / "config.json").read_text("utf-8"))
    content = (tmp_path / "config.json").read_bytes()
    same = 0
    for seed in range(100):
        (tmp_path / "config.json").write_bytes(flipped(content, seed))
        with suppress(ArtefactError):
            assert read_artefact_config(tmp_path) == {k: v for k, v in whole.items() if k != "sha256"}
            same += 1
    assert same < 20


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"format_version": ' + "[" * 5000 + "]" * 5000 + "}", '{"a": 1, "a": 2}']
)
def test_strange_json_is_no_artefact(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ArtefactError, match=r"in .*: (it is nested too deeply|'a' is in it twice)$"):
        read_artefact_config(tmp_path)


def test_a_model_card_is_no_web_page(tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)>"
    method = build_method("coop", load_backbone(str(TINY)), [name, "[a](http://b)", "`c"], n_ctx=2)
    PromptedModel(method, {"data set": "<b>&amp;", "options": "`init=<a>`</td>"}).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text("utf-8")
    assert r"| classes | &lt;img src=x onerror=alert(1)&gt;, \[a\](http://b), \`c |" in card
    assert "| data set | &lt;b&gt;&amp;amp; |" in card
    assert "| options | `init=<a>`&lt;/td&gt; |" in card


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["coop", "zero_shot"])
def test_a_run_that_was_killed_before_it_had_a_configuration_is_in_nobodys_way(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """At each of the first crash points: before, in and after the files that describe the run."""
    replace_, config = os.replace, configured(pictures, method, **{"train.epochs": 1})
    for last in range(1, 5):
        run, calls = tmp_path / f"run-{last}", 0

        def killed(source, target, last=last):
            nonlocal calls
            calls += 1
            if calls == last:
                raise KilledError
            replace_(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed)
            patch.setattr(Path, "unlink", lambda *given, **more: None)
            with pytest.raises(KilledError):
                train(config, run)
        assert any(map(is_unfinished, run.rglob(".*")))
        begun = (run / "config.yaml").exists()
        assert begun == (last > 1)
        train(saved_config(run) if begun else config, run, resume=begun)
        assert not any(map(is_unfinished, run.rglob(".*")))
    assert prompts(tmp_path / "run-1").keys() == prompts(tmp_path / "run-4").keys()


def test_a_run_is_resumed_from_any_folder(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vlprompt
) -> None:
    monkeypatch.chdir(pictures.parent)
    (tmp_path / "clip").symlink_to(TINY)
    given = {"backbone": os.path.relpath(tmp_path / "clip"), "data.name": pictures.name}
    with pytest.raises(Interrupted):
        train(configured(pictures, **given), tmp_path / "run", [StopsAfter(4)])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, _, err = vlprompt("train", "--resume", "../run")
    assert code == 0, err
    train(configured(pictures), tmp_path / "whole")
    assert (tmp_path / "run" / "prompts.safetensors").read_bytes() == (
        tmp_path / "whole" / "prompts.safetensors"
    ).read_bytes()


LONG = "x" * 300


def test_paths_that_no_system_takes_are_one_line(pictures: Path, tmp_path: Path, vlprompt, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("circle").symlink_to("circle")
    image = next(pictures.rglob("*.png"))
    for command in (
        ["train", "coop", pictures, "--out", LONG],
        ["train", "coop", pictures, "--out", "circle"],
        ["train", "coop", pictures, "--out", "circle/run"],
        ["train", "coop", LONG],
        ["train", "coop", "circle"],
        ["train", "coop", pictures, "--config", LONG],
        ["train", "coop", pictures, "--config", "/dev/zero"],
        ["train", "coop", pictures, "--backbone", LONG],
        ["train", "coop", pictures, "--bank", LONG],
        ["train", "coop", pictures, "--bank", "circle"],
        ["train", "coop", pictures, "--device", "meta"],
        ["train", "--resume", LONG],
        ["train", "--resume", "circle"],
        ["evaluate", LONG, pictures],
        ["predict", "circle", image],
        ["predict", "/dev/zero", image],
        ["predict", TINY, LONG],
        ["predict", TINY, "circle"],
        ["bank", "info", LONG],
        ["bank", "verify", "circle"],
        ["bank", "build", pictures, "--out", LONG, "--backbone", TINY],
        ["bank", "build", pictures, "--out", "circle", "--backbone", TINY],
        ["bank", "build", pictures, "--out", "bank", "--backbone", TINY, "--device", "meta"],
        ["bench", "few-shot", "--methods", "coop", "--data", LONG, "--out", "bench"],
        ["bench", "few-shot", "--methods", "coop", "--data", pictures, "--out", LONG],
        ["bench", "few-shot", "--methods", "coop", "--data", pictures, "--out", "circle"],
        ["bench", "few-shot", "--rows", "/dev/zero", "--data", pictures, "--out", "bench"],
        ["bench", "few-shot", "--rows", LONG, "--data", pictures, "--out", "bench"],
        ["report", LONG],
        ["report", "circle"],
        ["export", LONG, "--out", "x.safetensors"],
        ["convert", LONG, "x.safetensors"],
        ["demo", "--out", LONG],
    ):
        code, out, err = vlprompt(*command)
        assert (code, out) == (2, ""), (command, err)
        assert err.count("\n") == 1, err
        assert err.startswith("error: "), err
        assert len(err) < 1000, err


def test_a_row_with_a_name_too_long_for_a_folder_is_refused(pictures: Path, tmp_path: Path, vlprompt) -> None:
    rows = tmp_path / "rows.yaml"
    rows.write_text(f"method: coop\nrows:\n  {LONG}: {{n_ctx: 2}}\n")
    given = ["--data", pictures, "--split", "val", "--backbone", TINY, "--shots", 1, "--seeds", 1]
    given += ["--out", tmp_path / "bench"]
    code, _, err = vlprompt("bench", "few-shot", "--rows", rows, *given)
    assert (code, err.count("\n")) == (2, 1)
    assert err == f"error: row '{LONG[:60]}' is no name of a folder\n"
    rows.write_text("method: coop\nrows:\n  a: {n_ctx: 2}\n  b: {n_ctx: 3}\n  a: {n_ctx: 4}\n")
    code, _, err = vlprompt("bench", "few-shot", "--rows", rows, *given)
    assert (code, err) == (2, f"error: cannot read rows from {rows}: 'a' is in it twice (line 5)\n")


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")],
)
def test_memory_that_does_not_do_is_one_line_and_no_bad_image(
    pictures: Path, tmp_path: Path, vlprompt, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from vlprompt.data import images
    from vlprompt.training import loop

    def full(*given, **more):
        raise error

    given = ["train", "coop", pictures, "--backbone", TINY, "--skip-bad", "--out"]
    with monkeypatch.context() as patch:
        patch.setattr(loop.Training, "_run", full)
        code, out, err = vlprompt(*given, tmp_path / "a")
    assert (code, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith("error: out of memory: ")
    assert all(key in last for key in ("data.batch_size", "train.accumulate", "train.text_chunk"))
    if isinstance(error, MemoryError):
        monkeypatch.setattr(images.Image.Image, "load", full)
        code, out, err = vlprompt(*given, tmp_path / "b")
        assert (code, out) == (2, "")
        assert err.splitlines()[-1].startswith("error: out of memory: ")
        assert "skipped" not in err


def test_every_file_is_on_the_disk_before_it_has_its_name(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of runs, banks and benches: whatever is renamed was synced, and its folder after it."""
    written: set[int] = set()
    waiting: set[str] = set()
    renamed: list[str] = []
    fsync, replace_ = os.fsync, os.replace

    def synced(handle: int) -> None:
        fsync(handle)
        written.add(os.fstat(handle).st_ino)
        waiting.discard(os.path.realpath(f"/proc/self/fd/{handle}"))

    def moved(source, target) -> None:
        assert os.stat(source).st_ino in written, target
        assert not waiting
        replace_(source, target)
        renamed.append(Path(target).name)
        waiting.add(os.path.realpath(Path(target).parent))

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", moved)
    train(configured(pictures, **{"train.epochs": 1}), tmp_path / "run")
    assert not waiting
    assert RUN_FILES | {"last.safetensors"} <= set(renamed)
    settings = {"data.name": str(pictures), "data.workers": 0, "backbone": str(TINY), "regions": 2}
    build_bank(bank_config(settings), tmp_path / "bank")
    assert not waiting
    assert {"manifest.json", "regions-00000.npy"} <= set(renamed)
    held = computed_once(tmp_path / "shared" / "views.npy", (2, 3), np.float32, lambda: [np.ones((2, 3), np.float32)])
    assert held is not None
    assert not waiting
    assert renamed[-1] == "views.npy"


def can_mount() -> bool:
    """Whether this process may mount an ext4 image."""
    return (
        os.name == "posix"
        and os.geteuid() == 0
        and shutil.which("mkfs.ext4") is not None
        and Path("/dev/loop-control").exists()
    )


@pytest.mark.skipif(not can_mount(), reason="only who may mount can cut the power; the sync calls are counted above")
def test_a_power_cut_leaves_whole_outputs(syncs: None, pictures: Path, tmp_path: Path) -> None:
    """What a disk holds at the moment that a run, and a bank, are finished: a copy of it, taken while it is mounted."""
    disk, copy, place = tmp_path / "disk.img", tmp_path / "copy.img", tmp_path / "mounted"
    with disk.open("wb") as stream:
        stream.truncate(64 << 20)
    place.mkdir()
    subprocess.run(["mkfs.ext4", "-q", disk], check=True)
    subprocess.run(["mount", "-o", "loop", disk, place], check=True)
    try:
        train(configured(pictures, **{"train.epochs": 1}), place / "run")
        settings = {"data.name": str(pictures), "data.workers": 0, "backbone": str(TINY), "regions": 2}
        build_bank(bank_config(settings), place / "bank")
        shutil.copy(disk, copy)
        expected = {path.relative_to(place): path.read_bytes() for path in place.rglob("*.*") if path.is_file()}
    finally:
        subprocess.run(["umount", "-l", place], check=True)
    subprocess.run(["mount", "-o", "loop", copy, place], check=True)
    try:
        (place / "bank" / ".lock").unlink(missing_ok=True)  # that it was removed need not be on the disk
        found = {path.relative_to(place): path.read_bytes() for path in place.rglob("*.*") if path.is_file()}
        assert found == expected
        PromptedModel.from_pretrained(place / "run")
        verify(place / "bank")
    finally:
        subprocess.run(["umount", "-l", place], check=True)


# --- what others read -----------------------------------------------------------------------------


def test_what_a_spreadsheet_would_compute_is_text(tmp_path: Path, pictures: Path, vlprompt, monkeypatch) -> None:
    names = ("=1+1", "@SUM(A1)", "-cat", "plain")
    method = build_method("coop", load_backbone(str(TINY)), names, n_ctx=2)
    PromptedModel(method).save_pretrained(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    shutil.copy(next(pictures.rglob("*.png")), "=cmd.png")
    code, out, err = vlprompt("predict", "run", "=cmd.png", "--csv")
    assert code == 0, err
    rows = list(csv.reader(out.splitlines()))[1:]
    assert {row[0] for row in rows} == {"./=cmd.png"}
    assert {row[1] for row in rows} == {"'=1+1", "'@SUM(A1)", "'-cat", "plain"}
    row = replace(PLAIN, data="=1+1", name="@x", measured_on="'plain")
    (tmp_path / "results.csv").write_text(to_csv([row]))
    assert "'=1+1,'@x," in (tmp_path / "results.csv").read_text()
    assert read_results(tmp_path / "results.csv") == [row]


def test_no_escape_sequence_reaches_the_terminal(tmp_path: Path, pictures: Path, vlprompt) -> None:
    names = ("red\x1b]0;owned\x07", "b\u202elue")
    method = build_method("coop", load_backbone(str(TINY)), names, n_ctx=2)
    PromptedModel(method).save_pretrained(tmp_path / "run")
    code, out, _ = vlprompt("predict", tmp_path / "run", next(pictures.rglob("*.png")))
    assert code == 0
    assert r"red\x1b]0;owned\x07" in out
    assert r"b\u202elue" in out
    code, _, err = vlprompt("predict", tmp_path / "run", "\x1b[2J.png")
    assert (code, err) == (2, "error: image \\x1b[2J.png does not exist\n")
    code, _, err = vlprompt("train", "coop", pictures, "lr=\x1b[2J")
    assert code == 2
    assert "\x1b" not in err


def test_a_special_token_in_a_name_is_its_letters() -> None:
    for name in ("mini", str(TINY)):
        backbone = load_backbone(name)
        start, end = backbone.tokenizer.start, backbone.tokenizer.end
        for special in ("<|endoftext|>", "<|startoftext|>"):
            (ids,) = backbone.tokenize([f"a photo of a cat {special} dog."])
            assert set(ids[1:-1]).isdisjoint({*start, *end})
            assert ids != backbone.tokenize(["a photo of a cat  dog."])[0]
            spelled = backbone.tokenize(
                [f"a photo of a cat {' '.join([special[:2], special[2:-2], special[-2:]])} dog."]
            )
            assert ids == spelled[0]


def test_what_a_backbone_remembers_of_texts_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = load_backbone(str(TINY))
    monkeypatch.setattr(backbone_module, "TEXTS_KEPT", 100 * 4 * tiny.embed_dim)
    first = tiny.encode_texts(["a", "b"])
    for i in range(100):
        frozen_class_features(tiny, [f"name {i}", f"other {i}", "always"], ["a {}."])
        assert len(tiny._texts) <= 100
        assert len(tiny._known) <= backbone_module.LISTS_KEPT
    assert "a always." in tiny._texts
    assert "a" not in tiny._texts
    assert tiny.encode_texts(["a", "b"]).equal(first)
    assert len(tiny.encode_texts([f"{i}" for i in range(120)])) == 120
    assert len(tiny._texts) == 100
    assert all(row.untyped_storage().nbytes() == 4 * tiny.embed_dim for row in tiny._texts.values())


# --- settings -------------------------------------------------------------------------------------

DIGITS = "9" * 5000


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("weight_decay=1e300", "optim.weight_decay = 1e300 (allowed: less than or equal to 1000)"),
        ("n_ctx=1000000000000", "method.n_ctx = 1000000000000 (allowed: less than or equal to 10000)"),
        ("lr=2026-13-45", "optim.lr = '2026-13-45' (allowed: number"),
        ("epochs=2026-01-01", "train.epochs = '2026-01-01' (allowed: integer"),
        ("batch_size=1_000", "data.batch_size = '1_000' (allowed: integer"),
        ("n_ctx=0x10", "method.n_ctx = '0x10' (allowed: integer"),
        ("n_ctx=010", "method.n_ctx = '010' (allowed: integer"),
        ("epochs=1:30", "train.epochs = '1:30' (allowed: integer"),
        ("momentum=5", "optim.momentum = 5 (allowed: less than 1)"),
        ("batch_size=1e23", "data.batch_size = 1e23 (allowed: integer"),
        ("min_lr=1", "optim.min_lr = 1 (allowed: at most optim.lr = 0.002)"),
        ("lr=.inf", "optim.lr = inf (allowed: less than or equal to 10000)"),
        (f"seed={DIGITS}", "seed = 99999"),
        (f"lr={DIGITS}", "optim.lr = 99999"),
        (f"n_ctx={DIGITS[:4000]}", "method.n_ctx = 99999"),
        ("init=a\0b", r"method.init: 'a\x00b' has a zero byte in it"),
        ("init=\ud800", r"method.init: '\ud800' has half a character in it"),
        ("teacher.template=\udc80 {}", r"teacher.template = \udc80 {} (allowed: '\udc80 {}' has half a character in"),
    ],
)
def test_values_that_no_setting_has_are_refused(given: str, says: str) -> None:
    key, value = parse_override(given)
    with pytest.raises(ConfigError) as refused:
        build_config("coop", overrides={key: value})
    assert str(refused.value).startswith(says)
    assert len(str(refused.value)) < 300


def test_every_number_has_a_largest_value() -> None:
    for key, value in build_config("drople").flat().items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            with pytest.raises(ConfigError, match=rf"^{key} = 1e\+?19|^{key} = 10000000000000000000 "):
                build_config("drople", overrides={key: 10**19})


def test_plain_words_of_yaml_are_texts() -> None:
    text = "a: 0o7\nb: 1:30\nc: 010\nd: 2020-01-01\ne: off\nf: 1_0\ng: 0x1f"
    assert parse_yaml(text) == dict(
        zip("abcdefg", ["0o7", "1:30", "010", "2020-01-01", "off", "1_0", "0x1f"], strict=True)
    )
    values = {"a": 1, "b": -2.5, "c": 1e-7, "d": None, "e": True, "f": 1e30}
    assert parse_yaml(yaml.safe_dump(values)) == values
    words = [
        "yes",
        "010",
        "1_000",
        "2020-01-01",
        "1e3",
        "1:30",
        "null",
        "~",
        "true",
        "0x1f",
        "1.5",
        "12",
        "=",
        "<<",
        "",
    ]
    assert parse_yaml(yaml.safe_dump(words)) == words


DOUBLING = "a0: &a0 [1, 1]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(40))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (DOUBLING, "holds more than 20,000 values"),
        ("a: &a {x: 1}\n" + "b: {<<: [" + "*a," * MOST_NODES + "]}", "holds more than 20,000 values"),
        ("[" * 3000, "nested too deeply"),
        ("[" * 60 + "]" * 60, "nested more than 50 deep"),
        ("a: &a [*a]", "an alias stands for what it is in"),
        ("optim: {lr: 1}\nseed: 2\noptim: {momentum: 0}", r"'optim' is in it twice \(line 3\)"),
        ("optim:\n  lr: 1\n  lr: 2", r"'lr' is in it twice \(line 3\)"),
        ("x" * 300_000, "longer than 262,144"),
        (r'init: "\ud800"', "half a character"),
        (f"seed: {DIGITS}", "digits"),
    ],
)
def test_yaml_that_is_made_to_harm_is_refused(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"^cannot read configuration .*run.yaml: .*{says}") as refused:
        read_config(tmp_path / "run.yaml")
    assert len(str(refused.value)) < 500
    assert "\n" not in str(refused.value)


def test_thousands_of_unknown_keys_are_told_briefly() -> None:
    with pytest.raises(ConfigError, match=r"^unknown key 'k0'.*; and 8980 more \(allowed keys: ") as refused:
        build_config("coop", file={f"k{i}": "x" * 10_000 for i in range(9000)})
    assert len(str(refused.value)) < 4000


def test_a_device_that_never_ends_is_no_configuration() -> None:
    with pytest.raises(ConfigError, match=r"^cannot read configuration /dev/zero: it is longer than 262,144 bytes$"):
        read_config(Path("/dev/zero"))


def test_json_repeats_no_key_and_has_a_bottom() -> None:
    with pytest.raises(ValueError, match=r"^'a' is in it twice$"):
        parse_json('{"b": {"a": 1, "a": 2}}')
    with pytest.raises(ValueError, match=r"^it is nested too deeply$"):
        parse_json("[" * 100_000 + "]" * 100_000)
