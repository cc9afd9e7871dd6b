"""A comparison as one HTML page, which needs no other file and no network."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from vlprompt.bench.report import plots
from vlprompt.bench.report.document import document
from vlprompt.compare.rows import HEAD, Row, cells

if TYPE_CHECKING:
    from vlprompt.compare.run import Comparison

NOTE = (
    "Accuracy on images held out ± its standard error; macro accuracy is the mean of the classes'. The calibration "
    "error (0 to 1, 15 bins) is that of the method's own probabilities, and of calibrated ones by cross-validation. "
    "Training is the time of one run; what the frozen tower has seen for another method it does not see again. Size is "
    "without the backbone."
)


def page(result: Comparison) -> str:
    """The whole page."""
    title = f"Methods compared on {result.data}"
    head = "".join(f"<th>{escape(text)}</th>" for text in HEAD)
    accuracy = {row.method: row.accuracy for row in result.rows}
    colour = dict.fromkeys(accuracy, plots.GREY) | {result.best: plots.COLOURS[0]}
    left = [f"<li><b>{escape(x.method)}</b>: {escape(x.reason)}</li>" for x in result.left_out]
    bars = plots.bars(accuracy, colour, "Accuracy, %")
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(result.reason)}</p>",
        f"<p>Take <b>{escape(result.best)}</b>. It was trained on all {result.images} images, and is calibrated:</p>",
        f"<pre>vlprompt predict {escape(result.run)} IMAGE…</pre>",
        f"<div class=wide><table><thead><tr>{head}</tr></thead>",
        f"<tbody>{''.join(map(_row, result.rows))}</tbody></table></div>",
        f"<p class=note>{escape(NOTE)}</p>",
        f"<figure>{bars}<figcaption>Accuracy on held-out images, %</figcaption></figure>",
        *(["<h2>Left out</h2>", f"<ul>{''.join(left)}</ul>"] if left else []),
        f"<p class=note>Held out: {escape(result.held_out)}. Backbone: {escape(result.backbone)}. Test images were not "
        f"touched. {result.seconds:.0f} s in all.</p>",
    ]
    return document(title, body)


def _row(row: Row) -> str:
    return f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in cells(row))}</tr>"
