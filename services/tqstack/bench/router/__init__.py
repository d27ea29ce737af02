"""`tqstack bench router`: what the router costs, against a direct connection, nginx and LiteLLM.

Each measure is taken of every target in turn, for several rounds, and the median of the rounds is
reported, so that a busy moment of the machine hits all of them. On Linux the proxy has the last
core to itself; the load and the backend share the others. The router runs as it is, policy, metrics
and watcher included, but without its log line per request; nginx has no access log either.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import uvloop
from rich.console import Console
from rich.table import Table

from tqstack.bench.router import load
from tqstack.bench.router.targets import (
    Target,
    litellm,
    litellm_path,
    nginx,
    nginx_path,
    pin_load,
    router,
    running,
)

# Backends of a fixed speed, as replicas have one.
SLOW_SECONDS, SLOW_AT_ONCE = 0.05, 2
_SLOW = f"backends of {SLOW_AT_ONCE} at once in {1000 * SLOW_SECONDS:.0f} ms"
# Figure, what it is, unit.
_ROWS = [
    ("rps_small", "requests per second, 500 bytes, 16 connections", "{:,.0f}"),
    ("cpu_us_small", "processor time per request, µs", "{:,.0f}"),
    ("rps_large", "requests per second, 500 kB, 4 connections", "{:,.0f}"),
    ("ttft_small", "first token, 500 bytes, 1 connection, ms", "{:.2f}"),
    ("ttft_large", "first token, 500 kB, 1 connection, ms", "{:.2f}"),
    ("gap_p50", "chunk delay, 16 streams of 100/s, median, ms", "{:.2f}"),
    ("gap_p99", "chunk delay, 99th percentile, ms", "{:.2f}"),
    ("cpu_us_chunk", "processor time per chunk, µs", "{:,.0f}"),
    ("cancel_wait", "cancel seen by the backend, no byte yet, worst, ms", "{:.1f}"),
    ("cancel_stream", "cancel seen by the backend, in a stream, worst, ms", "{:.1f}"),
    ("rps_slow", f"requests per second, {_SLOW}, 16 connections", "{:,.0f}"),
    ("resident", "resident memory at the end, MB", "{:.0f}"),
]


def run(
    rounds: int = 3,
    seconds: float = 3.0,
    requests: int = 0,
    backends: Sequence[int] = (),
    replicas: int = 0,
) -> list[Target]:
    """Measures every target that is installed, and prints a table.

    Args:
        rounds: how often each measure is taken.
        seconds: how long a measure of throughput or streams lasts.
        requests: send so many more to the router at the end, to see whether its memory stays flat.
        backends: measure the router with so many, too.
        replicas: measure what one and so many backends of a fixed speed answer together, too.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        command = [sys.executable, "-m", "tqstack.bench.router.backend"]
        process = stack.enter_context(running(command, proxy=False))
        assert process.stdout
        backend = int(process.stdout.readline())
        pin_load()
        targets = [Target("direct", backend)]
        if nginx_path():
            targets.append(stack.enter_context(nginx(backend, Path(folder))))
        for count in (1, *backends):
            targets.append(stack.enter_context(router(backend, Path(folder), count)))
        if litellm_path():
            targets.append(stack.enter_context(litellm(backend, Path(folder))))
        uvloop.run(_measure(targets, backend, rounds, seconds))
        if replicas:
            slow = [
                stack.enter_context(router(backend, Path(folder), count, SLOW_AT_ONCE))
                for count in (1, replicas)
            ]
            uvloop.run(_measure_slow(slow, rounds, seconds))
            targets += slow
        if requests:
            uvloop.run(_soak(targets, requests))
    _report(targets)
    return targets


async def _measure(targets: list[Target], backend: int, rounds: int, seconds: float) -> None:
    for target in targets:  # everything is imported, connected and warm
        await load.throughput(target, load.SMALL, 4, 0.5)
        target.figures.clear()
    for _ in range(rounds):
        for measure in (
            lambda target: load.throughput(target, load.SMALL, 16, seconds),
            lambda target: load.throughput(target, load.LARGE, 4, seconds / 2),
            lambda target: load.first_token(target, load.SMALL, 100),
            lambda target: load.first_token(target, load.LARGE, 50),
            lambda target: load.streams(target, 16, seconds),
            lambda target: load.cancels(target, backend, 3),
        ):
            for target in targets:
                # What a target cannot do in ten times the time stays blank.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(10 * max(seconds, 2.0)):
                        await measure(target)
    for target in targets:
        if target.pids:
            target.note(resident=target.resident_mb())


async def _measure_slow(targets: list[Target], rounds: int, seconds: float) -> None:
    order = f"after{SLOW_SECONDS}"
    for _ in range(rounds):
        for target in targets:
            await load.throughput(target, load.SMALL, 16, seconds, order, "slow")


async def _soak(targets: list[Target], requests: int) -> None:
    target = next(target for target in targets if target.name == "tqstack")
    done = 0
    while done < requests:
        await load.throughput(target, load.SMALL, 16, 2.0)
        done += round(2 * target.figures["rps_small"].pop())
    target.note(resident_after=target.resident_mb())


def _report(targets: list[Target]) -> None:
    table = Table("", *(target.name for target in targets))
    for name, what, form in _ROWS:
        values = [target.medians().get(name) for target in targets]
        table.add_row(what, *("–" if v is None else form.format(v) for v in values))
    console = Console()
    console.print(table)
    for target in targets:
        after = target.medians().get("resident_after")
        if after is not None:
            console.print(f"{target.name}: {after:.0f} MB resident after the long run")
