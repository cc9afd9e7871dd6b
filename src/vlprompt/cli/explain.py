"""``vlprompt explain``: which patches of an image speak for a class, for any method, as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor, nn

from vlprompt.artefact.calibration import Calibration
from vlprompt.backbones.attack import Pixels
from vlprompt.backbones.backbone import unit
from vlprompt.data.images import ImageSource, load_image
from vlprompt.data.splits import find_classes
from vlprompt.demo.drawing import FAINT, GRID, SCALE, Sheet
from vlprompt.errors import ConfigError, DataError, first_few
from vlprompt.files import write_atomically
from vlprompt.methods import Method
from vlprompt.methods.base import TokenMaps
from vlprompt.training.explain import relevance


@dataclass(frozen=True)
class Explanation:
    """What the patches of one image say, row by row, and what else the method shows of its tokens."""

    image: Image.Image
    """What the model sees, S × S."""
    class_name: str
    """The class that was asked about, or the most probable one."""
    probability: float
    asked: bool
    relevance: Tensor
    """[grid, grid]; see :func:`vlprompt.training.explain.relevance`."""
    contribution: Tensor | None
    """Cosine of each patch with the class, [N]; None of a ResNet, which has no tokens."""
    maps: Sequence[TokenMaps]

    def to_dict(self) -> dict[str, Any]:
        """The numbers as JSON values; the method's own for each block from 1."""
        names = [rows.name for rows in self.maps]
        blocks = zip(*(rows.values for rows in self.maps), strict=True)
        return {
            "class": self.class_name,
            "probability": self.probability,
            "patches": list(self.relevance.shape),
            "relevance": _numbers(self.relevance.flatten()),
            "contribution": None if self.contribution is None else _numbers(self.contribution),
            "blocks": [
                {"block": i, **dict(zip(names, map(_numbers, block), strict=True))} for i, block in enumerate(blocks, 1)
            ],
        }


def _numbers(values: Tensor) -> list[float] | list[int]:
    """Numbers, or which tokens are marked."""
    if values.dtype == torch.bool:
        return values.nonzero()[:, 0].tolist()
    return [round(x, 6) for x in values.tolist()]


@torch.no_grad()
def explain(
    method: Method,
    source: ImageSource,
    seed: int = 0,
    class_name: str | None = None,
    calibration: Calibration | None = None,
) -> Explanation:
    """Explain what a tuned model says of an image.

    Raises DataError if the image cannot be read or the model has no such class, ConfigError if it cannot be explained.
    """
    preprocess = method.backbone.preprocess
    asked = None if class_name is None else own_class(method, class_name)
    pixels = preprocess(load_image(source, method.white))
    images = pixels[None].to(method.backbone.device)
    found = relevance(method, pixels, class_index=asked, calibration=calibration)
    has_tokens = hasattr(method.backbone.image_tower, "blocks")
    shown = (255 * Pixels(preprocess).of(images)[0]).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
    return Explanation(
        Image.fromarray(shown),
        found.name,
        found.probability,
        asked is not None,
        found.map,
        contribution(method, images, found.index) if has_tokens else None,
        method.explain(images, seed),
    )


def own_class(method: Method, name: str) -> int:
    """The index of a class of the model's; raises DataError if it has no such class."""
    (c,) = find_classes([name], method.class_names)
    if c is None:
        near = get_close_matches(name, method.class_names, 1, 0.5)
        hint = f": did you mean '{near[0]}'?" if near else ""
        raise DataError(f"the model has no class '{name}'{hint} (its classes: {first_few(method.class_names)})")
    return c


def contribution(method: Method, images: Tensor, c: int) -> Tensor:
    """Cosine of each patch of an image [1, 3, S, S] with class c: [N]."""
    if method.image_dependent:
        t = method.class_features(method.class_names, method.adapt(method.encode_images(images)))
    else:
        t = method.kept_class_features(method.class_names)
    patches = method.adapt(unit(patch_features(method, images)[0]))
    t = t[..., c, : patches.shape[-1]]  # what a head adds to it, as a bias, is the same for every patch
    t = unit(t.float()).reshape(-1, t.shape[-1]).mean(0)  # of several features: the mean
    return (unit(patches.float()) @ t).cpu()


def patch_features(method: Method, images: Tensor) -> Tensor:
    """Features of each patch [B, N, E], not normalised: what the tower would read were it the only token at its end.

    The last block computes all tokens while the method encodes the images, whatever the method does to tokens,
    attention or weights. Raises ConfigError if it does not run the image tower once.
    """
    tower, seen = method.backbone.image_tower, list[Tensor]()

    def every_row(block: nn.Module, given: tuple) -> None:
        seen.append(block.forward(*given[:2]))

    hook = tower.blocks[-1].register_forward_pre_hook(every_row)
    try:
        method.encode_images(images)
    finally:
        hook.remove()
    if len(seen) != 1:
        raise ConfigError(
            f"cannot explain method '{method.name}': it runs the image tower {len(seen)} times for an image"
        )
    first = 0 if tower.class_token is None else 1
    patches = seen[0][:, first : len(tower.positions)]
    return tower.read(patches.flatten(0, 1)[:, None]).unflatten(0, patches.shape[:2])[:, :, 0]


def write_explanation(explanation: Explanation, out: Path, title: str) -> None:
    """Draw into a PNG; raises OutputError if it cannot be written."""
    content = io.BytesIO()
    draw_explanation(explanation, title).save(content, "PNG")
    write_atomically(out, content.getvalue())


# --- the picture ----------------------------------------------------------------------------------

CELL, GAP, MARGIN, LABEL, HEAD, PROMPT = 148, 12, 24, 128, 64, 12  # pixels
ROW = CELL + PROMPT + 26 + GAP
MARK = (178, 24, 43)
SCALE_COLOURS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=float)
"""Dark to bright, told apart in grey too (viridis at five points)."""


