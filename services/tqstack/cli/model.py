"""`tqstack model ...`: download a model, whole; remove it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tqstack.cli.common import console, fail, settings

app = typer.Typer(help="Download and remove models.", no_args_is_help=True)

Model = Annotated[str, typer.Argument(help="a hub name; without it, SIDECAR_MODEL")]
# What mlx-lm reads of a repository.
FILES = ("*.json", "model*.safetensors", "*.py", "tokenizer.model", "*.tiktoken", "*.jinja")


@app.command()
def download(model: Model = "") -> None:
    """Download a model, or the rest of one; then check that its files are whole."""
    from huggingface_hub import snapshot_download

    from tqstack.sidecar.model import resolve
    from tqstack.sidecar.safetensors import model_tensors

    config = settings()
    if not model and not config.runs_sidecar:
        console.print("no model is needed: the sidecar is off (SIDECAR_ENABLED)")
        return
    name = model or config.model_name
    try:
        _, path = resolve(name)
        if not Path(path).is_dir():
            path = snapshot_download(path, allow_patterns=list(FILES))
        count = len(model_tensors(Path(path)))
    except Exception as error:  # of the network, the hub or the disk: each says what it is
        fail(f"{name} could not be downloaded: {error}. Run it again: what has come is kept", 1)
    console.print(f"{name} is whole: {count} tensors in {path}", soft_wrap=True, highlight=False)


@app.command()
def remove(model: Model = "") -> None:
    """Remove a downloaded model from the hub's cache; folders of yours stay."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    name = model or settings().model_name
    try:
        cache = scan_cache_dir()
    except CacheNotFound:
        console.print(f"{name} is not here")
        return
    revisions = [
        revision.commit_hash
        for repository in cache.repos
        if repository.repo_id == name
        for revision in repository.revisions
    ]
    strategy = cache.delete_revisions(*revisions)
    strategy.execute()
    console.print(f"{name}: {strategy.expected_freed_size_str} given back")
