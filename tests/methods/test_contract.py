"""What a method says it can is so, for every method of the registry and for files of one's own; the rest is refused."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.kit import TINY
from tests.kit.marks import sweep
from tests.kit.pictures import write_pictures
from vlprompt.api import PromptedModel, build_method, fit
from vlprompt.artefact.artefact import load_artefact, save_artefact
from vlprompt.artefact.export import export_classes
from vlprompt.backbones.backbone import Backbone
from vlprompt.config.schema import TrainConfig, build_config, check_capabilities
from vlprompt.data.images import load_image
from vlprompt.data.reading import ImageReader
from vlprompt.errors import ArtefactError, ConfigError
from vlprompt.methods import METHODS, Batch, Can, Method, find_method, registry
from vlprompt.training.evaluate import EvaluationImages, predict_logits

NAMES = ("red square", "blue circle", "green star", "black dog", "old oak tree")

ADAPTER = '''
from dataclasses import dataclass
import torch
from torch import nn
from vlprompt.backbones.backbone import unit
from vlprompt.methods import Method, register
from vlprompt.methods.zero_shot import frozen_class_features

@register("own_adapter")
class Adapter(Method):
    """A bottleneck on image features, as in CLIP-Adapter, in the obvious way."""

    paper, year, learns, parity = "-", 2021, "a bottleneck", "identity"
    learns_prompts = False

    def build(self):
        d = self.backbone.embed_dim
        self.down, self.up = nn.Linear(d, d // 4, bias=False), nn.Linear(d // 4, d, bias=False)

    def class_features(self, class_names, image_features=None):
        return frozen_class_features(self.backbone, class_names, [self.template])

    def adapt(self, v):
        return unit(0.5 * v + 0.5 * self.up(self.down(v).relu()).relu())
'''
ENCODES = ADAPTER.replace("own_adapter", "own_encoder").replace(
    "    def adapt(self, v):\n        return",
    "    def encode_images(self, images):\n        v = super().encode_images(images)\n        return",
)
CACHE = ADAPTER.replace("own_adapter", "own_cache").replace(
    ADAPTER[ADAPTER.index("    def build") :],
    """
    def build(self):
        self.keys = nn.Parameter(torch.zeros(0, self.backbone.embed_dim))
        self.register_buffer("values", torch.zeros(0, len(self.class_names)))

    def fit_features(self, features, labels):
        self.keys = nn.Parameter(features.clone())
        self.values = torch.eye(len(self.class_names)).to(features)[labels]

    def load_inference_state(self, state):
        self.keys, self.values = nn.Parameter(state["keys"]), state["values"]

    def class_features(self, class_names, image_features=None):
        return frozen_class_features(self.backbone, class_names, [self.template])

    def logits(self, v, t):
        return super().logits(v, t) + (-5.5 * (1 - v @ self.keys.T)).exp() @ self.values
""",
)
OWN = {"own_adapter": ADAPTER, "own_encoder": ENCODES, "own_cache": CACHE}
EVERY = sorted([*METHODS, *OWN])
AS_ANOTHER = ("fdbpl_promptsrc", "ivlp", "kdpl_coop", "kdpl_maple", "kdpl_promptsrc", "kdpl_vpt", "vpt")
"""Whose losses are a mean over images as another's are."""


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, str]:
    """What each method is found by; the files' methods are forgotten afterwards."""
    for name, code in OWN.items():
        (tmp_path / f"{name}.py").write_text(code, "utf-8")
    yield {name: str(tmp_path / f"{name}.py") if name in OWN else name for name in EVERY}
    for name in OWN:
        METHODS.pop(name, None)


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    return sorted(write_pictures(tmp_path / "photos", n=2).rglob("*.png"))


def images(backbone: Backbone, n: int = 6) -> Tensor:
    size = backbone.image_size
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.double)


