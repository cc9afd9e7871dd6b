"""Random views of the rendered pictures, made a batch at a time on the training device.

A drawing is shifted, scaled, turned, recoloured and put on a background. Two changes stand for styles that the
sets lack: black outlines around flat colours, and bare edges.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from steps import draw_by_weight
from torch import Tensor
from torch.nn import functional as F

from vlprompt.backbones.processors import CLIP_MEAN, CLIP_STD

MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))

VALIDATION_SETS = ("fxemoji",)
"""Never trained on: a style of its own on which settings are chosen, so that OpenMoji chooses nothing."""

EMOJI, ICON = 4.0, 1.0
"""How much more often a caption of the emoji is drawn than one that icons alone show, per root of its pictures."""


class Pictures:
    """The rendered pictures with their captions, memory-mapped, and how often each is drawn.

    Args:
        data: the folder that ``data.py`` wrote.
        size: the rendering to read.
        validation: the pictures of ``VALIDATION_SETS`` instead of all others.
    """

    def __init__(self, data: Path, size: int, validation: bool = False) -> None:
        captions = json.loads((data / "captions.json").read_text(encoding="utf-8"))
        listed = json.loads((data / "pictures.json").read_text(encoding="utf-8"))
        self.pixels = np.load(data / f"pictures-{size}.npy", mmap_mode="r")
        chosen = [i for i, p in enumerate(listed) if p["drawn"] and (p["set"] in VALIDATION_SETS) == validation]
        self.rows = torch.tensor(chosen)
        self.captions = torch.tensor([listed[i]["caption"] for i in chosen])
        emoji = torch.tensor([bool(caption["subgroup"]) for caption in captions])[self.captions]
        per_caption = torch.bincount(self.captions, minlength=len(captions)).float()[self.captions]
        coloured = self._coloured([listed[i]["set"] for i in chosen])
        self.mono = ~coloured
        # A caption in proportion to the root of its pictures; among them, coloured ones thrice as often.
        weights = torch.where(emoji, EMOJI, ICON) * torch.where(coloured, 3.0, 1.0) / per_caption.sqrt()
        self.ends = weights.double().cumsum(0)

    def _coloured(self, sets: list[str]) -> Tensor:
        """Sets of which a sample has colours."""
        known: dict[str, bool] = {}
        rows: dict[str, list[int]] = {}
        for i, name in enumerate(sets):
            rows.setdefault(name, []).append(i)
        for name, members in rows.items():
            sample = self.pixels[[int(self.rows[i]) for i in members[:: max(1, len(members) // 20)]]]
            known[name] = bool(np.ptp(sample[..., :3].astype(int), -1).max() > 24)
        return torch.tensor([known[name] for name in sets])

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """n pictures at random, by weight: indices."""
        return draw_by_weight(self.ends, n, generator)

    def read(self, index: Tensor) -> Tensor:
        """[B, 4, size, size] in 0…1, colours multiplied by alpha."""
        rows = self.rows[index].numpy()
        order = np.argsort(rows)  # in the order of the disk
        pixels = np.empty((len(rows), *self.pixels.shape[1:]), np.uint8)
        pixels[order] = self.pixels[rows[order]]
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255)


def _chance(n: int, p: float, generator: torch.Generator, device: torch.device) -> Tensor:
    return (torch.rand(n, 1, 1, 1, generator=generator, device=device) < p).float()


def _some(n: int, p: float, generator: torch.Generator, device: torch.device) -> Tensor:
    """About p·n of the rows 0…n-1: what few views undergo is computed for those alone."""
    return (torch.rand(n, generator=generator, device=device) < p).nonzero()[:, 0]


def _uniform(n: int, low: float, high: float, generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.rand(n, generator=generator, device=device) * (high - low) + low


def _placed(rgba: Tensor, size: int, mirror: Tensor, generator: torch.Generator) -> Tensor:
    """Scaled, turned, shifted and perhaps mirrored onto a canvas of ``size`` pixels."""
    n, device = len(rgba), rgba.device
    scale = 1 / _uniform(n, 0.6, 1.15, generator, device)
    stretch = torch.exp(_uniform(n, -0.15, 0.15, generator, device))
    angle = torch.randn(n, generator=generator, device=device) * (12 * math.pi / 180)
    room = (1 - 1 / scale).clamp(min=0.06)
    dx, dy = (_uniform(n, -1, 1, generator, device) * room for _ in range(2))
    flip = 1 - 2 * mirror * (torch.rand(n, generator=generator, device=device) < 0.5)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    turn = torch.stack(
        [
            torch.stack([cos * stretch * flip, -sin * flip, -dx * scale * flip], -1),
            torch.stack([sin, cos / stretch, -dy * scale], -1),
        ],
        1,
    )
    grid = F.affine_grid(turn, [n, 4, size, size], align_corners=False)
    return F.grid_sample(rgba, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _edges(x: Tensor) -> Tensor:
    """Strength of the edges of [B, C, S, S], about 0…1: [B, 1, S, S]."""
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    across = (x[..., 1:-1, 2:] - x[..., 1:-1, :-2]).abs().amax(1, keepdim=True)
    down = (x[..., 2:, 1:-1] - x[..., :-2, 1:-1]).abs().amax(1, keepdim=True)
    return across + down


def _recoloured(
    rgb: Tensor, generator: torch.Generator, hues: float = 0.3, saturations: tuple[float, float] = (0.4, 1.5)
) -> Tensor:
    """Colours mixed at random around grey: hue, saturation, contrast, brightness."""
    n, device = len(rgb), rgb.device
    grey = torch.full((3, 3), 1 / 3, device=device)
    axis = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=device) / math.sqrt(3)
    hue = (torch.randn(n, generator=generator, device=device) * hues).view(n, 1, 1)
    hue = torch.where(_chance(n, 0.15, generator, device)[:, 0] > 0, hue * 6, hue)
    saturation = _uniform(n, *saturations, generator, device).view(n, 1, 1)
    saturation = saturation * (1 - _chance(n, 0.1, generator, device)[:, 0])
    rest = torch.eye(3, device=device) - grey
    matrix = grey + saturation * (hue.cos() * rest + hue.sin() * axis)
    rgb = torch.einsum("nij,njhw->nihw", matrix, rgb)
    contrast = _uniform(n, 0.7, 1.3, generator, device).view(n, 1, 1, 1)
    brightness = _uniform(n, -0.12, 0.12, generator, device).view(n, 1, 1, 1)
    return ((rgb - 0.5) * contrast + 0.5 + brightness).clamp(0, 1)


def _background(n: int, size: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """White half of the time, else a colour, often light, in part running into another or with noise: [n, 3, S, S]."""
    colour = torch.rand(n, 3, 1, 1, generator=generator, device=device)
    light = _chance(n, 0.5, generator, device)
    colour = torch.where(light > 0, 0.75 + 0.25 * colour, colour)
    white = _chance(n, 0.5, generator, device)
    back = torch.where(white > 0, 1.0, colour).expand(n, 3, size, size).contiguous()
    rows = _some(n, 0.12, generator, device)
    if len(rows):
        other = torch.rand(len(rows), 3, 1, 1, generator=generator, device=device)
        ramp = torch.linspace(0, 1, size, device=device).view(1, 1, 1, size)
        down = _chance(len(rows), 0.5, generator, device)
        ramp = torch.where(down > 0, ramp.transpose(2, 3), ramp)
        back[rows] = torch.lerp(back[rows], other, ramp)
    rows = _some(n, 0.1, generator, device)
    if len(rows):
        coarse = torch.rand(len(rows), 3, 8, 8, generator=generator, device=device)
        noise = F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)
        back[rows] = torch.lerp(back[rows], noise, 0.6)
    return back


def view(rgba: Tensor, mono: Tensor, mirror: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Random views, as the image tower reads them.

    Args:
        rgba: [B, 4, S, S] in 0…1, colours multiplied by alpha.
        mono: [B], drawings in one colour, which are drawn in any.
        mirror: [B], pictures that mean the same in the mirror.
        size: pixels of the views.
        generator: on the device of ``rgba``.

    Returns [B, 3, size, size], normalised.
    """
    n, device = len(rgba), rgba.device
    placed = _placed(rgba, size, mirror.float(), generator)
    alpha = placed[:, 3:]
    back = _background(n, size, generator, device)
    # Ink is dark on a light ground, black as often as coloured; a fifth of the drawings the other way round.
    ink = mono.float().view(n, 1, 1, 1)
    pen = torch.rand(n, 3, 1, 1, generator=generator, device=device) * 0.6 * _chance(n, 0.6, generator, device)
    inverse = _chance(n, 0.2, generator, device)
    pen = torch.where(inverse > 0, 1 - pen, pen)
    rows = mono.nonzero()[:, 0]
    back[rows] = torch.where(inverse[rows] > 0, 0.4 * (1 - back[rows]), back[rows].clamp(min=0.55))
    colour = torch.where(ink > 0, pen, placed[:, :3])
    many = (~mono).nonzero()[:, 0]
    colour[many] = _recoloured((placed[many, :3] / alpha[many].clamp(min=1e-3)).clamp(0, 1), generator)
    image = torch.lerp(back, colour, alpha)

    rows = many[_some(len(many), 0.3, generator, device)]
    if len(rows):
        inner = (_edges(colour[rows] * alpha[rows]) * 1.5 - 0.15).clamp(0, 1)
        outer = F.max_pool2d(alpha[rows], 3, 1, 1) - F.avg_pool2d(alpha[rows], 3, 1, 1)
        image[rows] *= 1 - torch.maximum(inner, outer.clamp(0, 1))
    rows = _some(n, 0.06, generator, device)
    if len(rows):
        drawn = (_edges(image[rows]) * 1.2).clamp(0, 1)
        image[rows] = torch.where(_chance(len(rows), 0.5, generator, device) > 0, drawn, 1 - drawn)
    rows = _some(n, 0.15, generator, device)
    if len(rows):
        small = F.avg_pool2d(image[rows], 2)
        image[rows] = F.interpolate(small, size=(size, size), mode="bilinear", align_corners=False)
    rows = _some(n, 0.25, generator, device)
    if len(rows):
        amount = _uniform(len(rows), 0, 0.06, generator, device).view(-1, 1, 1, 1)
        noise = torch.randn(image[rows].shape, generator=generator, device=device)
        image[rows] = (image[rows] + amount * noise).clamp(0, 1)
    return (image - MEAN.to(device)) / STD.to(device)


