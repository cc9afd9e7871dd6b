"""Shared fixtures. Small models run several times faster with one thread, in processes that tests start too."""

import os
import signal
import warnings
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # warnings of other libraries while they are imported are not ours
    import torch

from tests.kit import TINY, command
from tests.kit.known import needs_openmoji
from tests.kit.pictures import make_photos, make_pictures

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts the tests in the background ignores it

SYNC = os.fsync, os.sync
# A run of three epochs waits for the disk 28 times; files of a test need not outlive a power cut.
os.fsync = os.sync = lambda *given: None


@pytest.fixture
def syncs(monkeypatch):
    """Files are written to the disk, as outside of tests."""
    monkeypatch.setattr(os, "fsync", SYNC[0])
    monkeypatch.setattr(os, "sync", SYNC[1])


@pytest.fixture(scope="session")
def tiny():
    """The reduced golden backbone."""
    from vlprompt.backbones.load import load_backbone

    return load_backbone(str(TINY))


@pytest.fixture(scope="session")
def double():
    """The same in float64."""
    from vlprompt.backbones.load import load_backbone

    return load_backbone(str(TINY)).to(dtype=torch.double)


@pytest.fixture(scope="session")
def mini():
    """The embedded backbone."""
    from vlprompt.backbones.load import load_backbone

    return load_backbone("mini")


@pytest.fixture(autouse=True)
def forget_texts(request):
    """A shared backbone remembers texts, whose last bits depend on what they were first encoded with."""
    for name in {"tiny", "double", "mini"} & set(request.fixturenames):
        request.getfixturevalue(name).to()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """4 training and 2 val pictures of noise of each of three classes."""
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def openmoji(tmp_path_factory):
    """The OpenMoji data set, drawn; nothing else is in its folder's folder."""
    from vlprompt.data.datasets import load_dataset

    needs_openmoji()
    return load_dataset("openmoji", tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """4 training, 2 val and 3 test pictures of each of three classes that are easy to tell apart."""
    return make_photos(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture
def vlprompt():
    """The command line in this process: exit code, standard output, standard error."""
    return command.vlprompt
