"""Tuned models on the Hugging Face hub: a repository holds the artefact's three files."""

from __future__ import annotations

from pathlib import Path

from vlprompt.artefact.artefact import FILES
from vlprompt.errors import ArtefactError, first_line


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


def download(repo: str, revision: str | None = None) -> Path:
    """Fetch an artefact from ``owner/name``; returns its folder. Raises ArtefactError with the hub's reason."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(FILES)))
    except Exception as error:  # as above
        raise ArtefactError(f"no folder '{repo}', and not on the hub: {first_line(error)}") from None
