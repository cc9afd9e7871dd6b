"""One ONNX file of every method: what onnxruntime answers, what the file says of itself, and what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from tests.backbones.test_backbones import write_siglip
from tests.backbones.test_more_towers import resnet as resnet  # a fixture
from tests.kit import REPOSITORY, TINY
from tests.kit.command import vlprompt
from tests.kit.marks import slow
from tests.kit.pictures import draw, pictures
from tests.kit.runs import arguments
from vlprompt.api import PromptedModel, build_method
from vlprompt.artefact.artefact import save_artefact
from vlprompt.artefact.calibration import Calibration
from vlprompt.artefact.export import as_read, export_onnx, onnx_model, onnx_session
from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.load import load_backbone
from vlprompt.data.images import Preprocess
from vlprompt.errors import ArtefactError, ConfigError, DataError, VlpromptError
from vlprompt.methods import METHODS, Method

NAMES = ("blue boat", "green leaf", "red rose")
OTHERS = ("brown bear", "grey seal")
MORE = {
    "dpl": {"instance_to_prompt": "constant"},
    "drople": {"lora_rank": 2},
    "bayesian": {"conditional": True},
    "coop": {"class_specific": True},
}
"""Options under which a method goes another way."""
OWN_GRAPHS = (
    "apt", "clip_adapter", "clip_lora", "comma", "dpl", "drople", "gda", "linear_probe", "mmrl", "plot", "prolip",
    "promptkd", "tip_adapter",
)  # fmt: skip
FAST = [(name, {}) for name in OWN_GRAPHS]
"""Those whose graph is least like another's."""
CASES = [
    pytest.param(name, options, id="-".join([name, *options]), marks=slow if (name, options) not in FAST else ())
    for name, options in [*((name, {}) for name in sorted(METHODS)), *MORE.items()]
]


