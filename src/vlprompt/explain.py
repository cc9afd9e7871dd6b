"""``vlprompt explain``: which tokens of an image matter to DroPLe, and which its dropout would hit, as a picture."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from vlprompt.data.images import load_image
from vlprompt.demo.drawing import FAINT, GRID, SCALE, Sheet
from vlprompt.errors import ArtefactError, OutputError
from vlprompt.files import write_atomically
from vlprompt.methods import Method
from vlprompt.methods.drople.drople import BlockDropout, DroPLe


@dataclass(frozen=True)
class Explanation:
    """One image under a tuned model's token dropout; tokens are the patches, row by row, then the visual prompts."""

    image: Image.Image
    """What the model sees, S × S."""
    class_name: str
    """The most probable class."""
    probability: float
    patches: int
    """Patches along each side."""
    settings: str
    """The kind of dropout, in words."""
    blocks: list[BlockDropout]
    hit: list[Tensor]
    """Tokens that one draw hits after each block, [N − 1]; no prompt that is replaced anyway."""

    def to_dict(self) -> dict[str, Any]:
        """The numbers as JSON values, for each block from 1."""
        blocks = [
            {
                "block": i,
                "importance": [round(x, 6) for x in b.importance[0].tolist()],
                "probability": [round(x, 6) for x in b.p[0].tolist()],
                "hit": hit.nonzero()[:, 0].tolist(),
            }
            for i, (b, hit) in enumerate(zip(self.blocks, self.hit, strict=True), 1)
        ]
        return {
            "class": self.class_name,
            "probability": self.probability,
            "patches": [self.patches, self.patches],
            "blocks": blocks,
        }


@torch.no_grad()
def explain(method: Method, file: Path, seed: int = 0) -> Explanation:
    """Importance, probabilities and one draw for an image file.

    Raises ArtefactError for a model of another method, DataError if the image cannot be read.
    """
    if not isinstance(method, DroPLe):
        raise ArtefactError(f"cannot explain a model of {method.name}: token importance belongs to {DroPLe.name}")
    preprocess, c = method.backbone.preprocess, method.config
    pixels = preprocess(load_image(file))
    images = pixels[None].to(method.backbone.device)
    logits = method.logits(method.encode_images(images), method.class_features(method.class_names))
    probability, best = logits[0].double().softmax(-1).max(-1)
    blocks = [BlockDropout(b.importance.cpu(), b.p.cpu(), b.reach) for b in method.explain(images)]
    generator = torch.Generator().manual_seed(seed)
    hit = []
    for block in blocks:
        p = block.p[0].clone()
        p[block.reach :] = 0
        hit.append(torch.rand(len(p), generator=generator) < p)
    mean, std = (torch.tensor(x)[:, None, None] for x in (preprocess.mean, preprocess.std))
    shown = (255 * (pixels * std + mean)).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    tower = method.backbone.image_tower.config
    action = {"gaussian": f"noise, sigma {c.sigma:g}", "zero": "zeroed"}[c.mode]
    kinds = {
        "importance": f"importance-weighted, p {c.p_min:g} to {c.p_max:g}; {action}",
        "uniform": f"uniform, p {(c.p_min + c.p_max) / 2:g}; {action}",
        "none": "none",
    }
    return Explanation(
        Image.fromarray(shown),
        method.class_names[int(best)],
        probability.item(),
        tower.image_size // tower.patch_size,
        kinds[c.dropout],
        blocks,
        hit,
    )


def write_explanation(explanation: Explanation, out: Path, title: str, seed: int) -> None:
    """Draw into a PNG; raises OutputError if its name says otherwise, or it cannot be written."""
    if out.suffix.lower() != ".png":
        raise OutputError(f"cannot write {out}: its name must end in .png")
    content = io.BytesIO()
    draw_explanation(explanation, title, seed).save(content, "PNG")
    write_atomically(out, content.getvalue())


# --- the picture ----------------------------------------------------------------------------------

CELL, GAP, MARGIN, LABEL, HEAD, PROMPT = 148, 12, 24, 128, 92, 12  # pixels
HIT = (178, 24, 43)
SCALE_COLOURS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=float)
"""Dark to bright, told apart in grey too (viridis at five points)."""


