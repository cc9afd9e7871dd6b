"""The Python API, the artefact, its way over the hub, and the exported class features."""

from __future__ import annotations

import json
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import vlprompt
from tests.kit import TINY, sealed
from tests.kit.command import vlprompt as command_line
from tests.kit.hub import Hub
from tests.kit.marks import sweep
from tests.kit.pictures import pictures, write_pictures
from vlprompt import PromptClassifier, PromptedModel, build_method, evaluate, fit, load_backbone, load_dataset
from vlprompt.artefact.artefact import FORMAT_VERSION
from vlprompt.config.schema import build_config
from vlprompt.errors import ArtefactError, BackboneError, ConfigError, DataError, OutputError, VlpromptError
from vlprompt.methods import METHODS, Can
from vlprompt.training.run import train

NAMES = ["blue boat", "green leaf", "red rose"]
OTHERS = ["brown bear", "grey seal"]  # not those of other files: the shared backbone remembers texts as first computed


def fails(error: type[VlpromptError], match: str):
    """An error of one line that says this."""
    return pytest.raises(error, match=rf"(?s)\A(?!.*\n).*{match}")


@pytest.fixture(scope="module")
def tuned(tiny):
    """CoOp with every parameter moved away from its start."""
    return moved(build_method("coop", tiny, NAMES, n_ctx=2))


def moved(method):
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        for tensor in method.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.05 * torch.randn_like(tensor))
    return method


