"""What every method is: a frozen configuration, learned parameters, class features and named loss terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Flag, auto
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from annotated_types import Ge, Le, MinLen
from pydantic import AfterValidator, BeforeValidator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from typing_extensions import TypedDict  # pydantic's, before Python 3.12

from vlprompt.backbones.backbone import Backbone, unit
from vlprompt.backbones.towers import Prompts
from vlprompt.data.batches import Batch
from vlprompt.data.descriptions import Descriptions, texts_of
from vlprompt.data.splits import find_classes
from vlprompt.documents import check_text, checksum, parse_yaml
from vlprompt.errors import ConfigError, DataError
from vlprompt.prompting.prior import Prior
from vlprompt.prompting.text import TextContext, check_known, encode_classes, encode_in_parts

TEXTS_OF_IMAGES = 2000
"""Class texts encoded together where each image has its own (CoCoOp)."""
IMAGE_WEIGHT = "image_weight"
"""In a batch's ``extra``: how much each image's cross-entropy counts, [B]; 1 on average over all images."""
KEPT = 4
"""Lists of class names whose features a tuned model remembers."""

Count = Annotated[int, Ge(1), Le(10_000)]
Weight = Annotated[float, Ge(0), Le(1e6)]


def _check_template(given: str | tuple[str, ...]) -> str | tuple[str, ...]:
    for text in [given] if isinstance(given, str) else given:
        if "{}" not in text:
            raise ValueError("text with {} for the class name")
        check_text(text)
    return given


def _listed(given: Any) -> Any:
    """A list that was written on the command line."""
    try:
        return parse_yaml(given) if isinstance(given, str) and given.startswith("[") else given
    except ValueError:
        return given


def _several(given: Any) -> Any:
    if isinstance(listed := _listed(given), str):
        raise ValueError("list, as in [a, b]")
    return listed


Listed = BeforeValidator(_several)
"""Of an option with several values: on the command line ``key="[a, b]"``."""
Template = Annotated[str, AfterValidator(_check_template)]
Templates = Annotated[
    str | Annotated[tuple[str, ...], MinLen(1)], BeforeValidator(_listed), AfterValidator(_check_template)
]
"""One template, or several whose features are averaged."""


class Can(Flag):
    """What may be done with a method beyond training it on whole batches and asking it about images."""

    USE_FROZEN_FEATURES = auto()
    """It reads nothing of an image but its features from the frozen tower, which are computed once."""
    USE_POOLED_FEATURES = auto()
    """It reads nothing of an image but what the frozen tower makes of it before its projection: computed once, too."""
    SPLIT_BATCHES = auto()
    """Its loss is a mean over images: parts of a batch, and processes, give the same step."""
    SPLIT_TEXTS = auto()
    """The texts of all classes may be encoded a few at a time (``text_chunk``)."""
    REPLAY_STEPS = auto()
    """A step does the same operations whatever its batch holds: it may be recorded as a CUDA graph."""
    DROP_ATTENTION = auto()
    """Its steps run a tower, whose attention may be perturbed (``train.attention_drop``)."""
    EXPORT_CLASSES = auto()
    """Its logits are scale · v · tᵀ + bias, v the plain backbone's normalised image features."""
    JOIN_CLASSES = auto()
    """A class's logit reads nothing that is kept for other classes, but for what a head takes over in ``join``: models
    of some classes each answer side by side."""


LEARNS_PROMPTS = Can.SPLIT_BATCHES | Can.SPLIT_TEXTS | Can.REPLAY_STEPS | Can.DROP_ATTENTION
"""Of methods whose loss is a mean over images, and whose class features come from :meth:`Method.encode_classes`."""
LEARNS_TEXT = LEARNS_PROMPTS | Can.USE_FROZEN_FEATURES | Can.EXPORT_CLASSES
"""Of those that leave images alone."""


@dataclass(frozen=True)
class MethodConfig:
    """Base of the methods' options; each method adds its own."""

    @property
    def can(self) -> Can:
        """What may be done with the method under these options; what it does not say is not done."""
        return Can(0)

    @property
    def transductive(self) -> bool:
        """Whether it learns from unlabelled images of all classes, those too that it is tested on."""
        return False

    beside: ClassVar[Mapping[str, tuple[str, bool]]] = {}
    """Options that have an effect only with (true) or only without (false) a file of ``data``: its key, and which."""

    def unused(self) -> dict[str, str]:
        """Options that have no effect, each with the option whose value makes it so."""
        return {}


