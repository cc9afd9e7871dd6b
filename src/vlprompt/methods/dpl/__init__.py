"""DPL: the method and its decoupled attention."""

from vlprompt.methods.dpl.dpl import DPL

__all__ = ["DPL"]
