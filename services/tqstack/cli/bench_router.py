"""`tqstack bench router`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tqstack.cli.bench import numbers
from tqstack.cli.common import console, fail


def bench_router(
    rounds: Annotated[int, typer.Option(min=1, help="how often each measure is taken")] = 3,
    seconds: Annotated[float, typer.Option(min=0.5, help="length of a measure")] = 3.0,
    requests: Annotated[
        int, typer.Option(min=0, help="then so many more, to see whether memory stays flat")
    ] = 0,
    backends: Annotated[
        str, typer.Option(help="measure the router with so many backends, too, by commas: 2,10")
    ] = "",
    replicas: Annotated[
        int,
        typer.Option(min=0, help="then what so many backends of a fixed speed answer, beside one"),
    ] = 0,
    output: Annotated[Path | None, typer.Option(help="Write the figures as JSON here.")] = None,
) -> None:
    """What the router costs: beside a direct connection, and nginx and LiteLLM if installed."""
    from tqstack.bench.router import run

    counts = numbers(backends) if backends else []
    if any(not 2 <= count <= 100 for count in counts):
        fail(f"--backends {backends}: from 2 to 100 of them", 2)
    if replicas == 1 or replicas > 100:
        fail(f"--replicas {replicas}: from 2 to 100 of them", 2)
    try:
        targets = run(rounds, seconds, requests, counts, replicas)
    except (OSError, RuntimeError) as error:
        fail(f"the measurement broke off: {error}", 1)
    if output:
        figures = {target.name: target.medians() for target in targets}
        output.write_text(json.dumps(figures, indent=2) + "\n")
        console.print(f"written: {output}")
