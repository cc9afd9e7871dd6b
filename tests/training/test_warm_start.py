"""Training that begins with what was tuned before: a run, an artefact, CoOp's own checkpoint."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from shutil import copytree, rmtree

import pytest
import torch
from torch import nn

from tests.kit import TINY
from tests.kit.command import vlprompt
from tests.kit.runs import arguments, prompts
from vlprompt import PromptedModel, build_method, fit
from vlprompt.artefact.artefact import load_artefact
from vlprompt.backbones.load import load_backbone

NAMES = ("cat", "dog", "sea horse")
FINE = ("optim.lr=1e-30", "optim.warmup_lr=1e-30", "optim.momentum=0", "optim.weight_decay=0", "--epochs", 1)
"""Steps that change nothing."""


@pytest.fixture(scope="module")
def begun(pictures, tmp_path_factory) -> Path:
    """Runs of some methods."""
    out = tmp_path_factory.mktemp("begun")
    for name, method, more in [
        ("coop", "coop", ["n_ctx=2"]), ("maple", "maple", ["n_ctx=2", "depth=2"]),
        ("csc", "coop", ["n_ctx=2", "class_specific=true"]), ("linear_probe", "linear_probe", []),
    ]:  # fmt: skip
        done = vlprompt(*arguments(method, pictures, out / name, *more, "optim.lr=0.1", "train.epochs=2"))
        assert done.code == 0, done.err
    return out


@pytest.mark.parametrize(("start", "method", "more"), [
    ("coop", "coop", ["n_ctx=2"]), ("coop", "kgcoop", ["n_ctx=2"]), ("maple", "maple", ["n_ctx=2", "depth=2"]),
    ("csc", "coop", ["n_ctx=2", "class_specific=true"]),
])  # fmt: skip
def test_training_begins_there(begun, pictures, tmp_path, start, method, more):
    done = vlprompt(*arguments(method, pictures, tmp_path / "run", *more, *map(str, FINE), "--from", begun / start))
    assert done.code == 0, done.err
    before, after = prompts(begun / start), prompts(tmp_path / "run")
    assert set(before) == set(after)
    for key, value in before.items():
        torch.testing.assert_close(after[key], value)


def test_from_an_artefact_alone_and_in_python(begun, pictures, tmp_path, tiny):
    for name in ("config.json", "prompts.safetensors"):
        (tmp_path / name).write_bytes((begun / "coop" / name).read_bytes())
    method = build_method("coop", tiny, NAMES, n_ctx=2)
    images = sorted((pictures / "train").rglob("*.png"))
    fit(method, images, [p.parent.name for p in images], warm_start=tmp_path, epochs=1, lr=1e-30, warmup_lr=1e-30)
    torch.testing.assert_close(method.context.vectors.detach(), prompts(begun / "coop")["context.vectors"])


def test_a_resumed_run_needs_it_no_longer(begun, pictures, tmp_path):
    copytree(begun / "coop", tmp_path / "start")
    given = arguments("coop", pictures, tmp_path / "run", "n_ctx=2", "train.epochs=1", "--from", tmp_path / "start")
    assert vlprompt(*given).code == 0
    rmtree(tmp_path / "start")
    assert vlprompt("train", "--resume", tmp_path / "run").code == 0


def test_what_does_not_fit(begun, pictures, tmp_path, tiny):
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("config.json", "prompts.safetensors"):
        (alone / name).write_bytes((begun / "maple" / name).read_bytes())
    cases = [
        (
            "coop",
            ["n_ctx=4"],
            begun / "coop",
            "its 'context.vectors' is [2, 512], and here [4, 512] (method.n_ctx = 2 th",
        ),
        ("vpt", [], begun / "coop", "of method 'coop': it has 'context.vectors', which is not learned here"),
        ("cocoop", ["n_ctx=2"], begun / "coop", "of method 'coop': it has no 'meta_net.0.bias'"),
        ("maple", ["n_ctx=2", "depth=2"], alone, "it has no 'coupled."),
        ("coop", ["n_ctx=2"], tmp_path / "no", "no tuned model in"),
        ("coop", ["n_ctx=2", "--backbone", "mini"], begun / "coop", "it was tuned on"),
        ("zero_shot", [], begun / "coop", "takes no training steps: it begins from no tuned model (train.warm_start)"),
        (
            "coop",
            ["n_ctx=2", "class_specific=true", "--classes", "base"],
            begun / "csc",
            "prompts for each of its own cl",
        ),
    ]
    for method, more, start, says in cases:
        done = vlprompt(*arguments(method, pictures, tmp_path / "run", *more, "--from", start))
        assert (done.code, done.err.count("error: ")) == (2, 1), done.err
        text = done.err.replace("[2, 512]", "[2, 512]")
        width = tiny.text_tower.config.width
        assert says.replace("512", str(width)) in text
    assert not (tmp_path / "run").exists()


def test_words_are_no_place(begun, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(begun)
    for init in (begun / "coop", "runs/gone", "coop", "./coop"):
        done = vlprompt(*arguments("coop", pictures, tmp_path / "run", f"init={init}"))
        told = f"method.init = {init}: words are meant here, and this is a place; --from starts from a tuned model"
        assert (done.code, told in done.err) == (2, True)
    for init in ("a photo of a", "photo", "either/or of a"):
        assert vlprompt("train", "coop", pictures, f"init={init}", "--dry-run").code == 0


# --- CoOp's checkpoints ---------------------------------------------------------------------------


class Runs:
    """An object whose reading would leave a file."""

    def __reduce__(self):
        return os.mkdir, ("it-ran",)


def dassl(file: Path, backbone, state: dict | None = None, beside: object = None, csc: bool = False) -> torch.Tensor:
    """What CoOp's trainer writes: the prompt learner in fp16, and objects of its schedule; returns the context."""
    width, n_ctx = backbone.text_tower.config.width, 3
    table = backbone.text_tower.token_embedding.weight.detach()
    texts = [backbone.tokenize([f"X X X {name}."])[0] for name in NAMES]
    ids = torch.zeros(len(NAMES), 77, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = torch.as_tensor(text)
    embedded = table[ids].half()
    shape = (len(NAMES), n_ctx, width) if csc else (n_ctx, width)
    context = (0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).half()
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.grad = torch.ones(2)
    optimizer.step()
    successor = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10.0)
    weights = {
        "ctx": context,
        "token_prefix": embedded[:, :1],
        "token_suffix": embedded[:, 1 + n_ctx :],
        **(state or {}),
    }
    torch.save({
        "state_dict": weights, "epoch": 50, "optimizer": optimizer.state_dict(), "val_result": None,
        "scheduler": {"successor": successor, "last_epoch": 3, "seen": defaultdict(dict)}, "beside": beside,
    }, file)  # fmt: skip
    return context.float()


