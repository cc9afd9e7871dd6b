"""What the page is told: which runs there are, and what each says of a picture, within limits of size and type."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from threading import Lock
from typing import Any

from PIL import Image, UnidentifiedImageError
from pydantic import Base64Bytes

from vlprompt.api import PromptedModel
from vlprompt.data.files import formats, open_image
from vlprompt.data.images import load_image
from vlprompt.errors import DataError, first_line
from vlprompt.prompting.text import partly_known
from vlprompt.training.explain import relevance

MOST_BYTES = 20 << 20
"""Of a picture's file."""
MOST_PIXELS = 50_000_000


class PictureError(DataError):
    """An upload that is no picture, or too large a one."""


@dataclass(frozen=True)
class Names:
    """Class names typed into the page."""

    run: int
    class_names: list[str]


@dataclass(frozen=True)
class Question(Names):
    """A picture, and the classes that it is asked about."""

    file: str
    """The file's name."""
    image: Base64Bytes


@dataclass(frozen=True)
class Why(Question):
    """What of the picture speaks for one of the classes."""

    class_index: int


class Answers:
    """Tuned models, asked by one thread after the other."""

    def __init__(self, runs: Sequence[str], models: Sequence[PromptedModel], top: int) -> None:
        """``runs`` are what the page calls the models, ``top`` how many classes it shows of each picture."""
        self.runs, self.models, self.top = list(runs), list(models), top
        self._lock = Lock()

    def about(self) -> dict[str, Any]:
        """The runs, and the largest file that is taken, in bytes."""
        runs = [
            {
                "name": run,
                "method": model.method.name,
                "backbone": model.backbone.name,
                "class_names": model.class_names,
                "takes_new_classes": model.method.takes_new_classes,
                "calibrated": model.calibration is not None,
                "tells_none": model.calibration is not None and model.calibration.threshold is not None,
            }
            for run, model in zip(self.runs, self.models, strict=True)
        ]
        return {"runs": runs, "most_bytes": MOST_BYTES}

    def names(self, asked: Names) -> dict[str, Any]:
        """Whether these are the run's own classes, and a note on names that it cannot read whole; errors as below."""
        model, names = self._run(asked)
        with self._lock:
            own = model.predict([], names).class_names
            if not model.method.takes_new_classes:
                model.method.own_classes(own)
        return {"own": names is None, "note": None if names is None else partly_known(model.backbone, names)}

    def predict(self, asked: Question) -> dict[str, Any]:
        """The most probable classes, whether it seems to be none of them, and what the model sees of the picture.

        Raises PictureError for a picture that cannot be read, and what :meth:`PromptedModel.predict` raises.
        """
        model, names = self._run(asked)
        image = read_picture(asked.image, asked.file, model.method.white)
        with self._lock:
            said = model.predict([image], names)
        order = (-said.probabilities[0]).argsort(kind="stable")
        top = [
            {"index": c, "class": said.class_names[c], "probability": said.probabilities[0, c]}
            | ({} if said.spread is None else {"spread": said.spread[0, c]})
            for c in order[: self.top].tolist()
        ]
        none = None if said.none_of_these is None else bool(said.none_of_these[0])
        return {"top": top, "none_of_these": none, "view": png(model.backbone.preprocess.whole(image))}

    def explain(self, asked: Why) -> dict[str, Any]:
        """How much each patch speaks for the class, row by row, 1 at most; raises what ``relevance`` raises."""
        model, names = self._run(asked)
        pixels = model.backbone.preprocess(read_picture(asked.image, asked.file, model.method.white))
        with self._lock:
            found = relevance(model.method, pixels, names, asked.class_index, model.calibration)
        return {"class": found.name, "map": (found.map / (found.map.max().item() or 1)).tolist()}

    def _run(self, asked: Names) -> tuple[PromptedModel, list[str] | None]:
        """The model, and the class names if they are others than its own, which may repeat."""
        if not 0 <= asked.run < len(self.models):
            raise DataError(f"run {asked.run} (allowed: 0 to {len(self.models) - 1})")
        model = self.models[asked.run]
        names = [name.strip() for name in asked.class_names]
        return model, None if tuple(names) == model.class_names else names


def read_picture(content: bytes, file: str, white: float | None) -> Image.Image:
    """A file's picture as ``vlprompt predict`` reads it, from memory; raises PictureError that names the file."""
    if not content:
        raise PictureError(f"{file}: the file is empty")
    if len(content) > MOST_BYTES:
        raise PictureError(f"{file}: {len(content) / 2**20:.1f} MB (allowed: {MOST_BYTES >> 20} MB)")
    try:
        with open_image(BytesIO(content)) as image:
            if image.width * image.height > MOST_PIXELS:
                raise DataError(f"{image.width} × {image.height} pixels (allowed: {MOST_PIXELS:,} in all)")
            return load_image(image, white)
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise PictureError(f"{file}: not an image in a known format: {', '.join(formats())}") from None
    except Exception as error:  # Pillow raises almost anything on damaged bytes; load_image names no file
        raise PictureError(f"{file}: {first_line(error.__cause__ or error)}") from error  # type: ignore[arg-type]


def png(image: Image.Image) -> str:
    """An image as the address that a page shows it by."""
    content = BytesIO()
    image.save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
