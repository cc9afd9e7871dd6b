"""``vlprompt app``: command only, no logic."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

import typer

from vlprompt.cli.options import OUTPUT, Device, OtherBackbone, Precision, say
from vlprompt.errors import ConfigError

serve_app = typer.Typer()


@serve_app.command("app", epilog="Example: vlprompt app runs/photos runs/other")
def app(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN", help="Run folders or hub ids; several are shown side by side.")
    ],
    backbone: OtherBackbone = None,
    device: Device = "cpu",
    precision: Precision = "fp32",
    top: Annotated[int, typer.Option(help="Classes shown for each picture.", min=1, rich_help_panel=OUTPUT)] = 5,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.", rich_help_panel=OUTPUT)
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535, rich_help_panel=OUTPUT)
    ] = 7860,
) -> None:
    """Try tuned models on a local page: drop pictures on it, edit the class names, see why.

    Nobody but this machine reaches the page, unless --host says so. Pictures stay in memory, and nothing is
    sent elsewhere.
    """
    if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        raise ConfigError(f"the page needs {' and '.join(missing)}: pip install 'vlprompt[app]'")
    from vlprompt.api import PromptedModel
    from vlprompt.app.answers import Answers
    from vlprompt.app.server import address, allowed_hosts, listen, serve

    with listen(host, port) as listener:
        models = [PromptedModel.from_pretrained(r, backbone=backbone, device=device, precision=precision) for r in runs]
        hosts = allowed_hosts(listener, host)
        if "*" in hosts:
            say(f"note: whoever reaches {host} can use the page, which asks for no password")
        print(f"{address(listener)} (Ctrl-C ends it)", flush=True)
        serve(Answers(runs, models, top), listener, hosts)
