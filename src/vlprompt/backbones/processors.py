"""What a checkpoint's configuration says about images, as a :class:`Preprocess`; what it cannot hold is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from vlprompt.backbones.convert import read_json
from vlprompt.data.images import Preprocess
from vlprompt.errors import BackboneError, DataError, one_line

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PILLOW_FILTERS: dict[int, Literal["nearest", "lanczos", "bilinear", "bicubic"]] = {
    0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic",
}  # fmt: skip
PROCESSORS = ("CLIPImageProcessor", "CLIPFeatureExtractor", "SiglipImageProcessor")


def hf_preprocess(folder: Path, size: int, siglip: bool) -> Preprocess:
    """From ``preprocessor_config.json``, as ``transformers`` reads it, for a tower that reads ``size`` × ``size``.

    Without one, what CLIP (or SigLIP) was trained with. A processor saved by transformers 5 writes the same settings
    into ``processor_config.json``.
    """
    file, whole = folder / "preprocessor_config.json", folder / "processor_config.json"
    settings = read_json(file) if file.is_file() else {}
    if not settings and whole.is_file():
        file, settings = whole, read_json(whole).get("image_processor") or {}
    settings = {key: value for key, value in settings.items() if value is not None}  # None is the default
    kind = str(settings.get("image_processor_type", settings.get("feature_extractor_type", "")))
    if kind and kind.removesuffix("Fast").removesuffix("Pil") not in PROCESSORS:
        raise BackboneError(f"{file}: image_processor_type = {one_line(kind, 60)} (allowed: {', '.join(PROCESSORS)})")
    siglip = kind.startswith("Siglip") if kind else siglip

    def refuse(key: str, allowed: str) -> BackboneError:
        return BackboneError(f"{file}: {key} = {one_line(settings[key], 60)} (allowed: {allowed})")

    for key, allowed in (("do_resize", True), ("do_rescale", True), ("do_pad", False), ("use_square_size", False)):
        if settings.get(key, allowed) is not allowed:
            raise refuse(key, str(allowed).lower())
    for key in ("do_center_crop", "do_normalize"):
        if not isinstance(settings.get(key, True), bool):
            raise refuse(key, "true or false")
    factor = settings.get("rescale_factor", 1 / 255)
    if not isinstance(factor, int | float) or abs(255 * factor - 1) > 1e-6:
        raise refuse("rescale_factor", "1/255")
    resample = settings.get("resample", 3)
    if type(resample) is not int or resample not in PILLOW_FILTERS:
        raise refuse("resample", ", ".join(f"{n} {name}" for n, name in PILLOW_FILTERS.items()))

    crops = settings.get("do_center_crop", not siglip)
    if crops and _sides(settings.get("crop_size", size), square=True) != (size, size):
        raise refuse("crop_size", f"{size}, what the image tower reads")
    sides = _sides(settings["size"]) if "size" in settings else (size, size) if siglip else (size,)
    fits = min(sides, default=0) >= size if crops else sides == (size, size)
    if not fits:
        least = f"a height and width or a shortest_edge of at least {size}" if crops else f"height and width {size}"
        raise refuse("size", f"{least} with do_center_crop = {str(crops).lower()}")
    normalised = settings.get("do_normalize", True)
    try:
        return Preprocess(
            size,
            _channels(settings.get("image_mean", (0.5,) * 3 if siglip else CLIP_MEAN)) if normalised else (0.0,) * 3,
            _channels(settings.get("image_std", (0.5,) * 3 if siglip else CLIP_STD)) if normalised else (1.0,) * 3,
            resize="shortest" if len(sides) == 1 else "squash",
            interpolation=PILLOW_FILTERS[resample],
            resized=() if set(sides) == {size} else sides,
        )
    except (DataError, TypeError, ValueError) as error:
        raise BackboneError(f"{file}: {error}") from None


def open_clip_preprocess(size: int, settings: Mapping[str, Any]) -> Preprocess:
    """From open_clip's ``preprocess_cfg``, for a tower that reads ``size`` × ``size``."""
    resize = settings.get("resize_mode", "shortest")
    if resize not in ("shortest", "squash"):
        raise BackboneError(f"unsupported open_clip resize_mode '{resize}'")
    if _sides(settings.get("size", size), square=True) != (size, size):
        raise BackboneError(
            f"unsupported open_clip preprocess_cfg with size = {settings['size']} (the tower's: {size})"
        )
    try:
        return Preprocess(
            size,
            _channels(settings.get("mean", CLIP_MEAN)),
            _channels(settings.get("std", CLIP_STD)),
            resize=resize,
            interpolation=settings.get("interpolation", "bicubic"),
        )
    except (DataError, TypeError, ValueError) as error:
        raise BackboneError(f"unsupported open_clip preprocess_cfg: {error}") from None


def _sides(size: Any, square: bool = False) -> tuple[int, ...]:
    """``(shortest side,)`` or ``(height, width)`` of a size as transformers writes it; ``()`` if it is neither."""
    if isinstance(size, Mapping):
        keys = {key for key, value in size.items() if value is not None}
        names = next((names for names in (("shortest_edge",), ("height", "width")) if keys == set(names)), ())
        sides = [size[name] for name in names]
    else:
        sides = list(size) if isinstance(size, list | tuple) else [size, size] if square else [size]
    return tuple(sides) if len(sides) <= 2 and all(type(side) is int for side in sides) else ()


def _channels(values: Any) -> tuple[float, ...]:
    """One value a channel; transformers takes one number for all."""
    return (float(values),) * 3 if isinstance(values, int | float) else tuple(values)
