"""``vlprompt evaluate --html``: an evaluation as one page, and which images to look at."""

from __future__ import annotations

import io
import math
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlprompt.artefact.artefact import load_calibration
from vlprompt.artefact.calibration import probabilities
from vlprompt.bench.report import plots
from vlprompt.bench.report.document import document
from vlprompt.data.batches import FOLDS
from vlprompt.data.reading import ImageReader
from vlprompt.evaluation.measure import Measured
from vlprompt.evaluation.suspects import ALIKE, LEAST, doubtful_labels, near_duplicates
from vlprompt.methods import Method
from vlprompt.training.calibrate import images_trained_on
from vlprompt.training.evaluate import BINS, score

SHOWN = 24
"""Pictures of a kind."""
CLASSES = 40
"""Of a confusion matrix."""
SIDE = 150  # pixels of a picture, as in STYLE
STYLE = """
div.cards { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start }
figure.card { margin: 0; width: 150px; font-size: 13px; line-height: 1.35; overflow-wrap: anywhere }
figure.pair { width: 312px }
figure.card img { width: 150px; height: 150px; object-fit: contain; background: #f5f5f5; vertical-align: bottom }
figure.card small { color: #555 }
td.bar { background: linear-gradient(90deg, #cfe3f2 var(--part), transparent var(--part)); min-width: 6rem }
td.name { text-align: left }
"""


def page(method: Method, run: Path, measured: Measured) -> str:
    """The whole page of a model in the folder ``run``, which may be calibrated."""
    result, names = measured.result, measured.result.classes
    calibration = load_calibration(run)
    p, _ = probabilities(calibration, method, measured.logits, names)
    data = f"{measured.asked.data} ({measured.split} images)"
    title = f"{method.name} on {data}"
    share = result.accuracy / 100
    error = 100 * math.sqrt(share * (1 - share) / result.n)
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p><b>{result.accuracy:.1f} % ± {error:.1f}</b> of {result.n} images of {len(measured.class_names)} classes "
        f"are told right, among {len(names)} classes; {result.macro_accuracy:.1f} % on average over classes. "
        f"Model: {escape(str(run))}, on {escape(method.backbone.name)}.</p>",
        *_by_class(measured),
        *_confusion(measured),
        *_reliability(measured, None if calibration is None else p),
        *_mistakes(measured, p, "calibrated, as predict prints it" if calibration else "the model's own"),
        *_duplicates(run, measured, p),
        *_doubts(method, measured),
    ]
    return document(title, body, STYLE)


# --- tables and charts ----------------------------------------------------------------------------


