"""``vlprompt app``: what the page is told, over HTTP too, and the command. The page itself: test_page.py."""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.kit.command import environment
from tests.kit.marks import slow
from tests.kit.pictures import SHADES
from vlprompt.api import PromptedModel, build_method
from vlprompt.app.answers import MOST_PIXELS, Answers, Names, PictureError, Question, Why
from vlprompt.app.server import allowed_hosts, listen
from vlprompt.backbones.backbone import Backbone
from vlprompt.errors import ConfigError, DataError
from vlprompt.training.explain import relevance

NAMES = list(SHADES)


def question(picture: Path, run: int = 0, names: list[str] = NAMES) -> Question:
    return Question(run, names, picture.name, picture.read_bytes())


# --- answers --------------------------------------------------------------------------------------


def test_runs_are_described(answers: Answers) -> None:
    about = answers.about()
    assert about["most_bytes"] == 20 * 2**20
    assert [run["name"] for run in about["runs"]] == ["runs/a", "runs/b", "runs/c"]
    assert [run["calibrated"] for run in about["runs"]] == [run["tells_none"] for run in about["runs"]]
    assert [run["calibrated"] for run in about["runs"]] == [True, False, False]
    assert [run["takes_new_classes"] for run in about["runs"]] == [True, True, False]


@pytest.mark.parametrize("names", [NAMES, ["a red thing", "water", " grass ", "sky"]])
def test_predictions_are_those_of_the_model(answers: Answers, models, picture: Path, names: list[str]) -> None:
    own, stripped = names == NAMES, [name.strip() for name in names]
    for run in (0, 1):
        expected = models[run].predict([picture], stripped)
        said = answers.predict(question(picture, run, names))
        order = np.argsort(-expected.probabilities[0])[:2]
        assert [(t["index"], t["class"]) for t in said["top"]] == [(c, stripped[c]) for c in order]
        assert [t["probability"] for t in said["top"]] == expected.probabilities[0, order].tolist()
        assert said["none_of_these"] is (True if own and run == 0 else None)
        shown = Image.open(io.BytesIO(base64.b64decode(said["view"].partition(",")[2])))
        assert np.array_equal(shown, models[run].backbone.preprocess.whole(Image.open(picture)))


def test_spread_is_told_where_there_is_one(tiny: Backbone, picture: Path) -> None:
    model = PromptedModel(build_method("bayesian", tiny, NAMES))
    top = Answers(["run"], [model], 1).predict(question(picture))["top"]
    expected = model.predict([picture])
    assert top[0]["spread"] == expected.spread[0, top[0]["index"]] > 0


def test_an_explanation_is_that_of_the_class_asked_for(answers: Answers, models, picture: Path) -> None:
    pixels = models[0].backbone.preprocess(Image.open(picture))
    for c in (0, 2):
        expected = relevance(models[0].method, pixels, class_index=c).map
        said = answers.explain(Why(0, NAMES, picture.name, picture.read_bytes(), c))
        assert said["class"] == NAMES[c]
        np.testing.assert_allclose(said["map"], expected / expected.max(), rtol=1e-6)
    with pytest.raises(ConfigError, match="class_index = 3"):
        answers.explain(Why(0, NAMES, picture.name, picture.read_bytes(), 3))


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([], "class names are a list of one or more texts"),
        (["red", "", "blue"], "class names: a class has no name"),
        (["red", " "], "class names: a class has no name"),
        (["red", "blue", "red"], "class names: 2 classes are named 'red'"),
        (["red", "Red"], "classes 'red' and 'Red' have the same name for a text tower"),
        (["red"], "there is only one class, 'red'"),
    ],
)
def test_bad_class_names(answers: Answers, picture: Path, names: list[str], says: str) -> None:
    for run in (0, 1, 2):
        for ask in (
            lambda n=run: answers.names(Names(n, names)),
            lambda n=run: answers.predict(question(picture, n, names)),
        ):
            with pytest.raises(DataError, match=re.escape(says)):
                ask()


