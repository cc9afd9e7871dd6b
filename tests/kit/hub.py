"""A stand-in for huggingface_hub that needs no network."""

from __future__ import annotations

import inspect
from pathlib import Path

import huggingface_hub
import pytest


class Hub:
    """Stands in for huggingface_hub: repositories are folders; calls must fit the real signatures."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.calls = root, []
        real = huggingface_hub.HfApi

        class Api:
            def __init__(api, **arguments):
                inspect.signature(real).bind(**arguments)

            def create_repo(api, *args, **arguments):
                call = inspect.signature(real.create_repo).bind(api, *args, **arguments).arguments
                self.calls.append(call)
                if "/" not in call["repo_id"]:
                    raise ValueError("bad repository name\nmore lines")
                (root / call["repo_id"]).mkdir(parents=True, exist_ok=call["exist_ok"])
                return huggingface_hub.RepoUrl(f"https://huggingface.co/{call['repo_id']}")

            def upload_folder(api, **arguments):
                call = inspect.signature(real.upload_folder).bind(api, **arguments).arguments
                self.calls.append(call)
                for file in Path(call["folder_path"]).iterdir():
                    (root / call["repo_id"] / file.name).write_bytes(file.read_bytes())

        def snapshot_download(*args, **arguments):
            call = inspect.signature(real_download).bind(*args, **arguments).arguments
            self.calls.append(call)
            if not (root / call["repo_id"]).is_dir():
                raise OSError("404: no such repository\nmore lines")
            return str(root / call["repo_id"])

        real_download = huggingface_hub.snapshot_download
        monkeypatch.setattr(huggingface_hub, "HfApi", Api)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