def draw_explanation(explanation: Explanation, title: str) -> Image.Image:
    """What the model sees beside what speaks for the class; below, a row for each further map."""
    grid = len(explanation.relevance)
    speaks = TokenMaps("relevance", "% of what speaks\nfor the class", [100 * explanation.relevance.flatten()])
    said = explanation.contribution
    own = [] if said is None else [TokenMaps("contribution", "cosine of each patch\nwith the class", [said])]
    columns = max([4, *(len(rows.values) for rows in explanation.maps)])
    width = MARGIN + LABEL + columns * (CELL + GAP) + MARGIN
    sheet = Sheet(width, HEAD + 24 + (1 + len(own) + len(explanation.maps)) * ROW + MARGIN)
    sheet.text(MARGIN, MARGIN + 12, title, size=17, margin=MARGIN)
    what = "asked about" if explanation.asked else "prediction"
    about = f"{what}: {explanation.class_name}, {100 * explanation.probability:.1f} %"
    sheet.text(MARGIN, MARGIN + 32, about, FAINT, margin=MARGIN)
    picture = explanation.image.resize((SCALE * CELL, SCALE * CELL), Image.Resampling.BICUBIC)
    top, left = HEAD + 24, MARGIN + LABEL
    sheet.image.paste(picture, (SCALE * left, SCALE * top))
    sheet.box(left, top, CELL, CELL, None, GRID)
    _draw_row(sheet, speaks, picture, grid, left + CELL + GAP, top)
    for r, rows in enumerate(own, 1):
        _draw_row(sheet, rows, picture, grid, left + CELL + GAP, top + r * ROW)
    top += len(own) * ROW
    for i in range(max((len(rows.values) for rows in explanation.maps), default=0)):
        sheet.text(left + i * (CELL + GAP), top + ROW + 12, f"after block {i + 1}", FAINT, 12)
    for r, rows in enumerate(explanation.maps, 1):
        _draw_row(sheet, rows, picture, grid, left, top + r * ROW + 20)
    return sheet.finished()


def _draw_row(sheet: Sheet, rows: TokenMaps, picture: Image.Image, grid: int, left: int, y: int) -> None:
    sheet.text(MARGIN, y + 16, rows.name, size=15)
    for n, line in enumerate(rows.about.split("\n")):
        sheet.text(MARGIN, y + 36 + 16 * n, line, FAINT, 11)
    values = [of_block.double().numpy() for of_block in rows.values]
    marks = rows.values[0].dtype == torch.bool
    low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    if not marks:
        _colour_bar(sheet, MARGIN, y + 66, low, high)
    for i, of_block in enumerate(values):
        x, patches, prompts = left + i * (CELL + GAP), of_block[: grid * grid], of_block[grid * grid :]
        if marks:
            over, below = _marked(picture, patches, grid), f"{int(of_block.sum())} of {len(of_block)} marked"
            fills = [MARK if value else None for value in prompts]
        else:
            colours = _colours((of_block - low) / ((high - low) or 1))
            heat = Image.fromarray(colours[: grid * grid].reshape(grid, grid, 3)).resize(picture.size, 0)
            over, below = Image.blend(picture.convert("L").convert("RGB"), heat, 0.68), f"mean {of_block.mean():.2f}"
            fills = list(map(tuple, colours[grid * grid :].tolist()))
        sheet.image.paste(over, (SCALE * x, SCALE * y))
        sheet.box(x, y, CELL, CELL, None, GRID)
        step = min(1.25 * PROMPT, CELL / max(len(prompts), 1))
        for m, fill in enumerate(fills):
            sheet.box(x + m * step, y + CELL + 4, 0.8 * step, PROMPT, fill, FAINT)
        sheet.text(x, y + CELL + PROMPT + 19, below, FAINT, 11)


def _colours(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Values from 0 to 1 as colours, [..., 3]."""
    at = np.clip(values, 0, 1) * (len(SCALE_COLOURS) - 1)
    points = np.arange(len(SCALE_COLOURS))
    return np.stack([np.interp(at, points, channel) for channel in SCALE_COLOURS.T], -1).round().astype(np.uint8)


def _marked(picture: Image.Image, marks: NDArray[np.floating], grid: int) -> Image.Image:
    """Marked patches faded and crossed out: seen without colours too."""
    size = SCALE * CELL
    mask = Image.fromarray(np.where(marks.reshape(grid, grid), 255, 0).astype(np.uint8))
    faded = Image.blend(picture, Image.new("RGB", picture.size, "white"), 0.72)
    marked = Image.composite(faded, picture, mask.resize(picture.size, Image.Resampling.NEAREST))
    draw = ImageDraw.Draw(marked)
    for place in np.flatnonzero(marks):
        top, left = divmod(int(place), grid)
        x, y, side = left * size / grid, top * size / grid, size / grid
        draw.line([x + 0.25 * side, y + 0.75 * side, x + 0.75 * side, y + 0.25 * side], MARK, SCALE)
        draw.line([x + 0.25 * side, y + 0.25 * side, x + 0.75 * side, y + 0.75 * side], MARK, SCALE)
    return marked


def _colour_bar(sheet: Sheet, x: int, y: int, low: float, high: float) -> None:
    width, height = 96, 10
    bar = Image.fromarray(_colours(np.linspace(0, 1, SCALE * width))[None])
    sheet.image.paste(bar.resize((SCALE * width, SCALE * height)), (SCALE * x, SCALE * y))
    sheet.text(x, y + height + 14, f"{low:.2f}", FAINT, 11)
    sheet.text(x + width, y + height + 14, f"{high:.2f}", FAINT, 11, "rs")
