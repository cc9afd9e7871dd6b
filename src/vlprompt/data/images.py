"""Image files to tensors: decoding, evaluation preprocessing, and regions (random crops kept as numbers)."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from vlprompt.data.files import formats, heif_advice, open_image
from vlprompt.errors import DataError, first_line, unknown

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
SIXTEEN_BIT = 65535
# No photograph is this many times longer than wide; resizing such a strip whole would fill the memory.
_LONGEST = 100

Region = Sequence[float] | NDArray[np.floating]
"""(top, left, height, width, flip): a box relative to the image, each in 0..1; flip is 0 or 1."""

ImageSource = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]
"""A file, a Pillow image, or uint8 pixels: [H, W, 3], or [H, W] for grey."""


White = float | Literal["auto"]
"""The value of greys deeper than 8 bits that is white; ``auto`` finds it in the training images."""


def load_image(source: ImageSource, white: float | None = None, max_pixels: int | None = None) -> Image.Image:
    """An image upright (EXIF orientation), its first frame, as 8-bit RGB; files are decoded.

    JPEGs are decoded at full size: Pillow's draft mode, which decodes at 1/2, 1/4 or 1/8, gives other pixels than
    resizing the whole image does, and so other features.

    Greys of more than 8 bits are scaled so that ``white`` becomes 255, by default the largest 16-bit value; a format
    that tells its own (PGM, 12-bit TIFF) decides that. The greatest value found is ``info["greatest"]``. ``max_pixels``
    replaces Pillow's limit where that is lifted, as :class:`~vlprompt.data.reading.ImageReader` does.

    Raises DataError with the file and the reason if it is missing, damaged, empty, in no documented format, or a
    decompression bomb, and for pixels of another type or shape than ``ImageSource`` says.
    """
    if isinstance(source, np.ndarray):
        return _from_pixels(source)
    if not isinstance(source, (str, os.PathLike, Image.Image)):
        raise DataError(f"an image is a path, a Pillow image or an array, not {type(source).__name__}")
    try:
        with nullcontext(source) if isinstance(source, Image.Image) else open_image(source) as image:
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise DataError(f"{image.width * image.height} pixels; data.max_pixels = {max_pixels} is the limit")
            own, sliced = _own_white(image), _has_16_bit_colours(image)
            if sliced and white is not None:
                raise DataError("of 16-bit colours 8 bits are read, so data.white is for greys; save it with 8 bits")
            image.load()
            rgb = to_rgb(_upright(image), own or white)
            if sliced:
                rgb.info["greatest"] = 257 * max(high for _, high in rgb.getextrema())  # type: ignore[misc]
            return rgb
    except MemoryError:  # which says nothing about the image
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on damaged bytes
        if isinstance(source, Image.Image):
            raise DataError(f"cannot read the image {source!r}: {error}") from error
        raise DataError(f"cannot read image {os.fspath(source)}: {_reason(error, Path(source))}") from error


def _from_pixels(pixels: NDArray[np.uint8]) -> Image.Image:
    grey, colour = pixels.ndim == 2, pixels.ndim == 3 and pixels.shape[-1] == 3
    if pixels.dtype != np.uint8 or not pixels.size or not (grey or colour):
        found = f"{pixels.dtype} {list(pixels.shape)}"
        raise DataError(f"an image as an array is uint8 [H, W, 3] or [H, W], 0 to 255; found {found}")
    return Image.fromarray(pixels).convert("RGB")


def greatest_grey(source: ImageSource) -> float | None:
    """The greatest value of a grey image deeper than 8 bits, which is not 0; None for others and unreadable ones."""
    try:
        with nullcontext(source) if isinstance(source, Image.Image) else open_image(source) as image:  # type: ignore[arg-type]
            if not _is_deep(image) or _own_white(image):
                return None
            return float(np.asarray(image).max()) or None
    except Exception:  # told when it is decoded
        return None


def white_above(greatest: float) -> float:
    """What is white, by the greatest value of many images: of whole numbers the most that their bits hold (4095).

    Others are 1 or less, or the greatest is white itself.
    """
    if greatest != int(greatest) or greatest == 1:
        return max(greatest, 1.0)
    return float(2 ** max(int(greatest).bit_length(), 8) - 1)


def to_rgb(image: Image.Image, white: float | None = None) -> Image.Image:
    """Any Pillow image as 8-bit RGB: transparency over white, deep greys scaled (``convert`` would clip them).

    Raises DataError for pixels whose range is unknown: 32-bit floats and integers beyond 16 bits without ``white``,
    negative ones, and those that are not finite.
    """
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if _is_deep(image):
        return _scale_to_8_bit(image, white)
    if image.has_transparency_data:
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _is_deep(image: Image.Image) -> bool:
    return image.mode == "F" or image.mode.startswith("I")


def _raw_mode(image: Image.Image) -> tuple[str, str]:
    """How the pixels of a file that is not decoded yet lie in it: decoder and layout."""
    tiles = getattr(image, "tile", None)
    codec, _, _, layout = tiles[0] if tiles else ("", (), 0, "")
    return codec, str(layout[0] if isinstance(layout, tuple) and layout else layout)


def _own_white(image: Image.Image) -> float | None:
    """What is white in deep greys as the format says: Pillow scales PGM to 16 bits, but not 12-bit TIFF."""
    codec, raw = _raw_mode(image)
    return float(SIXTEEN_BIT) if codec.startswith("ppm") else 4095.0 if raw.startswith("I;12") else None


def _has_16_bit_colours(image: Image.Image) -> bool:
    return not _is_deep(image) and ";16" in _raw_mode(image)[1]


def _scale_to_8_bit(image: Image.Image, white: float | None) -> Image.Image:
    pixels = np.asarray(image)
    low, high = float(pixels.min()), float(pixels.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise DataError("some pixels are not finite")
    if low < 0:
        raise DataError(f"negative pixels (down to {low:g}), as CT values are: add to all so that black is 0")
    # Some 16-bit files open in mode "I", which has 32 bits.
    if white is None and (image.mode == "F" or high > SIXTEEN_BIT):
        kind = "32-bit float pixels" if image.mode == "F" else "integer pixels beyond 16 bits"
        raise DataError(f"{kind} have no known range: data.white=auto or data.white=VALUE says what is white")
    white = white or float(SIXTEEN_BIT)
    scaled = np.rint(np.minimum(pixels, white) * (255 / white)).astype(np.uint8)
    rgb = Image.fromarray(scaled).convert("RGB")
    rgb.info["greatest"] = high
    return rgb


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return image


def _reason(error: Exception, path: Path) -> str:
    if path.is_file() and path.stat().st_size == 0:
        return "the file is empty"
    if isinstance(error, UnidentifiedImageError):
        return f"not an image in a known format: {', '.join(formats())}{heif_advice(path)}"
    if isinstance(error, Image.DecompressionBombError):
        return f"{first_line(error)} (data.max_pixels=N allows more)"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)


@dataclass(frozen=True)
class Preprocess:
    """From an image to what a backbone reads: float32 [3, S, S], normalised per channel.

    ``shortest`` is CLIP's: the shorter side becomes S, then a centre crop. ``squash`` is SigLIP's: both sides
    become S. Sizes and offsets are rounded down, as in transformers; torchvision, which OpenAI's CLIP uses,
    rounds half an offset to even, so that its crop is one pixel further for some sizes.
    """

    image_size: int
    """S, in pixels."""
    mean: tuple[float, ...]
    """Per channel, of values in 0..1."""
    std: tuple[float, ...]
    """Per channel, of values in 0..1."""
    resize: Literal["shortest", "squash"] = "shortest"
    """What happens to images that are not square."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    """Pillow's filter."""
    resized: tuple[int, ...] = field(default=(), kw_only=True)
    """What images are resized to before S × S is cut from the centre, where that is not S: the shortest side, or height
    and width with ``squash``."""

    def __post_init__(self) -> None:
        if self.resize not in ("shortest", "squash"):
            raise DataError(unknown("resize", self.resize, ("shortest", "squash")))
        if self.interpolation not in _FILTERS:
            raise DataError(unknown("interpolation", self.interpolation, _FILTERS))
        if self.image_size < 1 or len(self.mean) != 3 or len(self.std) != 3 or 0 in self.std:
            raise DataError(
                f"preprocessing needs a positive image_size and three values for mean and std, none of std zero, "
                f"not {self.image_size}, {self.mean} and {self.std}"
            )
        # Configuration files give lists; equal settings must compare and print alike.
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))

    def __call__(self, image: Image.Image) -> Tensor:
        """Evaluation view of the whole image, [3, S, S]."""
        return self.tensor(self.whole(image))

    def whole(self, image: Image.Image) -> Image.Image:
        """The pixels of the evaluation view, S × S."""
        image, size = to_rgb(image), self.image_size
        if self.resize == "squash":
            height, width = self.resized or (size, size)
            image = self._resized(image, width, height)
        else:
            image, (shortest,) = _without_extreme_ends(image), self.resized or (size,)
            width, height = image.size
            if width <= height:
                image = self._resized(image, shortest, int(shortest * height / width))
            else:
                image = self._resized(image, int(shortest * width / height), shortest)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        return image.crop((left, top, left + size, top + size))

    def region(self, image: Image.Image, region: Region) -> Tensor:
        """Training view of one region, [3, S, S]: cropped, resized to a square, perhaps flipped."""
        return self.tensor(self.cropped(image, region))

    def cropped(self, image: Image.Image, region: Region) -> Image.Image:
        """The pixels of ``region``, S × S."""
        # Crop first: resize(box=…) would let the filter read pixels outside the box.
        crop = to_rgb(image).crop(pixel_box(region, image.width, image.height))
        view = self._resized(crop, self.image_size, self.image_size)
        return ImageOps.mirror(view) if region[4] > 0.5 else view

    def tensor(self, image: Image.Image | NDArray[np.uint8]) -> Tensor:
        """Pixels of an RGB image [H, W, 3], normalised: [3, H, W]."""
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return ((pixels - mean[:, None, None]) / std[:, None, None]).contiguous()

    def _resized(self, image: Image.Image, width: int, height: int) -> Image.Image:
        return image.resize((width, height), _FILTERS[self.interpolation])


