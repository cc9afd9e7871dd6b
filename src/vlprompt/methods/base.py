"""What every method is: a frozen configuration, learned parameters, class features and named loss terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar

import torch
from annotated_types import Ge
from pydantic import AfterValidator
from torch import Tensor, nn

from vlprompt.backbones.backbone import Backbone, unit
from vlprompt.backbones.towers import Prompts
from vlprompt.errors import ConfigError, DataError, unknown
from vlprompt.prompting.text import TextContext, encode_classes, encode_in_parts

Count = Annotated[int, Ge(1)]
Weight = Annotated[float, Ge(0)]


def _check_template(text: str) -> str:
    if "{}" not in text:
        raise ValueError("text with {} for the class name")
    return text


Template = Annotated[str, AfterValidator(_check_template)]


def small_backbone(lr: float, epochs: int, min_scale: float, **own: Any) -> dict[str, Any]:
    """A preset ``mini``, for small backbones: found on validation images of openmoji by ``tools/search.py``."""
    return {
        "optim.lr": lr,
        "optim.warmup_epochs": 0,
        "optim.cosine_epochs": 1,
        "train.epochs": epochs,
        "data.batch_size": 16,
        "data.min_scale": min_scale,
    } | {f"method.{key}": value for key, value in own.items()}


@dataclass(frozen=True)
class Batch:
    """One step's data: images [B, 3, S, S] preprocessed, labels [B], and what the method ``needs`` beyond them.

    Images are left out where frozen features are all that the method reads of them.
    """

    images: Tensor | None
    labels: Tensor
    frozen_image_features: Tensor | None = None
    """Normalised features of the same views from the frozen image tower, [B, E]."""
    teacher_probabilities: Tensor | None = None
    """What a larger frozen model takes the same views for, [B, C] in fp32 at least; each row sums to 1."""
    second_view: Tensor | None = None
    """The same views, each of their patches changed by a RandAugment of its own, [B, 3, S, S]."""


@dataclass(frozen=True)
class MethodConfig:
    """Base of the methods' settings; each method adds its own."""

    def unused(self) -> dict[str, str]:
        """Settings that have no effect, each with the setting whose value makes it so."""
        return {}


