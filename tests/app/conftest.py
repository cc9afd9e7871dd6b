"""Models that a page shows, and the page served."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import Thread

import pytest

from tests.kit.pictures import SHADES, paint
from vlprompt.api import PromptedModel, build_method
from vlprompt.app.answers import Answers
from vlprompt.app.server import address, allowed_hosts, listen, web_server
from vlprompt.artefact.calibration import Calibration
from vlprompt.backbones.backbone import Backbone

NEVER_SURE = Calibration(3.0, ((0.5,), (0.5,), (0.5,)), "maximum probability", 0.999, 0.95)
"""Takes every image for one of no class."""


@pytest.fixture(scope="module")
def models(tiny: Backbone) -> list[PromptedModel]:
    """One that is calibrated, one that is not, and one that knows its own classes alone."""
    methods = [build_method(name, tiny, list(SHADES)) for name in ("coop", "zero_shot", "linear_probe")]
    return [PromptedModel(method, calibration=c) for method, c in zip(methods, (NEVER_SURE, None, None), strict=True)]


@pytest.fixture(scope="module")
def answers(models: list[PromptedModel]) -> Answers:
    """Of all three, two classes a picture."""
    return Answers(["runs/a", "runs/b", "runs/c"], models, 2)


@contextmanager
def serving(answers: Answers) -> Iterator[str]:
    """The address of the page, which a thread serves."""
    with listen("127.0.0.1", 0) as listener:
        server = web_server(answers, allowed_hosts(listener, "127.0.0.1"))
        thread = Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield address(listener)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def served(answers: Answers) -> Iterator[str]:
    """The address of the page, while the tests run."""
    with serving(answers) as url:
        yield url


@pytest.fixture
def served_for_a_while(answers: Answers) -> AbstractContextManager[str]:
    """The address of a page whose server a test stops."""
    return serving(answers)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A red one."""
    file = tmp_path_factory.mktemp("picture") / "red.png"
    paint(file, SHADES["red"], 7, 40)
    return file