def _by_class(measured: Measured) -> list[str]:
    taken = Counter[int]()
    most: dict[int, tuple[int, int]] = {}  # the class that each is most often taken for, and how often
    for c, predicted, n in measured.result.confusion:
        taken[c] += n
        if c != predicted and n > most.get(c, (0, 0))[1]:
            most[c] = predicted, n
    figures = measured.result.metrics()["by_class"]
    rows = []
    for (name, row), c in sorted(zip(figures.items(), sorted(taken), strict=True), key=lambda x: x[0][1]["recall"]):
        other = f"{measured.result.classes[most[c][0]]} ({most[c][1]})" if c in most else ""
        accuracy = f'<td class=bar style="--part: {row["recall"]:.1f}%">{row["recall"]:.1f}</td>'
        cells = f"<td>{row['n']}</td>{accuracy}<td>{row['precision']:.1f}</td><td class=name>{escape(other)}</td>"
        rows.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
    head = "".join(f"<th>{x}</th>" for x in ("class", "images", "accuracy, %", "precision, %"))
    table = (
        f"<div class=wide><table><thead><tr>{head}<th class=name>most often taken for</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
    if len(rows) > CLASSES:
        table = f"<details><summary>{len(rows)} classes, the worst first</summary>{table}</details>"
    return ["<h2>Accuracy by class</h2>", table]


def _confusion(measured: Measured) -> list[str]:
    confusion, names = measured.result.confusion, measured.result.classes
    wrong = Counter[int]()
    for c, predicted, n in confusion:
        wrong.update({c: n * (c != predicted), predicted: n * (c != predicted)})
    shown = sorted(c for c, _ in wrong.most_common(CLASSES))
    place = {c: i for i, c in enumerate(shown)}
    counts = {(place[c], place[p]): n for c, p, n in confusion if c in place and p in place}
    chart = plots.matrix([names[c] for c in shown], counts, "Confusion matrix")
    which = "" if len(wrong) <= CLASSES else f" The {CLASSES} of {len(wrong)} classes with the most mistakes."
    about = f"Rows: the images' class; columns: what they are taken for, by number; darker: more of the class.{which}"
    return ["<h2>Confusion matrix</h2>", f"<figure>{chart}<figcaption>{about}</figcaption></figure>"]


def _reliability(measured: Measured, calibrated: Tensor | None) -> list[str]:
    names, labels = measured.result.classes, measured.images.labels
    bins = {"as the model says": _bins(measured.logits.double().softmax(-1), labels)}
    errors = f"calibration error {measured.result.calibration_error:.3f}"
    if calibrated is not None:
        bins = {"calibrated": _bins(calibrated, labels)} | bins
        after = score(calibrated.clamp_min(1e-30).log(), labels, names).calibration_error
        errors += f", calibrated {after:.3f}"
    colour = dict(zip(bins, plots.COLOURS, strict=False))
    chart = plots.reliability(bins, colour, "Reliability")
    about = (
        f"Of images with such a probability, the share that is right, ± its standard error; on the dashed line the two "
        f"agree. Grey: how many images there are. {errors[0].upper()}{errors[1:]} (0 to 1, {BINS} bins)."
    )
    return ["<h2>Reliability</h2>", f"<figure>{chart}<figcaption>{about}</figcaption></figure>"]


def _bins(p: Tensor, labels: Tensor) -> list[tuple[float, float, int]]:
    """Mean confidence, share right and images of each bin that has any."""
    confidence, predicted = p.max(-1)
    right, place = (predicted == labels).double(), (confidence * BINS).ceil().long().clamp(1, BINS)
    each = [place == i for i in range(1, BINS + 1)]
    return [(confidence[i].mean().item(), right[i].mean().item(), int(i.sum())) for i in each if i.any()]


# --- pictures -------------------------------------------------------------------------------------


def _mistakes(measured: Measured, p: Tensor, what: str) -> list[str]:
    names, images = measured.result.classes, measured.images
    confidence, predicted = p.max(-1)
    wrong = (predicted != images.labels).nonzero()[:, 0]
    worst = wrong[confidence[wrong].argsort(descending=True, stable=True)][:SHOWN].tolist()
    if not worst:
        return ["<h2>Mistakes</h2>", "<p>There are none.</p>"]
    cards = [
        _card(
            [measured.paths[i]], images.reader,
            f"<b>{escape(names[predicted[i]])}</b> {_percent(confidence[i])}<br>labelled "
            f"<b>{escape(names[images.labels[i]])}</b> {_percent(p[i, images.labels[i]])}",
        )
        for i in worst
    ]  # fmt: skip
    about = f"The probability is {what}. {_of(wrong)}, the most confident first."
    return ["<h2>The most confident mistakes</h2>", f"<p>{about}</p>", _cards(cards)]


def _duplicates(run: Path, measured: Measured, p: Tensor) -> list[str]:
    head, images = "<h2>Near-duplicates of training images</h2>", measured.images
    trained_on = [path for path in images_trained_on(run) or [] if path.is_file()]
    if not trained_on:
        return [head, "<p>Not looked for: the model does not say what it was trained on, or that is not there now.</p>"]
    known = {path.resolve() for path in trained_on}
    own = sum(path.resolve() in known for path in measured.paths)
    note = f" {own} of the images themselves were trained on." if own else ""
    pairs = near_duplicates(measured.paths, trained_on, images.reader)
    about = (
        f"{len(pairs)} of {len(measured.paths)} images are much like one of the {len(trained_on)} that the model was "
        f"trained on, or its mirror image: their thumbnails (16 × 16 colours) have a correlation of {ALIKE} or more."
        f"{note}"
    )
    if not pairs:
        return [head, f"<p>{about}</p>"]
    alike = {pair.image for pair in pairs}
    rest = torch.tensor([path not in alike for path in measured.paths])
    if rest.any():
        right = (p.argmax(-1) == images.labels)[rest].double().mean().item()
        about += f" Without them {100 * right:.1f} % are told right."
    cards = [_card(pair[:2], images.reader, f"correlation {pair.correlation:.3f}") for pair in pairs[:SHOWN]]
    return [
        head,
        f"<p>{about} {_of(pairs)}, most alike first; the image trained on stands at the right.</p>",
        _cards(cards),
    ]


def _doubts(method: Method, measured: Measured) -> list[str]:
    names, images = measured.result.classes, measured.images
    head = "<h2>Doubtful labels</h2>"
    found, n, agree = doubtful_labels(images.frozen(method).cpu(), images.labels)
    if not n:
        return [head, f"<p>Not looked for: that takes {LEAST} images of each of two classes.</p>"]
    about = (
        f"By confident learning, as cleanlab does it, {len(found)} of {n} labels are doubtful. The probabilities are "
        f"those of a linear discriminant on the frozen image features, {FOLDS}-fold cross-validated: no image speaks "
        f"for its own label, and the tuned model has no part in them. The discriminant agrees with {100 * agree:.0f} % "
        "of the labels; the less that is, the more often it is itself at fault."
    )
    if left := len(measured.paths) - n:
        about += f" {left} images of classes with fewer than {LEAST} images are left out."
    if found:
        about += f" {_of(found)}, the lowest probability of the label first."
    cards = [
        _card(
            [measured.paths[i]], images.reader,
            f"labelled <b>{escape(names[images.labels[i]])}</b><br>rather <b>{escape(names[c])}</b>",
        )
        for i, c in found[:SHOWN]
    ]  # fmt: skip
    return [head, f"<p>{about}</p>", _cards(cards)]


def _of(found: Sequence[Any] | Tensor) -> str:
    return f"Shown: {SHOWN} of {len(found)}" if len(found) > SHOWN else f"Shown: all {len(found)}"


def _percent(p: float | Tensor) -> str:
    return f"{100 * p:.1f}&nbsp;%"


def _cards(cards: Iterable[str]) -> str:
    return f"<div class=cards>{''.join(cards)}</div>"


def _card(paths: Sequence[Path], reader: ImageReader, about: str) -> str:
    """Pictures side by side, with a caption in HTML and their files' names."""
    pictures = " ".join(_picture(path, reader) for path in paths)
    files = "<br>".join(escape("/".join(path.parts[-2:])) for path in paths)
    kind = "card pair" if len(paths) > 1 else "card"
    return f'<figure class="{kind}">{pictures}<figcaption>{about}<br><small>{files}</small></figcaption></figure>'


def _picture(path: Path, reader: ImageReader) -> str:
    small = reader.image(path).convert("RGB")
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    small.save(content, "JPEG", quality=80)
    data = b64encode(content.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{escape("/".join(path.parts[-2:]))}">'
