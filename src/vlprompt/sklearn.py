"""``PromptClassifier``: prompt learning as a scikit-learn classifier of images."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d

from vlprompt.api import TRAINING, Images, PromptedModel, build_configured, fit_configured, full_keys, method_keys
from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.load import load_backbone
from vlprompt.config.schema import build_config
from vlprompt.errors import ConfigError, one_line


class PromptClassifier(ClassifierMixin, BaseEstimator):
    """A classifier of images: X is a list of paths or Pillow images, or uint8 pixels [n, H, W, 3]; y any labels.

    ``clone``, ``cross_val_score``, ``GridSearchCV`` and ``Pipeline`` work; grids reach a method's options through
    ``settings``. It trains as ``vlprompt train`` does; the same data and parameters give the same prompts. After
    ``fit``, ``classes_`` holds the labels in sorted order and ``model_`` the
    :class:`~vlprompt.api.PromptedModel`, which can be saved and knows other class names too.
    """

    def __init__(
        self,
        method: str = "coop",
        backbone: str | Backbone = "mini",
        class_names: Mapping[Any, str] | None = None,
        template: str | None = None,
        preset: str | None = None,
        epochs: int | None = None,
        lr: float | None = None,
        batch_size: int | None = None,
        settings: Mapping[str, Any] | None = None,
        seed: int = 1,
        device: str = "cpu",
        precision: Literal["fp32", "bf16", "fp16"] = "fp32",
        class_weight: Mapping[Any, float] | Literal["balanced"] | None = None,
    ) -> None:
        """Keep the parameters; nothing is checked or loaded before ``fit``.

        ``backbone``: a name that ``load_backbone`` takes, or a loaded backbone (its own device and precision then
        count; copies of the classifier share it). ``class_names``: words for labels; str(label) for those left out.
        ``template``: text with {} for the class name, "a photo of a {}." if not given. ``epochs``, ``lr``,
        ``batch_size``: the method's official ones if not given. ``settings``: the method's options, and what else
        training takes, ``{"n_ctx": 4, "momentum": 0}``; ``bank`` among them is the folder of a region bank.
        ``class_weight``: weights of labels, 1 if left out, or "balanced": n / (C · images of the class).
        """
        self.method = method
        self.backbone = backbone
        self.class_names = class_names
        self.template = template
        self.preset = preset
        self.epochs = epochs
        self.lr = lr
        self.batch_size = batch_size
        self.settings = settings
        self.seed = seed
        self.device = device
        self.precision = precision
        self.class_weight = class_weight

    def fit(self, X: Images, y: ArrayLike, sample_weight: ArrayLike | None = None) -> PromptClassifier:
        """Tune prompts on images X with labels y [n]; ``sample_weight`` [n] says how much each image's loss counts.

        It is multiplied with ``class_weight``, and only ratios count. Raises ConfigError for bad parameters and for a
        method whose loss knows no weights, DataError for what is no image or two labels with one name, ValueError for
        labels that are no classes and weights that are none.
        """
        for what in ("class_names", "settings"):
            if not isinstance(given := getattr(self, what), Mapping | None):
                says = "labels to words, such as dict(enumerate(names))" if what == "class_names" else "names to values"
                raise ConfigError(f"{what} = {one_line(given, 60)} (allowed: a mapping of {says})")
        _check_present(y)
        check_classification_targets(y)
        labels = column_or_1d(y, warn=True)
        self.classes_, indices = np.unique(labels, return_inverse=True)
        if len(self.classes_) == 1:
            raise ValueError(f"y has only one class, {self.classes_[0]!r}: every answer would be right")
        if self.class_names and not any(label in self.class_names for label in self.classes_.tolist()):
            labelled = f"{one_line(list(self.class_names), 60)}, and y's {one_line(self.classes_.tolist(), 60)}"
            raise ConfigError(f"class_names: its labels are {labelled}: none is in both")
        known = {**TRAINING, **method_keys(self.method)}
        overrides = full_keys(self.settings or {}, known, f"setting of {self.method}")
        for name in ("epochs", "lr", "batch_size"):
            if (value := getattr(self, name)) is not None:
                if TRAINING[name] in overrides:
                    raise ConfigError(f"{name} = {value}: it is given twice, in settings too")
                overrides[TRAINING[name]] = value
        overrides |= {"seed": self.seed, "data.template": self.template}
        config = build_config(self.method, self.preset, overrides=overrides)
        backbone = self.backbone
        if not isinstance(backbone, Backbone):
            backbone = load_backbone(backbone, self.device, self.precision)
        names = [self._name(label) for label in self.classes_.tolist()]
        method = build_configured(config, backbone, names)
        fit_configured(method, X, indices, config, weights=self._weights(labels, sample_weight))
        self.model_ = PromptedModel(method.requires_grad_(False))
        return self

    def predict_proba(self, X: Images) -> NDArray[np.float64]:
        """Probabilities [n, C]; columns as in ``classes_``. Raises DataError for what is no image."""
        check_is_fitted(self, "model_")
        return self.model_.predict(X).probabilities

    def predict(self, X: Images) -> NDArray[Any]:
        """The most probable label of each image, [n]. Raises DataError for what is no image."""
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]

    def _weights(self, labels: NDArray[Any], sample_weight: ArrayLike | None) -> NDArray[np.float64] | None:
        """What each image's loss counts, [n], 1 on average; None if all count the same."""
        if sample_weight is None and self.class_weight is None:
            return None
        weights = np.ones(len(labels)) if sample_weight is None else np.array(sample_weight, dtype=np.float64)
        if weights.shape != labels.shape:
            raise ValueError(f"sample_weight has shape {list(weights.shape)}, and y {list(labels.shape)}")
        weights = weights * compute_sample_weight(self.class_weight, labels)
        if not np.isfinite(weights).all() or weights.min() < 0:
            raise ValueError("sample_weight and class_weight must be finite numbers from 0 on")
        if not weights.any():
            raise ValueError("sample_weight and class_weight: every image's weight is zero")
        return weights / weights.mean()

    def _name(self, label: Hashable) -> str:
        return (self.class_names or {}).get(label, str(label))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        return tags


def _check_present(y: ArrayLike) -> None:
    """Raise ValueError for missing labels; NumPy would make a class "nan" of them beside texts."""
    values = y if isinstance(y, (list, tuple)) else np.asarray(y, dtype=object).ravel()
    missing = [i for i, v in enumerate(values) if v is None or type(v).__name__ in ("NAType", "NaTType") or _is_nan(v)]
    if missing:
        raise ValueError(
            f"y contains NaN: {len(missing)} of {len(values)} images have no label (the first: {missing[0]})"
        )


def _is_nan(value: object) -> bool:
    return isinstance(value, (float, np.floating)) and bool(np.isnan(value))
