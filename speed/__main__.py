"""``python -m speed COMMAND``: measure, print a table, write JSON."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from speed import short, show
from speed.inputs import write_figures
from vlprompt.errors import VlpromptError

COMMANDS = {**show.COMMANDS, "short": short, "show": show}


def main() -> int:
    """Run one command; bad input is one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m speed", description=sys.modules["speed"].__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        assert module.__doc__
        sub = commands.add_parser(
            name,
            help=module.__doc__.split("\n")[0],
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.arguments(sub)
        if name in show.COMMANDS:
            sub.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    args = parser.parse_args()
    module = COMMANDS[args.command]
    try:
        result = module.run(args)
        print(module.table(result))
        if getattr(args, "json", None):
            write_figures(args.json, result, args)
    except VlpromptError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