@pytest.fixture
def saved(tuned, tmp_path):
    """A folder with a tuned model."""
    PromptedModel(tuned, {"data set": "toys | games", "accuracy": "91.5 %"}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# --- names ----------------------------------------------------------------------------------------


def test_import_is_light_and_names_are_lazy():
    code = (
        "import sys, vlprompt\n"
        "assert not {'torch', 'numpy', 'sklearn', 'PIL'} & set(sys.modules)\n"
        "assert set(vlprompt.__all__) <= set(dir(vlprompt))\n"
        "assert all(getattr(vlprompt, name).__name__ == name for name in vlprompt.__all__)\n"
        "assert 'torch' in sys.modules\n"
    )
    path = str(Path(vlprompt.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": path, "OMP_NUM_THREADS": "1"})
    with pytest.raises(AttributeError, match="no attribute 'load_backbon'"):
        vlprompt.load_backbon  # noqa: B018


# --- fit, evaluate, predict -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["coop", "linear_probe"])
def test_same_prompts_as_the_command_line(name, tiny, tmp_path):
    folder = write_pictures(tmp_path / "photos")
    method_settings = {"n_ctx": 2} if name == "coop" else {"C": 10.0}
    settings = {"epochs": 2, "batch_size": 4, "lr": 0.01} if name == "coop" else {}
    overrides = {"data.name": str(folder), "backbone": str(TINY), "seed": 3, **settings, **method_settings}
    reference, _ = train(build_config(name, overrides=overrides), tmp_path / "run")
    split = load_dataset(folder).split
    state = torch.get_rng_state()
    method = build_method(name, tiny, split.class_names, seed=3, **method_settings)
    assert fit(method, split.paths("train"), split.labels("train"), seed=3, **settings) is method
    assert torch.equal(torch.get_rng_state(), state)
    ours, theirs = method.inference_state(), reference.inference_state()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_fit_in_parts_to_save_memory(tiny):
    pixels, names = pictures(2)
    fitted = []
    for parts in ({}, {"accumulate": 2, "text_chunk": 2}):
        method = build_method("coop", tiny, NAMES, n_ctx=2)
        fit(method, pixels, names, epochs=2, batch_size=4, lr=0.01, warmup_epochs=0, **parts)
        assert method.text_chunk == parts.get("text_chunk")
        fitted.append(method.inference_state())
    start = build_method("coop", tiny, NAMES, n_ctx=2).inference_state()
    for name, value in fitted[0].items():
        torch.testing.assert_close(fitted[1][name], value, rtol=0, atol=1e-5)
        assert not torch.allclose(value, start[name], atol=1e-4)


def test_fit_records_graphs_on_a_gpu_only(tiny):
    pixels, names = pictures(2)
    with fails(ConfigError, "train.graphs needs a GPU"):
        fit(build_method("coop", tiny, NAMES, n_ctx=2), pixels, names, epochs=1, graphs=True)


def test_images_may_be_files_pillow_images_or_arrays(tuned, tmp_path):
    folder, (pixels, names) = write_pictures(tmp_path, n=2), pictures(2)
    paths = [folder / name.replace(" ", "_") / f"{i % 2}.png" for i, name in enumerate(names)]
    model = PromptedModel(tuned)
    expected = model.logits(pixels)
    opened = [Image.open(path) for path in paths]
    for images in (paths, [str(p) for p in paths], opened, [Image.fromarray(p) for p in pixels], list(pixels)):
        torch.testing.assert_close(model.logits(images), expected, rtol=0, atol=0)
    for image in opened:
        image.close()
    prediction = model.predict(pixels)
    assert prediction.class_names == tuple(NAMES)
    assert prediction.probabilities.shape == (6, 3)
    np.testing.assert_allclose(prediction.probabilities.sum(1), 1)
    assert prediction.names == [NAMES[c] for c in prediction.probabilities.argmax(1)]
    assert model.predict([]).probabilities.shape == (0, 3)


def test_class_names_and_labels_may_be_arrays_and_tensors(tuned):
    pixels, names = pictures(1)
    expected = evaluate(tuned, pixels, names, class_names=NAMES)
    indices = torch.tensor([NAMES.index(name) for name in names])
    assert evaluate(tuned, pixels, indices, class_names=np.array(NAMES)) == expected
    answer = PromptedModel(tuned).predict(pixels, class_names=np.array(OTHERS))
    assert answer.class_names == tuple(OTHERS)
    assert {type(name) for name in answer.class_names} == {str}


def test_rotated_and_grey_pictures_are_read_as_from_files(tuned, tmp_path):
    model, rng = PromptedModel(tuned), np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn to the right
    picture.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as turned:
        assert torch.equal(model.logits([turned]), model.logits([tmp_path / "turned.png"]))
    grey = rng.integers(0, 256, (40, 60), dtype=np.uint8)
    assert torch.equal(model.logits([grey]), model.logits([np.stack([grey] * 3, -1)]))


def test_fit_learns_and_reports_each_epoch(tiny):
    pixels, names = pictures(8)
    log = []
    method = build_method("coop", tiny, NAMES, n_ctx=2)
    fit(method, pixels, names, epochs=4, lr=0.02, batch_size=8, after_epoch=log.append)
    assert [entry.epoch for entry in log] == [0, 1, 2, 3]
    assert log[-1].losses["ce"] < log[0].losses["ce"]
    indices = [NAMES.index(name) for name in names]
    result = evaluate(method, pixels, indices)
    assert result.to_dict() == evaluate(PromptedModel(method), pixels, names).to_dict()
    assert result.n == 24
    assert evaluate(method, pixels[:2], OTHERS, class_names=OTHERS).classes == tuple(OTHERS)


def test_preset_and_dotted_keys_reach_the_loop(tiny):
    pixels, names = pictures(2)
    log = []
    fit(build_method("maple", tiny, NAMES), pixels, names, preset="cross-dataset", after_epoch=log.append)
    assert [entry.lr for entry in log] == [1e-5, 0.0026]
    log.clear()
    fit(build_method("maple", tiny, NAMES), pixels, names, **{"optim.warmup_lr": 0.5}, epochs=1, after_epoch=log.append)
    assert [entry.lr for entry in log] == [0.5]


def test_random_states_stay_as_they_are(tiny, monkeypatch):
    """Those of GPUs too: here two that there are not."""
    given_back = {}
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_rng_state", lambda device: f"state of {device}")
    monkeypatch.setattr("torch.cuda.set_rng_state", lambda state, device: given_back.update({device: state}))
    before = torch.get_rng_state()
    method = build_method("coop", tiny, NAMES, n_ctx=2)
    assert given_back == {0: "state of 0", 1: "state of 1"}
    given_back.clear()
    fit(method, *pictures(1), epochs=1)
    assert given_back == {0: "state of 0", 1: "state of 1"}
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loaded_model_is_not_fitted_by_mistake(saved):
    pixels, names = pictures(1)
    with fails(ConfigError, "coop is frozen, as loaded models are"):
        fit(PromptedModel.from_pretrained(saved).method, pixels, names)


def test_bad_input(tiny, tuned, tmp_path):
    pixels, names = pictures(1)
    model = PromptedModel(tuned)
    with fails(ConfigError, "unknown method 'cop': did you mean 'coop'"):
        build_method("cop", tiny, NAMES)
    with fails(ConfigError, "unknown setting of coop 'nctx': did you mean 'n_ctx'"):
        build_method("coop", tiny, NAMES, nctx=4)
    with fails(ConfigError, r"method.n_ctx = 0 \(allowed: greater"):
        build_method("coop", tiny, NAMES, n_ctx=0)
    with fails(ConfigError, r"template = a photo \(allowed: text with \{\} for the class name\)"):
        build_method("zero_shot", tiny, NAMES, template="a photo")
    with fails(DataError, "2 classes are named 'a'"):
        build_method("coop", tiny, ["a", "a"])
    with fails(DataError, "not one text: 'otter'"):
        build_method("coop", tiny, "otter")
    with fails(DataError, "a list of one or more"):
        build_method("coop", tiny, [])
    with fails(DataError, "class names are texts: 0 is none"):
        build_method("coop", tiny, [0, 1])
    with fails(ConfigError, "unknown training setting 'epoch': did you mean 'epochs'"):
        fit(tuned, pixels, names, epoch=1)
    with fails(ConfigError, "unknown preset of coop 'few'"):
        fit(tuned, pixels, names, preset="few")
    with fails(DataError, "3 images and 2 labels"):
        fit(tuned, pixels, names[:2])
    for rows in (torch.ones(2, 4), torch.ones(5), torch.ones(()), np.ones(3)):
        with fails(DataError, "^extra: 'row' is no tensor with a row for each of 3 images$"):
            fit(build_method("coop", tiny, NAMES, n_ctx=1), pixels, names, epochs=1, extra={"row": rows})
    with fails(DataError, "0 images and 0 labels"):
        evaluate(tuned, [], [])
    with fails(DataError, "unknown label 'red nose': did you mean 'red rose'"):
        fit(tuned, pixels, [*NAMES[:2], "red nose"])
    for label in (3, -1, 0.5, None):
        with fails(DataError, "is no class name and no index below 3"):
            fit(tuned, pixels, [0, 1, label])
    with fails(DataError, r"put the one image into brackets"):
        model.predict("photo.jpg")
    with fails(DataError, r"uint8 \[n, H, W, 3\]; found uint8 \[32, 32, 3\]"):
        model.predict(pixels[0])
    with fails(DataError, r"uint8 \[H, W, 3\] or \[H, W\], 0 to 255; found float64 \[32, 32, 3\]"):
        model.predict(pixels / 255)
    with fails(DataError, "not NoneType"):
        model.predict([None])
    with fails(DataError, "cannot read image .*gone.png: No such file"):
        model.predict([tmp_path / "gone.png"])
    (tmp_path / "half.png").write_bytes(_png(pixels[0])[:200])
    with Image.open(tmp_path / "half.png") as half, fails(DataError, "cannot read the image .*PngImageFile"):
        model.predict([half])
    with fails(DataError, "a list of one or more"):
        model.predict(pixels, class_names=[])
    with fails(DataError, "a class has no name"):
        model.predict(pixels, class_names=["otter", ""])


@pytest.mark.parametrize("seed", [-1, 1.5, None, "one", True, 2**63])
def test_bad_seeds(tiny, seed):
    pixels, names = pictures(1)
    with fails(ConfigError, rf"^seed = {str(seed).lower() if seed is True else seed} \(allowed: "):
        build_method("coop", tiny, NAMES, seed=seed)
    with fails(ConfigError, "^seed = "):
        fit(build_method("coop", tiny, NAMES, n_ctx=1), pixels, names, epochs=1, seed=seed)
    with fails(ConfigError, "^seed = "):
        PromptClassifier(backbone=tiny, epochs=1, seed=seed).fit(pixels, names)


def test_numpys_numbers_are_numbers(tiny):
    one = build_method("coop", tiny, NAMES, n_ctx=np.int64(2), seed=np.uint8(3))
    other = build_method("coop", tiny, NAMES, n_ctx=2, seed=3)
    assert torch.equal(one.context.vectors, other.context.vectors)


def test_one_thing_where_another_is_meant(tiny, tuned, saved):
    pixels, names = pictures(1)
    model = PromptedModel(tuned)
    with fails(ConfigError, r"^backbone = 'mini' is no loaded backbone: load it first, load_backbone\('mini'\)$"):
        build_method("coop", "mini", NAMES)
    with fails(ConfigError, r"^backbone = PromptedModel\(coop on .* is no loaded backbone$"):
        build_method("coop", model, NAMES)
    with fails(ConfigError, r"^method <class .*> \(allowed: a name, or a file as text\)$"):
        build_method(type(tuned), tiny, NAMES)
    with fails(
        ConfigError, "^fit takes what build_method gives, not a PromptedModel: a tuned model is not fitted again$"
    ):
        fit(model, pixels, names)
    with fails(ConfigError, "^fit takes what build_method gives, not 'coop'$"):
        fit("coop", pixels, names)
    with fails(ConfigError, "^evaluate takes a method or a PromptedModel, not 'runs/x'$"):
        evaluate("runs/x", pixels, names)
    with fails(ConfigError, "^PromptedModel takes a method, not a PromptedModel$"):
        PromptedModel(model)
    with fails(ConfigError, "^from_pretrained takes a folder or a hub id, not a CoOp$"):
        PromptedModel.from_pretrained(tuned)
    for backbone in (model, 5):
        with fails(BackboneError, "a backbone is loaded by its name or path: .* is neither"):
            PromptedModel.from_pretrained(saved, backbone=backbone)
    for teacher in (model, tiny, tuned, 3):
        with fails(ConfigError, r"^teacher: a \w+ \(allowed: a name"):
            fit(build_method("coop", tiny, NAMES, n_ctx=1), pixels, names, teacher=teacher)
    for class_names in (set(NAMES), dict.fromkeys(NAMES), 3):
        with fails(DataError, "^class names are a list of texts, in an order, not a "):
            build_method("coop", tiny, class_names)
    for labels in ("otter", 3, None):
        with fails(DataError, "^labels are a list with one for each image, not "):
            fit(tuned, pixels, labels)
    with fails(DataError, "^images are a list, not a NoneType$"):
        model.predict(None)


def _png(pixels) -> bytes:
    from io import BytesIO

    Image.fromarray(pixels).save(file := BytesIO(), "png")
    return file.getvalue()


# --- the artefact ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sweep(sorted(METHODS), "bayesian", "cocoop", "coop", "gda", "linear_probe", "maple"))
def test_a_reloaded_model_is_the_same_under_its_own_and_other_class_names(name, tiny, tmp_path):
    method = moved(build_method(name, tiny, NAMES))
    model, pixels = PromptedModel(method), pictures(1)[0]
    model.save_pretrained(tmp_path)
    loaded = PromptedModel.from_pretrained(tmp_path)
    assert repr(loaded) == f"PromptedModel({name} on {TINY!s}, 3 classes)"
    torch.testing.assert_close(loaded.logits(pixels), model.logits(pixels), rtol=1e-6, atol=1e-4)
    if name == "gda":
        with fails(DataError, "gda was not fitted"):
            loaded.predict(pixels, class_names=OTHERS)
    elif method.takes_new_classes:
        other = loaded.predict(pixels, class_names=OTHERS)
        assert other.class_names == tuple(OTHERS)
        np.testing.assert_allclose(other.probabilities, model.predict(pixels, OTHERS).probabilities, atol=1e-6)
    else:
        with fails(DataError, "."):
            loaded.predict(pixels, class_names=OTHERS)


def test_no_new_classes_for_class_specific_contexts(tiny):
    model = PromptedModel(build_method("coop", tiny, NAMES, n_ctx=2, class_specific=True))
    with fails(DataError, "coop knows its own 3 classes alone, not"):
        model.predict(pictures(1)[0], class_names=OTHERS)


def test_what_is_stored(saved, tiny, tuned):
    assert {f.name for f in saved.iterdir()} == {"config.json", "prompts.safetensors", "README.md"}
    config = json.loads((saved / "config.json").read_text())
    assert config["format_version"] == FORMAT_VERSION
    assert config["class_names"] == NAMES
    assert config["backbone"]["fingerprint"] == tiny.fingerprint
    content = (saved / "prompts.safetensors").read_bytes()
    assert config["prompts"] == {
        "sha256": sha256(content).hexdigest(),
        "shapes": {"context.vectors": [2, tiny.text_tower.config.width]},
    }
    card = (saved / "README.md").read_text()
    for text in ("coop", "blue boat, green leaf, red rose", "toys \\| games", "91.5 %", tiny.fingerprint, "licence"):
        assert text in card
    assert str(TINY.parent) not in card  # a path says something about one machine only


def test_card_survives_loading_and_saving(saved, tmp_path):
    PromptedModel.from_pretrained(saved).save_pretrained(tmp_path / "again")
    for file in saved.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_card_of_a_run_has_data_settings_and_metrics(tmp_path):
    overrides = {"data.name": str(write_pictures(tmp_path / "photos")), "backbone": str(TINY), "n_ctx": 2, "epochs": 1}
    _, result = train(build_config("coop", overrides=overrides), tmp_path / "run")
    card = (tmp_path / "run" / "README.md").read_text()
    for text in (
        "photos (all classes)", "n_ctx=2", "lr 0.002, batches of 32", f"{result.train_accuracy:.1f} %",
        f"{result.val_accuracy:.1f} %", "| seed | 1 |", "not stated by its checkpoint",
    ):  # fmt: skip
        assert text in card
    assert PromptedModel.from_pretrained(tmp_path / "run").about["seed"] == "1"


def test_a_model_is_saved_over_no_other_files(tuned, tmp_path):
    model = PromptedModel(tuned)
    for name in ("README.md", "config.json"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("mine")
        with fails(OutputError, f"{name}: it is there already, and is no tuned model's"):
            model.save_pretrained(tmp_path / name)
        assert [file.name for file in (tmp_path / name).iterdir()] == [name]
    (tmp_path / "config.json" / "config.json").write_text('{"r": 8}\n')
    (tmp_path / "config.json" / "prompts.safetensors").write_text("mine too")
    with fails(OutputError, "config.json: it is there already, and is no tuned model's"):
        model.save_pretrained(tmp_path / "config.json")
    assert (tmp_path / "config.json" / "prompts.safetensors").read_text() == "mine too"
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / ".README.md.swp").write_text("mine")
    model.save_pretrained(tmp_path / "model")  # over an earlier model
    kept = {file.name for file in (tmp_path / "model").iterdir()}
    assert kept == {"README.md", "config.json", "prompts.safetensors", ".README.md.swp"}


def test_card_names_licence_and_hub_backbone(tuned, monkeypatch, tmp_path):
    monkeypatch.setattr(tuned.backbone, "licence", "mit")
    monkeypatch.setattr(tuned.backbone, "name", "openai/clip-vit-base-patch16")
    PromptedModel(tuned).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "\nbase_model: openai/clip-vit-base-patch16\n---" in card
    assert "| backbone's licence | mit |" in card


def rewrite(folder: Path, change, *, honest: bool = False) -> None:
    """Change the tensors; ``honest`` changes their description too, so that only the method can notice."""
    state = load_file(folder / "prompts.safetensors")
    change(state)
    save_file(state, folder / "prompts.safetensors")
    if honest:
        content = (folder / "prompts.safetensors").read_bytes()
        shapes = {name: list(t.shape) for name, t in state.items()}
        edit(folder, prompts={"sha256": sha256(content).hexdigest(), "shapes": shapes})


def edit(folder: Path, **values: object) -> None:
    sealed.change(folder / "config.json", **values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("context.vectors"), "'context.vectors' is missing"),
        (lambda s: s.update(more=torch.zeros(1)), "'more' was added"),
        (lambda s: s.update({"context.vectors": torch.zeros(3, 128)}), r"is \[3, 128\] and was \[2, 128\]"),
        (lambda s: s["context.vectors"].add_(1), "content has changed"),
    ],
)
def test_other_tensors_are_noticed(saved, change, message):
    rewrite(saved, change)
    with fails(ArtefactError, f"prompts.safetensors is not the file that was saved: .*{message}"):
        PromptedModel.from_pretrained(saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("context.vectors"),
        lambda s: s.update(more=torch.zeros(1)),
        lambda s: s.update({"context.vectors": torch.zeros(3, 128)}),
    ],
)
def test_tensors_that_do_not_fit_the_method_are_noticed(saved, change):
    rewrite(saved, change, honest=True)
    with fails(ArtefactError, "does not fit coop"):
        PromptedModel.from_pretrained(saved)


