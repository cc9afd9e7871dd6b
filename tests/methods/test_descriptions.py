"""Class descriptions: reading them, what each method makes of them, and where they are needed again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.kit import SHARED, TINY
from tests.kit.command import vlprompt
from tests.kit.marks import sweep
from tests.kit.pictures import CLASSES, SHADES, make_photos
from tests.kit.runs import StopsAfter, arguments, check_stopped, configured, described, prompts
from vlprompt.artefact.artefact import load_artefact
from vlprompt.artefact.export import export_classes
from vlprompt.backbones.backbone import Backbone, unit
from vlprompt.bench.protocols import Asked, plan
from vlprompt.bench.runs import do_run
from vlprompt.data.descriptions import check_descriptions, read_descriptions, texts_of
from vlprompt.errors import ArtefactError, ConfigError, DataError, Interrupted
from vlprompt.methods import Batch, Method, find_method
from vlprompt.methods.zero_shot import which
from vlprompt.training.run import train

NAMES = ("violin", "steam train", "lamp")
TEXTS = {
    "Violin": ["A violin has four strings."],
    "steam_train": ["a plume of smoke", "used on rails", "has wheels"],
    "lamp": ["bright light", "a shade"],
}


def make(backbone: Backbone, name: str, **settings) -> Method:
    torch.manual_seed(0)
    cls = find_method(name)
    method = cls(backbone, NAMES, cls.Config(**settings))
    method.take_descriptions(TEXTS)
    return method


def written(folder: Path, content: str) -> Path:
    file = folder / "texts.json"
    file.write_text(content, "utf-8")
    return file


# --- files ----------------------------------------------------------------------------------------


def test_descriptions_are_read_in_order(tmp_path: Path) -> None:
    said: list[str] = []
    found = read_descriptions(described(tmp_path, otter=["An otter."], lynx=["A lynx."], cats=["Two cats."]))
    assert found["sea horse"] == ("sea horse is a thing.", "sea horse, seen from far.")
    assert list(found) == [*CLASSES, "otter", "lynx", "cats"]
    check_descriptions(found, CLASSES[:2], [*CLASSES, "lynx"], "FILE", said.append)
    assert said == ["FILE have texts of what is no class: 'otter', 'cats' (did you mean 'cat'?)"]
    assert texts_of({"Sea_Horse": ["x"], "dog": ["y"]}, ("dog", "sea  horse"), "has") == [("y",), ("x",)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "must be a JSON object"),
        ('{"cat": "a cat"}', "must be a JSON object"),
        ('{"cat": {"a": 1}}', "must be a JSON object"),
        ('{"cat": ["a cat", 3]}', "3 of 'cat' is no text"),
        ('{"cat": ["a cat", null]}', "None of 'cat' is no text"),
        ('{"cat": [" "]}', "' ' of 'cat' is no text"),
        ('{"cat": [""]}', "'' of 'cat' is no text"),
        ('{"cat": ["\\ud800"]}', "of 'cat' is no text"),
        ('{" ": ["x"]}', "' ' is no name"),
        ('{"sea horse": ["x"], "sea_horse": ["y"]}', "'sea_horse' is there twice, as 'sea horse' too"),
        ('{"cat": ["x"], "Cat": ["y"]}', "'Cat' is there twice, as 'cat' too"),
        ('{"cat": ["x"], "cat": ["y"]}', "cannot read descriptions .*'cat' is in it twice"),
        ('{"cats": ["x"], "dog": []}', r"have no texts of 'cat', 'dog', 'sea horse' \(is 'cats' one of these\?\)"),
        ("{", "cannot read descriptions"),
    ],
)
def test_descriptions_that_are_none(tmp_path: Path, pictures: Path, content: str, message: str) -> None:
    file = written(tmp_path, content)
    with pytest.raises(DataError, match=message) as error:
        train(configured(pictures, "zero_shot", **{"data.descriptions": str(file)}), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["missing.json", "."])
def test_files_that_are_none(tmp_path: Path, place: str) -> None:
    with pytest.raises(DataError, match=r"^cannot read descriptions "):
        read_descriptions(tmp_path / place)


@pytest.mark.parametrize(
    ("name", "classes", "texts"), [("dtd", 47, 193), ("eurosat", 10, 25), ("food101", 101, 499),
                                   ("imagenet", 1000, 5800), ("pets", 37, 246)]
)  # fmt: skip
def test_published_descriptions_are_read(name: str, classes: int, texts: int, tiny: Backbone) -> None:
    """Menon and Vondrick's files, where they lie beside the repository."""
    file = SHARED / "data" / "descriptions" / f"menon_descriptors_{name}.json"
    if not SHARED.is_dir():
        pytest.skip("no shared folder")
    found = read_descriptions(file)
    assert (len(found), sum(map(len, found.values()))) == (classes, texts)
    some = [n for n in found if found[n]][:5]
    method = find_method("zero_shot")(tiny, some, find_method("zero_shot").Config(form="menon"))
    method.take_descriptions(found)
    assert method.class_features(some).shape == (5, tiny.embed_dim)


