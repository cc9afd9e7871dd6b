"""PromptKD: unsupervised prompt distillation (Li et al., CVPR 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Gt
from torch import Tensor, nn

from vlprompt.backbones.backbone import unit
from vlprompt.backbones.towers import Prompts
from vlprompt.data.batches import Batch
from vlprompt.data.splits import find_classes
from vlprompt.errors import DataError, first_few
from vlprompt.methods.base import Can, ClassVectors, Count, Method, MethodConfig, Output, TeacherEntry, Weight
from vlprompt.methods.registry import register
from vlprompt.methods.zero_shot import frozen_class_features
from vlprompt.prompting.visual import VisualPrompts


@register("promptkd")
class PromptKD(Method):
    """Visual prompts, and a projection of image features into a larger tuned teacher's space, from its logits alone.

    Logits are s · unit(h(f(x))) · t with the student's scale s, the teacher's class features t (kept in the tuned
    model) and h of two linear layers with batch normalisation between them. Loss: w · T² · KL(teacher/T ‖ student/T)
    summed and divided by B·C; no labels. Official settings: 4 tokens, depth 9, w 1000, T 1, SGD 0.005, batch 8, 20
    epochs, on all training images of all classes, base and novel: transductive, and marked so in tables.
    ``setting=inductive`` learns from the images and names of the run's own classes.
    """

    paper, year = "Li et al., CVPR", 2024
    learns = "visual prompts and a projection to a teacher's class features, without labels (transductive)"
    needs = frozenset({"teacher_probabilities"})
    of_its_classes = frozenset({"vectors"})
    official = {
        "optim.name": "sgd",
        "optim.lr": 0.005,
        "optim.warmup_epochs": 1,
        "data.batch_size": 8,
        "train.epochs": 20,
    }
    presets = {
        "base-to-novel-fgvc_aircraft": {"method.w": 200.0},
        "base-to-novel-oxford_flowers": {"method.w": 200.0},
        "cross-dataset": {"method.depth": 3},
    }

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """Options of promptkd."""

        n_ctx: Count = 4
        """Learned tokens of the image tower, at each layer."""
        depth: Count = 9
        """Layers of the image tower with tokens of their own."""
        w: Weight = 1000.0
        """Weight of the distillation (the official code's KD_WEIGHT)."""
        temperature: Annotated[float, Gt(0)] = 1.0
        """T, by which both logits are divided."""
        setting: Literal["transductive", "inductive"] = "transductive"
        """transductive learns from unlabelled images of all classes, inductive from those of the run's classes."""

        @property
        def can(self) -> Can:
            """Its steps run the image tower."""
            return Can.DROP_ATTENTION

        @property
        def transductive(self) -> bool:
            """Whether it sees images of the classes that it is tested on."""
            return self.setting == "transductive"

    vectors: Tensor
    """[C, E'], the teacher's class features; [0, E] where the student's own text tower makes them."""

    def build(self) -> None:
        """Create prompts and projection; the teacher's width is not known yet."""
        self.visual = VisualPrompts(self.backbone, self.config.n_ctx, self.config.depth)
        self.seed = int(torch.randint(2**31, ()))
        self.keep(torch.zeros(0, self.backbone.embed_dim))

    def keep(self, vectors: Tensor) -> None:
        """Take class features, and begin a projection to their width."""
        self.register_buffer("vectors", vectors)
        width = vectors.shape[-1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            first, second = nn.Linear(self.backbone.embed_dim, width), nn.Linear(width, width)
        self.projection = nn.Sequential(first, nn.BatchNorm1d(width), nn.ReLU(), second)
        self.to(self.backbone.device)

    def take_teacher(self, class_vectors: ClassVectors, teacher: TeacherEntry | None = None) -> None:
        """Its class features in place of the student's, if it has any."""
        vectors = class_vectors(self.class_names)
        if vectors is not None:
            self.keep(vectors.clone())
            self.teacher, self.ask_teacher = teacher, class_vectors

    def visual_prompts(self) -> Prompts:
        """The learned tokens."""
        return self.visual.prompts()

    def encode_images(self, images: Tensor) -> Tensor:
        """[B, E'], projected; in training normalised over the batch, which has two images or more."""
        if self.training and len(images) == 1:
            raise DataError("promptkd normalises features over a batch, and was given one image (data.batch_size)")
        v = self.backbone.image_tower(images.to(self.backbone.device), self.visual_prompts())
        return unit(self.projection(v.to(next(self.projection.parameters()).dtype)))

    def class_features(self, class_names: Sequence[str], image_features: Tensor | None = None) -> Tensor:
        """[C, E'], those that are kept; with other names among them, all from the teacher."""
        if not len(self.vectors):
            return frozen_class_features(self.backbone, class_names, [self.template])
        rows = find_classes(class_names, self.class_names)
        if new := [name for name, c in zip(class_names, rows, strict=True) if c is None]:
            found = self.ask_teacher(tuple(class_names)) if self.ask_teacher else None
            if found is None:
                raise DataError(
                    f"promptkd keeps its teacher's features of {len(self.class_names)} classes, and has none of "
                    f"{first_few([repr(name) for name in new])}: they are asked of the teacher, which is not at hand"
                )
            return found.to(self.vectors)
        return self.vectors[rows]

    def supervision(self, out: Output, batch: Batch) -> dict[str, Tensor]:
        """What the teacher says, a mean over images and classes."""
        c, p = self.config, batch.taught
        log_p = (p.clamp_min(torch.finfo(p.dtype).tiny).log() / c.temperature).log_softmax(-1)
        log_q = (out.logits / c.temperature).log_softmax(-1)
        return {"kd": c.w * c.temperature**2 * (log_p.exp() * (log_p - log_q)).mean()}

    def inference_state(self) -> dict[str, Tensor]:
        """All but a counter that nothing reads."""
        return {k: v for k, v in self.state_dict().items() if not k.endswith("num_batches_tracked")}

    def load_inference_state(self, state: Mapping[str, Tensor]) -> None:
        """Into a projection of the width that was saved."""
        if state["vectors"].shape != self.vectors.shape:
            self.keep(torch.zeros_like(state["vectors"]))
        self.load_state_dict(state)