def test_any_changed_byte_is_noticed(saved):
    file = saved / "prompts.safetensors"
    content = file.read_bytes()
    for position in (0, 9, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with fails(ArtefactError, "is not the file that was saved"):
            PromptedModel.from_pretrained(saved)


def test_truncated_and_missing_files(saved, tmp_path):
    file = saved / "prompts.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with fails(ArtefactError, "it is damaged"):
        PromptedModel.from_pretrained(saved)
    file.unlink()
    with fails(ArtefactError, "cannot read the tuned model in .*No such file.*prompts.safetensors"):
        PromptedModel.from_pretrained(saved)
    (saved / "config.json").write_text((saved / "config.json").read_text()[:50])
    with fails(ArtefactError, "cannot read the tuned model in "):
        PromptedModel.from_pretrained(saved)
    with fails(ArtefactError, "no tuned model in .*was the run finished"):
        PromptedModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format_version": FORMAT_VERSION + 1}, f"format_version {FORMAT_VERSION + 1}; this vlprompt reads up to"),
        ({"format_version": "new"}, "cannot read the tuned model in "),
        ({"method": "cop"}, "unknown method 'cop': did you mean 'coop'"),
        ({"settings": {"n_ctx": 0}}, "n_ctx"),
        ({"settings": {"n_ctx": 2, "more": 1}}, "unknown setting of coop 'more'"),
        ({"class_names": "otter"}, "class_names: input should be a valid list"),
        ({"prompts": {}}, "prompts.sha256: field required"),
        ({"backbone": None}, "cannot read"),
        ({"backbone": {"name": str(TINY), "fingerprint": "0" * 64}}, "has other weights"),
    ],
)
def test_configurations_that_cannot_be_used(saved, values, message):
    edit(saved, **values)
    with fails(ArtefactError, message):
        PromptedModel.from_pretrained(saved)


