"""A stand-in for huggingface_hub that needs no network."""

from __future__ import annotations

import inspect
import shutil
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest


class Hub:
    """Stands in for huggingface_hub: repositories are folders; calls must fit the real signatures.

    ``fetched`` lists what was downloaded, in this order; nothing is while it is ``offline``.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.calls, self.fetched, self.offline = root, [], list[str](), False
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

            def list_repo_files(api, *args, **arguments):
                call = inspect.signature(real.list_repo_files).bind(api, *args, **arguments).arguments
                if self.offline or not (root / call["repo_id"]).is_dir():
                    raise OSError("no network: no such repository\nmore lines")
                return files_below(root / call["repo_id"])

            def upload_folder(api, **arguments):
                call = inspect.signature(real.upload_folder).bind(api, **arguments).arguments
                self.calls.append(call)
                for file in Path(call["folder_path"]).iterdir():
                    (root / call["repo_id"] / file.name).write_bytes(file.read_bytes())

        def snapshot_download(*args, **arguments):
            call = inspect.signature(real_download).bind(*args, **arguments).arguments
            self.calls.append(call)
            repo, cache = root / call["repo_id"], root / "cache" / call["repo_id"]
            if call.get("local_files_only") or self.offline:
                if not cache.is_dir():
                    raise OSError("not in the cache\nmore lines")
                return str(cache)
            if not repo.is_dir():
                raise OSError("404: no such repository\nmore lines")
            for name in files_below(repo):
                wanted = any(fnmatch(name, pattern) for pattern in call.get("allow_patterns") or ["*"])
                if wanted and not (cache / name).exists():
                    (cache / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(repo / name, cache / name)
                    self.fetched.append(name)
            return str(cache)

        real_download = huggingface_hub.snapshot_download
        monkeypatch.setattr(huggingface_hub, "HfApi", Api)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def files_below(folder: Path) -> list[str]:
    """Their names relative to the folder."""
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