def plain(rgba: Tensor, size: int) -> Tensor:
    """The pictures as they are, on white: [B, 3, size, size], normalised."""
    image = rgba[:, :3] + 1 - rgba[:, 3:]
    image = F.interpolate(image, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return (image.clamp(0, 1) - MEAN.to(rgba.device)) / STD.to(rgba.device)


class Photographs:
    """The photographs with chances of what they show, memory-mapped.

    Args:
        data: the folder that ``photos.py`` wrote.
        places: the classifier's classes that count, in order; chances are [B, len(places)].
        ids: the WordNet ids of those.
        validation: Tiny-ImageNet's val part instead of all others.
    """

    OWN = 0.4
    """Share of its own label in the chances of a photograph that has one; the rest is the classifier's."""

    def __init__(self, data: Path, places: list[int], ids: list[str], validation: bool = False) -> None:
        folder = data / "photos"
        every = sorted(file.name.removesuffix("-chance.npy") for file in folder.glob("*-chance.npy"))
        sources = [name for name in every if (name == "val") == validation]
        self.pixels = [np.load(folder / f"{name}-pixels.npy", mmap_mode="r") for name in sources]
        self.starts = np.cumsum([0, *map(len, self.pixels)])
        self.size = int(self.starts[-1])
        at = {id_: i for i, id_ in enumerate(ids)}
        labels = [json.loads((folder / f"{name}-labels.json").read_text(encoding="utf-8")) for name in sources]
        self.labels = torch.tensor([at.get(label, -1) for part in labels for label in part])
        top, chance = (
            torch.from_numpy(np.concatenate([np.load(folder / f"{name}-{what}.npy") for name in sources]))
            for what in ("top", "chance")
        )
        place = torch.full((max(*places, int(top.max())) + 1,), -1)
        place[places] = torch.arange(len(places))
        found = place[top.long()]
        self.top = found.clamp(min=0)
        self.chance = F.normalize(chance.float() * (found >= 0), p=1.0, dim=-1)
        self.kinds = len(places)
        self.grids = [np.load(folder / f"{name}-grid.npy", mmap_mode="r") for name in sources]

    def chances(self, index: Tensor) -> Tensor:
        """[B, kinds], each row a sum of one."""
        own = self.labels[index]
        share = torch.where(own >= 0, self.OWN, 0.0)[:, None]
        out = torch.zeros(len(index), self.kinds).scatter_add_(1, self.top[index], (1 - share) * self.chance[index])
        return out.scatter_add_(1, own.clamp(min=0)[:, None], share)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """n photographs at random: indices."""
        return torch.randint(self.size, (n,), generator=generator)

    def _rows(self, parts: list[np.ndarray], index: Tensor) -> Tensor:
        rows = index.numpy()
        out = np.empty((len(rows), *parts[0].shape[1:]), parts[0].dtype)
        source = np.searchsorted(self.starts, rows, side="right") - 1
        for at in np.argsort(rows):  # in the order of the disk
            out[at] = parts[source[at]][rows[at] - self.starts[source[at]]]
        return torch.from_numpy(out)

    def read(self, index: Tensor) -> Tensor:
        """[B, 3, S, S] in 0…1."""
        return self._rows(self.pixels, index).permute(0, 3, 1, 2).float().div_(255)

    def seen(self, index: Tensor) -> Tensor:
        """What the classifier sees, along its axes: [B, K, 5, 5]."""
        return self._rows(self.grids, index).permute(0, 3, 1, 2).float().div_(32)


def photo_view(rgb: Tensor, seen: Tensor, size: int, patches: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random views of photographs [B, 3, S, S] in 0…1: crops, flips, colour.

    Returns [B, 3, size, size], normalised, and what ``seen`` [B, K, 5, 5] says where the patches are,
    [B, patches², K].
    """
    n, device = len(rgb), rgb.device
    side = _uniform(n, 0.3, 1, generator, device).sqrt()
    stretch = torch.exp(_uniform(n, -0.2, 0.2, generator, device))
    wide, high = (side * stretch).clamp(max=1), (side / stretch).clamp(max=1)
    angle = torch.randn(n, generator=generator, device=device) * (4 * math.pi / 180)
    flip = 1 - 2 * (torch.rand(n, generator=generator, device=device) < 0.5).float()
    dx, dy = _uniform(n, -1, 1, generator, device) * (1 - wide), _uniform(n, -1, 1, generator, device) * (1 - high)
    cos, sin = angle.cos(), angle.sin()
    turn = torch.stack(
        [torch.stack([wide * cos * flip, -high * sin, dx], -1), torch.stack([wide * sin * flip, high * cos, dy], -1)], 1
    )
    grid = F.affine_grid(turn, [n, 3, size, size], align_corners=False)
    image = F.grid_sample(rgb, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    rows = _some(n, 0.8, generator, device)
    image[rows] = _recoloured(image[rows], generator, hues=0.12, saturations=(0.5, 1.4))
    rows = _some(n, 0.1, generator, device)
    if len(rows):
        small = F.avg_pool2d(image[rows], 2)
        image[rows] = F.interpolate(small, size=(size, size), mode="bilinear", align_corners=False)
    grid = F.affine_grid(turn, [n, 3, patches, patches], align_corners=False)
    where = F.grid_sample(seen, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return (image - MEAN.to(device)) / STD.to(device), where.flatten(2).transpose(1, 2)


def plain_photo(rgb: Tensor, size: int) -> Tensor:
    """The photographs as they are: [B, 3, size, size], normalised."""
    image = F.interpolate(rgb, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return (image - MEAN.to(rgb.device)) / STD.to(rgb.device)
