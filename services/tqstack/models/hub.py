"""Models on the Hugging Face hub: what is here of one, and the download of the rest.

huggingface_hub begins a file that was interrupted anew, and a model's files are gigabytes. The
large ones are therefore fetched here, one after the other, to the place in its cache where it finds
them.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_url, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import build_hf_headers, filter_repo_objects
from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS as FILES


def snapshot(name: str) -> Path:
    """The folder of a downloaded model.

    Raises:
        LocalEntryNotFoundError: it is not here, or files are missing.
    """
    return Path(snapshot_download(name, local_files_only=True, allow_patterns=FILES))


def fetch(name: str) -> Path:
    """The folder of a model, downloaded if it is not here; only then is the hub asked.

    Raises:
        OSError, HfHubHTTPError: of the network, the hub or the disk. What has come is kept.
    """
    try:
        return snapshot(name)
    except LocalEntryNotFoundError:
        return _download(name)


def page(name: str) -> str:
    """Where people read about a model."""
    return f"{constants.ENDPOINT}/{name}"


def remove(name: str) -> int:
    """Remove a model and what came of it: the bytes that were given back."""
    folder = _home(name)
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    size = sum(path.stat().st_size for path in files)
    for place in (folder, folder.parent / ".locks" / folder.name):
        shutil.rmtree(place, ignore_errors=True)
    return size


def _download(name: str) -> Path:
    info = HfApi().model_info(name, files_metadata=True)
    files = filter_repo_objects(
        info.siblings or [], allow_patterns=FILES, key=lambda file: file.rfilename
    )
    for file in files:
        if file.lfs:
            url = hf_hub_url(name, file.rfilename, revision=info.sha)
            _fetch_file(url, file.rfilename, file.lfs.sha256, file.lfs.size, _home(name))
    return Path(snapshot_download(name, allow_patterns=FILES))


def _home(name: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")


def _fetch_file(url: str, title: str, sha256: str, size: int, home: Path) -> None:
    """Download a file, from where an earlier try ended, to the blob of this digest."""
    blob = home / "blobs" / sha256
    if blob.exists():
        return
    blob.parent.mkdir(parents=True, exist_ok=True)
    partial = blob.with_name(f"{sha256}.part")
    with partial.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"{title} is being downloaded by another process") from None
        http_get(
            url,
            file,
            resume_size=file.tell(),
            headers=build_hf_headers(),
            expected_size=size,
            displayed_filename=title,
        )
        file.seek(0)
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            partial.unlink()
            raise OSError(f"{title} came with an error, and was removed")
        partial.rename(blob)
