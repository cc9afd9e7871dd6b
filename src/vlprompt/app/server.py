"""The local web server of ``vlprompt app``: one page, what it fetches from here, and nothing from anywhere else."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from errno import EACCES, EADDRINUSE
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
from pydantic import TypeAdapter, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from vlprompt.app.answers import MOST_BYTES, Answers, Names, PictureError, Question, Why
from vlprompt.errors import ConfigError, VlpromptError, first_line, memory_is_full

T = TypeVar("T", bound=Names)
MOST_BODY = MOST_BYTES * 4 // 3 + (8 << 20)
"""Bytes of a request: a picture in base64, and 50,000 class names."""
HEADERS = [
    # The browser itself refuses what is not from here, pictures that the page makes excepted.
    (
        "Content-Security-Policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'",
    ),
    ("Cache-Control", "no-store"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
]


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; raises ConfigError for a port in use or not allowed, and for no address of this machine.

    Before the models are loaded, which takes longer.
    """
    try:
        family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError):
        raise ConfigError(f"--host = {host}: no such address") from None
    try:
        return socket.create_server(place, family=family)
    except OSError as error:
        number = error.errno or 0  # what create_server says is longer
        if number == EADDRINUSE:
            raise ConfigError(f"--port = {port}: another program listens there; --port 0 takes a free one") from None
        if number == EACCES:
            raise ConfigError(f"--port = {port}: not allowed to this user (allowed: 1024 to 65535, or 0)") from None
        raise ConfigError(f"--host = {host}: {os.strerror(number)}") from None


def address(listener: socket.socket) -> str:
    """Where a browser finds the page."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def allowed_hosts(listener: socket.socket, host: str) -> list[str]:
    """The names that a browser may know the page by: any, ``*``, where other machines reach it.

    On this machine alone, another site's name that leads here (DNS rebinding) is refused.
    """
    if not ip_address(listener.getsockname()[0]).is_loopback:
        return ["*"]
    return ["localhost", "127.0.0.1", "[::1]", host]


def web_app(answers: Answers, hosts: Sequence[str]) -> Starlette:
    """The page, and its questions as JSON: errors too, as ``{"error": …}``."""
    here = Path(__file__).parent

    def file(path: str, name: str, kind: str) -> Route:
        content = (here / name).read_bytes()
        return Route(path, lambda request: Response(content, media_type=kind))

    def runs(request: Request) -> Response:
        return JSONResponse(answers.about())

    def question(path: str, kind: type[T], answer: Callable[[T], dict[str, Any]]) -> Route:
        adapter = TypeAdapter(kind)

        async def respond(request: Request) -> Response:
            # A page of another site can send no JSON here: the browser would ask first, and is not told yes.
            if request.headers.get("content-type") != "application/json":
                return JSONResponse({"error": "questions are JSON"}, 415)
            body = await request.body()
            return JSONResponse(await run_in_threadpool(lambda: answer(adapter.validate_json(body))))

        return Route(f"/{path}", respond, methods=["POST"], max_body_size=MOST_BODY)

    return Starlette(
        routes=[
            file("/", "page.html", "text/html"),
            file("/page.css", "page.css", "text/css"),
            file("/page.js", "page.js", "text/javascript"),
            Route("/runs", runs),
            question("names", Names, answers.names),
            question("predict", Question, answers.predict),
            question("explain", Why, answers.explain),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)],
        exception_handlers={VlpromptError: _told, ValidationError: _told, Exception: _told},
    )


def _told(request: Request, error: Exception) -> Response:
    """An error as one line for the page; those that are not the user's go to standard error too."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the question"
        return JSONResponse({"error": f"{where}: {first['msg']}"}, 400)
    if isinstance(error, VlpromptError):
        return JSONResponse({"error": str(error)}, 415 if isinstance(error, PictureError) else 400)
    what = "out of memory" if memory_is_full(error) else f"{type(error).__name__}: {first_line(error)}"
    return JSONResponse({"error": what}, 500)


def web_server(answers: Answers, hosts: Sequence[str]) -> uvicorn.Server:
    """Runs on a socket of :func:`listen` until it ``should_exit``."""
    config = uvicorn.Config(
        web_app(answers, hosts), log_level="error", lifespan="off", ws="none", proxy_headers=False, server_header=False,
        headers=HEADERS, timeout_graceful_shutdown=2,
    )  # fmt: skip
    return uvicorn.Server(config)


def serve(answers: Answers, listener: socket.socket, hosts: Sequence[str]) -> None:
    """Answer until Ctrl-C, which is the way to end it."""
    with suppress(KeyboardInterrupt):
        web_server(answers, hosts).run(sockets=[listener])