# --- zero-shot ------------------------------------------------------------------------------------


def test_zero_shot_is_the_mean_of_features_or_of_scores(tiny: Backbone) -> None:
    cupl, menon = make(tiny, "zero_shot"), make(tiny, "zero_shot", form="menon")
    train_texts = TEXTS["steam_train"]
    torch.testing.assert_close(cupl.class_features(NAMES)[1], unit(tiny.encode_texts(train_texts).mean(0)))
    v = unit(torch.randn(4, tiny.embed_dim, generator=torch.Generator().manual_seed(0)))
    read = ["steam train, which is a plume of smoke", "steam train, which is used on rails",
            "steam train, which has wheels"]  # fmt: skip
    scores = (v @ tiny.encode_texts(read).T).mean(-1)
    torch.testing.assert_close(menon.predict(v, NAMES)[:, 1], tiny.logit_scale * scores)
    assert menon.class_features(NAMES).norm(dim=-1)[1] < 0.9999
    torch.testing.assert_close(cupl.predict(v, NAMES[::-1]), cupl.predict(v, NAMES).flip(-1))
    before = cupl.predict(v, NAMES)
    cupl.descriptions = {**TEXTS, "lamp": ["a lamp"]}
    assert not torch.equal(cupl.predict(v, NAMES), before)  # what was kept is of other texts
    with pytest.raises(DataError, match=r"^zero_shot reads class .*, and has no texts of 'lamps' \(is 'lamp' one of"):
        cupl.predict(v, ("violin", "lamps", "lamp")[:2])


@pytest.mark.parametrize(
    ("text", "read"),
    [("two legs", "which has two legs"), ("a beak", "which is a beak"), ("often red", "which often red"),
     ("can be big", "which can be big"), ("used to cut", "which is used to cut"), ("has ears", "which has ears")],
)  # fmt: skip
def test_which_is_as_published(text: str, read: str) -> None:
    assert which("sea_hen", text) == f"sea hen, {read}"


def test_zero_shot_keeps_its_texts(pictures: Path, tmp_path: Path) -> None:
    file, run, more = described(tmp_path, otter=["An otter."]), tmp_path / "run", tmp_path / "more.json"
    given = ["--descriptions", str(file), "form=menon", "ensemble=imagenet"]
    done = vlprompt(*arguments("zero_shot", pictures, run, *given))
    assert done.code == 0
    assert "method.ensemble = imagenet has no effect beside data.descriptions = " in done.err
    assert "texts of what is no class: 'otter'" in done.err
    file.unlink()
    method = load_artefact(run)
    assert method.descriptions == {"cat": ["cat is a thing.", "cat, seen from far."], **method.descriptions}
    image = next(pictures.rglob("*.png"))
    own = vlprompt("predict", run, image, "--json").json["predictions"][0]["top"]
    assert {row["class"] for row in own} == set(CLASSES)
    assert vlprompt("predict", run, image, "--class-names", "Otter,cat").code == 0  # of the file, too
    refused = vlprompt("predict", run, image, "--class-names", "lynx,cat")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "zero_shot reads class descriptions (--descriptions FILE), and has no texts of 'lynx'" in refused.err
    more.write_text(json.dumps({"lynx": ["A lynx."], "CAT": ["A cat."]}))
    told = ["--descriptions", more, "--class-names", "lynx,cat"]
    assert vlprompt("predict", run, image, *told).code == 0
    assert vlprompt("export", run, *told, "--out", tmp_path / "x.safetensors").code == 0
    evaluated = vlprompt("evaluate", run, pictures, "--split", "val", "--descriptions", more, "--json").json
    assert set(evaluated["classes"]) == set(CLASSES)
    export_classes(method, CLASSES, tmp_path / "own.safetensors")


