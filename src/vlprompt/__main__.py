"""``python -m vlprompt``."""

from vlprompt.cli import main

main()
