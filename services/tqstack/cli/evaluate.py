"""`tqstack evaluate`: models side by side, by size, quality and speed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import track

from tqstack.cli.bench import Output, Plot, numbers, show, write
from tqstack.cli.common import console, errors, fail, preload_openblas, size

if TYPE_CHECKING:
    from tqstack.bench.evaluate import Row


def evaluate(
    models: Annotated[list[str], typer.Argument(help="each demo, a folder or a hub name")],
    against: Annotated[
        str, typer.Option(help="the reference, best with 16-bit weights: adds KL and top-1")
    ] = "",
    text: Annotated[
        Path | None, typer.Option(help="what to read: a UTF-8 file, or token ids as .npy")
    ] = None,
    tokens: Annotated[int, typer.Option(min=16, help="to predict, in windows of 1,024")] = 8192,
    affine: Annotated[
        str, typer.Option(help="mlx's affine codes of the reference to compare, such as 2,3,4")
    ] = "",
    output: Output = None,
    plot: Plot = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Perplexity, KL divergence from a reference, top-1 agreement, size and speed of models."""
    preload_openblas()
    from tqstack.bench import evaluate as bench

    if not against and (affine or plot):
        option = "--affine" if affine else "--plot"
        fail(f"{option} needs a reference: --against MODEL", 2)
    if plot:
        _check_plot()
    try:
        candidates = _candidates(models, against, numbers(affine) if affine else [])
        read = corpus([candidate.name for candidate in candidates], text)
        pieces = bench.windows(read, tokens)
        steps = bench.measure(candidates, pieces, bool(against))
        bar = track(steps, "measuring", bench.steps(candidates, pieces), console=errors)
        rows = [row for row in bar if row is not None]
    except (ValueError, OSError) as error:
        fail(str(error), 2)
    report = bench.as_json(rows, _about(models, against, text, tokens))
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print(rows, bool(against))
    write(output, report, errors if as_json else console)
    if plot:
        from tqstack.bench import plots

        plots.evaluate(rows, plot)


def _check_plot() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        fail("--plot needs matplotlib: pip install 'tqstack\\[plot]'", 2)


def _candidates(models: list[str], against: str, affine: list[int]) -> list[Any]:
    """The reference, if there is one, the models, and affine codes of the reference.

    Raises:
        ValueError: one of them does not exist, or no such code can be made.
    """
    from tqstack.bench.evaluate import Candidate, check_affine
    from tqstack.bench.shapes import AFFINE_GROUP
    from tqstack.models.load import fetched
    from tqstack.models.spec import resolve

    for name in (*models, *filter(None, [against])):
        fetched(name)
    ids = [resolve(name)[0] for name in models]
    labels = [id if ids.count(id) == 1 else name for id, name in zip(ids, models, strict=True)]
    candidates = [Candidate(*pair) for pair in zip(labels, models, strict=True)]
    if not against:
        return candidates
    check_affine(against, affine)
    reference = Candidate(f"{resolve(against)[0]} (reference)", against)
    codes = [Candidate(f"mlx affine {b}, g{AFFINE_GROUP}", against, b) for b in affine]
    return [reference, *candidates, *codes]


def corpus(models: list[str], text: Path | None) -> Any:
    """Token ids to measure on, which must mean the same to all models.

    Raises:
        ValueError: they have other tokenizers, or the file holds no token ids.
    """
    from mlx_lm.utils import load_tokenizer

    from tqstack import demo_model
    from tqstack.models.corpus import token_ids
    from tqstack.models.spec import model_folder

    folders = {name: model_folder(name)[1] for name in models}
    tokenizers = {name: load_tokenizer(folder) for name, folder in folders.items()}
    tokenizer = tokenizers[models[0]]
    words = tokenizer.get_vocab()
    for name, other in tokenizers.items():
        if other.get_vocab() != words:
            raise ValueError(
                f"{name} and {models[0]} have different tokenizers: their figures cannot be "
                "compared"
            )
    if text is None:
        if words != load_tokenizer(demo_model.PATH).get_vocab():
            raise ValueError(
                "say what the models are to read: --text FILE, some 40 kB of plain text, or of "
                "token ids as .npy, that they were not made from"
            )
        return demo_model.held_out_tokens()
    return token_ids(text, tokenizer)


def _about(models: list[str], against: str, text: Path | None, tokens: int) -> dict[str, Any]:
    import mlx.core as mx

    return {
        "models": models,
        "against": against or None,
        "text": str(text) if text else "the demo model's held-out text",
        "tokens": tokens,
        "device": mx.device_info().get("device_name", str(mx.default_device())),
    }


def _print(rows: list[Row], against: bool) -> None:
    from tqstack.models.device import this_machine

    columns: dict[str, Any] = {
        "model": lambda row: row.model,
        "bits/weight": lambda row: f"{row.bits_per_weight:.3f}",
        "size": lambda row: size(row.weight_bytes),
        "perplexity": lambda row: f"{row.perplexity:,.3f}",
    }
    if against:
        columns |= {
            "KL divergence": _divergence,
            "top-1": lambda row: "" if row.top1 is None else f"{row.top1:.1%}",
        }
    columns |= {
        "prefill tok/s": lambda row: f"{row.prefill_tps:,.0f}",
        "decode tok/s": lambda row: f"{row.decode_tps:,.1f}",
    }
    show(rows, columns)
    if this_machine().expands_weights:
        console.print("On a CPU weights become float32 when they are loaded: speeds are of those.")


def _divergence(row: Row) -> str:
    return "" if row.kl_divergence is None else f"{row.kl_divergence:.5f} ± {row.kl_error:.5f}"