def test_an_artefact_without_checksums_is_refused(saved):
    config = json.loads((saved / "config.json").read_text())
    old = {k: v for k, v in config.items() if k not in ("prompts", "about")} | {"format_version": 1}
    (saved / "config.json").write_text(json.dumps(old))
    with fails(ArtefactError, "has format_version 1, of before 0.1: it has no checksums; tune it again"):
        PromptedModel.from_pretrained(saved)


def test_the_backbone_may_lie_elsewhere_but_must_be_the_same(saved):
    edit(saved, backbone={**json.loads((saved / "config.json").read_text())["backbone"], "name": "/gone/clip"})
    with fails(ArtefactError, r"tuned on backbone '/gone/clip': no backbone '/gone/clip'.*in Python: backbone="):
        PromptedModel.from_pretrained(saved)
    assert PromptedModel.from_pretrained(saved, backbone=str(TINY)).backbone.name == str(TINY)
    with fails(ArtefactError, "'mini' has other weights"):
        PromptedModel.from_pretrained(saved, backbone="mini")


def test_models_share_a_loaded_backbone(saved, tiny, tuned):
    models = [PromptedModel.from_pretrained(saved, backbone=tiny) for _ in range(2)]
    assert all(model.backbone is tiny for model in models)
    pixels = pictures(1)[0]
    assert torch.equal(models[0].logits(pixels), PromptedModel(tuned).logits(pixels))
    with fails(ArtefactError, "'mini' has other weights"):
        PromptedModel.from_pretrained(saved, backbone=load_backbone("mini"))


