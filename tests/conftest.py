"""Shared fixtures. Small models run several times faster with one thread."""

import os
import signal
import sys
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # warnings of other libraries while they are imported are not ours
    import torch

from tests.kit import TINY

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts the tests in the background ignores it


@pytest.fixture(scope="session")
def tiny():
    """The reduced golden backbone: 12 layers, width 128, 32-px images, a vocabulary of a few hundred tokens."""
    from vlprompt.backbones.load import load_backbone

    return load_backbone(str(TINY))


@pytest.fixture(autouse=True)
def forget_texts(request):
    """The shared backbone remembers texts, whose last bits depend on what they were first encoded with."""
    if "tiny" in request.fixturenames:
        request.getfixturevalue("tiny").to()


@pytest.fixture
def vlprompt(monkeypatch, capsys):
    """The command line in this process: exit code, standard output, standard error."""

    from vlprompt import cli

    def run(*given: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vlprompt", *map(str, given)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return (end.value.code or 0, *capsys.readouterr())

    return run