def views(backbone: Backbone, photos: list[Path]) -> Tensor:
    return torch.stack([backbone.preprocess(load_image(photo)) for photo in photos])


def made(source: str, backbone: Backbone) -> Method:
    """A method whose learned tensors are not those it starts with."""
    method = build_method(source, backbone, NAMES, seed=2).double()
    method.fit_features(backbone.encode_images(images(backbone)), torch.arange(6) % len(NAMES))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in method.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return method.eval()


def batch(method: Method, x: Tensor) -> Batch:
    backbone, n = method.backbone, len(NAMES)
    taught = torch.randn(len(x), n, generator=torch.Generator().manual_seed(4), dtype=torch.double).softmax(-1)
    return Batch(
        x,
        torch.arange(len(x)) % n,
        backbone.encode_images(x) if "frozen_image_features" in method.needs else None,
        taught if "teacher_probabilities" in method.needs else None,
        x + 0.1 if "second_view" in method.needs else None,
    )


# --- evaluation and export say what the method says -----------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_predict_is_what_the_method_says(name: str, double: Backbone, sources: dict[str, str]) -> None:
    method, x = made(sources[name], double), images(double)
    with torch.no_grad():
        v = method.adapt(method.encode_images(x))
        expected = method.logits(v, method.class_features(NAMES, v if method.image_dependent else None))
    torch.testing.assert_close(method.predict(x, NAMES), expected, rtol=0, atol=1e-9)
    frozen = double.encode_images(x)
    if Can.USE_FROZEN_FEATURES in method.config.can:
        torch.testing.assert_close(method.predict(frozen, NAMES), expected, rtol=0, atol=1e-9)
    else:
        with pytest.raises(ConfigError, match=f"^method '{name}' reads images, and was given their frozen features$"):
            method.predict(frozen, NAMES)


@pytest.mark.parametrize("name", EVERY)
def test_evaluation_reloading_and_export_keep_every_part(
    name: str, tiny: Backbone, sources: dict[str, str], photos: list[Path], tmp_path: Path
) -> None:
    method = build_method(sources[name], tiny, NAMES, seed=2)
    method.fit_features(tiny.encode_images(images(tiny).float()), torch.arange(6) % len(NAMES))
    with torch.no_grad():
        for p in method.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3))
    method.eval()
    x = views(tiny, photos)
    with torch.no_grad():
        v = method.adapt(method.encode_images(x))
        expected = method.logits(v, method.class_features(NAMES, v if method.image_dependent else None))
    close = {"rtol": 0, "atol": 2e-5 * tiny.logit_scale}
    with ImageReader(0) as reader:
        evaluated = predict_logits(method, EvaluationImages(photos, [0] * len(photos), reader), NAMES)
    torch.testing.assert_close(evaluated, expected, **close)
    torch.testing.assert_close(PromptedModel(method).logits(photos), expected, **close)
    out = tmp_path / "classes.safetensors"
    if Can.EXPORT_CLASSES in method.config.can:
        export_classes(method, NAMES, out)
        file = load_file(out)
        logits = file["logit_scale"] * tiny.encode_images(x) @ file["class_features"].T + file["logit_bias"]
        torch.testing.assert_close(logits, expected, **close)
    else:
        with pytest.raises(ArtefactError, match=f"^cannot export {name}: "):
            export_classes(method, NAMES, out)
    save_artefact(method, tmp_path / "saved")
    again = load_artefact(tmp_path / "saved", str(TINY)).eval()
    torch.testing.assert_close(again.predict(x, NAMES), expected, **close)


def test_kept_class_features_are_those_of_the_model_as_it_is(double: Backbone) -> None:
    """However it was changed: in place, past autograd's count of changes, or by another tensor."""
    method, x = made("coop", double), images(double)
    seen = [method.predict(x, NAMES)]
    with torch.no_grad():
        method.context.vectors.add_(0.1)
    seen.append(method.predict(x, NAMES))
    method.context.vectors.data.add_(0.1)
    seen.append(method.predict(x, NAMES))
    method.context.vectors = torch.nn.Parameter(method.context.vectors.detach() + 0.1)
    seen.append(method.predict(x, NAMES))
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    again = method.predict(x, NAMES)
    assert torch.equal(again, seen[-1])
    assert len(method._kept) == 1


