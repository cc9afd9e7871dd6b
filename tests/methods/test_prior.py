"""A language model's prior: its last layer, what it is asked about classes, and what DroPLe learns of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.kit import TINY
from tests.kit.command import vlprompt
from tests.kit.language import save_model
from tests.kit.pictures import CLASSES
from tests.kit.runs import StopsAfter, arguments, check_stopped, configured
from vlprompt.artefact.artefact import load_artefact
from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.load import load_backbone
from vlprompt.describe import describe as making
from vlprompt.describe.describe import QUESTIONS, describe
from vlprompt.describe.language import LanguageModel, load_language_model
from vlprompt.errors import ArtefactError, BackboneError, ConfigError, DataError, Interrupted
from vlprompt.methods import Batch, find_method
from vlprompt.methods.drople import drople as code
from vlprompt.methods.drople.prior import TRAINED
from vlprompt.prompting.prior import Past, decode, read_prior
from vlprompt.training.run import train

ASKED = ("what does a {} look like?", "which fur has a {}", "describe a {} , one red {}")
CHAT = "{% for m in messages %}<s> {{ m.content }} {% endfor %}"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "llama", chat=CHAT)


@pytest.fixture(scope="module")
def language(llama: Path) -> LanguageModel:
    return load_language_model(llama, "cpu", "fp32")


@pytest.fixture(scope="module")
def prior_file(language: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("priors") / "prior.safetensors"
    describe(language, [*CLASSES, "lamp"], ASKED, out, 10)
    return out


def drople(backbone: Backbone, names: tuple[str, ...] = CLASSES, **settings):
    torch.manual_seed(0)
    cls = find_method("drople")
    return cls(backbone, names, cls.Config(**{"prior_tokens": 5, **settings}))


def batch(backbone: Backbone, n: int = 4) -> Batch:
    x = torch.randn(n, 3, backbone.image_size, backbone.image_size, generator=torch.Generator().manual_seed(1))
    x = x.to(backbone.dtype)
    return Batch(x, torch.arange(n) % 3, backbone.encode_images(x), second_view=x + 0.1)


# --- the layer ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("Llama", {}),
        ("Llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3}),
        ("Llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                    "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}),
        ("Mistral", {}),
        ("Qwen2", {}),
    ],
)  # fmt: skip
def test_the_layer_is_the_models_own(kind: str, more: dict, tmp_path: Path) -> None:
    """With cached keys and values, and all tokens behind them recomputed."""
    language = load_language_model(save_model(tmp_path / "model", kind, **more), "cpu", "fp32")
    ids = language.prompt("what does a {} look like , and which red fur has a {}", "cat")
    half = ids.shape[1] // 2
    model, layer, (eps, scaling) = language.model, language.layer(), language.numbers
    with torch.inference_mode():
        out = model.model(ids, use_cache=True)
        first = model(ids[:, :half], use_cache=True).past_key_values.layers[-1]
        x = model(ids, output_hidden_states=True).hidden_states[-2]
    past = Past(first.keys, first.values, torch.tensor([half]))
    found = decode(x[:, half:], layer, past, eps, scaling)
    torch.testing.assert_close(found, out.last_hidden_state[:, half:], rtol=1e-4, atol=1e-4)
    more_padding = torch.full((1, first.keys.shape[1], 7, first.keys.shape[3]), 9.0)
    padded = Past(*(torch.cat([t, more_padding], 2) for t in past[:2]), past.lengths)
    torch.testing.assert_close(decode(x[:, half:], layer, padded, eps, scaling), found, rtol=1e-4, atol=1e-5)


def test_cached_keys_and_values_are_those_recomputed(language: LanguageModel, prior_file: Path) -> None:
    prior = read_prior(prior_file)
    assert (prior.questions, prior.class_names) == (ASKED, (*CLASSES, "lamp"))
    names = ("lamp", "Sea_horse")
    for k, past in enumerate(prior.pasts(names, torch.device("cpu"))):
        for c, name in enumerate(("lamp", "sea horse")):
            ids, n = language.prompt(ASKED[k], name), int(past.lengths[c])
            assert n == ids.shape[1]
            with torch.inference_mode():
                seen = language.model(ids, use_cache=True).past_key_values.layers[-1]
            assert torch.equal(past.keys[c, :, :n], seen.keys[0])
            assert torch.equal(past.values[c, :, :n], seen.values[0])
    with pytest.raises(DataError, match=r"has no questions about 'lamps' \(is 'lamp' one of these\?\)$"):
        prior.pasts(("cat", "lamps"), torch.device("cpu"))


def test_a_question_is_asked_in_the_models_own_chat(language: LanguageModel) -> None:
    text = language.tokenizer.decode(language.prompt("describe a {}", "sea horse")[0])
    assert text == "<s> In one sentence , describe a sea horse The sea horse appears as"


# --- learning -------------------------------------------------------------------------------------


def test_tokens_stand_behind_the_class_name(tiny: Backbone, prior_file: Path) -> None:
    method = drople(tiny)
    method.take_prior(read_prior(prior_file))
    prior, d = method.prior, tiny.text_tower.config.width
    shapes = {name: tuple(p.shape) for name, p in prior.named_parameters()}
    assert shapes == {"tokens": (5, 32), "maps": (9, d, 32), "biases": (9, 5, d), "q": (32, 32), "o": (32, 32),
                      "norm_1": (32,), "norm_2": (32,), "norm": (32,)}  # fmt: skip
    assert [tuple(x.shape) for x in prior.tokens_of(CLASSES, 1)] == [(3, 5, d)] * 9
    text = prior.packed(tiny, method.context, CLASSES)
    for c, name in enumerate(CLASSES):
        end = text.pooled[text.order][c]
        words = tiny.tokenizer.words(name)
        slots = text.slots[text.source // 9 == c].tolist()
        assert slots[-5:] == list(range(end - 5, end))
        assert text.tokens[end - 5 - len(words) : end - 5].tolist() == words
        last = 1 + 4 + len(words)  # where the end token stands without the prior
        assert text.positions[end - 5 - last : end + 1].tolist() == [*range(last), *[last] * 6]
    assert method.class_features(CLASSES).shape == (3, 3, tiny.embed_dim)
    torch.testing.assert_close(method.class_features(CLASSES[::-1]), method.class_features(CLASSES).flip(1))
    assert drople(tiny, prior_tokens=24).config.prior_tokens == find_method("drople").Config().prior_tokens == 24


def test_the_tower_reads_what_the_layer_gives(tiny: Backbone, prior_file: Path) -> None:
    method = drople(tiny)
    method.take_prior(read_prior(prior_file))
    prior, seen, tower = method.prior, [], tiny.text_tower
    text = prior.packed(tiny, method.context, CLASSES)
    hook = tower.blocks[0].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    tower(text, prior.prompts(tiny, method.context, CLASSES, 2))
    hook.remove()
    (first,) = seen
    expected = prior.tokens_of(CLASSES, 2)[0]  # without positions
    for c, end in enumerate(text.pooled[text.order].tolist()):
        torch.testing.assert_close(first[0, end - 5 : end], expected[c], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            first[0, end], tower.token_embedding(text.tokens[end]) + tower.positions[text.positions[end]]
        )


def test_gradients_are_where_they_should_be(tiny: Backbone, prior_file: Path) -> None:
    method, prior = drople(tiny), read_prior(prior_file)
    method.take_prior(prior)
    before = {name: t.clone() for name, t in prior.layer.items()}
    method.train()
    losses = method.losses(batch(tiny))
    sum(losses.values()).backward()
    for name, p in method.prior.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name
    learned = {name for name, _ in method.prior.named_parameters()}
    assert learned == {"tokens", "maps", "biases", "q", "o", "norm_1", "norm_2", "norm"}
    frozen = set(prior.layer) - set(TRAINED.values())
    assert {name.split(".")[1] for name in frozen if "." in name} >= {"k_proj", "v_proj", "gate_proj", "up_proj"}
    assert not any(t.requires_grad for t in prior.layer.values())
    with torch.no_grad():
        for p in method.learned():
            p -= 0.1 * p.grad if p.grad is not None else 0
    assert all(torch.equal(t, before[name]) for name, t in prior.layer.items())
    assert not torch.equal(method.prior.q, prior.layer[TRAINED["q"]])


def test_a_step_asks_one_question_and_evaluation_all(tiny: Backbone, prior_file: Path) -> None:
    method = drople(tiny, dropout="none")
    method.take_prior(read_prior(prior_file))
    drawn, draw = set(), method.prior.draw
    for _ in range(40):
        drawn.add(draw())
    assert drawn == {0, 1, 2}
    features = method.class_features(CLASSES)
    for k in range(3):
        method.prior.draw = lambda k=k: k
        torch.testing.assert_close(method(batch(tiny)).t, features[k], rtol=1e-4, atol=1e-5)
    method.eval()
    v = torch.nn.functional.normalize(torch.randn(6, tiny.embed_dim), dim=-1)
    logits = method.logits(v, features)
    averaged = torch.stack([(v @ t.T).softmax(-1) for t in features]).mean(0)
    torch.testing.assert_close(logits, method.scale() * averaged.log())
    one = method.logits(v, features[:1]).softmax(-1)
    torch.testing.assert_close(one, method.logits(v, features[0]).softmax(-1))


def test_dropout_hits_the_priors_tokens_in_the_last_prompted_layer(tiny: Backbone, prior_file: Path) -> None:
    method = drople(tiny, mode="zero", p_max=1.0, p_min=1.0, dropout="uniform")
    method.take_prior(read_prior(prior_file))
    hit, drop = [], code.drop
    text = method.prior.packed(tiny, method.context, CLASSES)

    def look(x, rows, p, mode, sigma):
        if x.shape[0] == 1:  # of texts
            hit.append(sorted(rows.tolist()))
        return drop(x, rows, p, mode, sigma)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code, "drop", look)
        method.train()
        method(batch(tiny))
    ends = text.pooled.tolist()
    starts = [0, *(end + 1 for end in ends[:-1])]
    context = [s + k for s in starts for k in range(1, 5)]
    assert hit == [sorted([*context, *(e - k for e in ends for k in range(1, 6))])]


def test_without_a_prior_nothing_changes(tiny: Backbone, prior_file: Path) -> None:
    plain, other = drople(tiny), drople(tiny, prior_tokens=7)
    torch.manual_seed(3)
    a = plain.losses(batch(tiny))
    torch.manual_seed(3)
    b = other.losses(batch(tiny))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert "prior" not in {name.split(".")[0] for name in plain.state_dict()}


# --- runs and tuned models ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(pictures: Path, prior_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(settings(pictures, prior_file), out)
    return out


def settings(pictures: Path, prior_file: Path):
    return configured(pictures, "drople", **{"data.prior": str(prior_file), "method.prior_tokens": 5,
                                             "train.epochs": 2})  # fmt: skip


def test_a_run_resumes(pictures: Path, prior_file: Path, tmp_path: Path, run: Path) -> None:
    shutil.copytree(run, tmp_path / "whole")
    whole = check_stopped(settings(pictures, prior_file), tmp_path, 3)
    assert whole["prior.own"].shape[:2] == (3, 3)
    assert "prior" in (run / "README.md").read_text()


def test_a_tuned_model_needs_questions_about_new_classes_alone(
    pictures: Path, prior_file: Path, run: Path, language: LanguageModel, tmp_path: Path
) -> None:
    again = load_artefact(run)
    method = load_artefact(run)
    method.take_prior(read_prior(prior_file))
    x = batch(again.backbone).images
    own = again.predict(x, CLASSES)
    torch.testing.assert_close(again.predict(x, CLASSES[::-1]), own.flip(-1))
    fresh = method.prior.asked(method.backbone, method.context, CLASSES)
    torch.testing.assert_close(fresh, method.prior.own, rtol=1e-4, atol=1e-5)
    mixed = method.predict(x, ("lamp", "cat"))
    expected = torch.cat([method.prior.asked(method.backbone, method.context, ["lamp"]), method.prior.own[:, :1]], 1)
    torch.testing.assert_close(mixed, method.logits(method.encode_images(x), expected))
    with pytest.raises(DataError, match=r"^drople's language prior has no questions about 'otter', which .*--prior"):
        again.predict(x, ("otter", "cat"))
    image = next(pictures.rglob("*.png"))
    command = ["predict", run, image, "--class-names", "otter,cat"]
    refused = vlprompt(*command)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    refused = vlprompt(*command, "--prior", prior_file)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "has no questions about 'otter'" in refused.err
    more = tmp_path / "more.safetensors"
    describe(language, ["otter"], ASKED, more, 10)
    found = vlprompt(*command, "--prior", more, "--json").json["predictions"][0]["top"]
    assert {row["class"] for row in found} == {"otter", "cat"}
    other = tmp_path / "other.safetensors"
    describe(language, ["otter"], ASKED[:2], other, 10)
    assert "another language model or other questions" in vlprompt(*command, "--prior", other).err
    assert vlprompt("evaluate", run, pictures, "--split", "val").code == 0
    assert "was tuned without one" in vlprompt("predict", *without(pictures, tmp_path), "--prior", more).err
    saved = tmp_path / "saved.onnx"
    assert vlprompt("export", run, "--class-names", "otter,cat", "--prior", more, "--out", saved).code == 0


def without(pictures: Path, tmp_path: Path) -> list[Path]:
    train(configured(pictures, "drople", **{"train.epochs": 1}), tmp_path / "without")
    return [tmp_path / "without", next(pictures.rglob("*.png"))]


def test_priors_that_do_not_fit(pictures: Path, prior_file: Path, run: Path, tmp_path: Path) -> None:
    def says(method: str, file: Path, *more: str) -> str:
        done = vlprompt(*arguments(method, pictures, tmp_path / "run", "--prior", str(file), "--epochs", "1", *more))
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert not (tmp_path / "run").exists()
        return done.err

    assert "data.prior = " in says("coop", prior_file)
    assert "method 'coop' reads no language model's prior" in says("coop", prior_file)
    assert "train.graphs: with data.prior = " in says("drople", prior_file, "graphs=true")
    assert "cannot read prior" in says("drople", tmp_path / "none.safetensors")
    assert "none that `vlprompt describe` wrote" in says("drople", run / "prompts.safetensors")
    (tmp_path / "no.safetensors").write_text("no")
    assert "cannot read prior" in says("drople", tmp_path / "no.safetensors")
    content = prior_file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    inside = [start + header[name]["data_offsets"][0] for name in ("layer.norm.weight", "past.0.keys", "past.2.values")]
    for at in (content.index(b"fur has"), *inside):
        damaged = bytearray(content)
        damaged[at] ^= 1
        (tmp_path / "damaged.safetensors").write_bytes(damaged)
        assert "it is damaged" in says("drople", tmp_path / "damaged.safetensors")


def test_the_prior_needs_a_causal_tower(prior_file: Path, tmp_path: Path) -> None:
    backbone = load_backbone(str(TINY))
    method = drople(backbone)
    object.__setattr__(backbone.text_tower.config, "causal", False)
    with pytest.raises(ConfigError, match=r"reads texts of one length: no room behind the class name"):
        method.take_prior(read_prior(prior_file))


# --- vlprompt describe ----------------------------------------------------------------------------


def test_descriptions_are_written_and_read(llama: Path, pictures: Path, tmp_path: Path) -> None:
    out, asked = tmp_path / "texts.json", tmp_path / "questions.txt"
    asked.write_text("\n".join(ASKED) + "\n\n")
    command = ["describe", llama, "--data", pictures, "--questions", asked, "--out", out, "--max-tokens", 6]
    assert vlprompt(*command, "--json").json == {"out": str(out), "classes": 3, "questions": 3}
    texts = json.loads(out.read_text())
    assert list(texts) == list(CLASSES)
    assert all(text.startswith(f"The {name} appears as ") for name, own in texts.items() for text in own)
    assert not out.with_name("texts.json.part").exists()
    done = vlprompt(*arguments("zero_shot", pictures, tmp_path / "run", "--descriptions", str(out)))
    assert done.code == 0
    assert "there already: delete it" in vlprompt(*command).err
    prior = tmp_path / "prior.safetensors"
    assert vlprompt("describe", llama, "--class-names", "cat,dog", "--out", prior).code == 0
    assert read_prior(prior).questions == QUESTIONS
    assert len(QUESTIONS) == len(set(QUESTIONS)) == 11
    assert {key.split(".")[0] for key in load_file(prior)} == {"layer", "past"}


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_describe_goes_on_where_it_stopped(
    suffix: str, language: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out, part = tmp_path / f"whole{suffix}", tmp_path / f"out{suffix}", tmp_path / f"out{suffix}.part"
    describe(language, CLASSES, ASKED, whole, 6)
    done, name = [], "_texts" if suffix == ".json" else "_write_past"
    work = getattr(making, name)

    def stopped(*given):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(given)
        return work(*given)

    monkeypatch.setattr(making, name, stopped)
    with pytest.raises(Interrupted, match=r"^to continue: the same command again"):
        describe(language, CLASSES, ASKED, out, 6)
    assert not out.exists()
    assert len(list(part.glob(f"*{suffix}"))) == 2 + (suffix == ".json")  # and the settings
    with pytest.raises(ConfigError, match=r"out.*\.part was begun with other questions: give the same again"):
        describe(language, CLASSES, ASKED[:2], out, 6)
    again = []
    monkeypatch.setattr(making, name, lambda *given: again.append(given) or work(*given))
    describe(language, CLASSES, ASKED, out, 6)
    assert len(again) == 1
    assert out.read_bytes() == whole.read_bytes()
    assert not part.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "there are none"), ("what is it", "has no {} for the class name"), ("a {}\nb {}\na {}", "'a {}' is there tw"),
     ("\0 {}", "cannot read questions")],
)  # fmt: skip
def test_questions_that_are_none(content: str, message: str, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text(content)
    done = vlprompt("describe", llama, "--class-names", "cat,dog", "--questions", tmp_path / "q.txt",
                    "--out", tmp_path / "x.json")  # fmt: skip
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert message in done.err


def test_folders_that_hold_no_such_model(llama: Path, tmp_path: Path) -> None:
    def says(folder: Path, out: str = "x.json") -> str:
        done = vlprompt("describe", folder, "--class-names", "cat,dog", "--out", tmp_path / out)
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert not (tmp_path / out).exists()
        assert not (tmp_path / f"{out}.part").exists()
        return done.err

    assert "has no config.json" in says(tmp_path / "nothing")
    assert "has no config.json" in says(tmp_path)
    pickled = tmp_path / "pickled"
    shutil.copytree(llama, pickled, ignore=shutil.ignore_patterns("*.safetensors"))
    (pickled / "pytorch_model.bin").write_bytes(b"no")
    assert "pytorch_model.bin is not read, as it may hold code" in says(pickled)
    damaged = tmp_path / "damaged"
    shutil.copytree(llama, damaged)
    (damaged / "model.safetensors").write_bytes(b"no")
    assert "cannot load the language model" in says(damaged)
    foreign = tmp_path / "foreign"
    shutil.copytree(llama, foreign)
    config = json.loads((foreign / "config.json").read_text()) | {"model_type": "own", "auto_map": {
        "AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}  # fmt: skip
    (foreign / "config.json").write_text(json.dumps(config))
    (foreign / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "cannot load the language model" in says(foreign)
    assert not (tmp_path / "ran").exists()
    gpt2 = save_model(tmp_path / "gpt2", "GPT2")
    assert "gpt2 (GPT2LMHeadModel) is not Llama-style" in says(gpt2, "x.safetensors")
    qwen3 = save_model(tmp_path / "qwen3", "Qwen3", head_dim=8)
    assert "its last layer has self_attn.k_norm.weight too" in says(qwen3, "x.safetensors")
    gemma = save_model(tmp_path / "gemma", "Gemma", head_dim=8)
    assert "(GemmaForCausalLM) is not Llama-style" in says(gemma, "x.safetensors")
    assert vlprompt("describe", gpt2, "--class-names", "cat,dog", "--out", tmp_path / "gpt2.json").code == 0


def test_what_describe_is_asked_wrongly(llama: Path, pictures: Path, tmp_path: Path) -> None:
    def says(*given: object) -> str:
        done = vlprompt("describe", llama, *given)
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        return done.err

    out = ("--out", tmp_path / "x.json")
    assert "say which classes" in says(*out)
    assert "say which classes" in says("--class-names", "cat,dog", "--data", pictures, *out)
    assert "(allowed: a .json file for descriptions" in says("--class-names", "cat,dog", "--out", tmp_path / "x.txt")
    assert "classes 'cat' and 'Cat' have the same name" in says("--class-names", "cat,Cat", *out)
    assert "precision = int8" in says("--class-names", "cat,dog", "--precision", "int8", *out)
    assert not (tmp_path / "x.json.part").exists()


def test_a_class_that_nothing_is_said_of(language: LanguageModel, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModel, "answer", lambda self, q, name, n: "" if name == "dog" else f"The {name}.")
        with pytest.raises(DataError, match=r"^llama says nothing of 'dog': ask it other questions"):
            describe(language, CLASSES, ASKED, tmp_path / "x.json", 6)


def test_another_prior_is_not_resumed_with(
    pictures: Path, prior_file: Path, language: LanguageModel, tmp_path: Path
) -> None:
    file = tmp_path / "prior.safetensors"
    shutil.copy(prior_file, file)
    with pytest.raises(Interrupted):
        train(settings(pictures, file), tmp_path / "run", [StopsAfter(3)])
    file.unlink()
    describe(language, CLASSES, ASKED[::-1], file, 6)
    with pytest.raises(ArtefactError, match="begun with other class descriptions, or another prior"):
        train(settings(pictures, file), tmp_path / "run", resume=True)


def test_transformers_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlprompt.describe.language.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs transformers: pip install 'vlprompt\[describe\]'"):
        load_language_model(tmp_path, "cpu", "fp32")
    monkeypatch.undo()
    with pytest.raises(BackboneError, match="no language model"):
        load_language_model(tmp_path, "cpu", "fp32")