def draw_explanation(explanation: Explanation, title: str, seed: int) -> Image.Image:
    """Columns are blocks; rows are importance, probability and the draw, over what the model sees."""
    n, grid = len(explanation.blocks), explanation.patches
    row = CELL + PROMPT + 26 + GAP
    width = MARGIN + LABEL + max(n, 4) * (CELL + GAP) + MARGIN
    sheet = Sheet(width, HEAD + 24 + 3 * row + MARGIN)
    picture = explanation.image.resize((SCALE * CELL, SCALE * CELL), Image.Resampling.BICUBIC)
    thumbnail = explanation.image.resize((SCALE * 60, SCALE * 60), Image.Resampling.BICUBIC)
    sheet.image.paste(thumbnail, (SCALE * MARGIN, SCALE * MARGIN))
    sheet.text(MARGIN + 74, MARGIN + 18, title, size=17, margin=MARGIN)
    said = f"{100 * explanation.probability:.1f} % {explanation.class_name}"
    sheet.text(MARGIN + 74, MARGIN + 38, f"prediction: {said}", FAINT, margin=MARGIN)
    sheet.text(MARGIN + 74, MARGIN + 57, f"token dropout while training: {explanation.settings}", FAINT, margin=MARGIN)
    top = HEAD + 24
    largest = max(float(b.p.max()) for b in explanation.blocks) or 1.0
    rows = (
        ("importance", "of the patches and,", "below, the prompts", (0.0, 1.0)),
        ("probability", "that dropout hits", "the token", (0.0, largest)),
        ("one draw", f"(seed {seed}): hit", "tokens are marked", None),
    )
    for r, (name, first, second, span) in enumerate(rows):
        y = top + r * row
        sheet.text(MARGIN, y + 16, name, size=15)
        sheet.text(MARGIN, y + 36, first, FAINT, 12)
        sheet.text(MARGIN, y + 52, second, FAINT, 12)
        if span:
            _colour_bar(sheet, MARGIN, y + 66, span)
        for i, (block, hit) in enumerate(zip(explanation.blocks, explanation.hit, strict=True)):
            x = MARGIN + LABEL + i * (CELL + GAP)
            if r == 0:
                sheet.text(x, y - 8, f"after block {i + 1}", FAINT, 12)
            below = f"{int(hit.sum())} of {block.reach} hit"
            values = hit.numpy()
            if span:
                values = (block.importance if r == 0 else block.p)[0].numpy()
                below = f"mean {values.mean():.2f}"
                over = Image.blend(_grey(picture), _heat(values[: grid * grid] / span[1], grid), 0.68)
            else:
                over = _marked(picture, values[: grid * grid], grid)
            sheet.image.paste(over, (SCALE * x, SCALE * y))
            sheet.box(x, y, CELL, CELL, None, GRID)
            alive = block.reach > grid * grid
            _prompts(sheet, x, y + CELL + 4, values[grid * grid :], span[1] if span else None, alive)
            sheet.text(x, y + CELL + PROMPT + 19, below, FAINT, 11)
    return sheet.finished()


def _colours(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Values from 0 to 1 as colours, [..., 3]."""
    at = np.clip(values, 0, 1) * (len(SCALE_COLOURS) - 1)
    points = np.arange(len(SCALE_COLOURS))
    return np.stack([np.interp(at, points, channel) for channel in SCALE_COLOURS.T], -1).round().astype(np.uint8)


def _heat(values: NDArray[np.floating], grid: int) -> Image.Image:
    colours = Image.fromarray(_colours(values.reshape(grid, grid)))
    return colours.resize((SCALE * CELL, SCALE * CELL), Image.Resampling.NEAREST)


def _grey(image: Image.Image) -> Image.Image:
    return image.convert("L").convert("RGB")


def _marked(picture: Image.Image, hit: NDArray[np.bool_], grid: int) -> Image.Image:
    """Hit patches faded and crossed out: seen without colours too."""
    size = SCALE * CELL
    mask = Image.fromarray(np.where(hit.reshape(grid, grid), 255, 0).astype(np.uint8))
    faded = Image.blend(picture, Image.new("RGB", picture.size, "white"), 0.72)
    marked = Image.composite(faded, picture, mask.resize(picture.size, Image.Resampling.NEAREST))
    draw = ImageDraw.Draw(marked)
    for place in np.flatnonzero(hit):
        top, left = divmod(int(place), grid)
        x, y, side = left * size / grid, top * size / grid, size / grid
        draw.line([x + 0.25 * side, y + 0.75 * side, x + 0.75 * side, y + 0.25 * side], HIT, SCALE)
        draw.line([x + 0.25 * side, y + 0.25 * side, x + 0.75 * side, y + 0.75 * side], HIT, SCALE)
    return marked


def _prompts(sheet: Sheet, x: int, y: int, values: NDArray, largest: float | None, alive: bool) -> None:
    """The visual prompts as small boxes, as wide as there is room; hollow where the next block replaces them."""
    step = min(1.25 * PROMPT, CELL / max(len(values), 1))
    for m, value in enumerate(values):
        left = x + m * step
        if largest is not None:
            red, green, blue = _colours(np.asarray(value / largest)).tolist()
            sheet.box(left, y, 0.8 * step, PROMPT, (red, green, blue), FAINT)
        elif alive:
            sheet.box(left, y, 0.8 * step, PROMPT, HIT if value else None, FAINT)
    if largest is None and not alive:
        sheet.text(x, y + PROMPT - 2, "prompts are replaced", FAINT, 11)


def _colour_bar(sheet: Sheet, x: int, y: int, span: tuple[float, float]) -> None:
    width, height = 96, 10
    bar = Image.fromarray(_colours(np.linspace(0, 1, SCALE * width))[None])
    sheet.image.paste(bar.resize((SCALE * width, SCALE * height)), (SCALE * x, SCALE * y))
    sheet.text(x, y + height + 14, f"{span[0]:g}", FAINT, 11)
    right = f"{span[1]:.2g}"
    sheet.text(x + width - 6 * len(right), y + height + 14, right, FAINT, 11)