def test_an_installed_method_stands_for_the_file_it_came_from(
    tiny: Backbone, sources: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path(sources["own_adapter"])
    save_artefact(build_method(str(file), tiny, NAMES), tmp_path / "saved")
    METHODS.pop("own_adapter")
    file.rename(tmp_path / "own_package.py")
    with pytest.raises(ArtefactError, match=r"own_adapter.py, which is not there: load it first"):
        load_artefact(tmp_path / "saved", str(TINY))
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("own_adapter", "own_package:Adapter", registry.GROUP)
    monkeypatch.setattr(registry, "_installed", lambda: {"own_adapter": point})
    assert load_artefact(tmp_path / "saved", str(TINY)).name == "own_adapter"


def test_a_file_is_known_by_what_was_run_of_it(tiny: Backbone, sources: dict[str, str], tmp_path: Path) -> None:
    """Not by what is in it when the model is saved: it may have been edited while the model was trained."""
    file = Path(sources["own_adapter"])
    method = build_method(str(file), tiny, NAMES)
    file.write_text(file.read_text("utf-8").replace("0.5", "0.9"), "utf-8")
    save_artefact(method, tmp_path / "saved")
    with pytest.warns(UserWarning, match=r"own_adapter.py has changed since .*saved was tuned with it"):
        load_artefact(tmp_path / "saved", tiny)
    (tmp_path / "elsewhere").mkdir()
    METHODS.pop("own_adapter")
    find_method(str(file.rename(tmp_path / "elsewhere" / "other.py")))
    with pytest.warns(UserWarning, match=r"other.py has changed since .*saved was tuned with it"):
        load_artefact(tmp_path / "saved", tiny)


def test_what_is_not_saved_is_told(tiny: Backbone, tmp_path: Path, photos: list[Path]) -> None:
    """A tensor that is neither a parameter nor a buffer, unless ``build`` makes it again."""
    code = ADAPTER.replace("own_adapter", "own_mean").replace(
        "    def class_features",
        "        self.same, self.share, self.mean = torch.randn(3).sort().values.sign() ** 2, 0.1, None\n\n"
        "    def fit_features(self, features, labels):\n        self.mean = features.mean(0)\n\n    def class_features",
    )
    (tmp_path / "own_mean.py").write_text(code, "utf-8")
    method = build_method(str(tmp_path / "own_mean.py"), tiny, NAMES)
    save_artefact(method, tmp_path / "untrained")
    method.fit_features(tiny.encode_images(views(tiny, photos)), torch.arange(len(photos)))
    with pytest.warns(UserWarning, match="^'own_mean' is saved without its mean: no parameter, no buffer$"):
        save_artefact(method, tmp_path / "saved")
    METHODS.pop("own_mean")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("class Adapter(Method)", "class Adapter", "'own_adapter' is no Method, or its Config no MethodConfig"),
        ("    def build", "    class Config:\n        pass\n\n    def build", "or its Config no MethodConfig"),
        ("paper, year, learns, parity", "_, year, _, parity", "'own_adapter' does not say its paper, learns"),
    ],
)
def test_what_is_no_whole_method(old: str, new: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(ADAPTER.replace(old, new), "utf-8")
    with pytest.raises(ConfigError, match=says):
        find_method(str(tmp_path / "own.py"))


def test_a_file_that_is_edited_and_edited_back(sources: dict[str, str]) -> None:
    file = Path(sources["own_adapter"])
    one, two = (code.encode() for code in (ADAPTER, ADAPTER.replace("0.5", "0.9")))  # in one second, of one size
    classes = []
    for content in (one, two, one, two):
        file.write_bytes(content)
        classes.append(find_method(str(file)))
        assert METHODS["own_adapter"] is classes[-1]
    assert classes[:2] == classes[2:]
    assert classes[0] is not classes[1]
    for wrong, says in ((one + b"\n1 / 0\n", "cannot be run: ZeroDivisionError"), (b"", "it registers none")):
        file.write_bytes(wrong)
        with pytest.raises(ConfigError, match=says):
            find_method(str(file))
        assert METHODS["own_adapter"] is classes[1]
    file.write_bytes(one + b"\n")  # mended
    assert find_method(str(file)).name == "own_adapter"


# --- parts equal the whole, or are refused --------------------------------------------------------


@pytest.mark.parametrize("name", sweep(EVERY, *(name for name in EVERY if name not in AS_ANOTHER)))
def test_parts_of_a_batch_are_the_whole_or_refused(name: str, double: Backbone, sources: dict[str, str]) -> None:
    method = made(sources[name], double)
    if not method.trains:
        return
    can = method.config.can
    if Can.SPLIT_BATCHES not in can:
        for processes, parts, how in ((2, 1, "2 processes"), (1, 2, "train.accumulate = 2")):
            says = f"^method '{name}' compares the images of a batch: it does not allow {how}$"
            with pytest.raises(ConfigError, match=says):
                check_capabilities(name, can, TrainConfig(accumulate=parts), processes=processes)
        return
    whole = batch(method, images(double))
    method.eval()  # no random draws: parts would draw others

    def gradients(parts: list[Batch]) -> dict[str, list[Tensor]]:
        added: dict[str, list[Tensor]] = {}
        for part in parts:
            losses = {term: len(part.labels) / 6 * value for term, value in method.losses(part).items()}
            for key, new in method.gradients(losses).items():
                added[key] = [a + b for a, b in zip(added[key], new, strict=True)] if key in added else new
        return added

    one, three = gradients([whole]), gradients(whole.parts(3))
    assert any(g.abs().max() > 1e-9 for group in one.values() for g in group)
    torch.testing.assert_close(three, one, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", EVERY)
def test_texts_in_parts_are_the_whole_or_refused(name: str, double: Backbone, sources: dict[str, str]) -> None:
    method, x = made(sources[name], double), images(double)
    if Can.SPLIT_TEXTS not in method.config.can:
        with pytest.raises(ConfigError, match=f"^train.text_chunk: method '{name}' encodes the texts of all classes"):
            check_capabilities(name, method.config.can, TrainConfig(text_chunk=2))
        return
    expected = method.predict(x, NAMES)
    method.text_chunk = 2
    torch.testing.assert_close(method.predict(x, NAMES), expected, rtol=0, atol=1e-9)


# --- a method that declares nothing -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"train.accumulate": 2}, "method 'own_adapter' compares the images of a batch: it does not allow train.accum"),
        ({"train.text_chunk": 2}, "train.text_chunk: method 'own_adapter' encodes the texts of all classes at once"),
        ({"train.graphs": True}, "train.graphs: method 'own_adapter' does other operations from step to step"),
    ],
)
def test_what_is_not_declared_is_refused(asked: dict, says: str, sources: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"^{says}"):
        build_config(sources["own_adapter"], overrides=asked)


def test_a_cache_is_filled_before_steps_change_it(tiny: Backbone, sources: dict[str, str], photos: list[Path]) -> None:
    method = build_method(sources["own_cache"], tiny, NAMES)
    fit(method, photos, [i % len(NAMES) for i in range(len(photos))], epochs=1, batch_size=2, lr=0.001, warmup_epochs=0)
    assert method.keys.shape == (len(photos), tiny.embed_dim)
    change = (method.keys - tiny.encode_images(views(tiny, photos))).abs().max().item()
    assert 1e-5 < change < 0.1
