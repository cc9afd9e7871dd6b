"""Seeded fuzzers: files that were damaged, and inputs that nobody should give, are one line or change nothing."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.kit import TINY, sealed
from tests.kit.marks import slow
from tests.kit.runs import StopsAfter, configured
from vlprompt.api import PromptedModel, build_method
from vlprompt.artefact.artefact import read_artefact_config
from vlprompt.backbones.load import load_backbone
from vlprompt.bank.build import build_bank
from vlprompt.bank.config import bank_config
from vlprompt.bank.records import Bank
from vlprompt.bench.bench import bench, read_planned
from vlprompt.bench.protocols import Asked, plan
from vlprompt.bench.report.report import checked_results, write_report
from vlprompt.bench.rows import read_rows
from vlprompt.cli import OF_THE_SYSTEM
from vlprompt.config.schema import RunConfig, build_config, parse_override, read_config
from vlprompt.data.folders import from_csv
from vlprompt.data.reading import ImageReader
from vlprompt.data.splits import names_in_file, read_split
from vlprompt.errors import Interrupted, VlpromptError
from vlprompt.methods import METHODS
from vlprompt.training.checkpoints import checkpoint_file, load_checkpoint
from vlprompt.training.prepare import build, find_sources, prepare
from vlprompt.training.run import train

LONGEST = 20  # seconds for one input, which takes milliseconds
pytestmark = slow

TOKENS = [
    b"", b"{", b"}", b"[" * 300, b"]", b'"', b":", b",", b"null", b"true", b"-1", b"NaN", b"1e999", b"9" * 5000,
    b"0x10",
    b'"\\ud800"', b'"\\u0000"', b"\x00", b"\xff\xfe", b"\x1b[2J", b"*a", b"&a ", b"<<: ", b"!!python/name:os.system ",
    b"2026-13-45", b"\r", b"\n", b";", b"\t", b"=1+1", b"'", "é".encode("latin-1"), "𝕊".encode(),
]  # fmt: skip
VALUES: list[Any] = [
    None, True, -1, 0, 1e308, -1e-308, 10**30, "", "\ud800", "\0", "=x", "../..", "x" * 10_000, [], {}, [[]], {"a": {}},
    [None], ["a", 1], list(range(100)), {str(i): i for i in range(100)},
]  # fmt: skip


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Other bytes: bits, a piece cut out, doubled, overwritten, an end cut off, something strange put in."""
    at, until = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    until = min(until, at + draw.choice([1, 4, 64, 10_000]))
    piece, token = content[at:until], draw.choice(TOKENS)
    other = draw.choice(
        [
            content[:at],
            content[:at] + content[until:],
            content[:until] + piece + content[until:],
            content[:at] + token + content[at:],
            content[:at] + token + content[until:],
            content[:at] + draw.randbytes(len(piece)) + content[until:],
            content[:at] + bytes(len(piece)) + content[until:],
            *[
                content[:at] + bytes([byte ^ 1 << draw.randrange(8)]) + content[at + 1 :]
                for byte in content[at : at + 1]
            ]
            * 4,
        ]
    )
    return other


def with_other_value(content: Any, draw: random.Random) -> Any:
    """The same JSON with one value, somewhere in it, replaced or taken away."""
    content = json.loads(json.dumps(content))
    place = content
    while True:
        key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if isinstance(place[key], dict | list) and place[key] and draw.random() < 0.7:
            place = place[key]
        elif draw.random() < 0.2:
            del place[key]
            return content
        else:
            place[key] = draw.choice(VALUES)
            return content


@contextmanager
def in_time() -> Iterator[None]:
    """Inside, what takes long is an error that nothing expects."""

    def stop(*given: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LONGEST)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def told(call: Callable[[], Any]) -> Any:
    """What it gives, or None where it is refused in one line; anything else that it raises fails the test."""
    with in_time():
        try:
            return call()
        except VlpromptError as error:
            text = str(error)
        except OSError as error:  # of which the command line makes one line
            if error.errno not in OF_THE_SYSTEM:
                raise
            text = str(error.strerror)
    assert "\n" not in text
    assert len(text) < 4000
    return None


def fuzz(n: int, file: Path, whole: bytes, seed: object, call: Callable[[], Any], expected: Any) -> int:
    """Read a file with n mutations: each is refused or changes nothing; returns how many were refused."""
    refused = 0
    for i in range(n):
        content = mutated(whole, random.Random(f"{seed}{i}"))
        file.write_bytes(content)
        found = told(call)
        assert found is None or found == expected, (i, content[:300])
        refused += found is None and content != whole
    file.write_bytes(whole)
    assert told(call) == expected
    return refused


@pytest.mark.parametrize("method", ["coop", "linear_probe", "drople"])
def test_artefacts(method: str, tmp_path: Path) -> None:
    tiny, run = load_backbone(str(TINY)), tmp_path / "run"
    PromptedModel(build_method(method, tiny, ["blue", "green", "日本"]), {"data set": "x"}).save_pretrained(run)

    def read() -> Any:
        model = PromptedModel.from_pretrained(run, backbone=tiny)
        state = {key: value.numpy().tobytes() for key, value in model.method.inference_state().items()}
        return (
            model.method.name,
            asdict(model.method.config),
            model.class_names,
            model.method.template,
            model.about,
            state,
        )

    expected = read()
    config = run / "config.json"
    assert fuzz(450, config, config.read_bytes(), method, read, expected) > 300
    prompts = run / "prompts.safetensors"
    assert fuzz(150, prompts, prompts.read_bytes(), method, read, expected) > 100
    content = sealed.read(config)
    for i in range(100):  # with its checksum
        sealed.write(config, with_other_value(content, random.Random(f"{method}{i}")))
        told(read)
        told(lambda: read_artefact_config(run))