GIVEN = ["--backbone", TINY, "--class-names", ",".join(NAMES)]


@pytest.mark.parametrize("csc", [False, True])
def test_coops_own_checkpoint(tmp_path, pictures, tiny, csc):
    file, out = tmp_path / "model.pth.tar-50", tmp_path / "out"
    context = dassl(file, tiny, csc=csc)
    done = vlprompt("convert", file, out, *GIVEN)
    assert (done.code, done.err) == (0, f"coop with 3 classes on {TINY} written to {out}\n")
    method = load_artefact(out)
    assert (method.name, method.class_names, method.config.class_specific) == ("coop", NAMES, csc)
    assert torch.equal(method.context.vectors, context)
    assert vlprompt("predict", out, pictures / "val").code == 0
    more = ["n_ctx=3", *(["class_specific=true"] if csc else []), *map(str, FINE)]
    assert vlprompt(*arguments("coop", pictures, tmp_path / "run", *more, "--from", out)).code == 0
    torch.testing.assert_close(prompts(tmp_path / "run")["context.vectors"], context)


def test_cocoops(tmp_path, tiny):
    embed, width, file = tiny.embed_dim, tiny.text_tower.config.width, tmp_path / "model.pth.tar-10"
    hidden = build_method("cocoop", tiny, NAMES).meta_net[0].out_features
    shapes = {"1.weight": (hidden, embed), "1.bias": (hidden,), "2.weight": (width, hidden), "2.bias": (width,)}
    net = {f"meta_net.linear{k}": torch.randn(s) for k, s in shapes.items()}
    dassl(file, tiny, net)
    assert vlprompt("convert", file, tmp_path / "out", *GIVEN).code == 0
    model = PromptedModel.from_pretrained(tmp_path / "out")
    assert model.method.name == "cocoop"
    assert torch.equal(model.method.meta_net[2].bias, net["meta_net.linear2.bias"])


def test_checkpoints_that_are_refused(tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dassl(Path("model.pth.tar-1"), tiny)
    dassl(Path("model.pth.tar-2"), tiny, beside=Runs())
    dassl(Path("model.pth.tar-3"), tiny, {"compound_prompts_text.0": torch.ones(2)})
    dassl(Path("model.pth.tar-4"), tiny, {"ctx": torch.full((3, tiny.text_tower.config.width), float("nan"))})
    dassl(Path("model.pth.tar-5"), tiny, {"ctx": torch.ones(3, 5)})
    Path("model.pth.tar-6").write_bytes(b"no checkpoint")
    torch.save({"state_dict": {"ctx": torch.ones(3, 2, tiny.text_tower.config.width)}}, "model.pth.tar-8")
    swapped = ["--backbone", TINY, "--class-names", "dog,cat,sea horse"]
    for n, given, says in [
        (1, [], "CoOp's prompts name no backbone and no classes: --backbone, --class-names-file"),
        (1, ["--backbone", TINY], "CoOp's prompts name no backbone and no classes"),
        (1, ["--backbone", TINY, "--class-names", "a,b"], "was trained on 3 classes, and 2 class names are given"),
        (1, swapped, "was trained on other texts than 'dog' gives on"),
        (1, ["--backbone", "mini", *GIVEN[2:]], "was trained on "),
        (2, GIVEN, "cannot read model.pth.tar-2 as weights alone"),
        (3, GIVEN, "is no prompt learner of CoOp or CoCoOp: it holds 'compound_prompts_text.0'"),
        (4, GIVEN, "'ctx' is no tensor of finite numbers"),
        (5, GIVEN, "was trained on tokens of width 5"),
        (6, GIVEN, "cannot read model.pth.tar-6 as weights alone"),
        (7, GIVEN, "checkpoint model.pth.tar-7 does not exist"),
        (8, GIVEN, "model.pth.tar-8 holds no 'token_suffix': nothing in it says which context is which class's"),
    ]:
        done = vlprompt("convert", f"model.pth.tar-{n}", "out", *given)
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert says in done.err
    assert not Path("out").exists()
    assert not Path("it-ran").exists()
    assert load_backbone(str(TINY)).fingerprint == tiny.fingerprint