def _without_extreme_ends(image: Image.Image) -> Image.Image:
    longest = _LONGEST * min(image.size)
    width, height = min(image.width, longest), min(image.height, longest)
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def pixel_box(region: Region, width: int, height: int) -> tuple[int, int, int, int]:
    """A region's whole pixels inside an image of this size: (left, top, right, bottom), at least 1×1."""
    top = min(max(round(float(region[0]) * height), 0), height - 1)
    left = min(max(round(float(region[1]) * width), 0), width - 1)
    bottom = min(max(top + round(float(region[2]) * height), top + 1), height)
    right = min(max(left + round(float(region[3]) * width), left + 1), width)
    return left, top, right, bottom


def random_regions(
    rng: np.random.Generator,
    width: int,
    height: int,
    n: int = 1,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
) -> NDArray[np.float64]:
    """Draw n regions of an image as torchvision's RandomResizedCrop and RandomHorizontalFlip do.

    ``width`` and ``height`` are in pixels; ``scale`` bounds the relative area, ``ratio`` width / height, and
    ``flip`` is a probability. Returns [n, 5]; ``pixel_box`` gives exactly the whole-pixel boxes drawn.
    """
    regions = np.empty((n, 5))
    for row in regions:
        top, left, h, w = _random_box(rng, width, height, scale, ratio)
        row[:] = top / height, left / width, h / height, w / width, rng.random() < flip
    return regions


def _random_box(
    rng: np.random.Generator, width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    # The image is too long for the ratios: its centre, as long as they allow.
    w, h = width, height
    if width / height < ratio[0]:
        h = max(round(width / ratio[0]), 1)
    elif width / height > ratio[1]:
        w = max(round(height * ratio[1]), 1)
    return (height - h) // 2, (width - w) // 2, h, w
