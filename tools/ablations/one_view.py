"""DroPLe whose learned branch sees the plain view, which no patch of is changed: a row of ``drople.yaml``."""

from __future__ import annotations

from dataclasses import replace

from vlprompt.config.presets import presets_of
from vlprompt.data.batches import Batch
from vlprompt.methods.base import Output
from vlprompt.methods.drople.drople import DroPLe
from vlprompt.methods.registry import register


@register("drople_one_view")
class OneView(DroPLe):
    """DroPLe without its second view; all else is the same."""

    needs = DroPLe.needs - {"second_view"}
    presets = presets_of(DroPLe)

    def forward(self, batch: Batch) -> Output:
        """The plain view in the second one's place."""
        return super().forward(replace(batch, second_view=batch.images))
