"""Teach the text tower of ``mini`` where photographs of the kinds lie that mean nearly what a text says.

    python tools/mini/nearest.py pretraining/met --data pretraining --out pretraining/nearest \
        --photographs vipriors/train tiny-imagenet-200/train --to src/vlprompt/backbones/mini

Where photographs of a kind lie is a direction of Fisher's linear discriminant: the mean feature of its photographs,
less that of all, with less weight on what differs between photographs of one kind. Where a text points is the mean of
those directions, weighted by how near the text's sentence embedding is to each kind's: ConSE (Norouzi et al., ICLR
2014) the other way round, as a dot product needs it. The text tower learns to add ``ADDED`` times that to where it
points already. The image tower stays as it is. No photograph of Imagenette's ten kinds is looked at.

Reads in DATA ``texts.json``, ``texts.npy``, ``kinds.json`` and ``captions.json`` (``data.py``, ``kinds.py``,
``embed.py``). Writes ``OUT/features.safetensors`` and ``OUT/text.safetensors``, and goes on from both; then the
backbone into ``--to``.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from evaluate import image_features
from export import hugging_face, rescaled
from kinds import UNSEEN, WORDNET, line_above, synsets
from names import kind_embeddings, listed_kinds, read_texts
from safetensors.torch import load_file, save
from steps import EPS, Training, processes
from text import CHUNKS, apart, drawn_batches, encode, everyday, padded, tokenized, unscaled_tower
from tokenizer import counts
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from data import PACKAGES, package_folder
from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.load import load_backbone
from vlprompt.backbones.towers import TextTower
from vlprompt.files import write_atomically

EACH = 150
"""Photographs of a kind that are taken of a folder, at most."""
SHRUNK = 0.4
"""How far the covariance within kinds is drawn to a multiple of the identity."""
SHARPNESS = 10.0
"""What cosines of sentence embeddings are multiplied by, before the softmax over kinds."""
ADDED = 0.5
"""How much is added of where the nearest kinds lie, to a unit vector."""
SHARES = {"kinds": 0.25, "drawings": 0.25, "things": 0.4, "other": 0.1}
"""Of the texts drawn: names of kinds and what is above them; captions and tags; other nouns for what can be seen."""
SEEABLE = "00001930"
"""WordNet's "physical entity"."""
HELD_OUT, VALIDATION = 250, 2_000
STEPS, BATCH = 1400, 512
RECIPE = {"learning_rate": 0.0015, "weight_decay": 0.1, "warmup": 50, "cooldown": 0.68}
SEED = 7


def features_of(backbone: Backbone, folders: Sequence[Path], file: Path) -> tuple[Tensor, list[str]]:
    """Unit features [photographs, E] and WordNet ids of the photographs in folders ``WNID``; kept in ``file``."""
    photos: list[tuple[Path, str]] = []
    for folder in folders:
        for kind in sorted(path for path in folder.iterdir() if path.name not in UNSEEN):
            photos += [(photo, kind.name) for photo in sorted(kind.rglob("*.JPEG"))[:EACH]]
    if not file.exists() or len(load_file(file)["features"]) != len(photos):
        features = image_features(backbone, [photo for photo, _ in photos])
        write_atomically(file, save({"features": features.half()}))
    return load_file(file)["features"].float(), [kind for _, kind in photos]


def discriminants(features: Tensor, labels: Tensor, kinds: int) -> Tensor:
    """Unit directions of Fisher's linear discriminant, [kinds, E]."""
    number = torch.zeros(kinds).index_add(0, labels, torch.ones(len(labels)))
    means = torch.zeros(kinds, features.shape[1]).index_add(0, labels, features) / number[:, None]
    away = features - means[labels]
    within = away.T @ away / len(away)
    even = torch.eye(len(within)) * within.trace() / len(within)
    solved = torch.linalg.solve((1 - SHRUNK) * within + SHRUNK * even, (means - features.mean(0)).T)
    return F.normalize(solved.T, dim=-1)


def nearby(embeddings: Tensor, kinds: Tensor, directions: Tensor) -> Tensor:
    """Where the kinds lie that mean nearly what texts [T, 384] say; kinds are [K, 384] and point to [K, E]: [T, E]."""
    weights = (SHARPNESS * F.normalize(embeddings, dim=-1) @ F.normalize(kinds, dim=-1).T).softmax(-1)
    return F.normalize(weights @ directions, dim=-1)


def on_held_out(features: Tensor, labels: Tensor, kinds: Tensor, directions: Tensor) -> float:
    """Per cent of photographs named rightly among ``HELD_OUT`` kinds by the directions of all others."""
    order, right = torch.randperm(len(kinds), generator=torch.Generator().manual_seed(0)), []
    for held in order.split(HELD_OUT)[:3]:
        rest = torch.ones(len(kinds), dtype=torch.bool).index_fill(0, held, value=False)
        place = torch.full((len(kinds),), -1).index_copy(0, held, torch.arange(len(held)))[labels]
        scores = features[place >= 0] @ nearby(kinds[held], kinds[rest], directions[rest]).T
        right.append((scores.argmax(-1) == place[place >= 0]).float().mean().item())
    return 100 * sum(right) / len(right)


