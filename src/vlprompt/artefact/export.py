"""``vlprompt export``: class features as one safetensors file that works without vlprompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from vlprompt.backbones.names import public_name
from vlprompt.data.splits import check_class_names
from vlprompt.errors import ArtefactError
from vlprompt.files import write_atomically
from vlprompt.methods import Can, Method
from vlprompt.version import __version__

EXPORT_VERSION = 1


def export_classes(method: Method, class_names: Sequence[str], out: Path) -> None:
    """Write what scores normalised image features v [B, E] of the *plain* backbone, without prompts or vlprompt.

    ``class_features`` [C, E], ``logit_scale`` [] and ``logit_bias`` ([] or [C]) in fp32:
    logits = logit_scale · v · class_featuresᵀ + logit_bias. The file's metadata holds ``class_names`` and
    ``preprocess`` as JSON, the method, and the backbone's name and fingerprint.

    Raises ArtefactError for methods that no such file can stand for: class features that depend on the image
    (cocoop), or image features that depend on learned tokens (vpt, maple, …).
    """
    if out.suffix != ".safetensors":
        raise ArtefactError(f"{out} must end in .safetensors")
    if method.image_dependent:
        raise ArtefactError(f"cannot export {method.name}: its class features are different for each image")
    if Can.EXPORT_CLASSES not in method.config.can:
        raise ArtefactError(
            f"cannot export {method.name}: it does more to images than the plain backbone, to features or to logits; "
            "ship the run folder and use vlprompt predict"
        )
    check_class_names(class_names, "class names")
    own = None if method.takes_new_classes else method.own_classes(class_names)
    with torch.no_grad():
        features = method.class_features(tuple(class_names) if own is None else method.class_names)
    scale, bias = method.scale_and_bias()
    if own is not None:
        features, bias = features[own], bias[own] if bias.ndim else bias
    backbone = method.backbone
    metadata = {
        "export_version": str(EXPORT_VERSION),
        "vlprompt_version": __version__,
        "method": method.name,
        "backbone": public_name(backbone.name),
        "backbone_fingerprint": backbone.fingerprint,
        "class_names": json.dumps(list(class_names), ensure_ascii=False),
        "preprocess": json.dumps(asdict(backbone.preprocess)),
    }
    tensors = {"class_features": features, "logit_scale": scale, "logit_bias": bias}
    write_atomically(out, save({name: _plain(tensor) for name, tensor in tensors.items()}, metadata))


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().contiguous().clone()
