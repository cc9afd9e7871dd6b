"""Write where ``efficientnet-lite0``'s classes point among sentences, which ``vlprompt.backbones.lite0`` reads.

python tools/mini/directions.py
"""

from __future__ import annotations

from safetensors.torch import save

from vlprompt.backbones.lite0 import DIRECTIONS, directions, kinds, sentence_encoder
from vlprompt.files import write_atomically


def main() -> None:
    """Write the file."""
    write_atomically(DIRECTIONS, save({"directions": directions(kinds(), sentence_encoder())}))


if __name__ == "__main__":
    main()