def test_class_names(answers: Answers, picture: Path) -> None:
    assert answers.names(Names(0, NAMES)) == {"own": True, "note": None}
    assert answers.names(Names(0, ["sky", "sea"])) == {"own": False, "note": None}
    assert answers.names(Names(2, NAMES[:2])) == {"own": False, "note": None}
    with pytest.raises(DataError, match="linear_probe knows its own 3 classes alone, not 'sky'"):
        answers.names(Names(2, ["red", "sky"]))
    with pytest.raises(DataError, match=r"run 3 \(allowed: 0 to 2\)"):
        answers.names(Names(3, NAMES))


def png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


HALF = png(Image.frombytes("RGB", (64, 64), np.random.default_rng(0).bytes(3 * 64 * 64)))[:6000]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file is empty"),
        (b"no picture at all", "not an image in a known format: AVIF, BMP"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image in a known format"),
        (HALF, "image file is truncated"),
        (bytes(20 * 2**20 + 1), r"20.0 MB (allowed: 20 MB)"),
        (png(Image.new("1", (MOST_PIXELS // 1000, 1001))), "50000 × 1001 pixels (allowed: 50,000,000 in all)"),
        (png(Image.new("1", (20000, 20000))), "decompression bomb"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_pictures(answers: Answers, content: bytes, says: str) -> None:
    with pytest.raises(PictureError, match=re.escape(says)) as told:
        answers.predict(Question(0, NAMES, "photo.jpg", content))
    assert str(told.value).startswith("photo.jpg: ")


def test_deep_greys_are_read_as_predict_reads_them(answers: Answers, models, tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 65536, (32, 32)).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    expected = models[1].predict([tmp_path / "deep.png"]).probabilities.max()
    assert answers.predict(question(tmp_path / "deep.png", 1))["top"][0]["probability"] == expected


# --- over HTTP ------------------------------------------------------------------------------------


def ask(url: str, content: object = None, **headers: str) -> tuple[int, Any, Any]:
    """Status, what is answered, and the headers."""
    body = content if content is None or isinstance(content, bytes) else json.dumps(content).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read(), response.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), error.headers


def asked(picture: Path, **more: object) -> dict[str, object]:
    image = base64.b64encode(picture.read_bytes()).decode()
    return {"run": 1, "class_names": NAMES, "file": picture.name, "image": image, **more}


def test_questions_are_answered(served: str, answers: Answers, picture: Path) -> None:
    assert json.loads(ask(f"{served}runs")[1]) == json.loads(json.dumps(answers.about()))
    status, body, _ = ask(f"{served}predict", asked(picture))
    assert (status, json.loads(body)) == (200, answers.predict(question(picture, 1)))


def test_the_page_may_fetch_nothing_from_elsewhere(served: str) -> None:
    for path in ("", "page.css", "page.js", "runs"):
        status, body, headers = ask(f"{served}{path}")
        assert status == 200
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert headers["Cache-Control"] == "no-store"
        assert not re.search(rb"https?://|//\w+\.", body)


@pytest.mark.parametrize(
    ("path", "content", "headers", "status", "says"),
    [
        ("predict", b"{", {}, 400, "Invalid JSON"),
        ("predict", {"run": 0}, {}, 400, "class_names: Field required"),
        ("predict", {"run": 0, "class_names": NAMES, "file": "a", "image": 5}, {}, 400, "image: "),
        ("names", {"run": 9, "class_names": NAMES}, {}, 400, "run 9 (allowed: 0 to 2)"),
        ("names", {"run": 0, "class_names": ["a", "a"]}, {}, 400, "2 classes are named 'a'"),
        ("predict", {"run": 0, "class_names": NAMES, "file": "a", "image": "AAAA"}, {}, 415, "a: not an image"),
        ("names", {"run": 0, "class_names": NAMES}, {"Content-Type": "text/plain"}, 415, "questions are JSON"),
        ("names", {"run": 0, "class_names": NAMES}, {"Host": "elsewhere.example"}, 400, "Invalid host header"),
        ("", None, {"Host": "elsewhere.example:80"}, 400, "Invalid host header"),
        ("../pyproject.toml", None, {}, 404, "Not Found"),
    ],
)
def test_bad_questions(
    served: str, path: str, content: object, headers: dict[str, str], status: int, says: str
) -> None:
    code, body, _ = ask(f"{served}{path}", content, **headers)
    told = json.loads(body)["error"] if body.startswith(b"{") else body.decode()
    assert code == status
    assert says in told
    assert "\n" not in told


def test_a_body_that_is_too_large_is_not_read(served: str) -> None:
    with closing(http.client.HTTPConnection(served.removeprefix("http://").rstrip("/"), timeout=60)) as connection:
        connection.putrequest("POST", "/predict")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(36 * 2**20))
        connection.endheaders()
        assert connection.getresponse().status == 413


def test_what_is_our_fault_is_told_too(served: str, answers: Answers, picture: Path, monkeypatch, capsys) -> None:
    def fails(*given: object) -> None:
        raise RuntimeError("broken\nin two lines")

    monkeypatch.setattr(answers.models[1], "predict", fails)
    status, body, _ = ask(f"{served}predict", asked(picture))
    assert (status, json.loads(body)) == (500, {"error": "RuntimeError: broken"})


@pytest.mark.parametrize(
    ("host", "only_here"), [("127.0.0.1", True), ("localhost", True), ("127.1", True), ("0.0.0.0", False)]
)
def test_names_of_other_sites_are_refused_on_loopback(host: str, only_here: bool) -> None:
    with listen(host, 0) as listener:
        assert allowed_hosts(listener, host) == (["localhost", "127.0.0.1", "[::1]", host] if only_here else ["*"])


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(models: list[PromptedModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "a"
    models[0].save_pretrained(folder)
    return folder


def refused(vlprompt: Any, *given: object) -> str:
    """The one line of error of a command that ends with exit code 2."""
    done = vlprompt("app", *given)
    assert (done.code, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert line.startswith("error: ")
    return line


def test_a_port_in_use(vlprompt, run: Path) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        said = refused(vlprompt, run, "--port", port)
    assert said == f"error: --port = {port}: another program listens there; --port 0 takes a free one"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--port", "65536"], "less than or equal to 65535"),
        (["--top", "0"], "'--top': Input should be greater than or equal to 1"),
        (["--host", "no.such.host.invalid"], "--host = no.such.host.invalid: no such address"),
        (["--host", "192.0.2.1"], "--host = 192.0.2.1: "),
        (["--device", "tpu"], "tpu"),
    ],
)
def test_bad_options(vlprompt, run: Path, given: list[str], says: str) -> None:
    assert says in refused(vlprompt, run, *given, *([] if "--port" in given else ["--port", "0"]))


def test_a_run_that_is_none(vlprompt, run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'}" in refused(vlprompt, run, tmp_path / "empty", "--port", 0)
    assert "nothing" in refused(vlprompt, tmp_path / "nothing", "--port", 0)
    assert "RUN" in refused(vlprompt)


def test_the_extra_is_named(vlprompt, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlprompt.cli.serve.find_spec", lambda name: None)
    assert refused(vlprompt, run) == "error: the page needs starlette and uvicorn: pip install 'vlprompt[app]'"


@slow
def test_it_runs_until_ctrl_c(run: Path) -> None:
    given = [sys.executable, "-m", "vlprompt", "app", str(run), "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(given, env=environment(), text=True, **pipes)  # type: ignore[call-overload]
    try:
        said = process.stdout.readline()
        found = re.fullmatch(r"(http://127\.0\.0\.1:\d+/) \(Ctrl-C ends it\)\n", said)
        assert found, process.stderr.read()
        assert [run["method"] for run in json.loads(ask(f"{found[1]}runs")[1])["runs"]] == ["coop"]
    finally:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")
