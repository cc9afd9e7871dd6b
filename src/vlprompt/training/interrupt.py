"""Ctrl-C that lets the running step finish."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred_interrupt(insist: bool = True) -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C only makes the given function return True; a second one interrupts at once.

    Not with ``insist=False``: torchrun passes on the Ctrl-C that its processes have had already. Outside the main
    thread, where Python handles no signals, nothing changes.
    """
    asked = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked and insist:
            raise KeyboardInterrupt
        asked = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
