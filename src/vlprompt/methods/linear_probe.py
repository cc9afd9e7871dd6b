"""Linear probe on frozen image features: the baseline that every reader asks for first."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from vlprompt.errors import DataError
from vlprompt.methods.base import Can, Method, MethodConfig
from vlprompt.methods.registry import register

GRID = (0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)  # inverse regularisation tried on normalised features
FOLDS = 3


@register("linear_probe")
class LinearProbe(Method):
    """Logistic regression (scikit-learn, L2) on normalised frozen features of the training images, un-augmented.

    It reads no text, so it knows the classes that it was fitted on and no others.
    """

    paper, year, learns = "Radford et al., ICML", 2021, "linear classifier on frozen features"
    parity = "identity"

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """Options of linear_probe."""

        C: Annotated[float, Gt(0)] | None = None
        """Inverse L2 strength; if not given, chosen by cross-validation on the training images."""
        max_iter: Annotated[int, Gt(0)] = 1000
        """Iterations of the solver (L-BFGS)."""

        @property
        def can(self) -> Can:
            """There are no steps."""
            return Can.USE_FROZEN_FEATURES | Can.EXPORT_CLASSES | Can.JOIN_CLASSES

    weight: Tensor
    bias: Tensor

    def build(self) -> None:
        """Create the classifier's weights, all zero until fitted."""
        n_classes, embed = len(self.class_names), self.backbone.embed_dim
        self.register_buffer("weight", torch.zeros(n_classes, embed))
        self.register_buffer("bias", torch.zeros(n_classes))

    @property
    def takes_new_classes(self) -> bool:
        """A classifier of the classes it was fitted on."""
        return False

    def fit_features(self, features: Tensor, labels: Tensor, weights: Tensor | None = None) -> None:
        """Fit on normalised features [n, E]; with a fold's worth of images per class, C is cross-validated.

        ``weights`` [n] say how much each image counts.
        """
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GridSearchCV, StratifiedKFold

        count = torch.bincount(labels, minlength=len(self.class_names))
        if not count.all():
            name = self.class_names[int(count.argmin())]
            raise DataError(f"linear_probe cannot score class '{name}': it has no training images")
        if len(count) == 1:
            return  # one class: nothing to tell apart, and scikit-learn refuses it
        x, y = features.double().cpu().numpy(), labels.cpu().numpy()
        counts = None if weights is None else weights.numpy()
        c = self.config.C
        if c is None and count.min() < FOLDS:
            c = GRID[len(GRID) // 2]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a solver stopped at max_iter is a setting, not a fault
            model = LogisticRegression(C=c or 1.0, max_iter=self.config.max_iter)
            if c is None:
                folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
                model = GridSearchCV(model, {"C": GRID}, cv=folds).fit(x, y, sample_weight=counts).best_estimator_
            else:
                model.fit(x, y, sample_weight=counts)
        weight, bias = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
        if len(weight) == 1:  # two classes: scikit-learn keeps one row, the logit of the second
            weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
        self.weight.copy_(weight)
        self.bias.copy_(bias)

    def class_features(self, class_names: Sequence[str], image_features: Tensor | None = None) -> Tensor:
        """The classifier's weights [C, E] (not normalised); only for the classes it was fitted on."""
        if tuple(class_names) != self.class_names:
            raise DataError("linear_probe was fitted on its own classes and reads no text: it cannot score others")
        return self.weight

    def logits(self, image_features: Tensor, class_features: Tensor) -> Tensor:
        """W v + b: [B, C]."""
        return image_features.to(class_features.dtype) @ class_features.T + self.bias

    def scale_and_bias(self) -> tuple[Tensor, Tensor]:
        """1 and b."""
        return torch.ones(()), self.bias
