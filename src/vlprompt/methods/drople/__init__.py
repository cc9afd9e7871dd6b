"""DroPLe: the method, its token dropout and its adapters."""

from vlprompt.methods.drople.drople import DroPLe

__all__ = ["DroPLe"]
