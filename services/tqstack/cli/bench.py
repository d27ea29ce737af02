"""`tqstack bench ...`: every figure of the README comes from one of these commands."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tqstack.cli import drafts
from tqstack.cli.common import console, errors, fail, preload_openblas

app = typer.Typer(help="Measure speed, quality and the router.", no_args_is_help=True)

Output = Annotated[Path | None, typer.Option(help="Write the rows as JSON to this file.")]
Plot = Annotated[Path | None, typer.Option(help="Draw the rows into this PNG file.")]


def backend_names(text: str) -> list[str]:
    from tqstack.bench.caches import ALL, NAMES

    names = list(ALL) if text == "all" else text.split(",")
    for name in names:
        if name not in NAMES:
            fail(f"--backend {name}: allowed: all, or by commas {', '.join(NAMES)}", 2)
    return names


def numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace("_", "").split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 1024,8192") from None


@app.command()
def speed(
    model: Annotated[str, typer.Argument(help="demo, a folder or a hub name")] = "demo",
    shape: Annotated[str, typer.Option(help="random weights of this geometry instead")] = "",
    layers: Annotated[int, typer.Option(help="of the shape; 0: all")] = 0,
    backend: Annotated[
        str,
        typer.Option(
            help="what to compare, by commas: baseline, mlx_quant, turboquant (all), and mlx_lm, "
            "the model with its layers as installed"
        ),
    ] = "all",
    bits: Annotated[str, typer.Option(help="of turboquant: 4, k4v3, or codecs by name")] = "4",
    weights: Annotated[
        str, typer.Option(help="of the shape, by commas: affine-4, trellis-3, lloyd-4 ...")
    ] = "affine-4",
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 1000,
    generation_tokens: Annotated[int, typer.Option(min=1)] = 64,
    context: Annotated[str, typer.Option(help="tokens in the cache before the prompt")] = "0",
    batch: Annotated[int, typer.Option(min=1, help="equal sequences decoded together")] = 1,
    prefill_step: Annotated[int, typer.Option(min=1)] = 2048,
    trials: Annotated[int, typer.Option(min=1)] = 3,
    speculation: Annotated[
        bool, typer.Option("--speculation", help="each drafter against none, on three tasks")
    ] = False,
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Prefill and decode speed, cache bytes and peak memory, backends interleaved."""
    preload_openblas()
    if speculation:
        if shape or plot:
            fail("--speculation measures what is accepted: a trained model, and no plot", 2)
        drafts.bench(model, bits, batch, generation_tokens, trials, output)
        return
    import mlx.core as mx
    import numpy as np

    from tqstack import demo_model
    from tqstack.bench import plots
    from tqstack.bench.caches import cached_models
    from tqstack.bench.speed import Row, Workload, as_json, measure, runnable
    from tqstack.models.spec import ModelNotFoundError

    names, codes, subjects = backend_names(backend), weights.split(","), {}
    if weights != "affine-4" and not shape:
        fail("--weights is of a --shape; a named model has its own", 2)
    try:
        for code in codes:
            network = partial(_network, model, shape, layers, weights=code)
            found = cached_models(names, network(True), bits, partial(network, False))
            subjects |= {f"{n}, {code}" if len(codes) > 1 else n: b for n, b in found.items()}
    except (ModelNotFoundError, ValueError) as error:
        fail(str(error), 2)
    tokens = demo_model.held_out_tokens().astype(np.int32)
    caches, unable = runnable(subjects, tokens, batch)
    for name, why in unable.items():
        errors.print(f"{name} is left out: {why}", highlight=False)
    if not caches:
        fail("nothing to measure", 1)
    works = [
        Workload(tokens_before, prompt_tokens, generation_tokens, prefill_step, batch)
        for tokens_before in numbers(context)
    ]
    steps = measure(caches, works, tokens, trials)
    total = len(works) * trials * len(caches)
    rows = [
        row
        for row in track(steps, "measuring", total=total + len(works) * len(caches))
        if isinstance(row, Row)
    ]
    about = {
        "model": shape or model,
        "device": mx.device_info().get("device_name", str(mx.default_device())),
        "bits": bits,
        "weights": weights if shape else None,
        "trials": trials,
    }
    _print_speed(rows)
    write(output, as_json(rows, about))
    if plot:
        plots.speed(rows, plot)