def made(name: str, backbone: Backbone, **options: object) -> Method:
    """A method whose learned tensors are not those it starts with."""
    method = build_method(name, backbone, NAMES, seed=2, **options)
    generator = torch.Generator().manual_seed(3)
    x = views(backbone, 2)
    method.fit_features(backbone.encode_images(x), torch.arange(len(x)) // 2)
    with torch.no_grad():
        for p in method.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    return method.eval()


def views(backbone: Backbone, n: int) -> Tensor:
    """n preprocessed pictures of each class."""
    return torch.stack([backbone.preprocess.tensor(x) for x in pictures(n, backbone.image_size)[0]])


def refused(error: type[VlpromptError], match: str):
    """An error of one line that says this."""
    return pytest.raises(error, match=rf"(?s)\A(?!.*\n).*{match}")


def check(method: Method, names: tuple[str, ...], content: bytes, x: Tensor, images: Tensor) -> None:
    """onnxruntime gives PyTorch's probabilities and features, for one image and for all."""
    session = onnx_session(content)
    z, v = method.predict(x, names), method.encode_images(x).detach()
    for n in (1, len(x)):
        p, features = session.run(["probabilities", "image_features"], {"images": images[:n].numpy()})
        allowed = 1e-4 * z.abs().max().item()
        np.testing.assert_allclose(np.log(p + 1e-30), np.log(z[:n].softmax(-1).numpy() + 1e-30), atol=allowed, rtol=0)
        np.testing.assert_allclose(features, v[:n].numpy(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_every_method_becomes_one_file(name: str, options: dict, tiny: Backbone) -> None:
    method, x = made(name, tiny, **options), views(tiny, 2)
    content = onnx_model(method, NAMES)
    check(method, NAMES, content, x, x)
    weights = 4 * sum(p.numel() for p in tiny.image_tower.parameters())
    if not method.image_dependent:  # the text tower is not in it, and nothing is there twice
        assert len(content) < 1.2 * weights


@pytest.mark.parametrize("name", ["maple", "zero_shot"])
def test_pixels_other_names_and_what_the_file_says(name: str, tiny: Backbone, tmp_path: Path) -> None:
    method, x = made(name, tiny), views(tiny, 1)
    method.white = 4095.0
    images, file = torch.from_numpy(pictures(1, tiny.image_size)[0]), tmp_path / "new" / "model.onnx"
    PromptedModel(method).export(file, OTHERS, "uint8")
    check(method, OTHERS, file.read_bytes(), x, images)
    about = onnx_session(file).get_modelmeta().custom_metadata_map
    preprocess = json.loads(about["preprocess"])
    assert json.loads(about["class_names"]) == list(OTHERS)
    assert Preprocess(**{**preprocess, "resized": tuple(preprocess["resized"])}) == tiny.preprocess
    assert (about["method"], about["backbone_fingerprint"]) == (name, tiny.fingerprint)
    assert about["licence"] == (tiny.licence or "not stated by the backbone's checkpoint")
    assert (about["pixels"], about["white"], float(about["temperature"])) == ("uint8", "4095.0", 1.0)
    model = onnx.load(file)
    onnx.checker.check_model(model)
    assert [(x.domain, x.version) for x in model.opset_import] == [("", 17)]
    assert list(file.parent.iterdir()) == [file]


def test_a_head_takes_some_of_its_own_classes(tiny: Backbone) -> None:
    method, x, some = made("linear_probe", tiny), views(tiny, 1), ("red rose", "blue boat")
    check(method, some, onnx_model(method, some), x, x)


@pytest.mark.parametrize("names", [NAMES, OTHERS])
def test_probabilities_are_calibrated(names: tuple[str, ...], tiny: Backbone, tmp_path: Path) -> None:
    model, x = PromptedModel(made("coop", tiny)), pictures(2, tiny.image_size)[0]
    model.calibration = Calibration(2.5, ((0.1,),) * 3, "energy", None, 0.95)
    model.export(tmp_path / "model.onnx", names, "uint8")
    session = onnx_session(tmp_path / "model.onnx")
    p = session.run(["probabilities"], {"images": x})[0]
    expected = model.predict(list(x), names).probabilities
    plain = PromptedModel(model.method).predict(list(x), names).probabilities
    np.testing.assert_allclose(p, expected, atol=1e-4, rtol=0)
    assert np.abs(expected - plain).max() > 1e-3
    assert session.get_modelmeta().custom_metadata_map["temperature"] == "2.5"


def test_views_become_the_pixels_that_they_were(tiny: Backbone) -> None:
    pixels = torch.arange(256, dtype=torch.uint8)[None, :, None, None].expand(1, 256, 2, 3)
    made_of = tiny.preprocess.tensor(pixels[0].numpy())[None]
    assert torch.equal(as_read(tiny.preprocess, made_of, "uint8"), pixels)


def test_towers_of_other_kinds(resnet: Backbone, tmp_path: Path) -> None:
    for backbone in (resnet, load_backbone(str(write_siglip(tmp_path)))):
        method, x = build_method("zero_shot", backbone, NAMES), views(backbone, 1)
        check(method, NAMES, onnx_model(method, NAMES), x, x)


# --- what is refused --------------------------------------------------------------------------------


class Branches(METHODS["zero_shot"]):  # type: ignore[misc]
    """A method whose way depends on the values of images, which no traced graph follows."""

    name = "branches"

    def adapt(self, image_features: Tensor) -> Tensor:
        return image_features * (2 if image_features.shape[0] == 2 else 1)


class Python(METHODS["zero_shot"]):  # type: ignore[misc]
    name = "python"

    def logits(self, image_features: Tensor, class_features: Tensor) -> Tensor:
        return torch.special.bessel_j0(super().logits(image_features, class_features))


def test_what_onnx_does_not_reproduce_is_refused(tiny: Backbone, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    with refused(ArtefactError, r"^cannot export branches to ONNX: its logits differ from PyTorch's by .* \(allowed: "):
        export_onnx(Branches(tiny, NAMES).eval(), NAMES, file)
    with refused(ArtefactError, "^cannot export python to ONNX: .*bessel_j0"):
        export_onnx(Python(tiny, NAMES).eval(), NAMES, file)
    with refused(DataError, "^there is only one class, 'cat'"):
        export_onnx(build_method("zero_shot", tiny, NAMES), ["cat"], file)
    damaged = made("coop", tiny)
    damaged.context.vectors.data[0, 0] = torch.nan
    with refused(VlpromptError, "^logits of coop are not finite"):
        export_onnx(damaged, NAMES, file)
    with refused(ArtefactError, "^the model is in torch.float64 on cpu: load it in fp32 on the CPU$"):
        export_onnx(build_method("zero_shot", load_backbone(str(TINY)).to(dtype=torch.double), NAMES), NAMES, file)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose data set has test images."""
    out = tmp_path_factory.mktemp("runs") / "probe"
    code, _, err = vlprompt(*arguments("linear_probe", photos, out))
    assert code == 0, err
    return out


def test_command(run: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "model.onnx"
    code, _, err = vlprompt("export", run, "--format", "onnx", "--out", out)
    assert (code, f"3 classes of linear_probe on {TINY} written to {out}\n" in err) == (0, True), err
    before = out.read_bytes()
    code, _, err = vlprompt("export", run, "--out", out)
    assert (code, err) == (2, f"error: {out} is there already: delete it, or choose another name\n")
    assert out.read_bytes() == before


@slow
def test_int8_tells_what_it_costs(run: Path, photos: Path, tmp_path: Path) -> None:
    out, plain = tmp_path / "small.onnx", tmp_path / "plain.onnx"
    code, _, err = vlprompt("export", run, "--int8", "--input", "uint8", "--out", out)
    assert code == 0, err
    said = re.search(
        r"accuracy on 9 test images of photos: (\S+) % in fp32, (\S+) % in int8 \((\S+)\); (\d+) % of the size", err
    )
    assert said, err
    assert vlprompt("export", run, "--input", "uint8", "--out", plain).code == 0
    files = sorted((photos / "test").rglob("*.png"))
    images = np.stack([np.asarray(load_backbone(str(TINY)).preprocess.whole(open_(f))) for f in files])
    for file, told in ((plain, said[1]), (out, said[2])):
        p = onnx_session(file).run(["probabilities"], {"images": images})[0]
        assert f"{100 * np.mean(p.argmax(-1) == np.arange(9) // 3):.2f}" == told
    assert float(said[3]) == pytest.approx(float(said[2]) - float(said[1]), abs=0.011)
    assert round(100 * out.stat().st_size / plain.stat().st_size) == int(said[4]) < 50
    assert onnx_session(out).get_modelmeta().custom_metadata_map["pixels"] == "uint8"


def open_(file: Path):
    from PIL import Image

    return Image.open(file)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--out", "x.txt"], r"x\.txt must end in \.onnx or \.safetensors"),
        (["--format", "onnx", "--out", "x.safetensors"], r"x\.safetensors must end in \.onnx \(--format onnx\)"),
        (["--out", "x.onnx", "--class-names", "cat,dog"], "linear_probe knows its own 3 classes alone, not 'cat'"),
        (["--out", "x.onnx", "--class-names", "cat"], "there is only one class, 'cat'"),
        (["--out", "x.onnx", "--class-names", "cat,cat"], "--class-names: 2 classes are named 'cat'"),
        (["--out", "x.safetensors", "--int8"], r"--int8 is for \.onnx files, and x\.safetensors is none"),
        (["--out", "x.safetensors", "--input", "uint8"], r"--input is for \.onnx files"),
        (["--out", "x.onnx", "--data", "y"], "--data says what --int8 is measured on: give both, or neither"),
        (["--out", "x.onnx", "--int8", "--data", "y"], r"'y'"),
    ],
)  # fmt: skip
def test_bad_input(given: list[str], says: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = vlprompt("export", run, *given)
    assert (code, err.count("\n")) == (2, 1), err
    assert re.match(f"error: .*{says}", err), err
    assert not list(tmp_path.iterdir())


def test_int8_needs_images_of_the_classes(tiny: Backbone, tmp_path: Path) -> None:
    save_artefact(build_method("zero_shot", tiny, NAMES), tmp_path / "model")
    says = (
        rf"error: --int8 is measured on labelled images, and {tmp_path / 'model'} names none: say which with --data\n"
    )
    code, _, err = vlprompt("export", tmp_path / "model", "--int8")
    assert (code, bool(re.fullmatch(says, err))) == (2, True), err
    for i in range(3):
        draw(tmp_path / "cats" / "cat" / f"{i}.png", i)
        draw(tmp_path / "cats" / "dog" / f"{i}.png", 9 + i)
    code, _, err = vlprompt("export", tmp_path / "model", "--int8", "--data", tmp_path / "cats")
    assert (code, err.count("\n")) == (2, 1)
    assert "data set 'cats' has no test or val images of blue boat, green leaf, red rose to measure --int8 on" in err
    assert not (tmp_path / "model" / "model.onnx").exists()


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_what_is_not_installed_is_named_with_its_extra(
    missing: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    code, _, err = vlprompt("export", run, "--out", tmp_path / "x.onnx")
    assert (code, err) == (2, f"error: an .onnx file needs {missing}: pip install 'vlprompt[onnx]'\n")
    with refused(ConfigError, f"needs {missing}: "):
        onnx_model(build_method("zero_shot", load_backbone(str(TINY)), NAMES), NAMES)


# --- without vlprompt -------------------------------------------------------------------------------


@pytest.mark.parametrize("pixels", ["float32", "uint8"])
def test_the_example_needs_onnxruntime_numpy_and_pillow_alone(pixels: str, tiny: Backbone, tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "export.md").read_text("utf-8")
    code = re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    blocked = "import sys\nfor name in ('torch', 'vlprompt', 'onnx', 'torchvision'): sys.modules[name] = None\n"
    (tmp_path / "classify.py").write_text(blocked + code, "utf-8")
    method, sizes = made("maple", tiny), ((50, 31), (40, 40), (33, 97))
    export_onnx(method, NAMES, tmp_path / "model.onnx", pixels)
    for i, (width, height) in enumerate(sizes):
        draw(tmp_path / f"{i}.png", i, width, height)
    given = ["classify.py", "model.onnx", "0.png", "1.png", "2.png"]
    done = subprocess.run([sys.executable, *given], cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    expected = PromptedModel(method).predict([tmp_path / f"{i}.png" for i in range(3)])
    for i, line in enumerate(done.stdout.splitlines()):
        file, name, p = re.fullmatch(r"(\S+) (.+) (\S+)", line).groups()
        assert (file, name) == (f"{i}.png", expected.names[i])
        assert float(p) == pytest.approx(expected.probabilities[i].max(), abs=2e-4)