def test_checkpoints(pictures: Path, tmp_path: Path) -> None:
    config, run = configured(pictures), tmp_path / "run"
    with pytest.raises(Interrupted):
        train(config, run, [StopsAfter(4)])
    split = read_split(run / "split.json", pictures)
    tiny = load_backbone(str(TINY))
    sources = find_sources(config, split.class_names, "a photo of a {}.", tiny)
    method = build(config, sources, tiny, "a photo of a {}.", split.class_names)
    with ImageReader(0) as reader:
        training = prepare(config, sources, method, split.paths("train"), split.labels("train"), 1, reader)
        assert training is not None

        def read() -> Any:
            history = load_checkpoint(run, training, config.fingerprint)
            state = {key: value.numpy().tobytes() for key, value in method.state_dict().items()}
            return training.epoch, training.step, training.sums, asdict(training.scale), history.rows, state

        file = checkpoint_file(run)
        assert fuzz(500, file, file.read_bytes(), "checkpoint", read, read()) > 350


def test_banks(pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bank"
    given = {"data.name": str(pictures), "data.workers": 0, "teacher.backbone": str(TINY), "backbone": str(TINY)}
    build_bank(bank_config({**given, "regions": 4, "top_k": 2}), folder)

    def read() -> Any:
        bank = Bank(folder)
        bank.verify()
        rows, regions = (each.ravel() for each in np.indices((len(bank), 4)))
        return bank.manifest, bank.read(rows, regions).tobytes()

    expected = read()
    for name, n in (("manifest.json", 250), ("regions-00000.npy", 250)):
        file = folder / name
        assert fuzz(n, file, file.read_bytes(), name, read, expected) > 0.6 * n
    content = sealed.read(folder / "manifest.json")
    for i in range(100):
        sealed.write(folder / "manifest.json", with_other_value(content, random.Random(i)))
        told(read)


def test_results(photos: Path, tmp_path: Path) -> None:
    """No mutation of any file of a bench makes ``report`` print a figure that was not measured."""
    given = {"backbone": str(TINY), "data.workers": 0}
    asked = Asked("base-to-novel", {"zero_shot": ("zero_shot", {})}, [str(photos)], [1, 2], [1], given)
    bench(plan(asked), tmp_path)
    expected = checked_results(tmp_path)
    assert len(expected) == 4

    def read() -> Any:
        return expected if set(checked_results(tmp_path)) <= set(expected) else "other rows"

    table, figures, planned = (next(tmp_path.rglob(name)) for name in ("results.csv", "figures.json", "planned.json"))
    assert fuzz(250, table, table.read_bytes(), "table", read, expected) > 120
    assert fuzz(250, figures, figures.read_bytes(), "figures", read, expected) > 120
    assert (
        fuzz(100, planned, planned.read_bytes(), "planned", lambda: read_planned(planned), read_planned(planned)) > 50
    )
    for file, content in ((figures, sealed.read(figures)), (planned, sealed.read(planned))):
        for i in range(60):
            sealed.write(file, with_other_value(content, random.Random(i)))
            told(lambda: write_report(tmp_path))
        sealed.write(file, content)


def test_settings() -> None:
    keys = sorted({*build_config("drople").flat(), *build_config("coop").flat(), "lr", "n_ctx", "nothing", "", "a.b.c"})
    for i in range(400):
        draw = random.Random(i)
        value = draw.choice(
            [token.decode("utf-8", "surrogateescape") for token in TOKENS] + [str(v)[:99] for v in VALUES]
        )

        def given(text: str = f"{draw.choice(keys)}={value}", name: str = draw.choice(sorted(METHODS))) -> RunConfig:
            return build_config(name, overrides=dict([parse_override(text)]))

        config = told(given)
        assert config is None or build_config(config.method, file=config.flat()) == config


INPUTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "run.yaml": (lambda file: build_config("coop", file=read_config(file)).flat(), build_config("coop").to_yaml()),
    "rows.yaml": (
        read_rows,
        "method: dpl\nset: {carry: add}\nrows:\n  a: {n_ctx: 2}\n  b: &b {method: coop}\n  c: *b\n",
    ),
    "names.txt": (names_in_file, "cat\ndog\nhorse_fly\n"),
    "split.json": (
        lambda file: read_split(file, file.parent),
        '{"train": [["a/1.png", 0, "cat"], ["b/1.png", 1, "dog"]], "test": [["a/2.png", 0, "cat"]]}',
    ),
    "data.csv": (from_csv, "path,label,split\na/1.png,cat,train\nb/1.png,dog,train\na/2.png,cat,test\n"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_files_that_people_write(name: str, tmp_path: Path) -> None:
    """What they say may change; that they say it in a way that is not theirs may not."""
    read, text = INPUTS[name]
    file = tmp_path / name
    for i in range(60):
        file.write_bytes(mutated(text.encode(), random.Random(f"{name}{i}")))
        told(lambda: read(file))


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer_config.json"])
def test_backbone_configurations(name: str, tmp_path: Path) -> None:
    """Another configuration is refused, or it is another backbone: the fingerprint tells."""
    folder = shutil.copytree(TINY, tmp_path / "clip")
    whole, fingerprint = (folder / name).read_bytes(), load_backbone(str(folder)).fingerprint
    content = json.loads(whole)
    for i in range(30):
        draw = random.Random(i)
        (folder / name).write_text(json.dumps(with_other_value(content, draw)))
        told(lambda: load_backbone(str(folder)))
        (folder / name).write_bytes(mutated(whole, draw))
        told(lambda: load_backbone(str(folder)))
    (folder / name).write_bytes(whole)
    assert load_backbone(str(folder)).fingerprint == fingerprint