# --- the hub --------------------------------------------------------------------------------------


def test_there_and_back_over_the_hub(tuned, tmp_path, monkeypatch):
    hub = Hub(tmp_path, monkeypatch)
    model, pixels = PromptedModel(tuned, {"data set": "toys"}), pictures(1)[0]
    address = model.push_to_hub("someone/toys-coop", private=True, message="first")
    assert address == "https://huggingface.co/someone/toys-coop"
    assert hub.calls[0]["private"] is True
    assert hub.calls[1]["commit_message"] == "first"
    assert {f.name for f in (tmp_path / "someone/toys-coop").iterdir()} == {
        "config.json", "prompts.safetensors", "README.md",
    }  # fmt: skip
    with fails(ArtefactError, rf"tuned on backbone '{TINY.name}': no backbone"):  # no path of this machine
        PromptedModel.from_pretrained("someone/toys-coop")
    assert str(TINY) not in (tmp_path / "someone/toys-coop/config.json").read_text("utf-8")
    hub.calls.pop()
    loaded = PromptedModel.from_pretrained("someone/toys-coop", revision="main", backbone=str(TINY))
    assert hub.calls[2]["revision"] == "main"
    assert loaded.about == {"data set": "toys"}
    assert torch.equal(loaded.logits(pixels), model.logits(pixels))


