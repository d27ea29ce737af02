"""`tqstack bench serving --long-prompt`: what a very long prompt does to the other clients.

One stream runs; then a long prompt comes, and just after it a short request. A server that reads
the long prompt in one go stops the stream, and lets the short one wait for all of it.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from tqstack.bench.prompts import HeldOutText
from tqstack.bench.servers import Server, in_turn
from tqstack.bench.serving import median, present
from tqstack.bench.streams import Reply, http_client, stream

RUNNING_TOKENS = 8192  # of the stream: more than anything generates while a prompt is read
SHORT_PROMPT = 200
SHORT_ANSWER = 16
SHORT_AFTER_S = 0.2  # after the long one


@dataclass(frozen=True)
class Plan:
    long_prompt: int
    prompt_tokens: int = 500
    generation_tokens: int = 64  # of the stream before the long prompt comes
    rounds: int = 3

    def steps(self, servers: int) -> int:
        return self.rounds * servers


@dataclass(frozen=True)
class Sample:
    """One round on one server.

    Attributes:
        before_tps, during_tps: pieces per second of the running stream, before the long prompt was
            sent, and from then to its first token.
        longest_gap_ms: of the running stream in that time.
    """

    before_tps: float | None
    during_tps: float | None
    longest_gap_ms: float | None
    short_first_token_s: float | None
    long_first_token_s: float | None
    long_prompt_tokens: int | None
    error: str


@dataclass(frozen=True)
class Row:
    """A server's medians over rounds; `ratio` is speed during the long prompt by speed before."""

    server: str
    before_tps: float | None
    during_tps: float | None
    ratio: float | None
    longest_gap_ms: float | None
    short_first_token_s: float | None
    long_first_token_s: float | None
    long_prompt_tokens: float | None
    errors: int
    error: str


def run(
    servers: Sequence[Server], text: HeldOutText, plan: Plan, advance: Callable[[], None]
) -> list[Row]:
    """Measure, server by server in each round."""
    return asyncio.run(_run(servers, text, plan, advance))


async def _run(
    servers: Sequence[Server], text: HeldOutText, plan: Plan, advance: Callable[[], None]
) -> list[Row]:
    samples: dict[Server, list[Sample]] = {server: [] for server in servers}
    async with http_client() as client:
        for server in servers:
            await stream(client, server, {"prompt": text.prompt("warm", 64), "max_tokens": 8})
        for turn in range(plan.rounds):
            for server in in_turn(servers, turn):
                samples[server].append(await _sample(client, server, text, plan, turn))
                advance()
    return [_row(server.name, found) for server, found in samples.items()]


async def _sample(
    client: httpx.AsyncClient, server: Server, text: HeldOutText, plan: Plan, turn: int
) -> Sample:
    def ask(name: str, tokens: int, limit: int, answer: Reply) -> asyncio.Task[Reply]:
        body = {"prompt": text.prompt(f"{name}/{turn}", tokens), "max_tokens": limit}
        return asyncio.create_task(stream(client, server, body, answer))

    running, long, short = Reply(), Reply(), Reply()
    task = ask("running", plan.prompt_tokens, RUNNING_TOKENS, running)
    try:
        while len(running.arrivals) <= plan.generation_tokens and not task.done():
            await asyncio.sleep(0.005)
        began = time.perf_counter()
        reading = ask("long", plan.long_prompt, 4, long)
        await asyncio.sleep(SHORT_AFTER_S)
        await ask("short", SHORT_PROMPT, SHORT_ANSWER, short)
        await reading
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    return _judge(running, long, short, began)


def _judge(running: Reply, long: Reply, short: Reply, began: float) -> Sample:
    """What the three answers tell; the long prompt was sent at `began`."""
    errors = present(answer.error or None for answer in (running, long, short))
    if not errors and running.finish_reason and running.arrivals[-1] < long.arrivals[0]:
        errors = ["the running stream ended before the long prompt was read"]
    if errors:
        return Sample(None, None, None, None, None, None, errors[0])
    end = long.arrivals[0]
    return Sample(
        rate(running.arrivals, running.arrivals[0], began),
        rate(running.arrivals, began, end),
        1e3 * longest_gap(running.arrivals, began, end),
        short.first_token_s,
        long.first_token_s,
        long.prompt_tokens,
        "",
    )


def rate(arrivals: Sequence[float], begin: float, end: float) -> float | None:
    """Pieces per second that came after `begin` and until `end`."""
    count = bisect.bisect_right(arrivals, end) - bisect.bisect_right(arrivals, begin)
    return count / (end - begin) if end > begin else None


def longest_gap(arrivals: Sequence[float], begin: float, end: float) -> float:
    """Seconds of the longest silence between `begin` and `end`."""
    times = [begin, *(at for at in arrivals if begin < at < end), end]
    return max(later - earlier for earlier, later in itertools.pairwise(times))


def _row(server: str, samples: list[Sample]) -> Row:
    def middle(name: str) -> float | None:
        return median(present(getattr(sample, name) for sample in samples))

    pairs = [(sample.before_tps, sample.during_tps) for sample in samples]
    ratios = [during / before for before, during in pairs if before and during is not None]
    errors = [sample.error for sample in samples if sample.error]
    figures: dict[str, Any] = {
        name: middle(name)
        for name in (
            *("before_tps", "during_tps", "longest_gap_ms"),
            *("short_first_token_s", "long_first_token_s", "long_prompt_tokens"),
        )
    }
    error = errors[0] if errors else ""
    return Row(server, ratio=median(ratios), errors=len(errors), error=error, **figures)
