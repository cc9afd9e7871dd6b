"""``vlprompt export``: a tuned model as one file that works without vlprompt.

An ONNX file holds the whole way from images to probabilities, for every method; a safetensors file the class features
of methods that leave images alone.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn

from vlprompt.artefact.calibration import Calibration, class_factors, dac
from vlprompt.backbones.names import public_name
from vlprompt.data.images import Preprocess
from vlprompt.data.splits import check_class_names
from vlprompt.errors import ArtefactError, ConfigError, DataError, VlpromptError, first_line
from vlprompt.files import write_atomically
from vlprompt.methods import Can, Method
from vlprompt.version import __version__

EXPORT_VERSION = 1
OPSET = 17
_WHOLE = "; an .onnx file holds all of it"
TOLERANCE = 1e-4
"""How far an ONNX file's logits may be from PyTorch's, as a share of the largest, and its image features."""
LARGEST = 2**31
"""Bytes of an ONNX file, by its format (protocol buffers)."""
FAINTEST = 1e-30
"""Probabilities below this are nothing: they are too small for fp32 to say more."""

Pixels = Literal["float32", "uint8"]
"""What an ONNX file reads: ``float32`` preprocessed images [B, 3, S, S], or ``uint8`` pixels [B, S, S, 3]."""


def check_new(out: Path, suffix: str) -> None:
    """Raise ArtefactError unless ``out`` is a new file of that kind."""
    if out.suffix != suffix:
        raise ArtefactError(f"{out} must end in {suffix}")
    if out.exists():
        raise ArtefactError(f"{out} is there already: delete it, or choose another name")


# --- class features -------------------------------------------------------------------------------


def export_classes(method: Method, class_names: Sequence[str], out: Path) -> None:
    """Write what scores normalised image features v [B, E] of the *plain* backbone, without prompts or vlprompt.

    ``class_features`` [C, E], ``logit_scale`` [] and ``logit_bias`` ([] or [C]) in fp32:
    logits = logit_scale · v · class_featuresᵀ + logit_bias. The file's metadata holds ``class_names`` and
    ``preprocess`` as JSON, the method, and the backbone's name, licence and fingerprint.

    Raises ArtefactError for a file that is there already, and for methods that no such file can stand for: class
    features that depend on the image (cocoop), or image features that depend on learned tokens (vpt, maple, …).
    """
    check_new(out, ".safetensors")
    if method.image_dependent:
        raise ArtefactError(f"cannot export {method.name}: its class features are different for each image{_WHOLE}")
    if Can.EXPORT_CLASSES not in method.config.can:
        raise ArtefactError(
            f"cannot export {method.name}: it does more to images than the plain backbone, to features or to logits"
            f"{_WHOLE}"
        )
    check_class_names(class_names, "class names")
    own = None if method.takes_new_classes else method.own_classes(class_names)
    with torch.no_grad():
        features = method.class_features(tuple(class_names) if own is None else method.class_names)
    scale, bias = method.scale_and_bias()
    if own is not None:
        features, bias = features[own], bias[own] if bias.ndim else bias
    tensors = {"class_features": features, "logit_scale": scale, "logit_bias": bias}
    content = save({name: _plain(tensor) for name, tensor in tensors.items()}, _metadata(method, class_names))
    write_atomically(out, content)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().contiguous().clone()


def _metadata(method: Method, class_names: Sequence[str]) -> dict[str, str]:
    backbone = method.backbone
    return {
        "export_version": str(EXPORT_VERSION),
        "vlprompt_version": __version__,
        "method": method.name,
        "backbone": public_name(backbone.name),
        "backbone_fingerprint": backbone.fingerprint,
        "licence": backbone.licence or "not stated by the backbone's checkpoint",
        "class_names": json.dumps(list(class_names), ensure_ascii=False),
        "preprocess": json.dumps(asdict(backbone.preprocess)),
        **({} if method.white is None else {"white": str(method.white)}),
    }


# --- the whole model ------------------------------------------------------------------------------


def export_onnx(
    method: Method,
    class_names: Sequence[str],
    out: Path,
    pixels: Pixels = "float32",
    calibration: Calibration | None = None,
) -> None:
    """Write :func:`onnx_model` to a new file."""
    check_new(out, ".onnx")
    write_atomically(out, onnx_model(method, class_names, pixels, calibration))


def check_onnx() -> None:
    """Raise ConfigError, with the extra that brings them, unless onnx and onnxruntime are installed."""
    if missing := [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]:
        raise ConfigError(f"an .onnx file needs {' and '.join(missing)}: pip install 'vlprompt[onnx]'")


def onnx_model(
    method: Method, class_names: Sequence[str], pixels: Pixels = "float32", calibration: Calibration | None = None
) -> bytes:
    """An ONNX file's content: ``images`` of any number → ``probabilities`` [B, C] and ``image_features`` [B, E].

    All that the method learned is folded in, and the calibration. Its metadata is that of :func:`export_classes`, with
    what the file reads (``pixels``) and the ``temperature`` of its probabilities, 1 if not calibrated. onnxruntime has
    answered as PyTorch does, for several batch sizes.

    Raises ConfigError if onnx or onnxruntime is missing, DataError for class names that the method cannot score, and
    ArtefactError for a model that is not in fp32 on the CPU, too large, or that ONNX does not reproduce.
    """
    check_onnx()
    import onnx

    backbone, names = method.backbone, tuple(class_names)
    if (backbone.device.type, backbone.dtype) != ("cpu", torch.float32):
        raise ArtefactError(f"the model is in {backbone.dtype} on {backbone.device}: load it in fp32 on the CPU")
    if names != method.class_names:  # its own may be repeated, in a published split
        check_class_names(names, "class names")
    if len(names) == 1:
        raise DataError(f"there is only one class, '{names[0]}': every answer would be right")
    whole = _Whole(method, names, pixels)
    size = sum(p.numel() * p.element_size() for p in whole.parameters())
    if size >= LARGEST:
        raise ArtefactError(f"cannot export {method.name}: {backbone.name} is larger than 2 GB, the most of ONNX")
    views = _trial_images(backbone.preprocess)
    images = as_read(backbone.preprocess, views, pixels)
    logits, v = method.predict(views, names), method.encode_images(views).detach()  # and bad names are found here
    if not (logits.isfinite().all() and v.isfinite().all()):
        raise VlpromptError(f"logits of {method.name} are not finite: its prompts, or {backbone.name}, are damaged")
    if calibration:
        whole.calibrate(calibration)
    try:
        model = _traced(whole, images[:2])
        more = {"pixels": pixels, "temperature": str(whole.temperature)}
        onnx.helper.set_model_props(model, _metadata(method, names) | more)
        content = model.SerializeToString()
        session = onnx_session(content)
        for n in (len(images), 1):
            p, features = session.run(None, {"images": images[:n].numpy()})
            _compare(p, features, whole.calibrated(logits[:n]).numpy(), v[:n].numpy())
    except VlpromptError as error:
        raise ArtefactError(f"cannot export {method.name} to ONNX: {error}") from None
    except Exception as error:  # what the exporter or onnxruntime cannot do, they say with errors of any kind
        raise ArtefactError(f"cannot export {method.name} to ONNX: {first_line(error)}") from error
    return content


class _Whole(nn.Module):
    """From images to calibrated probabilities and image features."""

    temperature, factors = 1.0, None

    def __init__(self, method: Method, class_names: tuple[str, ...], pixels: Pixels) -> None:
        super().__init__()
        self.method, self.class_names, self.pixels = method, class_names, pixels
        backbone = method.backbone
        # Named weights, not constants of the graph: only those are shared, and quantised.
        self.towers = nn.ModuleList([backbone.image_tower, backbone.text_tower][: 1 + method.image_dependent])
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images of any number: [B, C] and [B, E]."""
        if self.pixels == "uint8":
            preprocess = self.method.backbone.preprocess
            mean, std = torch.tensor(preprocess.mean), torch.tensor(preprocess.std)
            images = (images.permute(0, 3, 1, 2).float() / 255 - mean[:, None, None]) / std[:, None, None]
        encode, own = self.method.encode_images, vars(self.method)
        v = encode(images)
        own["encode_images"] = lambda x: v if x is images else encode(x)  # predict need not run the tower again
        try:
            logits = self.method.predict(images, self.class_names)
        finally:
            del own["encode_images"]
        return self.calibrated(logits).softmax(-1), v

    def calibrate(self, calibration: Calibration) -> None:
        """Take its temperature, and its factors where the class names are not those tuned on."""
        self.temperature, self.factors = calibration.temperature, class_factors(self.method, self.class_names)

    def calibrated(self, logits: Tensor) -> Tensor:
        """Logits whose softmax are the probabilities, [B, C]; see :meth:`Calibration.logits`."""
        return (logits if self.factors is None else dac(logits, self.factors)).float() / self.temperature


