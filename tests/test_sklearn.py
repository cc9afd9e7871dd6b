"""PromptClassifier with scikit-learn's own tools."""

from __future__ import annotations

import inspect
import pickle
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone, is_classifier
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import check_estimator
from sklearn.utils.validation import check_is_fitted, validate_data

from tests.kit import TINY
from tests.kit.marks import slow
from tests.kit.pictures import COLOURS, pictures, write_pictures
from vlprompt import PromptClassifier, PromptedModel, build_method
from vlprompt.errors import BackboneError, ConfigError, DataError
from vlprompt.methods import Batch


def coop(backbone, **parameters) -> PromptClassifier:
    """Quick to fit, and right about most pictures."""
    return PromptClassifier(
        "coop", backbone, epochs=2, lr=0.05, batch_size=6, **{"settings": {"n_ctx": 2}, **parameters}
    )


@pytest.fixture(scope="module")
def data():
    pixels, names = pictures(6)
    return pixels, np.array(names)


def test_fit_predict_score(tiny, data):
    X, y = data
    classifier = coop(tiny)
    with pytest.raises(NotFittedError):
        classifier.predict(X)
    assert classifier.fit(X, y) is classifier
    check_is_fitted(classifier)
    assert is_classifier(classifier)
    assert classifier.classes_.tolist() == sorted(COLOURS)
    probabilities = classifier.predict_proba(X)
    assert probabilities.shape == (18, 3)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    predicted = classifier.predict(X)
    assert (predicted == classifier.classes_[probabilities.argmax(1)]).all()
    assert classifier.score(X, y) == (predicted == y).mean()


def test_the_constructor_only_stores():
    parameters = {
        "method": "no such method", "backbone": "/nowhere", "class_names": {1: "otter"}, "template": "{}",
        "preset": "p", "epochs": -1, "lr": "fast", "batch_size": 0, "settings": {"x": 1}, "seed": 5, "device": "d",
        "precision": "p", "class_weight": "x",
    }  # fmt: skip
    classifier = PromptClassifier(**parameters)
    assert vars(classifier) == parameters
    assert all(classifier.get_params()[key] is value for key, value in parameters.items())
    assert list(inspect.signature(PromptClassifier).parameters) == list(parameters)
    assert classifier.set_params(epochs=3) is classifier
    assert classifier.epochs == 3
    with pytest.raises(ValueError, match="Invalid parameter 'epoch'"):
        classifier.set_params(epoch=3)


def test_clones_share_the_backbone_and_nothing_fitted(tiny, data):
    fitted = coop(tiny).fit(data[0][::3], data[1][::3])
    copy = clone(fitted)
    assert copy.backbone is tiny
    assert not hasattr(copy, "model_")
    assert {k: v for k, v in copy.get_params().items() if k != "backbone"} == {
        k: v for k, v in fitted.get_params().items() if k != "backbone"
    }


