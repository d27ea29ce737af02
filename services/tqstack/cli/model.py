"""`tqstack model ...`: download a model, whole; remove it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tqstack.cli.common import console, fail, preload_openblas, settings

app = typer.Typer(help="Download and remove models.", no_args_is_help=True)

Model = Annotated[str, typer.Argument(help="a hub name; without it, SIDECAR_MODEL")]


@app.command()
def download(model: Model = "") -> None:
    """Download a model, or the rest of one; then check that its files are whole."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    from tqstack.models import hub
    from tqstack.models.safetensors import BrokenFileError, model_tensors
    from tqstack.models.spec import ModelNotFoundError, resolve

    config = settings()
    if not model and not config.runs_sidecar:
        console.print("no model is needed: the sidecar is off (SIDECAR_ENABLED)")
        return
    name = model or config.model_name
    try:
        _, path = resolve(name)
        if not Path(path).is_dir():
            path = hub.fetch(name)
        count = len(model_tensors(Path(path)))
    except ModelNotFoundError as error:
        fail(str(error), 1)
    except BrokenFileError as error:
        fail(f"{error}; first remove what is here: tqstack model remove {name}", 1)
    except GatedRepoError:
        fail(
            f"{name} wants its terms to be accepted: do so on {hub.page(name)}, then `hf auth "
            "login`, and run it again",
            1,
        )
    except RepositoryNotFoundError:
        fail(
            f"{hub.page(name)} does not exist, or is private: correct the name (SIDECAR_MODEL), or "
            "`hf auth login`, and run it again",
            1,
        )
    except Exception as error:  # of the network, the hub or the disk: each says what it is
        fail(f"{name} could not be downloaded: {error}. Run it again: what has come is kept", 1)
    console.print(f"{name} is whole: {count} tensors in {path}", soft_wrap=True, highlight=False)


@app.command()
def remove(model: Model = "") -> None:
    """Remove a downloaded model from the hub's cache; folders of yours stay."""
    from tqstack.models import hub
    from tqstack.models.spec import ModelNotFoundError, resolve

    name = model or settings().model_name
    try:
        _, path = resolve(name)
    except ModelNotFoundError as error:
        fail(str(error), 1)
    if path != name:
        console.print(f"{name} was not downloaded: it stays")
        return
    console.print(f"{name}: {hub.remove(name) / 1e6:,.0f} MB given back")


@app.command("train-head")
def train_head(
    output: Annotated[Path, typer.Argument(help="the folder for mtp.safetensors")],
    model: Annotated[str, typer.Option(help="demo, or a folder of the same architecture")] = "demo",
    minutes: Annotated[float, typer.Option(min=0.01)] = 21,
    text: Annotated[
        Path | None, typer.Option(help="a folder of Python files; none: the standard library")
    ] = None,
) -> None:
    """Train a multi-token prediction head for a small Qwen 3.5 model, as the demo's was trained."""
    preload_openblas()
    from tqstack.models import mtp_training
    from tqstack.models.load import load_model

    try:
        loaded = load_model(model, adapted=False)
        head = mtp_training.train(loaded.model, loaded.tokenizer, 60 * minutes, text, console.print)
    except ValueError as error:
        fail(str(error), 2)
    output.mkdir(parents=True, exist_ok=True)
    console.print(f"written: {mtp_training.save(head, output)}", soft_wrap=True)