@app.command()
def start(
    model: Annotated[str, typer.Argument(help="demo, a folder or a hub name")] = "demo",
    shape: Annotated[str, typer.Option(help="random weights of this geometry instead")] = "",
    layers: Annotated[int, typer.Option(help="of the shape; 0: all")] = 0,
    bits: Annotated[str, typer.Option(help="of turboquant: 4, k4v3, or codecs by name")] = "4",
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 600,
    output: Output = None,
) -> None:
    """Where the time until the first answer goes: what mlx-lm needs by itself, and our part."""
    preload_openblas()
    from tqstack.bench.start import own_seconds, parts
    from tqstack.models.spec import ModelNotFoundError

    measured = []
    try:
        for part in parts(partial(_network, model, shape, layers, False), bits, prompt_tokens):
            console.print(f"{part.seconds:8.2f} s  {part.owner:8} {part.name}", highlight=False)
            measured.append(part)
    except ModelNotFoundError as error:
        fail(str(error), 2)
    own = round(own_seconds(measured), 2)
    console.print(f"{own:8.2f} s  our part of the first prompt and token")
    rows = [part._asdict() for part in measured]
    write(output, {"model": shape or model, "own_seconds": own, "rows": rows})


def _network(model: str, shape: str, layers: int, adapted: bool, weights: str = "affine-4") -> Any:
    """A model to measure: a named one, or random weights of a shape.

    Raises:
        ModelNotFoundError, ValueError: there is no such model, or no such code of weights.
    """
    from tqstack.bench import shapes
    from tqstack.models.load import load_model

    if not shape:
        return load_model(model, adapted=adapted).model
    if shape not in shapes.SHAPES:
        fail(f"--shape {shape}: allowed: {', '.join(shapes.SHAPES)}", 2)
    return shapes.build(shape, layers or None, adapted, weights)


def _print_speed(rows: list[Any]) -> None:
    first = {row.context: row.decode_tps for row in reversed(rows)}
    show(
        rows,
        {
            "backend": lambda row: row.backend,
            "batch": lambda row: str(row.batch),
            "context": lambda row: f"{row.context + row.prompt_tokens:,}",
            "prefill tok/s": lambda row: f"{row.prefill_tps:,.0f}",
            "decode steps/s": lambda row: f"{row.decode_tps:,.1f}",
            "×": lambda row: f"{row.decode_tps / first[row.context]:.2f}",
            "KV": lambda row: _megabytes(row.kv_bytes),
            "recurrent": lambda row: _megabytes(row.recurrent_bytes),
            "peak": lambda row: _megabytes(row.peak_bytes),
            "workspace": lambda row: _megabytes(row.workspace_bytes),
            "operations": lambda row: f"{row.decode_operations:,}",
        },
    )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def show(rows: Sequence[Any], columns: Mapping[str, Callable[[Any], str]]) -> None:
    """Print a table: each column's title, and what it shows of a row."""
    table = Table(*columns)
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()))
    console.print(table)


def write(output: Path | None, value: dict[str, Any], told: Console = console) -> None:
    if output:
        output.write_text(json.dumps(value, indent=2) + "\n")
        told.print(f"written: {output}")


