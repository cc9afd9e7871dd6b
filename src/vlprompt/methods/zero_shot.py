"""Zero-shot CLIP (Radford et al., ICML 2021): nothing learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlprompt.backbones.backbone import Backbone, unit
from vlprompt.methods.base import Can, Method, MethodConfig, Templates
from vlprompt.methods.registry import register
from vlprompt.methods.templates import ENSEMBLES
from vlprompt.prompting.text import check_known, fill, spaced


def frozen_class_features(
    backbone: Backbone, class_names: Sequence[str], templates: Sequence[str], average: str = "normalised"
) -> Tensor:
    """Normalised class features averaged over templates, computed once for a backbone: [C, E].

    ``normalised`` averages normalised text features, as CLIP's ensemble does; ``raw`` averages them as they
    come out of the text tower, as PromptSRC does.
    """

    def compute() -> Tensor:
        check_known(backbone, class_names)
        features = [backbone.encode_texts(fill(t, class_names), average == "normalised") for t in templates]
        return unit(sum(features[1:], features[0]) / len(features))

    return backbone.remember((tuple(class_names), tuple(templates), average), compute)


def mean_features(backbone: Backbone, texts: Sequence[Sequence[str]]) -> Tensor:
    """The mean of the normalised features of each class's texts, not normalised, computed once: [C, E]."""

    def compute() -> Tensor:
        features = backbone.encode_texts([text for own in texts for text in own])
        return torch.stack([own.mean(0) for own in features.split([len(own) for own in texts])])

    return backbone.remember(("mean", tuple(map(tuple, texts))), compute)


def which(name: str, text: str) -> str:
    """A description as Menon and Vondrick's code has the text tower read it: "hen, which has two legs"."""
    if text.startswith(("has", "often", "typically", "may", "can")):
        return f"{spaced(name)}, which {text}"
    return f"{spaced(name)}, which {'is' if text.startswith(('a', 'used')) else 'has'} {text}"


@register("zero_shot")
class ZeroShot(Method):
    """The data set's template, or an ensemble of templates whose normalised text features are averaged.

    Official code: KaiyangZhou's CoOp, ``ZeroshotCLIP`` and ``ZeroshotCLIP2``, which averages over the 7 selected
    templates and the data set's own, but for ImageNet. Class descriptions stand in the templates' place: CuPL (Pratt et
    al., ICCV 2023), or Menon and Vondrick (ICLR 2023; sachit-menon's classify_by_description_release).
    """

    paper, year, learns = "Radford et al., ICML", 2021, "nothing"
    reads_descriptions = keeps_descriptions = True

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """Options of zero_shot."""

        template: Templates | None = None
        """Text with {} for the class name, or several whose features are averaged; the data set's own if not given."""
        ensemble: Literal["none", "select", "imagenet"] = "none"
        """Average over the 7 templates selected for ImageNet, or over its first 60 (PromptSRC's list)."""
        form: Literal["cupl", "menon"] = "cupl"
        """How class descriptions are read: cupl scores by the normalised mean of the features of the texts as they are,
        menon by the mean of the scores of "{name}, which has {text}"."""

        beside = {"form": ("descriptions", True)} | dict.fromkeys(("template", "ensemble"), ("descriptions", False))

        @property
        def can(self) -> Can:
            """There are no steps."""
            return Can.USE_FROZEN_FEATURES | Can.EXPORT_CLASSES

        def unused(self) -> dict[str, str]:
            """A template beside an ensemble."""
            return {} if self.ensemble == "none" else {"template": "ensemble"}

    def class_features(self, class_names: Sequence[str], image_features: Tensor | None = None) -> Tensor:
        """[C, E], the same for every image; means of features, of another length than 1, in Menon's form."""
        if self.descriptions is not None:
            texts = self.texts_of(class_names)
            if self.config.form == "cupl":
                return unit(mean_features(self.backbone, texts))
            named = zip(class_names, texts, strict=True)
            return mean_features(self.backbone, [[which(name, text) for text in own] for name, own in named])
        given = self.config.template or self.template
        own = (given,) if isinstance(given, str) else tuple(given)
        return frozen_class_features(self.backbone, class_names, ENSEMBLES.get(self.config.ensemble, own))