def test_other_descriptions_are_for_models_that_read_them(pictures: Path, tmp_path: Path) -> None:
    file, image = described(tmp_path), next(pictures.rglob("*.png"))
    for name, reason in (("zero_shot", "was made without any"), ("coop", "reads none of the classes")):
        train(configured(pictures, name, **{"train.epochs": 1}), tmp_path / name)
        refused = vlprompt("predict", tmp_path / name, image, "--descriptions", file)
        assert (refused.code, refused.err.count("\n")) == (2, 1)
        assert reason in refused.err
    with pytest.raises(ConfigError, match=r"^data.descriptions = .*: method 'coop' reads no descriptions$"):
        train(configured(pictures, "coop", **{"data.descriptions": str(file)}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_form_without_descriptions_is_told(pictures: Path, tmp_path: Path) -> None:
    said: list[str] = []
    train(configured(pictures, "zero_shot", **{"method.form": "menon"}), tmp_path / "run", say=said.append)
    assert "method.form = menon has no effect without data.descriptions" in said


def test_novel_classes_of_a_bench_have_the_files_texts(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos")
    file = written(tmp_path, json.dumps({name: [f"{name}, a thing"] for name in SHADES}))
    settings = {"data.descriptions": str(file), "backbone": str(TINY)}
    (run,) = plan(Asked("base-to-novel", {"zero_shot": ("zero_shot", {})}, [str(photos)], [1], [1], settings))
    figures = do_run(run, tmp_path / "bench")
    assert {m["classes"] for m in figures["measured"]} == {"base", "novel"}


def test_a_bench_looks_at_files_before_its_first_run(tmp_path: Path) -> None:
    photos, out = make_photos(tmp_path / "photos"), tmp_path / "bench"
    base, novel = sorted(SHADES)[:2], sorted(SHADES)[2]

    def refused(methods: str, *settings: str) -> str:
        given = ["--methods", methods, "--data", photos, "--shots", "1", "--seeds", "1", "--out", out]
        code, _, err = vlprompt("bench", "base-to-novel", *given, "--backbone", TINY, "epochs=1", *settings)
        assert (code, out.exists(), err.count("\n")) == (2, False, 1), err
        return err

    def texts(*names: str) -> str:
        return f"data.descriptions={written(tmp_path, json.dumps({name: [f'{name}, a thing'] for name in names}))}"

    assert "error: cannot read descriptions " in refused("zero_shot", f"data.descriptions={tmp_path / 'gone.json'}")
    lacking = f"zero_shot reads class descriptions (--descriptions FILE), and has no texts of '{novel}'"
    assert lacking in refused("zero_shot", texts(*base))
    assert f"have no texts of '{base[1]}'" in refused("drople", texts(base[0]))
    assert "method 'coop' reads no descriptions" in refused("zero_shot,coop", texts(*SHADES))
    nowhere = tmp_path / "gone"
    names = f"teacher.class_names_file={nowhere}"
    assert "error: cannot read class names from " in refused("coop", f"teacher.backbone={TINY}", names)
    assert "error: no tuned model in " in refused("coop", f"train.warm_start={nowhere}")
    says = f"error: row 'zero_shot' takes no training steps: it does nothing with {nowhere}"
    assert says in refused("zero_shot,coop", f"train.warm_start={nowhere}")


# --- what is trained ------------------------------------------------------------------------------


def batch(backbone: Backbone, n: int = 3) -> Batch:
    x = torch.randn(n, 3, backbone.image_size, backbone.image_size, generator=torch.Generator().manual_seed(1))
    return Batch(x, torch.arange(n) % 3, backbone.encode_images(x), second_view=x)


def test_droples_t0_is_the_template_with_each_text(tiny: Backbone) -> None:
    method = make(tiny, "drople")
    read = ["a photo of a lamp with bright light", "a photo of a lamp with a shade"]
    torch.testing.assert_close(method.frozen_texts()[2], unit(tiny.encode_texts(read).mean(0)))
    method.eval()
    out = method(batch(tiny))
    found = method.regularisers(out, batch(tiny))["text_consistency"]
    torch.testing.assert_close(found, 25 * (out.t - method.frozen_texts()).abs().mean())
    method.descriptions = None
    torch.testing.assert_close(method.frozen_texts(), tiny.encode_texts([f"a photo of a {n}." for n in NAMES]))


def test_lasps_references_are_the_texts(tiny: Backbone) -> None:
    method = make(tiny, "lasp")
    method.eval()
    out = method(batch(tiny))
    every = [(text, c) for c, own in enumerate(TEXTS.values()) for text in own]
    logits = tiny.logit_scale * tiny.encode_texts([text for text, _ in every]) @ out.extra[0].T
    losses = cross_entropy(logits, torch.tensor([c for _, c in every]), reduction="none")
    by_class = [losses[0], losses[1:4].mean(), losses[4:].mean()]
    found = method.regularisers(out, batch(tiny))["text_to_text"]
    torch.testing.assert_close(found, 5 * torch.stack(by_class).mean())
    grouped = make(tiny, "lasp", groups=3).eval()
    out = grouped(batch(tiny))
    third = tiny.logit_scale * tiny.encode_texts(["has wheels"]) @ out.extra[2].T
    seconds = tiny.logit_scale * tiny.encode_texts(["used on rails", "a shade"]) @ out.extra[1].T
    firsts = tiny.logit_scale * tiny.encode_texts([own[0] for own in TEXTS.values()]) @ out.extra[0].T
    parts = [cross_entropy(firsts, torch.arange(3)), cross_entropy(seconds, torch.tensor([1, 2])),
             cross_entropy(third, torch.tensor([1]))]  # fmt: skip
    torch.testing.assert_close(grouped.regularisers(out, batch(tiny))["text_to_text"], 5 * torch.stack(parts).mean())
    with pytest.raises(ConfigError, match=r"^method.groups = 4 \(allowed: 1 to 3, a class's descriptions\)$"):
        make(tiny, "lasp", groups=4)


def test_virtual_classes_need_texts(pictures: Path, tmp_path: Path) -> None:
    given = {"data.descriptions": str(described(tmp_path)), "method.virtual_classes": ["dogs"]}
    with pytest.raises(DataError, match=r"have no texts of 'dogs'$"):
        train(configured(pictures, "lasp", **given), tmp_path / "run")


@pytest.mark.parametrize("name", sweep(["drople", "lasp"], "lasp"))
def test_training_with_descriptions_resumes(name: str, pictures: Path, tmp_path: Path) -> None:
    file = described(tmp_path)
    config = configured(pictures, name, **{"data.descriptions": str(file), "train.epochs": 2})
    train(config, tmp_path / "whole")
    whole = check_stopped(config, tmp_path, 3)
    train(configured(pictures, name, **{"train.epochs": 2}), tmp_path / "without")
    assert any(not torch.equal(tensor, whole[key]) for key, tensor in prompts(tmp_path / "without").items())
    assert load_artefact(tmp_path / "whole").descriptions is None  # a tuned model needs none


def test_a_run_is_not_resumed_with_other_texts(pictures: Path, tmp_path: Path) -> None:
    config = configured(pictures, "drople", **{"data.descriptions": str(described(tmp_path))})
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run", [StopsAfter(4)])
    described(tmp_path, cat=["Another text."])
    with pytest.raises(ArtefactError, match="was begun with other class descriptions"):
        train(config, tmp_path / "run", resume=True)