def _traced(whole: _Whole, images: Tensor) -> Any:
    """The ONNX graph of what PyTorch does for some images, everything that is the same for all images computed.

    Traced, not by torch.export: that would not let methods look at the values of their own parameters, and takes ten
    times as long.
    """
    import onnx

    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        traced, folded = folder / "traced.onnx", folder / "folded.onnx"
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # what tracing may get wrong is found out afterwards
        # functional_call refuses to be traced, for fear of compiled modules; and a failure prints the whole graph.
        stack.enter_context(patch.object(torch.jit, "is_tracing", lambda: False))
        stack.enter_context(patch.object(torch._C, "_jit_onnx_log", lambda *parts: None, create=True))
        torch.onnx.export(
            whole,
            (images,),
            traced,
            dynamo=False,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["probabilities", "image_features"],
            dynamic_axes={name: {0: "batch"} for name in ("images", "probabilities", "image_features")},
        )
        onnx_session(traced, folded)
        model = onnx.load(folded)
    used = {node.domain for node in model.graph.node}
    for declared in [x for x in model.opset_import if x.domain not in used]:  # of all that onnxruntime knows
        model.opset_import.remove(declared)
    return model


def onnx_session(model: bytes | Path, folded: Path | None = None) -> Any:
    """An onnxruntime session on the CPU that keeps its messages to itself.

    ``folded`` is where to write the model with what is constant computed, in standard operators still.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if folded:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(folded)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def as_read(preprocess: Preprocess, views: Tensor, pixels: Pixels) -> Tensor:
    """Preprocessed images [B, 3, S, S] as an ONNX file reads them: themselves, or their pixels [B, S, S, 3]."""
    if pixels == "float32":
        return views
    mean, std = torch.tensor(preprocess.mean), torch.tensor(preprocess.std)
    return ((views.permute(0, 2, 3, 1) * std + mean) * 255).round().byte()


def _trial_images(preprocess: Preprocess) -> Tensor:
    """Three images of noise, from fine to coarse, preprocessed: [3, 3, S, S]."""
    rng, size, images = np.random.default_rng(0), preprocess.image_size, list[Tensor]()
    for n in (1, 4, 16):
        noise = rng.integers(0, 256, (size // n + 1, size // n + 1, 3), dtype=np.uint8)
        images.append(preprocess.tensor(np.kron(noise, np.ones((n, n, 1), np.uint8))[:size, :size]))
    return torch.stack(images)


def _compare(p: NDArray, features: NDArray, logits: NDArray, v: NDArray) -> None:
    """Raise ArtefactError if probabilities [B, C] and features [B, E] are not those of logits and v."""
    expected = torch.from_numpy(logits).softmax(-1).numpy()
    if p.shape != expected.shape or features.shape != v.shape:
        raise ArtefactError(f"its answers are {p.shape} and {features.shape}, and PyTorch's {logits.shape}, {v.shape}")
    log_p, log_expected = (np.log(np.maximum(x, FAINTEST)) for x in (p, expected))
    for what, difference, allowed in (
        ("logits", np.abs(log_p - log_expected).max(), TOLERANCE * max(np.abs(logits).max(), 1)),
        ("image features", np.abs(features - v).max(), TOLERANCE),
    ):
        if not difference <= allowed:  # nor if it is no number
            raise ArtefactError(f"its {what} differ from PyTorch's by {difference:.2g} (allowed: {allowed:.2g})")


def quantised(content: bytes) -> bytes:
    """An ONNX file's content with the weights of its matrix products in 8 bits (dynamic quantisation).

    The weights use 7 of them: sums of 8-bit products overflow on processors without instructions of their own for them.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model, before = onnx.load_from_string(content), logging.root.manager.disable
    how = {"op_types_to_quantize": ["MatMul"], "per_channel": True, "reduce_range": True}
    logging.disable(logging.WARNING)  # it advises a preparation that changes nothing here
    try:
        with TemporaryDirectory() as folder:
            file = Path(folder) / "int8.onnx"
            quantize_dynamic(model, file, weight_type=QuantType.QInt8, **how)
            return file.read_bytes()
    finally:
        logging.disable(before)
