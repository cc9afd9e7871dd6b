"""How ``vlprompt.backbones.lite0`` should lead from a classifier's classes to given names, measured.

    python tools/mini/teacher.py --data pretraining

On Tiny-ImageNet's val images, whose 200 names the classifier should find: as they are, and with the right class hidden
from it, as it is for names that ImageNet does not have. Prints for each way of embedding classes, number of likeliest
classes and power of their probabilities the accuracy, and the factor of the cosines with the smallest cross entropy.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from vlprompt.backbones.lite0 import directions, kinds, sentence_encoder

SCALES = (8, 10, 12, 14, 16, 20)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that photos.py wrote")
    folder = parser.parse_args().data / "photos"
    torch.set_num_threads(1)
    embed, known = sentence_encoder(), kinds()
    at = {kind.id: i for i, kind in enumerate(known)}
    labels = torch.tensor([at[id_] for id_ in json.loads((folder / "val-labels.json").read_text(encoding="utf-8"))])
    top = torch.from_numpy(np.load(folder / "val-top.npy")).long()
    chance = torch.from_numpy(np.load(folder / "val-chance.npy")).float()
    ids = labels.unique()
    label = torch.searchsorted(ids, labels)
    asked = embed([known[i].names[0] for i in ids.tolist()])
    ways = {
        "names": F.normalize(embed([", ".join(kind.names) for kind in known]), dim=-1),
        "first names": embed([kind.text for kind in known]),
        "with glosses": directions(known, embed),
        "without glosses": directions([replace(kind, gloss=kind.text) for kind in known], embed),
    }
    print("classes | likeliest | power | accuracy, factor | hidden: accuracy, factor")
    for (way, names), most, power in product(ways.items(), (5, 10, 20), (1.0, 0.5)):
        shown = []
        for hidden in (False, True):
            weights = torch.where(hidden & (top == labels[:, None]), 0.0, chance)[:, :most] ** power
            meant = F.normalize((weights[..., None] * names[top[:, :most]]).sum(1), dim=-1)
            cosines = meant @ asked.T
            accuracy = 100 * (cosines.argmax(1) == label).float().mean().item()
            factor = min(SCALES, key=lambda scale: F.cross_entropy(scale * cosines, label).item())
            shown.append(f"{accuracy:.1f} %, {factor}")
        print(" | ".join((way, str(most), str(power), *shown)))


if __name__ == "__main__":
    main()
