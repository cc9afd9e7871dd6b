"""Backbones from the hub, under the names people know, against a stand-in with the file lists of real repositories."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizerFast

from tests.backbones.test_backbones import (
    OPEN_CLIP,
    Payload,
    changed,
    check_parity,
    clip,
    clip_ids,
    open_clip,  # noqa: F401, a fixture
    openai_state,
    refused,
    write_hf,
    write_open_clip,
    write_tokenizer,
)
from tests.kit.hub import Hub
from vlprompt.backbones.convert import convert
from vlprompt.backbones.load import load_backbone
from vlprompt.backbones.names import hub_id, public_name
from vlprompt.bench.rows import backbone_name
from vlprompt.errors import BackboneError

CARD = [".gitattributes", "README.md"]
CLIP_TEXT = ["merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
LISTS = {
    "openai/clip-vit-base-patch16": [
        *CARD, *CLIP_TEXT, "config.json", "flax_model.msgpack", "preprocessor_config.json", "pytorch_model.bin",
    ],
    "openai/clip-vit-base-patch32": [
        *CARD, *CLIP_TEXT, "config.json", "flax_model.msgpack", "preprocessor_config.json", "pytorch_model.bin",
        "tf_model.h5",
    ],
    "openai/clip-vit-large-patch14": [
        *CARD, *CLIP_TEXT, "config.json", "flax_model.msgpack", "model.safetensors", "preprocessor_config.json",
        "pytorch_model.bin", "tf_model.h5",
    ],
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K": [
        *CARD, *CLIP_TEXT, "config.json", "model.safetensors", "open_clip_config.json", "open_clip_model.safetensors",
        "open_clip_pytorch_model.bin", "preprocessor_config.json", "pytorch_model.bin",
    ],
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": [
        *CARD, *CLIP_TEXT, "config.json", "open_clip_config.json", "open_clip_pytorch_model.bin",
        "preprocessor_config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin",
        "pytorch_model.bin.index.json",
    ],
    "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224": [
        *CARD, "biomed-vlp-eval.svg", "biomed_clip_example.ipynb", "open_clip_config.json",
        "open_clip_pytorch_model.bin", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
        "vocab.txt",
    ],
}  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(tmp_path / "hub", monkeypatch)


def fill(hub: Hub, repo: str, made: Path) -> None:
    """A repository with the files of the real one: those that ``made`` has, and no more than bytes for the others."""
    for name in LISTS[repo]:
        file, source = hub.root / repo / name, made / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(source.read_bytes() if source.is_file() else b"not asked for")


def written(folder: Path) -> Path:
    """All forms of a small CLIP, as transformers and open_clip write them."""
    write_hf(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    write_open_clip(folder, state=openai_state(clip("gelu", 4)))
    torch.save(openai_state(clip("gelu", 4)), folder / "open_clip_pytorch_model.bin")
    CLIPTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    settings = {"size": {"shortest_edge": 32}, "crop_size": 32}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize(
    ("name", "repo", "weights"),
    [
        ("openai/clip-vit-base-patch16", "openai/clip-vit-base-patch16", "pytorch_model.bin"),
        ("ViT-B/16", "openai/clip-vit-base-patch16", "pytorch_model.bin"),
        ("vit-b/32", "openai/clip-vit-base-patch32", "pytorch_model.bin"),
        ("hf-hub:openai/clip-vit-large-patch14", "openai/clip-vit-large-patch14", "model.safetensors"),
        ("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", None, "open_clip_model.safetensors"),
        ("hf-hub:laion/CLIP-ViT-H-14-laion2B-s32B-b79K", None, "open_clip_pytorch_model.bin"),
    ],
)
def test_one_form_of_the_weights_is_fetched(hub: Hub, made: Path, name: str, repo: str | None, weights: str) -> None:
    repo = repo or name.removeprefix("hf-hub:")
    fill(hub, repo, made)
    backbone = load_backbone(name)
    model = clip("gelu", 4) if weights.startswith("open_clip") else clip()
    assert backbone.name == public_name(backbone.name) == repo
    check_parity(backbone, model, clip_ids(made))
    endings = (".bin", ".safetensors", ".h5", ".msgpack")
    assert [file for file in hub.fetched if file.endswith(endings)] == [weights]
    first = hub.fetched.index(weights)
    assert {"config.json", "open_clip_config.json"} & set(hub.fetched[:first])
    fetched = list(hub.fetched)
    hub.offline = True
    assert load_backbone(name).fingerprint == backbone.fingerprint
    assert hub.fetched == fetched


def test_weights_in_several_parts(hub: Hub, made: Path) -> None:
    """The index says which; old parts are converted like a single old file."""
    repo = hub.root / "owner" / "parts"
    repo.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        shutil.copy(made / name, repo / name)
    state = load_file(made / "model.safetensors")
    names = sorted(state)
    weight_map = {}
    for n, part in enumerate((names[:30], names[30:]), 1):
        file = f"pytorch_model-0000{n}-of-00002.bin"
        torch.save({k: state[k] for k in part}, repo / file)
        weight_map |= dict.fromkeys(part, file)
    (repo / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (repo / "optimizer.bin").write_bytes(b"x")
    check_parity(load_backbone("owner/parts"), clip(), clip_ids(made))
    assert [f for f in hub.fetched if f.endswith(".bin")] == sorted(set(weight_map.values()))


def test_configuration_comes_before_weights(hub: Hub, made: Path, tmp_path: Path) -> None:
    """What is refused costs a few small files, not the weights."""
    name = "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
    config = {
        "embed_dim": 512,
        "vision_cfg": {"timm_model_name": "vit_base_patch16_224", "timm_proj": "linear", "image_size": 224},
        "text_cfg": {"hf_model_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract", "proj": "mlp"},
    }
    fill(hub, name, write_open_clip(tmp_path / "biomed", config))
    refused(name, match="unsupported architecture: open_clip text_cfg with hf_model_name = microsoft/BiomedNLP-")
    assert hub.fetched == ["open_clip_config.json"]

    fill(hub, "openai/clip-vit-base-patch32", made)
    config_file = hub.root / "openai/clip-vit-base-patch32" / "config.json"
    config_file.write_text(json.dumps({**json.loads(config_file.read_text()), "model_type": "blip"}))
    hub.fetched.clear()
    refused("ViT-B/32", match="unsupported architecture 'blip' (allowed: clip, siglip)")
    assert set(hub.fetched) == {"config.json", "preprocessor_config.json"}
    settings = hub.root / "openai/clip-vit-base-patch16" / "preprocessor_config.json"
    fill(hub, "openai/clip-vit-base-patch16", made)
    settings.write_text(json.dumps({"do_rescale": False}))
    hub.fetched.clear()
    refused("ViT-B/16", match="do_rescale = False (allowed: true)")
    assert set(hub.fetched) == {"config.json", "preprocessor_config.json"}


def test_repositories_without_a_backbone(hub: Hub) -> None:
    for repo, files, match in (
        ("owner/nothing", ["README.md"], "no backbone in owner/nothing: needs config.json or open_clip_config.json"),
        ("owner/flax", ["config.json", "flax_model.msgpack"], "no weights in owner/flax beside its config.json"),
        ("owner/old", ["config.json", "epoch_3.pt"], "no model.safetensors in owner/old: convert older weights first"),
    ):
        for file in files:
            (hub.root / repo).mkdir(parents=True, exist_ok=True)
            (hub.root / repo / file).write_bytes(b"{}")
        refused(repo, match=match)
    refused("nobody/none", match="cannot fetch 'nobody/none' from the hub: no network: no such repository")
    assert hub.fetched == []


def test_names() -> None:
    assert hub_id("ViT-L/14@336px") == "openai/clip-vit-large-patch14-336"
    assert hub_id("RN50") == "timm/resnet50_clip.openai"
    assert hub_id("hf-hub:owner/name") == hub_id("owner/name") == "owner/name"
    assert hub_id("./owner/name") is hub_id("name") is hub_id("/a") is None
    refused("ViT-B-16", match="no backbone 'ViT-B-16': did you mean 'ViT-B/16'?")


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_hf(tmp_path / "ViT-B" / "16")
    assert load_backbone("ViT-B/16").name == "ViT-B/16"


# ------------------------------------------------------------------------------------------------ older weights


def test_bin_is_read_once_and_kept_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path / "model")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / "open_clip_config.json").unlink()
    check_parity(load_backbone(folder), clip(), clip_ids(folder))
    kept, calls, real = folder / "pytorch_model.safetensors", [], torch.load
    old = folder / "open_clip_pytorch_model.bin"
    monkeypatch.setattr(torch, "load", lambda *a, **k: calls.append(1) or real(*a, **k))
    first = load_backbone(folder).fingerprint
    assert kept.is_file()
    assert not calls

    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    state["logit_scale"] += 1
    torch.save(state, folder / "pytorch_model.bin")  # another file now: what was kept is not used
    os.utime(folder / "pytorch_model.bin", ns=(1, 1))
    assert load_backbone(folder).fingerprint != first
    assert load_backbone(folder).logit_scale == pytest.approx(torch.tensor(5.60546875).exp().item())
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP, "preprocess_cfg": {}}))
    (folder / "config.json").unlink()
    for scale in (4.5, 4.0):  # what was kept has a name that weights of their own may have
        torch.save(openai_state(clip("gelu", 4)) | {"logit_scale": torch.tensor(scale)}, old)
        os.utime(old, ns=(1, int(10 * scale)))
        assert load_backbone(folder).logit_scale == pytest.approx(torch.tensor(scale).exp().item())
        assert old.with_suffix(".safetensors").is_file()
    old.unlink()
    assert load_backbone(folder).logit_scale == pytest.approx(torch.tensor(4.0).exp().item())


def test_a_file_of_the_kept_name_is_left_alone(tmp_path: Path) -> None:
    folder = written(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "open_clip_config.json").unlink()
    kept = folder / "pytorch_model.safetensors"
    kept.write_bytes(b"damaged")
    check_parity(load_backbone(folder), clip(), clip_ids(folder))
    assert kept.read_bytes() == b"damaged"  # not ours: left alone


def test_bin_that_is_more_than_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = written(tmp_path / "model")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / "open_clip_config.json").unlink()
    torch.save({"w": Payload()}, folder / "pytorch_model.bin")
    refused(str(folder), match="pytorch_model.bin holds objects beside tensors and plain values: it is not read")
    assert not Path("code-ran").exists()
    assert not list(folder.glob("*.safetensors"))


# ------------------------------------------------------------------------------- state dicts that do not say enough


def write_state(file: Path, wrapper: str = "") -> Path:
    state = {wrapper + k: v for k, v in openai_state(clip("gelu", 4)).items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save({"epoch": 3, "state_dict": state, "optimizer": {"state": {}}}, file)
    return file


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_bare_open_clip_weights_need_a_configuration(tmp_path: Path, wrapper: str) -> None:
    """Heads and activation are not in them: nothing is guessed."""
    file = write_state(tmp_path / "epoch_3.safetensors", wrapper)
    write_tokenizer(tmp_path)
    refused(str(file), match=f"{file} does not say its architecture (heads and activation), and is not OpenAI's")
    refused(str(file), match=f"put its open_clip_config.json beside it, or name its model: open_clip:MODEL/{file}")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP, "preprocess_cfg": {}}))
    backbone = load_backbone(str(file))
    check_parity(backbone, clip("gelu", 4), clip_ids(tmp_path))
    assert backbone.image_tower.config.heads == 4


@pytest.mark.parametrize("wrapper", ["net.", "module", "student."])
def test_no_other_wrapper_is_unwrapped(tmp_path: Path, wrapper: str) -> None:
    file = write_state(tmp_path / "model.safetensors", wrapper)
    refused(str(file), match=f"unsupported architecture: {file} is no CLIP state dict")


def test_partly_wrapped_names_stay(tmp_path: Path) -> None:
    folder = write_open_clip(tmp_path)
    state = {k if "scale" in k else f"module.{k}": v for k, v in openai_state(clip("gelu", 4)).items()}
    write_open_clip(folder, state=state)
    refused(str(folder), match="checkpoint lacks tensor 'visual.conv1.weight'")


def test_hugging_face_weights_by_their_file(tmp_path: Path) -> None:
    folder = write_hf(tmp_path)
    check_parity(load_backbone(folder / "model.safetensors"), clip(), clip_ids(folder))
    (folder / "config.json").unlink()
    refused(str(folder / "model.safetensors"), match="put its config.json beside it")


def test_a_configuration_that_does_not_fit_is_told(tmp_path: Path) -> None:
    config = changed(OPEN_CLIP, "vision_cfg.image_size", [32, 64])
    refused(str(write_open_clip(tmp_path, config)), match="open_clip vision_cfg that is not square: [32, 64]")
    for key in ("width", "layers", "patch_size", "head_width", "mlp_ratio", "image_size"):
        for bad in ("thirty", None, {"a": 1}, -3, 0, 1.5, 10**9):
            write_open_clip(tmp_path, changed(OPEN_CLIP, f"vision_cfg.{key}", bad))
            with pytest.raises(BackboneError) as caught:
                load_backbone(tmp_path)
            assert "\n" not in str(caught.value)
    folder = write_hf(tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    for path in ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size"):
        for side in ("vision_config", "text_config"):
            for bad in ("thirty", None, [1], 7, -1):
                (folder / "config.json").write_text(json.dumps(changed(config, f"{side}.{path}", bad)))
                with pytest.raises(BackboneError) as caught:
                    load_backbone(folder)
                assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------- one's own checkpoint of an open_clip model


@pytest.mark.usefixtures("open_clip")
@pytest.mark.parametrize("name", ["epoch_3.pt", "open_clip_pytorch_model.bin", "model.safetensors"])
def test_own_checkpoint_of_an_open_clip_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """``open_clip:MODEL/FILE``: the library says the architecture, the file has the weights, and is found again."""
    file = write_state(tmp_path / "own" / name, "module.")
    backbone = load_backbone(f"open_clip:tiny/{file}")
    check_parity(backbone, clip("gelu", 4), clip_ids(write_tokenizer(tmp_path / "reference")))
    assert public_name(backbone.name) == f"open_clip:tiny/{name}"
    monkeypatch.chdir(tmp_path)
    again = load_backbone(f"open_clip:tiny/own/{name}")
    assert (again.name, again.fingerprint) == (backbone.name, backbone.fingerprint)
    quick = load_backbone(f"open_clip:tiny-quickgelu/own/{name}")
    assert quick.text_tower.config.activation == "quick_gelu"
    assert quick.fingerprint != backbone.fingerprint


@pytest.mark.usefixtures("open_clip")
def test_own_checkpoints_refused(tmp_path: Path) -> None:
    refused(f"open_clip:tiny/{tmp_path}/no.pt", match=f"checkpoint {tmp_path}/no.pt does not exist")
    torch.save({"w": Payload()}, tmp_path / "object.pt")
    refused(f"open_clip:tiny/{tmp_path}/object.pt", match="object.pt holds objects beside tensors")
    file = write_state(tmp_path / "other.pt")
    refused(f"open_clip:tower/{file}", match="open_clip vision_cfg with timm_model_name = vit_base_mci_224")


def test_convert_keeps_what_shows_openai(tmp_path: Path) -> None:
    """Their three numbers, tensors or not: after it the file loads without a configuration."""
    numbers = {"input_resolution": 32, "context_length": torch.tensor(40), "vocab_size": 6362}
    torch.save(openai_state() | numbers, tmp_path / "clip.pt")
    write_tokenizer(tmp_path)
    convert(tmp_path / "clip.pt", tmp_path / "clip.safetensors")
    check_parity(load_backbone(tmp_path / "clip.safetensors"), clip(), clip_ids(tmp_path))
    torch.save(openai_state(), tmp_path / "bare.pt")
    convert(tmp_path / "bare.pt", tmp_path / "bare.safetensors")
    refused(str(tmp_path / "bare.safetensors"), match="does not say its architecture (heads and activation)")


def test_a_bench_names_the_repository() -> None:
    """So that published figures are found whichever name the weights were asked for by."""
    assert {backbone_name(n) for n in ("ViT-B/16", "hf-hub:openai/clip-vit-base-patch16")} == {
        backbone_name("openai/clip-vit-base-patch16")
    }
    assert backbone_name("mini") == "mini"
    assert backbone_name("open_clip:ViT-B-16/openai") == "open_clip-ViT-B-16-openai"
