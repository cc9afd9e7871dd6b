"""``vlprompt``, also as ``python -m vlprompt``: Ctrl-C ends it in one line with exit code 130, whatever Python is at.

Little is imported before that is so.
"""

import gc
import os
import signal
import sys

INTERRUPTED = 130


def main() -> None:
    """Run the command line."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell may have it ignored
        signal.signal(signal.SIGINT, interrupt)
    if "OMP_WAIT_POLICY" not in os.environ:
        # PyTorch's threads wait for each other spinning, which, where other work has a core, keeps the one they
        # wait for off the others: docs/performance.md.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from vlprompt.cli import main as run

    try:
        run()
    except SystemExit as end:
        if end.code != INTERRUPTED:
            raise
        # Python would end otherwise (by the signal, or in a traceback of a second Ctrl-C while it waits for threads).
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(INTERRUPTED)
    finally:
        gc.freeze()  # or Python looks through all of PyTorch once more as it ends, a third of what importing that took


def interrupt(number: int, frame) -> None:  # type: ignore[no-untyped-def]
    """Leave at once while modules are imported: they turn KeyboardInterrupt into errors of their own; else raise it."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"interrupted\n")
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
