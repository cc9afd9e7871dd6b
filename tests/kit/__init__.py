"""What the tests share: where things are, pictures, runs, the command line, made-up results, and plain computations."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SHARED = REPOSITORY.parent / "shared"
"""Beside the repository, where there is one: the whole golden set, and CoOp's split files."""
TINY = REPOSITORY / "tests" / "golden" / "backbone"
"""The reduced golden backbone: 12 layers, width 128, 32-px images, a vocabulary of a few hundred tokens."""
