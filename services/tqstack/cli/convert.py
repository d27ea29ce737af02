"""`tqstack convert`: a model with compressed weights, from a 16-bit, affine or MXFP4 one."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tqstack.cli.common import console, errors, fail, preload_openblas, size

if TYPE_CHECKING:
    from tqstack.weights.convert import Converted

MEASURED = 8192  # tokens at most, on which the divergence is measured


def convert(
    source: Annotated[str, typer.Argument(help="demo, a folder or a hub name")],
    destination: Annotated[Path, typer.Argument(help="the folder that is made")],
    bits: Annotated[float, typer.Option(help="of a weight: 2, 3, 4; mixed: a mean between")] = 3,
    code: Annotated[
        Literal["trellis", "lloyd"], typer.Option(help="trellis is nearer, lloyd codes faster")
    ] = "trellis",
    recipe: Annotated[
        Literal["even", "mixed"], typer.Option(help="mixed: more bits where they matter more")
    ] = "even",
    calibrate: Annotated[
        Path | None, typer.Option(help="a text like what the model will read, mixed; or .npy ids")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="to measure the divergence on; not that of --calibrate")
    ] = None,
    qjl: Annotated[
        bool, typer.Option("--qjl", help="a bit more per weight: signs of what the code misses")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=(1 << 32) - 1, help="of the rotation")] = 0,
) -> None:
    """Compress a model's weights. Interrupted, the same command goes on where it stopped."""
    preload_openblas()
    import mlx.core as mx

    from tqstack.models.load import fetched
    from tqstack.models.spec import ModelNotFoundError, resolve
    from tqstack.weights.card import write_card
    from tqstack.weights.convert import ConversionError, Options
    from tqstack.weights.convert import convert as run
    from tqstack.weights.shards import DiskFullError

    try:
        folder = fetched(source)
        tokens = _calibration(folder, calibrate) if calibrate else None
        digest = hashlib.sha256(tokens.tobytes()).hexdigest() if tokens is not None else ""
        options = Options(bits, code, recipe, qjl, seed, digest)
        with _bar() as bar:
            task = bar.add_task("coding weights")
            done = run(
                folder,
                destination.expanduser(),
                options,
                text=None if tokens is None else mx.array(tokens),
                progress=lambda at, total: bar.update(task, completed=at, total=total),
            )
    except (ModelNotFoundError, ConversionError, DiskFullError, ValueError, OSError) as error:
        fail(str(error), 2)
    except KeyboardInterrupt:
        fail("stopped; the same command goes on from here", 130)
    divergence = _divergence(source, destination, text)
    write_card(destination, resolve(source)[0], options, done, divergence)
    _print(done, destination, divergence)


def _calibration(folder: Path, text: Path) -> Any:
    """(sequences, length) int32 ids."""
    import numpy as np
    from mlx_lm.utils import load_tokenizer

    from tqstack.models.corpus import token_ids
    from tqstack.weights.convert import TEXT_WINDOW, TEXT_WINDOWS

    ids = token_ids(text, load_tokenizer(folder))
    windows = min(TEXT_WINDOWS, len(ids) // TEXT_WINDOW)
    if windows < 4:
        raise ValueError(
            f"{text} has {len(ids):,} tokens; a calibration text needs {4 * TEXT_WINDOW:,} or "
            f"more, and {TEXT_WINDOWS * TEXT_WINDOW:,} are best"
        )
    starts = np.arange(windows) * ((len(ids) - TEXT_WINDOW) // max(1, windows - 1))
    return np.stack([ids[at : at + TEXT_WINDOW] for at in starts]).astype(np.int32)


def _divergence(source: str, converted: Path, text: Path | None) -> str:
    """How far the converted model is from its source, in words."""
    from tqstack.bench.evaluate import Candidate, measure, windows
    from tqstack.cli.evaluate import corpus
    from tqstack.models.device import this_machine
    from tqstack.models.planning import weight_bytes
    from tqstack.models.safetensors import model_tensors
    from tqstack.models.spec import read_spec

    later = f"not measured; tqstack evaluate {converted} --against {source} --text FILE does"
    spec = read_spec(source)
    machine = this_machine()
    loaded = weight_bytes(model_tensors(Path(spec.path)), spec.config, machine.expands_weights)
    if loaded > machine.budget:
        return f"{later}, on a machine that holds the source"
    try:
        read = corpus([source, str(converted)], text)
    except ValueError:
        if text:
            raise
        return later  # nothing to read that this tokenizer knows
    candidates = [Candidate(source, source), Candidate(converted.name, str(converted))]
    tokens = min(MEASURED, len(read) - 1)
    with errors.status("measuring the divergence"):
        rows = [row for row in measure(candidates, windows(read, tokens), True, False) if row]
    kl, top1 = rows[-1].kl_divergence, rows[-1].top1
    return f"{kl:.4f} nats on {tokens:,} tokens; the same first choice of {top1:.1%}"


def _print(done: Converted, destination: Path, divergence: str) -> None:
    table = Table(show_header=False, box=None)
    table.add_row("coded layers", str(done.recipe))
    for why, count in Counter(done.recipe.kept.values()).items():
        table.add_row("kept as they are", f"{count}: {why}")
    table.add_row("size", size(done.nbytes))
    table.add_row("bits per coded weight", f"{done.coded_bits:.3f}")
    table.add_row("divergence", divergence)
    table.add_row("peak memory", size(done.peak_memory))
    table.add_row("largest layer of the source", size(done.largest_layer))
    console.print(table, highlight=False)
    console.print(f"tqstack generate {destination} 'Hello'", style="dim", highlight=False)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
        console=errors,
    )
