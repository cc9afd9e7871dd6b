"""Damaged files and power cuts: told, never trained on or predicted with."""

from __future__ import annotations

import json
import os
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from tests.kit.runs import StopsAfter, configured
from vlprompt.api import PromptedModel
from vlprompt.errors import ArtefactError, Interrupted, VlpromptError
from vlprompt.files import write_atomically
from vlprompt.training.checkpoints import checkpoint_file
from vlprompt.training.run import train


def flipped(content: bytes, seed: int) -> bytes:
    """The content with one bit changed, at random."""
    at = int(torch.randint(8 * len(content), (1,), generator=torch.Generator().manual_seed(seed)))
    return content[: at // 8] + bytes([content[at // 8] ^ (1 << at % 8)]) + content[at // 8 + 1 :]


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
    train(config, run, resume=True)


def test_prompts_that_are_not_finite_are_refused(pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(configured(pictures, **{"train.epochs": 1}), run)
    state = load_file(run / "prompts.safetensors")
    state["context.vectors"][0, 0] = float("nan")
    content = save(state)
    (run / "prompts.safetensors").write_bytes(content)
    config = json.loads((run / "config.json").read_text("utf-8"))
    config["prompts"]["sha256"] = sha256(content).hexdigest()
    (run / "config.json").write_text(json.dumps(config), "utf-8")
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
