"""vlprompt: adapt a frozen vision-language model to your classes by learning a few prompt tokens."""

from __future__ import annotations

__version__ = "0.1.0"
