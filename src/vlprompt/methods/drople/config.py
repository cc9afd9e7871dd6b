"""Settings of DroPLe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le, Lt

from vlprompt.methods.base import LEARNS_PROMPTS, Can, Count, Weight
from vlprompt.methods.ivlp import DeepPrompts

Probability = Annotated[float, Ge(0), Le(1)]


@dataclass(frozen=True)
class Config(DeepPrompts):
    """Options of drople."""

    depth_vision: Count = 6
    """Layers of the image tower with tokens of their own."""
    prior_tokens: Count = 24
    """Tokens of a language model's prior behind the class name, at each layer with text tokens; with data.prior."""
    dropout: Literal["importance", "uniform", "none"] = "importance"
    """Tokens are hit the less the more important they are, all alike at (p_max + p_min) / 2, or not at all."""
    mode: Literal["gaussian", "zero"] = "gaussian"
    """Whether a token that is hit is multiplied by noise around 1, or by zero."""
    p_max: Probability = 0.5
    """Probability that the least important token is hit."""
    p_min: Probability = 0.1
    """Probability that the most important token is hit."""
    sigma: Weight = 0.03
    """Standard deviation of the noise."""
    n_shared: Count = 64
    """Shared tokens, which look at the tokens of both towers."""
    shared_width: Count = 512
    """Width of the shared tokens."""
    temperature: Weight = 1.0
    """τ, what the shared tokens' products with a block's outputs are multiplied by before their softmax."""
    label_smoothing: Probability = 0.0
    """Share of the label that all classes get, in the cross-entropy."""
    text_weight: Weight = 25.0
    """Weight of the distance to the frozen class features."""
    image_weight: Weight = 10.0
    """Weight of the distance to the frozen image features."""
    distillation_weight: Weight = 2.5
    """Weight of the KL to the zero-shot prediction."""
    entropy_weight: Weight = 0.05
    """Weight of the residual entropies, which are maximised."""
    lam: Annotated[float, Ge(0), Lt(1)] = 0.1
    """λ₀, how much of the frozen features the residuals leave out."""
    lam_schedule: Literal["rising", "fixed"] = "rising"
    """Whether λ rises from 0 towards λ₀ over the epochs, or is λ₀."""
    alignment_weight: Weight = 30.0
    """Weight of the distance between what the shared tokens see of an image and of its label's text."""
    lora_rank: Annotated[int, Ge(0)] = 0
    """Rank of adapters on queries and values of the image tower's later half, which learn at a tenth of the rate;
    0 for none."""
    lora_alpha: Weight = 16.0
    """Strength of the adapters, which are multiplied by lora_alpha / lora_rank."""
    lora_dropout: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Share of the adapters' input channels that a training step leaves out."""

    beside = {"prior_tokens": ("prior", True)}

    @property
    def can(self) -> Can:
        """Dropout reads all texts at once."""
        return LEARNS_PROMPTS & ~Can.SPLIT_TEXTS

    def unused(self) -> dict[str, str]:
        """Settings of a dropout, a noise, residual entropies or adapters that there are not."""
        unused: dict[str, str] = {}
        if self.mode == "zero":
            unused["sigma"] = "mode"
        if self.dropout == "none":
            unused |= dict.fromkeys(("mode", "p_max", "p_min", "sigma"), "dropout")
        if self.entropy_weight == 0:
            unused |= dict.fromkeys(("lam", "lam_schedule"), "entropy_weight")
        if self.lora_rank == 0:
            unused |= dict.fromkeys(("lora_alpha", "lora_dropout"), "lora_rank")
        return unused