def test_hub_errors_are_one_line(tuned, tmp_path, monkeypatch):
    Hub(tmp_path, monkeypatch)
    with fails(ArtefactError, "cannot upload to 'toys': bad repository name"):
        PromptedModel(tuned).push_to_hub("toys")
    with fails(ArtefactError, "no folder 'someone/gone', and not on the hub: 404"):
        PromptedModel.from_pretrained("someone/gone")


# --- export ---------------------------------------------------------------------------------------


def transformers_features(pixels) -> torch.Tensor:
    """Normalised image features of the golden backbone from transformers, without our code."""
    clip = pytest.importorskip("transformers.models.clip.modeling_clip")
    processing = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    processor = processing.CLIPImageProcessorPil.from_pretrained(str(TINY))
    images = processor(list(pixels), return_tensors="pt")["pixel_values"]
    model = clip.CLIPModel.from_pretrained(str(TINY)).float().eval()
    with torch.no_grad():
        features = model.get_image_features(images)
    features = getattr(features, "pooler_output", features)
    return features / features.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("name", ["coop", "linear_probe", "zero_shot"])
def test_exported_file_gives_the_same_logits_without_vlprompt(name, tiny, tmp_path):
    method, pixels = moved(build_method(name, tiny, NAMES)), pictures(2)[0]
    class_names = NAMES if name == "linear_probe" else OTHERS
    model, file = PromptedModel(method), tmp_path / "classes.safetensors"
    model.export(file, class_names)

    with safe_open(file, "pt") as opened:
        tensors, metadata = {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()  # noqa: SIM118
    v = transformers_features(pixels)
    logits = tensors["logit_scale"] * v @ tensors["class_features"].T + tensors["logit_bias"]

    torch.testing.assert_close(logits, model.logits(pixels, class_names), rtol=0, atol=1e-6 * tiny.logit_scale)
    assert json.loads(metadata["class_names"]) == class_names
    assert json.loads(metadata["preprocess"])["image_size"] == 32
    assert metadata["backbone_fingerprint"] == tiny.fingerprint


@pytest.mark.parametrize("name", sorted(METHODS))
def test_what_cannot_be_exported_is_refused_by_name(name, tiny, tmp_path):
    method = build_method(name, tiny, NAMES)
    file = tmp_path / "classes.safetensors"
    if Can.EXPORT_CLASSES not in method.config.can:
        with fails(ArtefactError, f"cannot export {name}: it(s class features are different| does more to images)"):
            PromptedModel(method).export(file)
        assert not file.exists()
    else:
        PromptedModel(method).export(file)
        assert file.exists()


def test_export_command(saved, tuned, tmp_path):
    out = tmp_path / "deep" / "classes.safetensors"
    code, _, err = command_line("export", saved, "--class-names", "brown bear, grey seal", "--out", out)
    assert (code, "2 classes of coop" in err) == (0, True)
    with torch.no_grad():
        assert torch.equal(load_file(out)["class_features"], tuned.class_features(OTHERS))
    code, _, err = command_line("export", saved, "--out", tmp_path / "classes.txt")
    assert (code, err) == (2, f"error: {tmp_path / 'classes.txt'} must end in .onnx or .safetensors\n")
    code, _, err = command_line("export", saved, "--class-names", "a,a", "--out", out)
    assert (code, err) == (2, "error: --class-names: 2 classes are named 'a'\n")


def test_predict_command_prints_for_people_and_for_programs(saved, tmp_path):
    folder = write_pictures(tmp_path / "photos", n=1)
    code, text, _ = command_line("predict", saved, folder, "--top", 1)
    assert (code, len(text.splitlines())) == (0, 6)
    _, rows, _ = command_line("predict", saved, folder, "--top", 1, "--csv")
    assert rows.splitlines()[0] == "image,class,probability"
    _, answer, _ = command_line("predict", saved, folder, "--top", 1, "--json")
    tops = [p["top"][0] for p in json.loads(answer)["predictions"]]
    assert [f"{t['class']},{t['probability']:.6f}" for t in tops] == [r.split(",", 1)[1] for r in rows.splitlines()[1:]]


def test_load_backbone_is_the_loader(tiny):
    assert load_backbone(str(TINY)).fingerprint == load_backbone(TINY).fingerprint == tiny.fingerprint