def weights_of(texts: Sequence[str], data: Path) -> tuple[Tensor, Tensor]:
    """How often each text is drawn, everyday words more often than rare ones; and which no picture shows: [texts]."""
    kinds, unseen = listed_kinds(data)
    captions = json.loads((data / "captions.json").read_text(encoding="utf-8"))
    known = synsets(WORDNET)
    parts = {
        "kinds": {text for kind in (*kinds, *unseen) for text in (*kind["names"], kind["text"], *kind["above"])},
        "drawings": {text for caption in captions for text in (caption["text"], *caption["tags"])},
        "things": {
            name.lower()
            for offset, synset in known.items()
            if SEEABLE in line_above(offset, known)
            for name in synset.names
        },
    }
    met = counts(data, package_folder(PACKAGES["words"], data / "packages") / "dict" / "index.sense")
    part_of = [next((part for part, members in parts.items() if text in members), "other") for text in texts]
    weights = torch.ones(len(texts))
    for i, text in enumerate(texts):
        if part_of[i] in ("things", "other"):
            weights[i] = everyday(text, met)
    for part, share in SHARES.items():
        rows = torch.tensor([of == part for of in part_of])
        weights[rows] *= share / weights[rows].sum()
    return weights, torch.tensor([part in ("things", "other") for part in part_of])


def main() -> None:
    """Look at photographs, train, write."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("backbone", type=Path, help="folder of the backbone as it is")
    parser.add_argument("--data", type=Path, required=True, help="folder that data.py, kinds.py and embed.py wrote")
    parser.add_argument("--photographs", type=Path, nargs="+", required=True, help="folders of folders WNID")
    parser.add_argument("--out", type=Path, required=True, help="folder of the state")
    parser.add_argument("--to", type=Path, required=True, help="folder of the backbone that is written")
    parser.add_argument("--save-every", type=int, default=400, help="steps")
    options = parser.parse_args()
    rank, world, device = processes()
    backbone = load_backbone(options.backbone)
    options.out.mkdir(parents=True, exist_ok=True)
    features, ids = features_of(backbone, options.photographs, options.out / "features.safetensors")

    texts, row, embeddings = read_texts(options.data)
    kinds, _ = listed_kinds(options.data)
    place = {kind["id"]: i for i, kind in enumerate(kinds)}
    labels = torch.tensor([place[id_] for id_ in ids])
    meant = kind_embeddings(kinds, row, embeddings)
    directions = discriminants(features, labels, len(kinds))
    if rank == 0:
        print(f"kinds held out: {on_held_out(features, labels, meant, directions):.1f} % right", flush=True)
    added = ADDED * torch.cat([nearby(part, meant, directions) for part in embeddings.split(4096)])

    weights, of_none = weights_of(texts, options.data)
    plain = (of_none & torch.tensor([" " not in text for text in texts])).nonzero()[:, 0]
    validation = plain[torch.randperm(len(plain), generator=torch.Generator().manual_seed(0))[:VALIDATION]]
    weights[validation] = 0
    ends = weights.double().cumsum(0)

    tokenizer = Tokenizer.from_file(str(options.backbone / "tokenizer.json"))
    before = unscaled_tower(backbone.text_tower).requires_grad_(False)
    context = before.config.context_length
    frozen = copy.deepcopy(before).to(device, torch.bfloat16)
    training = Training(copy.deepcopy(before).requires_grad_(True).to(device), None, RECIPE, STEPS)
    size = BATCH // world

    @lru_cache(1)
    def chunks(number: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        seed = (SEED * 1_000_003 + number) * 64 + rank
        return drawn_batches(texts, ends, tokenizer, context, size, seed)

    def aims_of(ids: Tensor, at: Tensor, rows: Tensor) -> Tensor:
        with torch.no_grad():
            points = F.normalize(encode(frozen, ids, at).float(), dim=-1)
        return F.normalize(points + added[rows.cpu()].to(device), dim=-1)

    def batch(step: int) -> Callable[[TextTower], Tensor]:
        ids, at, rows = (t.to(device) for t in chunks(step // CHUNKS)[step % CHUNKS])
        aims = aims_of(ids, at, rows)

        def loss_of(low: TextTower) -> Tensor:
            found = F.normalize(encode(low, ids, at).float(), dim=-1)
            far = (1 - (found * aims).sum(-1)).mean()
            return 8 * far + apart(found, aims, rows, 30)

        return loss_of

    @torch.no_grad()
    def found() -> dict[str, float]:
        """Mean cosine with where texts shall point: of words never trained on, and of kinds."""
        out = {}
        for name, rows in (("other words", validation), ("kinds", torch.tensor([row[k["names"][0]] for k in kinds]))):
            ids, at = padded(tokenized(tokenizer, [texts[i] for i in rows.tolist()], context))
            assert isinstance(training.tower, TextTower)
            said = F.normalize(encode(training.tower, ids.to(device), at.to(device)), dim=-1)
            out[name] = round((said * aims_of(ids.to(device), at.to(device), rows)).sum(-1).mean().item(), 3)
        return out

    if rank == 0:
        print(f"before {found()}", flush=True)
    training.run(batch, options.out / "text.safetensors", options.save_every, BATCH, found, first=rank == 0)
    if rank == 0:
        trained = training.tower.cpu()
        assert isinstance(trained, TextTower)
        write(options.backbone, trained, options.to)


def write(source: Path, tower: TextTower, to: Path) -> None:
    """The backbone of a folder with another text tower, into the folder ``to``; the card that lies there stays."""
    words, factor = rescaled(tower.state_dict())
    weights = load_file(source / "model.safetensors")
    weights |= {name: value.half().contiguous() for name, value in hugging_face(words, "text").items()}
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["layer_norm_eps"] = EPS * factor**2
    to.mkdir(parents=True, exist_ok=True)
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        write_atomically(to / name, (source / name).read_bytes())
    write_atomically(to / "config.json", json.dumps(config, indent=1) + "\n")
    write_atomically(to / "model.safetensors", save(weights, {"format": "pt"}))


if __name__ == "__main__":
    main()
