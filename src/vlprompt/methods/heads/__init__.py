"""Heads and light adapters: what is fitted in seconds once the frozen towers have seen the images (docs/heads.md)."""

from vlprompt.methods.heads import (  # noqa: F401
    clap,
    clip_adapter,
    clip_lora,
    gda,
    lp_plus_plus,
    prolip,
    ss_text,
    task_res,
    tip_adapter,
)
