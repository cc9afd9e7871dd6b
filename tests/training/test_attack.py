"""Damaged files and power cuts: told, never trained on or predicted with."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save

from tests.kit import TINY, sealed
from tests.kit.checks import flipped
from tests.kit.runs import StopsAfter, configured
from vlprompt.api import PromptedModel, build_method
from vlprompt.artefact.artefact import read_artefact_config
from vlprompt.backbones.load import load_backbone
from vlprompt.config.schema import build_config, parse_override, read_config
from vlprompt.documents import MOST_NODES, parse_json, parse_yaml
from vlprompt.errors import ArtefactError, ConfigError, Interrupted, VlpromptError
from vlprompt.files import write_atomically
from vlprompt.training.checkpoints import checkpoint_file
from vlprompt.training.run import train


def test_no_changed_bit_of_a_checkpoint_goes_unnoticed(pictures: Path, tmp_path: Path) -> None:
    config, run = configured(pictures), tmp_path / "run"
    with pytest.raises(Interrupted):
        train(config, run, [StopsAfter(4)])
    file = checkpoint_file(run)
    whole = file.read_bytes()
    for seed in range(60):
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
        ("template=\udc80 {}", r"teacher.template = \udc80 {} (allowed: '\udc80 {}' has half a character in it"),
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