@dataclass(frozen=True)
class Output:
    """What a method makes of a batch."""

    v: Tensor
    """Image features as ``logits`` reads them, [B, E]."""
    t: Tensor
    """Features of the K classes that are compared, [K, E], or [B, K, E] if they depend on the image."""
    logits: Tensor
    """[B, K]"""
    extra: Any = None
    """Whatever else the method's own loss terms read."""


@dataclass(frozen=True)
class Support:
    """What a method may choose on when its steps are done: frozen features of its training and val images."""

    views: Tensor
    """Of the training images' fixed views, [V, n, E], not normalised; of the whole images alone if there are none."""
    labels: Tensor
    """[n]"""
    whole: Tensor
    """Normalised features of the whole training images, [n, E]."""
    val: tuple[Tensor, Tensor] | None = None
    """Normalised features [m, E] and labels [m] of the val images."""


class TeacherEntry(TypedDict):
    """The teacher that a tuned model asks about other classes than its own."""

    name: str
    fingerprint: str
    template: str


ClassVectors = Callable[[Sequence[str]], Tensor | None]
"""A teacher's class features [C, E'] of class names; None if it has none."""


class TokenMaps(NamedTuple):
    """A row of what ``vlprompt explain`` draws: a map of an image's tokens after each of some blocks."""

    name: str
    about: str
    """Two lines of a few words each."""
    values: Sequence[Tensor]
    """[N] each, of the patches row by row, then of visual prompts: numbers, or booleans that mark some."""


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
    """What a batch must bring beyond images and labels: ``frozen_image_features``, ``second_view``,
    ``teacher_probabilities`` in place of labels, or the name of something in ``extra``."""
    official: ClassVar[Mapping[str, Any]] = {}
    """The official training settings (base-to-novel), by key of the run configuration."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Other official settings by name: ``cross-dataset``, ``few-shot``, …"""
    rates: ClassVar[Mapping[str, float]] = {}
    """Parameters, by how their names begin, that learn at this share of the learning rate."""
    floors: ClassVar[Mapping[str, float]] = {}
    """Of them those whose rate does not fall below this share of ``optim.min_lr``."""
    image_dependent: ClassVar[bool] = False
    """Whether class features depend on the image."""
    learns_prompts: ClassVar[bool] = True
    """Whether what it learns belongs to the template that it was trained with."""
    has_spread: ClassVar[bool] = False
    """Whether it says how sure it is of its probabilities: :meth:`spread`."""
    fixes_views: ClassVar[bool] = False
    """Whether ``data.views`` may fix random views without a bank: the frozen tower then sees each of them once."""
    first_view: ClassVar[int] = 0
    """Which of them the first epoch takes."""
    mixes_views: ClassVar[bool] = False
    """Whether an epoch draws from all fixed views together, instead of taking each image once, in the epoch's view."""
    keeps_best: ClassVar[bool] = False
    """Whether the epoch with the best val accuracy is kept wherever there are val images, as with ``select=val``."""
    images_per_class: float = 1.0
    """Training images of a class, on average, once training is prepared."""
    in_tasks: bool = False
    """Whether its classes are one of several tasks', once training is prepared."""
    log_prior: Tensor | None = None
    """What training adds to the logits, [C]: logit adjustment (Menon et al., ICLR 2021)."""
    reads_labels: ClassVar[bool] = True
    """Whether training reads the images' labels, where no teacher stands in their place."""
    reads_descriptions: ClassVar[bool] = False
    """Whether it reads further texts of each class: ``descriptions``."""
    keeps_descriptions: ClassVar[bool] = False
    """Whether the tuned model reads them too: it holds them, and classes that it has no texts of need some."""
    expects_descriptions: ClassVar[bool] = False
    """Whether it is not the published method without them."""

    white: float | None = None
    """Value that is white in the deep greys of the images that it was tuned on; the largest of 16 bits if not given."""
    reads_template: ClassVar[bool] = True
    """Whether it reads class names in the data set's template; learned text contexts stand in its place."""
    descriptions: Descriptions | None = None
    """Texts of each of its classes, and maybe of others, if any were given."""
    teacher: TeacherEntry | None = None
    """The teacher that it asks about other classes than its own, if it asks one."""
    ask_teacher: ClassVectors | None = None
    """What it asks; None where the teacher is not at hand."""
    of_its_classes: ClassVar[frozenset[str]] = frozenset()
    """Tensors that its class names alone decide: a run that begins with another's prompts has its own."""
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
        self._kept: dict[tuple, tuple[list[Tensor], Tensor]] = {}
        self.build()
        if self.reads_names:
            check_known(backbone, self.class_names)

    def build(self) -> None:
        """Create what is learned."""

    # --- from images and names to logits --------------------------------------------------------------

    def class_features(self, class_names: Sequence[str], image_features: Tensor | None = None) -> Tensor:
        """Normalised class features [C, E], or [B, C, E] if they depend on ``image_features`` [B, E]."""
        raise NotImplementedError

    def visual_prompts(self) -> Prompts | None:
        """Learned tokens of the image tower, if the method has any."""
        return None

    def encode_images(self, images: Tensor) -> Tensor:
        """Normalised features of images [B, 3, S, S] with the method's visual prompts: [B, E]."""
        prompts = self.visual_prompts()
        if prompts is None and not images.requires_grad:  # as an attack on the image asks for
            return self.backbone.encode_images(images)
        return unit(self.backbone.image_tower(images.to(self.backbone.device), prompts))

    def encode_pooled(self, pooled: Tensor) -> Tensor:
        """Normalised features [B, E] of what the frozen tower gives before its projection [B, D]."""
        return unit(self.backbone.project(pooled))

    def adapt(self, image_features: Tensor) -> Tensor:
        """What ``logits`` reads of image features [B, E]."""
        return image_features

    def logits(self, image_features: Tensor, class_features: Tensor) -> Tensor:
        """[B, C] logits of normalised features."""
        return self.backbone.logits(image_features, class_features)

    @torch.no_grad()
    def predict(self, x: Tensor, class_names: Sequence[str]) -> Tensor:
        """Logits for any class names, [B, C], of preprocessed images [B, 3, S, S].

        Or of their features from the frozen tower [B, E], or of what that gives before its projection, [B, 1, D], if
        these are all that the method reads of images. Evaluation, prediction and export ask here and nowhere else: what
        a method does to images or logits, it always does.
        """
        names = tuple(class_names)
        if not self.takes_new_classes and names != self.class_names:
            own = self.own_classes(names)
            return self.predict(x, self.class_names)[:, own]
        if x.ndim == 3 and Can.USE_POOLED_FEATURES not in self.config.can:
            raise ConfigError(f"method '{self.name}' reads images, and was given what the tower makes of them")
        if x.ndim == 2 and Can.USE_FROZEN_FEATURES not in self.config.can:
            raise ConfigError(f"method '{self.name}' reads images, and was given their frozen features")
        v = self.adapt(self.encode_images(x) if x.ndim == 4 else self.encode_pooled(x[:, 0]) if x.ndim == 3 else x)
        if not self.image_dependent:
            return self.logits(v, self.kept_class_features(names))
        at_once = self.images_at_once(names)
        parts = v.split(at_once) if v.shape[0] > at_once else [v]
        return torch.cat([self.logits(part, self.class_features(names, part)) for part in parts])

    def images_at_once(self, class_names: Sequence[str]) -> int:
        """Images whose own class texts are encoded together."""
        return max(TEXTS_OF_IMAGES // len(class_names), 1)

    def spread(self, x: Tensor, class_names: Sequence[str], scale: Tensor | None = None) -> Tensor:
        """Standard deviation of each class's probability over what is left open, logits times ``scale`` [B]: [B, C]."""
        raise NotImplementedError

    def own_classes(self, class_names: Sequence[str]) -> list[int]:
        """Which of its own classes these are; raises DataError for a name that is none of them."""
        found = find_classes(class_names, self.class_names)
        if None in found:
            name = class_names[found.index(None)]
            near = get_close_matches(name, self.class_names, 1, 0.5)
            hint = f": did you mean '{near[0]}'?" if near else ""
            raise DataError(f"{self.name} knows its own {len(self.class_names)} classes alone, not '{name}'{hint}")
        return [c for c in found if c is not None]

    def kept_class_features(self, class_names: Sequence[str]) -> Tensor:
        """Class features of a tuned model; the last few lists' are remembered while nothing of the model changes."""
        if self.training:
            return self.class_features(class_names)
        backbone, state = self.backbone, list(self.state_dict().values())
        texts = tuple(self.texts_of(class_names)) if self.keeps_descriptions and self.descriptions is not None else None
        key = (tuple(class_names), self.template, self.text_chunk, backbone.device, backbone.dtype, texts)
        # By their values: what is written through ``data``, or into memory used before, leaves no other trace.
        if key not in self._kept or not _equal(self._kept[key][0], state):
            if key not in self._kept and len(self._kept) == KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = [t.clone() for t in state], self.class_features(class_names)
        return self._kept[key][1]

    def scale_and_bias(self) -> tuple[Tensor, Tensor]:
        """What ``logits`` multiplies and adds: logits = scale · v · tᵀ + bias; the bias is a number, or [C]."""
        return torch.tensor(self.backbone.logit_scale), torch.tensor(self.backbone.logit_bias)

    def encode_classes(
        self, class_names: Sequence[str], context: TextContext, bias: Tensor | None = None, normalise: bool = True
    ) -> Tensor:
        """Class features under a learned context; see :func:`vlprompt.prompting.text.encode_classes`."""
        if context.class_specific and tuple(class_names) != self.class_names:
            raise DataError(f"{self.name} learned a context for each of its classes: it has none for other classes")
        tower, prompts, at_once = self.backbone.text_tower, context.prompts(bias), self.text_chunk
        if at_once is not None and at_once < len(class_names):
            parts = context.packed_parts(self.backbone, class_names, at_once)
            return encode_in_parts(tower, prompts, parts, at_once, normalise)
        return encode_classes(tower, prompts, context.packed(self.backbone, class_names), normalise)

    def take_descriptions(self, descriptions: Descriptions) -> None:
        """Before training: further texts of each of ``described_names``."""
        self.descriptions = descriptions

    def take_prior(self, prior: Prior) -> None:
        """Before training, or of a tuned model for other classes: a language model's prior.

        Raises ConfigError for a method that reads none, or one that does not fit, and DataError for a class not in it.
        """
        raise ConfigError(f"data.prior = {prior.file}: method '{self.name}' reads no language model's prior")

    @property
    def texts_fingerprint(self) -> str | None:
        """SHA-256 over the descriptions that training reads; None without."""
        return None if self.descriptions is None else checksum(self.texts_of(self.described_names))

    @property
    def described_names(self) -> tuple[str, ...]:
        """The classes that training reads descriptions of."""
        return self.class_names

    def texts_of(self, class_names: Sequence[str]) -> list[tuple[str, ...]]:
        """The descriptions of classes; raises DataError, naming them, for those that have none."""
        source = f"{self.name} reads class descriptions (--descriptions FILE), and has"
        return texts_of(self.descriptions or {}, class_names, source)

    def explain(self, images: Tensor, seed: int = 0) -> Sequence[TokenMaps]:
        """What ``vlprompt explain`` draws of an image [1, 3, S, S] beside what its patches say, which all have."""
        return ()

    # --- learning --------------------------------------------------------------------------------------

    def fit_features(self, features: Tensor, labels: Tensor) -> None:
        """Fit on frozen features [n, E] and labels [n] of the whole training images, before any gradient steps.

        With fixed views (``data.views``) they are those of the views, not normalised: [V, n, E].
        """

    def finish(self, support: Support) -> str | None:
        """Choose what steps do not learn, when they are done, on images held out; returns in words what was chosen."""
        return None

    def image_features(self, batch: Batch) -> Tensor:
        """Normalised features of the batch's images with the method's visual prompts: [B, E]."""
        if Can.USE_FROZEN_FEATURES in self.config.can and batch.frozen_image_features is not None:
            return batch.frozen_image_features
        if Can.USE_POOLED_FEATURES in self.config.can and "pooled" in batch.extra:
            return self.encode_pooled(batch.extra["pooled"])
        assert batch.images is not None
        return self.encode_images(batch.images)

    def take_teacher(self, class_vectors: ClassVectors, teacher: TeacherEntry | None = None) -> None:
        """Before training, for what else it takes of a teacher: its class features."""

    def names_of(self, classes: Tensor | slice) -> tuple[str, ...]:
        """The names of all classes, or of those given as indices [K]."""
        if isinstance(classes, slice):
            return self.class_names[classes]
        return tuple(self.class_names[c] for c in classes.tolist())

    def features_of(self, classes: Tensor | slice, image_features: Tensor | None = None) -> Tensor:
        """Features of the classes that a batch compares, all or those given as indices; other texts are not encoded."""
        return self.class_features(self.names_of(classes), image_features)

    def forward(self, batch: Batch) -> Output:
        """Features and logits of a training batch, among the classes that it compares."""
        v = self.adapt(self.image_features(batch))
        t = self.features_of(batch.compared, v if self.image_dependent else None)
        return Output(v, t, self.logits(v, t))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Named loss terms, already weighted; their sum is minimised."""
        out = self(batch)
        return {**self.supervision(out, batch), **self.regularisers(out, batch)}

    def supervision(self, out: Output, batch: Batch) -> dict[str, Tensor]:
        """What the labels say, or a teacher in their place: cross-entropy, or KDPL's two divergences."""
        if batch.teacher_probabilities is not None:
            return symmetric_kl(out.logits, batch.taught)
        logits = self.adjusted(out.logits, batch)
        if (weight := batch.extra.get(IMAGE_WEIGHT)) is not None:
            return {"ce": (weight * cross_entropy(logits, batch.labels, reduction="none")).mean()}
        return {"ce": cross_entropy(logits, batch.labels)}

    def adjusted(self, logits: Tensor, batch: Batch) -> Tensor:
        """Logits [B, K] as the loss sees them: with the logarithm of how frequent their classes are, if asked for."""
        return logits if self.log_prior is None else logits + self.log_prior[batch.compared]

    def regularisers(self, out: Output, batch: Batch) -> dict[str, Tensor]:
        """The loss terms beside the supervision."""
        return {}

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

    def take_template(self, template: str) -> None:
        """Read class names in the template of another data set, unless prompts were learned with the old one."""
        if not self.learns_prompts or next(self.parameters(), None) is None:
            self.template = template

    @property
    def trains(self) -> bool:
        """Whether there is anything to learn by gradient steps."""
        return bool(self.learned())

    @property
    def reads_names(self) -> bool:
        """Whether it makes texts of class names: for new classes, or with learned context for its own."""
        return self.takes_new_classes or any(isinstance(module, TextContext) for module in self.modules())

    @property
    def minimises_a_loss(self) -> bool:
        """Whether it learns from labels by a loss, by the loop's steps or its own."""
        return self.trains

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


def _equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether tensors are the same in number, kind, place and value."""
    return len(a) == len(b) and all(
        x.dtype == y.dtype and x.device == y.device and torch.equal(x, y) for x, y in zip(a, b, strict=True)
    )


def total(losses: Mapping[str, Tensor]) -> Tensor:
    """The sum of the loss terms."""
    return torch.stack(list(losses.values())).sum()


def divergences(logits: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p ‖ q) and KL(q ‖ p) of each image, [B] each, between p [B, K] and the softmax q of logits [B, K]."""
    log_p = p.clamp_min(torch.finfo(p.dtype).tiny).log()  # a probability may be too small for its dtype
    log_q = logits.log_softmax(-1)
    return (p * (log_p - log_q)).sum(-1), (log_q.exp() * (log_q - log_p)).sum(-1)


def symmetric_kl(logits: Tensor, p: Tensor) -> dict[str, Tensor]:
    """Learning from a teacher (KDPL, Mistretta et al., ECCV 2024): both divergences from it, half of each."""
    forward, reverse = divergences(logits, p)
    return {"kl_forward": 0.5 * forward.mean(), "kl_reverse": 0.5 * reverse.mean()}