@app.command()
def quality(
    model: Annotated[str, typer.Argument(help="demo, a folder or a hub name")] = "demo",
    codecs: Annotated[
        str, typer.Option(help="specs or keys/values pairs, by commas; tq4@0: all tokens coded")
    ] = "",
    exact_tokens: Annotated[
        int, typer.Option(min=0, help="newest tokens that stay exact, beside a query's own block")
    ] = 128,
    tokens: Annotated[Path | None, typer.Option(help="text as token ids, a .npy file")] = None,
    text: Annotated[Path | None, typer.Option(help="text, a UTF-8 file")] = None,
    windows: Annotated[int, typer.Option(min=1)] = 2,
    window_tokens: Annotated[int, typer.Option(min=2)] = 4000,
    first: Annotated[
        int, typer.Option("--from", min=0, help="position in a window from which tokens count")
    ] = 256,
    needle_lengths: Annotated[str, typer.Option(help="0: no needles")] = "4000",
    questions: Annotated[int, typer.Option(min=1, max=26, help="needles per length")] = 8,
    seed: int = 0,
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Perplexity, KL divergence, top-1 agreement and needle recall of any list of codecs."""
    preload_openblas()
    from tqstack.bench import plots
    from tqstack.bench.quality import CODECS, Plan, as_json, measure
    from tqstack.models.load import load_model
    from tqstack.models.spec import ModelNotFoundError

    try:
        loaded = load_model(model)
        names: list[str] = codecs.replace(",", " ").split() or CODECS
        lengths = tuple(n for n in numbers(needle_lengths) if n)
        plan = Plan(windows, window_tokens, first, lengths, questions, seed, exact_tokens)
        corpus = _corpus(loaded.tokenizer, tokens, text)
        rows: list[dict[str, Any]] = []
        steps = measure(loaded.model, loaded.tokenizer, corpus, names, plan)
        for step in track(steps, "measuring", total=plan.steps(len(names)) + 1):
            rows = step or rows
    except (ModelNotFoundError, ValueError, OSError) as error:
        fail(str(error), 2)
    show(
        rows,
        {
            "codec": lambda row: row["codec"],
            "exact": lambda row: "all" if row["exact_tokens"] is None else str(row["exact_tokens"]),
            "bits/value": lambda row: f"{row['bits_per_value']:.3f}",
            "perplexity": lambda row: f"{row['perplexity']:.4f}",
            "change": lambda row: f"{row['perplexity_change']:+.2%}",
            "KL divergence": lambda row: f"{row['kl_divergence']:.5f}",
            "top-1": lambda row: f"{row['top1']:.3f}",
            "needles": lambda row: ", ".join(
                f"{n:,}: {hits}" for n, hits in row["needle_by_length"].items()
            ),
        },
    )
    write(output, as_json(rows, plan, {"model": model}))
    if plot:
        plots.quality(rows[1:], plot)


def _corpus(tokenizer: Any, tokens: Path | None, text: Path | None) -> Any:
    """Token ids to measure on: the user's, or the embedded model's held-out text.

    Raises:
        ValueError: both are given, or the file holds no token ids of this model.
    """
    import numpy as np

    from tqstack import demo_model

    if tokens and text:
        raise ValueError("--tokens and --text exclude each other")
    if tokens:
        ids = np.load(tokens).reshape(-1)
        if not np.issubdtype(ids.dtype, np.integer) or not 0 <= ids.min() <= ids.max() < len(
            tokenizer
        ):
            raise ValueError(f"{tokens}: ids must be whole numbers from 0 to {len(tokenizer) - 1}")
        return ids
    if text:
        return np.array(tokenizer.encode(text.read_text()))
    held_out = demo_model.held_out_tokens()
    if len(tokenizer) == 8192:
        return held_out
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(demo_model.PATH / "tokenizer.json"))
    return np.array(tokenizer.encode(own.decode(held_out.tolist())))


@app.command()
def distortion(
    codecs: Annotated[str, typer.Option(help="specs, by commas")] = "",
    dim: Annotated[int, typer.Option(help="values of a vector")] = 256,
    vectors: Annotated[int, typer.Option(min=1)] = 4096,
    seed: int = 0,
    output: Output = None,
) -> None:
    """Squared error on random unit vectors, beside the paper's and the rate-distortion limit."""
    preload_openblas()
    from tqstack.bench.distortion import CODECS, measure

    names = codecs.replace(",", " ").split() or CODECS
    try:
        rows = [measure(name, dim, vectors, seed) for name in track(names, "measuring")]
    except ValueError as error:
        fail(str(error), 2)
    show(
        rows,
        {
            "codec": lambda row: row["codec"],
            "bits/value": lambda row: f"{row['bits_per_value']:.4f}",
            "squared error": lambda row: f"{row['squared_error']:.5f}",
            "paper": lambda row: f"{row['paper']:.4f}" if row["paper"] else "",
            "limit": lambda row: f"{row['limit']:.5f}",
            "× limit": lambda row: f"{row['squared_error'] / row['limit']:.2f}",
            "<q, x> error": lambda row: f"{row['inner_product_error']:.5f} / d",
        },
    )
    write(output, {"dim": dim, "vectors": vectors, "seed": seed, "rows": rows})
