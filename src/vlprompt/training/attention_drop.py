"""AttentionDrop (Baig et al., 2025) in training, of any method that runs a tower; reconstructed from its abstract."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from vlprompt.backbones.attention import changed_logits
from vlprompt.config.schema import TrainConfig
from vlprompt.data.batches import Batch
from vlprompt.errors import ConfigError
from vlprompt.methods import Method, Output


def check_attention(method: Method, config: TrainConfig) -> None:
    """Raise ConfigError where AttentionDrop is asked for on a backbone whose image tower has no attention."""
    if config.attention_drop is not None and method.backbone.image_tower.config.pool == "resnet":
        raise ConfigError(
            f"train.attention_drop = {config.attention_drop}: backbone '{method.backbone.name}' is a ResNet, without "
            "attention in its blocks"
        )


def losses_of(method: Method, batch: Batch, config: TrainConfig) -> dict[str, Tensor]:
    """The method's named loss terms, under AttentionDrop if that is asked for.

    Raises ConfigError for ``consistency`` of a method that does not make its logits once in a step.
    """
    if config.attention_drop is None:
        return method.losses(batch)
    if config.attention_drop == "blur":
        change = partial(blurred, sigma=config.attention_drop_sigma)
    else:
        change = partial(masked, k=config.attention_drop_k, p=config.attention_drop_p)
    with changed_logits(change):
        if config.attention_drop == "consistency":
            return _compared(method, batch, config.attention_drop_weight)
        return method.losses(batch)


def _compared(method: Method, batch: Batch, weight: float) -> dict[str, Tensor]:
    """The terms of two passes averaged, and the symmetric divergence of what they say."""
    said: list[Tensor] = []

    def keep(_: torch.nn.Module, given: object, out: Output) -> None:
        said.append(out.logits.log_softmax(-1))

    hook = method.register_forward_hook(keep)
    try:
        first, second = method.losses(batch), method.losses(batch)
    finally:
        hook.remove()
    if len(said) != 2:
        raise ConfigError(
            f"train.attention_drop = consistency: method '{method.name}' does not make its logits once in a step"
        )
    terms = {term: (value + second[term]) / 2 for term, value in first.items()}
    both = (kl_div(a, b, reduction="batchmean", log_target=True) for a, b in (said, said[::-1]))
    return {**terms, "consistency": weight * sum(both, torch.zeros_like(said[0][0, 0])) / 2}


def masked(logits: Tensor, k: int, p: float) -> Tensor:
    """Attention logits [..., K, N] without random ones of each query's ``k`` largest, each with probability ``p``.

    A query that would see nothing sees what it did.
    """
    largest = logits.topk(min(k, logits.shape[-1])).indices
    hit = torch.rand(largest.shape, device=logits.device) < p
    rest = logits.masked_fill(torch.zeros_like(logits, dtype=torch.bool).scatter(-1, largest, hit), -torch.inf)
    return torch.where(rest.isneginf().all(-1, keepdim=True), logits, rest)


def blurred(logits: Tensor, sigma: float) -> Tensor:
    """Attention logits [..., K, N] under a Gaussian over the keys in their order, among those that a query sees.

    Its standard deviation is drawn between 0 and ``sigma``, one for all queries.
    """
    drawn = sigma * (1 - torch.rand((), device=logits.device))  # never 0
    at = torch.arange(logits.shape[-1], device=logits.device)
    weights = (-((at[:, None] - at) ** 2) / (2 * drawn**2)).exp().to(logits.dtype)
    seen = ~logits.isneginf()
    mean = (
        logits.masked_fill(~seen, 0)
        @ weights
        / (seen.to(logits.dtype) @ weights).clamp_min(torch.finfo(logits.dtype).tiny)
    )
    return mean.masked_fill(~seen, -torch.inf)