def test_same_data_and_parameters_give_the_same_prompts(tiny, data):
    X, y = data
    first, again, other = (coop(tiny, seed=seed).fit(X, y).predict_proba(X) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert abs(first - other).max() > 1e-3


def test_images_may_be_paths_or_pillow_images(tiny, data, tmp_path):
    X, y = data
    folder = write_pictures(tmp_path, n=6)
    paths = [folder / name.replace(" ", "_") / f"{i % 6}.png" for i, name in enumerate(y)]
    expected = coop(tiny).fit(X, y).predict_proba(X)
    forms = [paths, np.array([str(path) for path in paths]), [Image.fromarray(pixels) for pixels in X]]
    for images in forms:
        np.testing.assert_array_equal(coop(tiny).fit(images, list(y)).predict_proba(images), expected)


@pytest.mark.parametrize("labels", [[7, 3, 5], ["rot", "blau", "grün"], [True, False, True], np.array([2, 0, 1])])
def test_any_labels(tiny, labels):
    X, _ = pictures(2)
    y = np.repeat(np.array(labels), 2)
    classifier = coop(tiny).fit(X, y)
    assert classifier.classes_.tolist() == sorted(set(np.array(labels).tolist()))
    assert classifier.model_.class_names == tuple(str(label) for label in classifier.classes_.tolist())
    assert classifier.predict(X).dtype == y.dtype
    assert set(classifier.predict(X)) <= set(y)


def test_class_names_say_labels_in_words(tiny, data):
    X, y = data
    numbers = np.unique(y, return_inverse=True)[1]
    words = dict(enumerate(sorted(COLOURS)))
    classifier = coop(tiny, class_names=words).fit(X, numbers)
    assert classifier.classes_.tolist() == [0, 1, 2]
    assert classifier.model_.class_names == tuple(words.values())
    np.testing.assert_array_equal(classifier.predict_proba(X), coop(tiny).fit(X, y).predict_proba(X))
    assert coop(tiny, class_names={0: "boat"}).fit(X[::6], numbers[::6]).model_.class_names == ("boat", "1", "2")
    with pytest.raises(DataError, match="2 classes are named 'boat'"):
        coop(tiny, class_names={0: "boat", 1: "boat"}).fit(X, numbers)


def test_a_fitted_model_is_saved_and_knows_other_classes(tiny, data, tmp_path):
    X, y = data
    classifier = coop(tiny).fit(X, y)
    classifier.model_.save_pretrained(tmp_path)
    loaded = PromptedModel.from_pretrained(tmp_path)
    np.testing.assert_allclose(loaded.predict(X).probabilities, classifier.predict_proba(X), atol=1e-6)
    assert set(loaded.predict(X, class_names=["otter", "sea horse"]).names) <= {"otter", "sea horse"}


def test_a_backbone_by_name_is_loaded_by_fit(data):
    X, y = data
    classifier = PromptClassifier("zero_shot", str(TINY)).fit(X, y)
    assert classifier.model_.backbone.name == str(TINY)


@slow
def test_cross_val_score(tiny, data):
    X, y = data
    scores = cross_val_score(coop(tiny).set_params(epochs=8), X, y, cv=3)
    assert scores.shape == (3,)
    assert scores.mean() > 1 / 3
    images = [Image.fromarray(pixels) for pixels in X]
    np.testing.assert_array_equal(cross_val_score(coop(tiny).set_params(epochs=8), images, y, cv=3), scores)


def test_grid_search_over_parameters_and_method_settings(tiny, data):
    grid = {"lr": [1e-6, 0.05], "settings": [{"n_ctx": 1}, {"n_ctx": 2}]}
    search = GridSearchCV(coop(tiny), grid, cv=2).fit(*data)
    assert len(search.cv_results_["params"]) == 4
    assert not np.isnan(search.cv_results_["mean_test_score"]).any()
    n_ctx = search.best_params_["settings"]["n_ctx"]
    assert search.best_estimator_.model_.method.config.n_ctx == n_ctx
    assert search.predict(data[0]).shape == (18,)


def test_pipeline(tiny, data):
    y = data[1]
    whole, halved = pictures(6, size=64)[0], FunctionTransformer(lambda images: images[:, ::2, ::2])
    pipeline = Pipeline([("halve", halved), ("classify", coop(tiny))])
    assert pipeline.fit(whole, y).predict(whole).shape == y.shape
    np.testing.assert_array_equal(
        pipeline.predict_proba(whole), coop(tiny).fit(whole[:, ::2, ::2], y).predict_proba(whole[:, ::2, ::2])
    )
    assert len(cross_val_score(pipeline.set_params(classify__epochs=1), whole, y, cv=2)) == 2


def loss_of(fitted, X, y) -> np.ndarray:
    """Cross-entropy of each image."""
    return -np.log(fitted.predict_proba(X)[np.arange(len(y)), np.searchsorted(fitted.classes_, y)])


def test_weights_say_whose_loss_counts(tiny, data):
    X, y = data
    plain = coop(tiny).fit(X, y)
    same = coop(tiny).fit(X, y, sample_weight=np.full(len(y), 3.0))
    np.testing.assert_allclose(same.predict_proba(X), plain.predict_proba(X), atol=1e-5)
    first = np.asarray(y) == plain.classes_[0]
    heavy = coop(tiny).fit(X, y, sample_weight=np.where(first, 20.0, 1.0))
    assert loss_of(heavy, X, y)[first].mean() < loss_of(plain, X, y)[first].mean()
    by_class = coop(tiny).set_params(class_weight={plain.classes_[0]: 20.0}).fit(X, y)
    np.testing.assert_array_equal(by_class.predict_proba(X), heavy.predict_proba(X))
    clone(by_class)


def test_the_weighted_loss_is_the_weighted_mean(tiny):
    method = build_method("coop", tiny, ["cat", "dog"], n_ctx=1)
    images = torch.randn(3, 3, tiny.image_size, tiny.image_size, generator=torch.Generator().manual_seed(0))
    labels, weight = torch.tensor([0, 1, 1]), torch.tensor([2.0, 0.0, 1.0])
    plain, weighted = (
        method.losses(Batch(images, labels, extra=extra))["ce"] for extra in ({}, {"image_weight": weight})
    )
    each = torch.stack([method.losses(Batch(images[i : i + 1], labels[i : i + 1]))["ce"] for i in range(3)])
    torch.testing.assert_close(plain, each.mean())
    torch.testing.assert_close(weighted, (2 * each[0] + each[2]) / 3)


def test_weights_of_a_linear_probe_are_scikit_learns(tiny, data):
    X, y = data
    some = np.arange(len(y)) % 3 > 0
    probe = PromptClassifier("linear_probe", tiny, settings={"C": 1.0})
    # What has no weight is not there: 12 of 18 images, 1.5 times as heavy each.
    weighted = clone(probe).fit(X, y, sample_weight=some.astype(float)).model_.method
    few = PromptClassifier("linear_probe", tiny, settings={"C": 1.5})
    few.fit([x for x, s in zip(X, some, strict=True) if s], np.asarray(y)[some])
    torch.testing.assert_close(weighted.weight, few.model_.method.weight, atol=1e-3, rtol=1e-3)


def test_weights_that_cannot_be_used(tiny, data):
    X, y = data
    for given, message in [
        (np.ones(5), r"sample_weight has shape \[5\], and y \[18\]"),
        (np.ones((18, 2)), "sample_weight has shape"),
        (np.full(18, np.nan), "finite numbers from 0 on"),
        (-np.ones(18), "finite numbers from 0 on"),
        (np.zeros(18), "every image's weight is zero"),
    ]:
        with pytest.raises(ValueError, match=message):
            coop(tiny).fit(X, y, sample_weight=given)
    for weight in (-0.5, np.inf, np.nan):
        with pytest.raises(ValueError, match="sample_weight and class_weight must be finite numbers from 0 on"):
            coop(tiny, class_weight={y[0]: weight}).fit(X, y)
    with pytest.raises(ConfigError, match="method 'drople' cannot weigh images"):
        PromptClassifier("drople", tiny, epochs=1, class_weight="balanced").fit(X, y)
    with pytest.raises(ConfigError, match="method 'coop' cannot weigh images"):
        coop(tiny).set_params(settings={"teacher": "mini"}).fit(X, y, sample_weight=np.ones(18))
    PromptClassifier("zero_shot", tiny, class_weight="balanced").fit(X, y)  # learns nothing of any image


@pytest.mark.parametrize("kind", ["texts", "floats", "objects", "none"])
def test_labels_that_are_missing(tiny, data, kind):
    X, y = data
    labels = {
        "texts": [*y[:-1], float("nan")], "floats": np.array([0.0, 1.0] * 8 + [0.0, np.nan]),
        "objects": np.array([*y[:-1], np.nan], dtype=object), "none": [*y[:-1], None],
    }[kind]  # fmt: skip
    with pytest.raises(ValueError, match=r"^y contains NaN: 1 of 18 images have no label \(the first: 17\)$"):
        coop(tiny).fit(X, labels)


def test_class_names_are_a_mapping(tiny, data):
    X, y = data
    with pytest.raises(ConfigError, match=r"class_names = \['a', 'b', 'c'\] \(allowed: a mapping of labels to words"):
        coop(tiny).set_params(class_names=["a", "b", "c"]).fit(X, y)


def test_bad_parameters_and_data_are_refused_by_fit(tiny, data):
    X, y = data
    for parameters, error, message in [
        ({"method": "cop"}, ConfigError, "did you mean 'coop'"),
        ({"epochs": 0}, ConfigError, "train.epochs = 0"),
        ({"lr": -1.0}, ConfigError, "optim.lr = -1.0"),
        ({"settings": {"nctx": 2}}, ConfigError, "unknown setting of coop 'nctx': did you mean 'n_ctx'"),
        ({"settings": {"shots": 2}}, ConfigError, "unknown setting of coop 'shots'"),
        ({"settings": ["n_ctx"]}, ConfigError, r"settings = \['n_ctx'\] \(allowed: a mapping of names to values\)"),
        ({"settings": {"epochs": 5}}, ConfigError, "epochs = 2: it is given twice, in settings too"),
        (
            {"settings": {"n_ctx": 2, "method.n_ctx": 3}},
            ConfigError,
            "n_ctx = 2: it is given twice, as method.n_ctx too",
        ),
        ({"class_names": {0: "boat"}}, ConfigError, r"labels are \[0\], and y's \['blue boat', .*: none is in both"),
        ({"preset": "no"}, ConfigError, "unknown preset"),
        ({"backbone": "/nowhere/at/all"}, BackboneError, "no backbone"),
    ]:
        with pytest.raises(error, match=message):
            coop(tiny).set_params(**parameters).fit(X, y)
    with pytest.raises(DataError, match="18 images and 17 labels"):
        coop(tiny).fit(X, y[:-1])
    with pytest.raises(ValueError, match="Unknown label type"):
        coop(tiny).fit(X, np.linspace(0, 1, 18))
    with pytest.raises(DataError, match=r"found float64 \[18, 4\]"):
        coop(tiny).fit(np.zeros((18, 4)), y)


# --- check_estimator ------------------------------------------------------------------------------

# scikit-learn's checks feed tables of floats. PromptClassifier says that it takes no tables, which skips all of
# them; on this thin shell, which turns each row into a picture, they run on the same fit, predict and parameters.


class OnRows(PromptClassifier):
    """PromptClassifier on rows of a table: their values as the grey levels of a picture one pixel high."""

    def __init__(
        self, method="linear_probe", backbone=str(TINY), class_names=None, template="a photo of a {}.", preset=None,
        epochs=1, lr=None, batch_size=None, settings=None, seed=1, device="cpu", precision="fp32",
        class_weight=None,
    ):  # fmt: skip
        super().__init__(
            method, backbone, class_names, template, preset, epochs, lr, batch_size, settings, seed, device, precision,
            class_weight,
        )  # fmt: skip

    def fit(self, X, y, sample_weight=None):
        X, y = validate_data(self, X, y)
        return super().fit(as_pictures(X), y, sample_weight)

    def predict_proba(self, X):
        check_is_fitted(self)
        return super().predict_proba(as_pictures(validate_data(self, X, reset=False)))

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        tags.classifier_tags.poor_score = True  # a random backbone on rows that are no pictures
        return tags


def as_pictures(rows):
    levels = (127 + 40 * np.clip(rows, -3, 3)).astype(np.uint8)  # [n, columns]
    return [np.repeat(row[None, :, None], 3, -1) for row in levels]


DO_NOT_APPLY = {
    "check_methods_subset_invariance": "fp32 features of an image differ in the last bits with the size of its batch; "
    "the check allows 1e-7 on probabilities",
    "check_sample_weight_equivalence_on_dense_data": "only ratios of weights count, as steps have no sum of losses: an "
    "image given twice makes a classifier less regularised, a weight of two does not",
}
"""Checks that fail, and why."""


@slow
def test_check_estimator(tiny, monkeypatch):
    monkeypatch.setattr("vlprompt.sklearn.load_backbone", lambda *_: tiny)
    results = check_estimator(OnRows(), expected_failed_checks=DO_NOT_APPLY, on_fail=None, on_skip=None)
    failed = {r["check_name"]: repr(r["exception"]) for r in results if r["status"] == "failed"}
    assert failed == {}
    counts = {status: sum(r["status"] == status for r in results) for status in ("passed", "xfail", "skipped")}
    assert counts["passed"] >= 40
    assert counts["xfail"] == len(DO_NOT_APPLY)


def test_check_estimator_says_that_images_are_no_table():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = check_estimator(PromptClassifier(), on_fail="raise")
    assert all(r["status"] == "passed" for r in results)
    assert any("requires input" in str(w.message) for w in caught)


def test_fitted_classifiers_survive_copies_between_processes(tiny, data):
    X, y = data
    fitted = coop(tiny).fit(X, y)
    copy = pickle.loads(pickle.dumps(fitted))  # what joblib does for n_jobs=2; no file of ours is a pickle
    np.testing.assert_array_equal(copy.predict_proba(X), fitted.predict_proba(X))
