"""Tuned models on the Hugging Face hub: a repository holds the artefact's three files."""

from __future__ import annotations

import os
from pathlib import Path

from vlprompt.artefact.artefact import FILES, load_artefact
from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.names import may_be_hub_id
from vlprompt.errors import ArtefactError, first_line
from vlprompt.methods import Method


def upload(folder: Path, repo: str, *, private: bool, token: str | None, message: str) -> str:
    """Upload an artefact to ``owner/name``, which is made if it is not there; returns the repository's address.

    Raises ArtefactError with the hub's reason.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, allow_patterns=list(FILES))
    except Exception as error:  # the library lets errors of several network libraries through
        raise ArtefactError(f"cannot upload to '{repo}': {first_line(error)}") from None
    return str(address)


def load_model(
    name: str | os.PathLike[str],
    backbone: str | Backbone | None = None,
    device: str = "cpu",
    precision: str = "fp32",
    revision: str | None = None,
) -> tuple[Method, Path]:
    """A tuned model in a folder, or in a hub repository ``owner/name``, and the folder that it now is in.

    A name is the hub's if there is neither such a folder nor one that would hold it. What is downloaded names no file
    of methods: code comes from this machine alone. Raises ArtefactError as :func:`load_artefact` does.
    """
    folder = find_model(name, revision)
    return load_artefact(folder, backbone, device, precision, files=_is_local(name)), folder


def find_model(name: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder of a tuned model, which is fetched if it is on the hub; raises ArtefactError with the hub's reason."""
    return Path(name).expanduser() if _is_local(name) else download(os.fspath(name), revision)


def _is_local(name: str | os.PathLike[str]) -> bool:
    folder = Path(name).expanduser()
    return not may_be_hub_id(os.fspath(name)) or folder.exists() or folder.parent.is_dir()


def download(repo: str, revision: str | None = None) -> Path:
    """Fetch an artefact from ``owner/name``; returns its folder. Raises ArtefactError with the hub's reason."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(FILES)))
    except Exception as error:  # as above
        raise ArtefactError(f"no folder '{repo}', and not on the hub: {first_line(error)}") from None