class Method(nn.Module):
    """A way of adapting a frozen backbone to a list of classes.

    The backbone is held outside the module tree, so that everything in ``parameters()`` is learned. A method
    never loads data, logs, saves or moves devices.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    year: ClassVar[int]
    learns: ClassVar[str]
    """What is learned, in a few words."""
    parity: ClassVar[str] = "golden"
    """How the numbers are checked: ``golden`` vectors of the official code, or an ``identity`` that pins them down;
    ``reconstructed`` from a description, where neither code nor numbers are public."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """What a batch must bring beyond images and labels: ``frozen_image_features``, ``second_view``, or
    ``teacher_probabilities`` in place of labels."""
    settings: ClassVar[Mapping[str, Any]] = {}
    """The official training settings (base-to-novel), by key of the run configuration."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Other settings by name: ``cross-dataset``, ``few-shot``, …"""
    rates: ClassVar[Mapping[str, float]] = {}
    """Parameters, by how their names begin, that learn at this share of the learning rate."""
    prompts_images: bool = False
    """Whether the image tower reads learned tokens; if not, image features are frozen."""

    image_dependent: ClassVar[bool] = False
    """Whether class features depend on the image."""
    couples_batch: bool = False
    """Whether a loss term is more than a mean over images, so that a batch cannot be computed in parts."""
    changes_texts: bool = False
    """Whether the texts that a step encodes depend on its batch, so that one step cannot be replayed for another."""

    transductive: ClassVar[bool] = False
    """Whether it learns from the unlabelled images that it is tested on; tables mark it."""
    needs_all_texts: ClassVar[bool] = False
    """Whether the texts of all classes are encoded at once, whatever ``text_chunk`` says."""
    text_chunk: int | None = None
    """Classes whose texts are encoded at once, to need less memory; all if not given."""

    Config: ClassVar[type[MethodConfig]] = MethodConfig

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        config: Any = None,
        template: str = "a photo of a {}.",
    ) -> None:
        super().__init__()
        self.backbone = backbone  # no nn.Module: stays out of the module tree
        self.class_names = tuple(class_names)
        self.config: Any = self.Config() if config is None else config
        self.template = template
        self.build()

    def build(self) -> None:
        """Create the learned parameters."""

    def take_template(self, template: str) -> None:
        """Read class names in the template of another data set, unless prompts were learned with the old one."""
        if next(self.parameters(), None) is None:
            self.template = template

    def class_features(self, class_names: Sequence[str], image_features: Tensor | None = None) -> Tensor:
        """Normalised class features [C, E], or [B, C, E] if they depend on ``image_features`` [B, E]."""
        raise NotImplementedError

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Named loss terms, already weighted; their sum is minimised."""
        raise NotImplementedError

    def visual_prompts(self) -> Prompts | None:
        """Learned tokens of the image tower, if the method has any."""
        return None

    def image_features(self, batch: Batch) -> Tensor:
        """Normalised features of the batch's images with the method's visual prompts: [B, E]."""
        if not self.prompts_images and batch.frozen_image_features is not None:
            return batch.frozen_image_features
        assert batch.images is not None
        return self.encode_images(batch.images)

    def encode_images(self, images: Tensor) -> Tensor:
        """Normalised features of images [B, 3, S, S] with the method's visual prompts: [B, E]."""
        prompts = self.visual_prompts()
        if prompts is None:
            return self.backbone.encode_images(images)
        return unit(self.backbone.image_tower(images.to(self.backbone.device), prompts))

    def encode_classes(self, class_names: Sequence[str], context: TextContext, bias: Tensor | None = None) -> Tensor:
        """Class features under a learned context; see :func:`vlprompt.prompting.text.encode_classes`."""
        if context.class_specific and tuple(class_names) != self.class_names:
            raise DataError(f"{self.name} learned a context for each of its classes: it has none for other classes")
        tower, prompts, at_once = self.backbone.text_tower, context.prompts(bias), self.text_chunk
        if at_once is not None and at_once < len(class_names):
            return encode_in_parts(tower, prompts, context.packed_parts(self.backbone, class_names, at_once), at_once)
        return encode_classes(tower, prompts, context.packed(self.backbone, class_names))

    def logits(self, image_features: Tensor, class_features: Tensor) -> Tensor:
        """[B, C] logits of normalised features."""
        return self.backbone.logits(image_features, class_features)

    def scale_and_bias(self) -> tuple[Tensor, Tensor]:
        """What ``logits`` multiplies and adds: logits = scale · v · tᵀ + bias; the bias is a number, or [C]."""
        return torch.tensor(self.backbone.logit_scale), torch.tensor(self.backbone.logit_bias)

    def objectives(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is differentiated, by name: the sum of the loss terms, unless the method steps along less than that."""
        return {"total": total(losses)}

    def combine(self, gradients: Mapping[str, Sequence[Tensor]]) -> Sequence[Tensor]:
        """The gradient to step along, from those of the objectives on the whole batch (one tensor a parameter)."""
        return gradients["total"]

    def gradients(self, losses: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
        """Gradient of each objective by every learned parameter, zero where a parameter takes no part.

        Linear in the losses: parts of a batch, and processes, add theirs up before :meth:`combine` sees them.
        """
        parameters, objectives = self.learned(), self.objectives(losses)
        last = list(objectives)[-1]
        return {
            name: list(torch.autograd.grad(value, parameters, retain_graph=name != last, materialize_grads=True))
            for name, value in objectives.items()
        }

    def backward(self, losses: Mapping[str, Tensor]) -> None:
        """Add the gradient of one whole batch to the parameters' ``grad``."""
        for p, g in zip(self.learned(), self.combine(self.gradients(losses)), strict=True):
            p.grad = g if p.grad is None else p.grad + g

    @property
    def patch_size(self) -> int | None:
        """Side of the patches, in pixels, that a second view changes; None if the method needs no second view."""
        return self.backbone.image_tower.config.patch_size if "second_view" in self.needs else None

    def learned(self) -> list[nn.Parameter]:
        """The parameters that gradient steps change."""
        return [p for p in self.parameters() if p.requires_grad]

    def after_epoch(self, epoch: int, epochs: int) -> None:
        """Called after each epoch (from 0) of ``epochs``."""

    def training_state(self) -> dict[str, Tensor]:
        """What training carries from epoch to epoch beside ``state_dict()``, for checkpoints."""
        return {}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over the tensors of :meth:`training_state`."""

    def fit_features(self, features: Tensor, labels: Tensor) -> None:
        """Fit on frozen features [n, E] and labels [n], for methods without gradient steps."""

    @property
    def trains(self) -> bool:
        """Whether there is anything to learn by gradient steps."""
        return bool(self.learned())

    @property
    def takes_new_classes(self) -> bool:
        """Whether the tuned model can be used with class names that it was not trained on."""
        return True

    def inference_state(self) -> dict[str, Tensor]:
        """The tensors that inference needs, folded as far as possible."""
        return self.state_dict()

    def load_inference_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over the tensors of :meth:`inference_state`."""
        self.load_state_dict(state)


def total(losses: Mapping[str, Tensor]) -> Tensor:
    """The sum of the loss terms."""
    return torch.stack(list(losses.values())).sum()


METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound=Method)


def register(name: str) -> Callable[[type[M]], type[M]]:
    """Make a method known under ``name``."""

    def add(cls: type[M]) -> type[M]:
        cls.name = name
        METHODS[name] = cls
        return cls

    return add


def find_method(name: str) -> type[Method]:
    """The method registered as ``name``; raises ConfigError with the nearest match."""
    if name not in METHODS:
        raise ConfigError(unknown("method", name, METHODS))
    return METHODS[name]
