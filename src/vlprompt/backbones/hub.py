"""Which files of a checkpoint's folder, or of a repository on the Hugging Face hub, are a backbone's."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from vlprompt.backbones.tokenizer import FILES as TOKENIZER_FILES
from vlprompt.errors import BackboneError, first_line

HF_CONFIG, OPEN_CLIP_CONFIG = "config.json", "open_clip_config.json"
# Many repositories hold both configurations, and the same weights in several forms. safetensors come first.
WEIGHTS = tuple(
    (config, stem + ending)
    for endings, stems in (
        (
            (".safetensors", ".safetensors.index.json"),
            (
                (OPEN_CLIP_CONFIG, "open_clip_model"),
                (OPEN_CLIP_CONFIG, "open_clip_pytorch_model"),
                (HF_CONFIG, "model"),
            ),
        ),
        (
            (".bin", ".bin.index.json"),
            ((OPEN_CLIP_CONFIG, "open_clip_pytorch_model"), (HF_CONFIG, "pytorch_model")),
        ),
    )
    for config, stem in stems
    for ending in endings
)
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
BESIDE = ("README.md", "tokenizer_config.json", "spiece.model", *TOKENIZER_FILES)


@dataclass(frozen=True)
class Found:
    """The configuration and the weights to read; the weights are one file, or an index of several."""

    config: str
    weights: str

    @property
    def of_open_clip(self) -> bool:
        """Whether the configuration is open_clip's."""
        return self.config == OPEN_CLIP_CONFIG

    @property
    def described_by(self) -> tuple[str, ...]:
        """The small files that say what the weights are."""
        index = (self.weights,) if self.weights.endswith(".index.json") else ()
        return (self.config, *PREPROCESSORS, *index)


def choose(files: Collection[str], place: str) -> Found:
    """The configuration and weights among the ``files`` of a folder or repository.

    Raises BackboneError, naming the ``place``, if one of the two is not there.
    """
    for config, weights in WEIGHTS:
        if config in files and weights in files:
            return Found(config, weights)
    present = [c for c in (HF_CONFIG, OPEN_CLIP_CONFIG) if c in files]
    if not present:
        raise BackboneError(f"no backbone in {place}: needs {HF_CONFIG} or {OPEN_CLIP_CONFIG}")
    own = [weights for c, weights in WEIGHTS if c == present[0]]
    old = next((f for f in sorted(files) if f.endswith((".bin", ".pt", ".pth", ".ckpt"))), None)
    if old:
        raise BackboneError(
            f"no {own[0]} in {place}: convert older weights first: vlprompt convert {old} {Path(place, own[0])}"
        )
    raise BackboneError(f"no weights in {place} beside its {present[0]} (read are {', '.join(own)})")


def list_files(repo: str) -> list[str] | None:
    """The names of a repository's files; None where the hub cannot be asked and an earlier download is there."""
    from huggingface_hub import HfApi

    try:
        return HfApi().list_repo_files(repo)
    except Exception as error:  # the library lets errors of several network libraries through
        reason = first_line(error)
    try:
        download(repo, [], local=True)
    except BackboneError:
        raise BackboneError(f"cannot fetch '{repo}' from the hub: {reason}") from None
    return None


def download(repo: str, files: Collection[str], *, local: bool = False) -> Path:
    """The folder of a repository's ``files``, fetched unless they are there; all there are with ``local``."""
    from huggingface_hub import snapshot_download

    try:
        if local:
            return Path(snapshot_download(repo, local_files_only=True))
        return Path(snapshot_download(repo, allow_patterns=sorted(files)))
    except Exception as error:  # as above
        raise BackboneError(f"cannot fetch '{repo}' from the hub: {first_line(error)}") from None
