"""What `tqstack generate --speculation` and `tqstack bench speed --speculation` do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import track
from rich.table import Table

from tqstack.cli.common import console, fail


def runtime_of(model: str, bits: str, mode: str) -> Any:
    """The model as the sidecar would run it; an error ends the command."""
    from tqstack.attention.dispatch import NotCompressedError
    from tqstack.models.runtime import load_runtime

    try:
        return load_runtime(_settings(model, bits, mode))
    except (ValueError, OSError, NotCompressedError) as error:
        fail(str(error), 2)


def _settings(model: str, bits: str, mode: str) -> Any:
    from pydantic import ValidationError

    from tqstack.settings import Settings

    try:
        return Settings(sidecar_model=model, tq_kv_bits=bits, sidecar_speculation=mode)  # pyright: ignore
    except ValidationError as error:
        fail(str(error.errors()[0]["msg"]), 2)


def answer(runtime: Any, tokens: list[int], options: dict[str, Any]) -> Iterator[str]:
    """One answer by the engine, in pieces of text; the last one tells what it took.

    Args:
        options: of a `Job`.
    """
    from tqstack.engine.jobs import Failed, Job, Token
    from tqstack.engine.worker import Worker
    from tqstack.sidecar.detokenizer import text_stream

    worker, events = Worker(runtime), []
    worker.submit(Job(tokens, **options), events.append)
    stream, stats = text_stream(runtime.tokenizer), {}
    while worker.busy or events:
        while events:
            event = events.pop(0)
            if isinstance(event, Failed):
                fail(event.error.message, 1)
            if not isinstance(event, Token):
                continue
            if event.finish_reason != "stop":
                yield stream.feed(event.id)
            stats = event.stats or stats
        if worker.busy:
            worker.step()
    yield _told(worker.status()["speculation"], stats)


def _told(speculation: dict[str, Any], stats: dict[str, Any]) -> str:
    drafters = ", ".join(speculation["drafters"]) or f"no drafter: {speculation['why_not']}"
    steps = speculation["plain_steps"] + speculation["verify_steps"]
    return (
        f"prompt at {stats['prefill_tokens_per_second']}/s, answer at "
        f"{stats['decode_tokens_per_second']}/s in {steps} steps; {drafters}: "
        f"{stats['draft_n_accepted']} of {stats['draft_n']} drafts accepted; keys and values "
        f"{stats['cache_bytes'] / 1e6:,.2f} MB"
    )


def _has_head(model: str, bits: str) -> bool:
    from tqstack.models.cache_spec import read_cache_spec
    from tqstack.models.planning import head_of
    from tqstack.models.spec import read_spec

    config = _settings(model, bits, "mtp")
    try:
        return bool(head_of(config, read_spec(model), read_cache_spec(config)))
    except (ValueError, OSError) as error:
        fail(str(error), 2)


def bench(
    model: str, bits: str, sequences: int, generated: int, trials: int, output: Path | None
) -> None:
    """Speed with each drafter, as multiples of without."""
    from tqstack.bench.speculation import Row, measure, modes

    runtime = runtime_of(model, bits, "mtp" if _has_head(model, bits) else "auto")
    if runtime.drafts.why_not:
        fail(f"there is nothing to measure: {runtime.drafts.why_not}", 1)
    count = len(modes(runtime))
    steps = measure(runtime, sequences, generated, trials)
    found = track(steps, "measuring", total=3 * count * (trials + 1))
    rows = [row for row in found if isinstance(row, Row)]
    table = Table(title=f"{model}: {sequences} sequences of {generated} tokens, {trials} trials")
    for name in ("task", "drafts", "tokens/s", "speedup", "accepted", "same tokens"):
        table.add_column(name, justify="left" if name in ("task", "drafts") else "right")
    for row in rows:
        told = f"{row.accepted} of {row.drafted}" if row.drafted else "-"
        same = "yes" if row.same_tokens else "no"
        speed = f"{row.tokens_per_second:,.1f}", f"{row.speedup:.2f}"
        table.add_row(row.task, row.mode, *speed, told, same)
    console.print(table)
    if output:
        figures = {"model": model, "bits": bits, "trials": trials}
        output.write_text(json.dumps({**figures, "rows": list(map(asdict, rows))}, indent=2) + "\n")
        console.print(f"written: {output}")
