"""Run as a program, by each of several processes: train runs one after the other with the real command line.

Arguments, as JSON: a list of command lines. The environment says which process this is. Prints the exit codes.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist

from vlprompt import cli
from vlprompt.methods import METHODS, Can
from vlprompt.methods.coop import CoOp


class Coupled(CoOp):
    """A method whose loss compares images of a batch."""

    name = "coupled"

    class Config(CoOp.Config):
        """Those of coop."""

        can = CoOp.Config().can & ~Can.SPLIT_BATCHES


if __name__ == "__main__":
    torch.set_num_threads(1)
    METHODS["coupled"] = Coupled
    dist.init_process_group("gloo")  # once for all runs
    codes = []
    for argv in json.loads(sys.argv[1]):
        sys.argv = ["vlprompt", *argv]
        try:
            cli.main()
        except SystemExit as end:
            codes.append(end.code or 0)
    print(json.dumps(codes))
    dist.destroy_process_group()
