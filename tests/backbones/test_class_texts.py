"""Class names as the backbone in use reads them: in lower case, told apart or refused, unknown letters told."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.backbones.test_backbones import NAMES, STRINGS, TEMPLATE, refused, write_siglip
from tests.kit.command import vlprompt
from tests.kit.pictures import draw
from vlprompt.backbones.load import load_backbone
from vlprompt.backbones.tokenizer import load_siglip_tokenizer
from vlprompt.errors import DataError
from vlprompt.methods import find_method
from vlprompt.prompting.text import partly_known


def write_siglip2_tokenizer(folder: Path) -> Path:
    """Gemma's kind: spaces are ▁, case stays, and nothing in the file says that the model was trained without."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<eos>", "<bos>", "<unk>"], show_progress=False
    )
    texts = [TEMPLATE.format(n) for n in NAMES]
    tokenizer.train_from_iterator([*texts, *(t.lower() for t in texts)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    return folder


def theirs(folder: Path, text: str, length: int) -> list[int]:
    names = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **names)
    return tokenizer(text, padding="max_length", max_length=length).input_ids


@pytest.mark.parametrize("text", [*STRINGS, "A Photo Of A BOEING 737-200.", "ÀÉÎ ΣΊΣΥΦΟΣ"])
def test_siglip_2_reads_lower_case(tmp_path: Path, text: str) -> None:
    """As transformers' own Siglip2Tokenizer does it: the file's tokens of the text in lower case."""
    folder = write_siglip2_tokenizer(tmp_path)
    assert load_siglip_tokenizer(folder, 200)([text]) == [theirs(folder, text.lower(), 200)]


@pytest.mark.parametrize("text", [*STRINGS, "Mr. Smith's  C++ / C#_code"])
def test_open_clip_drops_punctuation_for_siglip(tmp_path: Path, text: str) -> None:
    folder = write_siglip2_tokenizer(tmp_path)
    clean = text.replace("_", " ").translate(str.maketrans("", "", string.punctuation)).lower()
    expected = theirs(folder, " ".join(clean.split()), 200)
    assert load_siglip_tokenizer(folder, 200, canonical=True)([text]) == [expected]


def test_sentencepiece_file_alone_is_refused(tmp_path: Path) -> None:
    folder = write_siglip(tmp_path)
    (folder / "tokenizer.json").rename(folder / "spiece.model")
    refused(str(folder), match=f"no tokenizer.json in {folder}: SigLIP's tokenizer is read from it")
    refused(str(folder), match="spiece.model is not read: the model's repository on the hub has tokenizer.json")


# ------------------------------------------------------------------------------------------ apart from each other


@pytest.fixture(scope="module")
def without_punctuation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SigLIP whose tokenizer drops punctuation, as the first SigLIP's does."""
    folder = write_siglip(tmp_path_factory.mktemp("siglip"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Replace(Regex(r"[^\w\s]"), "")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("method", ["zero_shot", "coop", "cocoop", "prograd"])
@pytest.mark.parametrize("pair", [("c", "c++"), ("cat", "Cat."), ("pot_plant", "pot plant!"), ("dog χ", "dog ψ")])
def test_names_that_are_the_same_tokens_are_refused(
    without_punctuation: Path, method: str, pair: tuple[str, str]
) -> None:
    backbone = load_backbone(without_punctuation)
    with pytest.raises(DataError) as caught:
        find_method(method)(backbone, ["desk", *pair])
    assert str(caught.value) == (
        f"classes '{pair[0]}' and '{pair[1]}' are the same tokens for backbone '{without_punctuation}', which cannot "
        "tell them apart: write one of them in other words"
    )


def test_what_reads_no_names_takes_any(without_punctuation: Path) -> None:
    method = find_method("linear_probe")(load_backbone(without_punctuation), ["c", "c++"])
    assert method.class_names == ("c", "c++")


def test_another_backbone_may_tell_them_apart() -> None:
    names = ["c", "c++", "c#", "犬", "猫"]
    features = find_method("zero_shot")(load_backbone("mini"), names).class_features(names)
    assert len(features.unique(dim=0)) == len(names)


def test_new_names_are_checked_too(without_punctuation: Path) -> None:
    method = find_method("coop")(load_backbone(without_punctuation), ["cat", "desk"])
    with pytest.raises(DataError, match="classes 'ruler' and 'ruler!' are the same tokens"):
        method.class_features(["ruler", "ruler!"])


def test_a_name_that_is_known_in_part_is_told(without_punctuation: Path) -> None:
    backbone = load_backbone(without_punctuation)
    assert partly_known(backbone, NAMES) is None
    told = partly_known(backbone, ["cat", "cat χ", "ж_desk"])
    assert told == f"backbone '{without_punctuation}' does not know all letters of 'cat χ', 'ж_desk'"
    with pytest.raises(DataError, match="class name 'χψ' has no token that the backbone knows"):
        find_method("coop")(backbone, ["cat", "χψ"])


def test_commands_tell_it(without_punctuation: Path, tmp_path: Path) -> None:
    for name in ("cat χ", "desk"):
        for i in range(4):
            draw(tmp_path / "data" / name / f"{i}.png", i, 8, 8)
    told = "does not know all letters of 'cat χ'"
    settings = ["--backbone", without_punctuation, "--out", tmp_path / "run"]
    done = vlprompt("train", "zero_shot", tmp_path / "data", *settings)
    assert done.code == 0
    assert told in done.err
    image = tmp_path / "data" / "desk" / "0.png"
    assert told not in vlprompt("predict", tmp_path / "run", image).err
    done = vlprompt("predict", tmp_path / "run", image, "--class-names", "ruler,cat χ")
    assert told in done.err
    done = vlprompt("predict", tmp_path / "run", image, "--class-names", "ruler,ruler!")
    assert done.code == 2
    assert "classes 'ruler' and 'ruler!' are the same tokens" in done.err
