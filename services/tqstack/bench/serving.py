"""`tqstack bench serving`: what clients of a server see: speed, first token, gaps between tokens.

In each round every concurrency is measured on every server in turn, so that a busy moment of the
machine hits all of them; every other round takes the servers in reverse. A measure is so many
streams of `/v1/completions` at once. Prompts are the same for all servers, and each begins like no
other: nothing of a prefix cache helps. With `schema` each measure is taken twice, in turn: as it
is, and with answers forced into a JSON schema; what a token then takes longer is the overhead.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import httpx

from tqstack.bench.prompts import HeldOutText
from tqstack.bench.servers import Server, in_turn
from tqstack.bench.streams import Reply, http_client, stream


@dataclass(frozen=True)
class Plan:
    concurrency: Sequence[int] = (1, 4, 8)
    prompt_tokens: int = 500
    generation_tokens: int = 64
    rounds: int = 3
    schema: bool = False

    @property
    def forms(self) -> Sequence[bool]:
        """Whether answers are forced, in turn."""
        return (False, True) if self.schema else (False,)

    def steps(self, servers: int) -> int:
        measures = len(self.concurrency) * len(self.forms) * servers
        return (self.rounds + 1) * measures  # 1: the warm-up


# No answer comes to its end.
SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "size": {"type": "integer"},
            "kind": {"enum": ["file", "folder", "link"]},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["name", "size", "kind"],
        "additionalProperties": False,
    },
}


@dataclass(frozen=True)
class Row:
    """One server at one concurrency. None where nothing was answered.

    Attributes:
        prompt_tokens, generated_tokens: medians over requests, as the server counts them.
        output_tps: tokens of all streams per second, prompts included: the rounds' median.
        decode_tps: tokens per second of one stream after its first token: the requests' median.
        error: the first error's text.
        schema: whether answers were forced into one.
        overhead: how much longer a token then took, of one that was not forced.
    """

    server: str
    concurrency: int
    requests: int
    errors: int
    prompt_tokens: float | None
    generated_tokens: float | None
    output_tps: float | None
    decode_tps: float | None
    first_token_s: float | None
    first_token_s_p95: float | None
    gap_ms: float | None
    gap_ms_p99: float | None
    gap_ms_max: float | None
    error: str
    schema: bool = False
    overhead: float | None = None


@dataclass
class Samples:
    """All that one server answered at one concurrency, in one form."""

    answers: list[Reply] = field(default_factory=list)
    output_tps: list[float] = field(default_factory=list)  # of each round

    def add(self, answers: list[Reply], seconds: float) -> None:
        self.answers += answers
        tokens = sum(answer.generated_tokens for answer in answers if not answer.error)
        self.output_tps.append(tokens / seconds)

    def row(self, server: str, concurrency: int, schema: bool = False) -> Row:
        good = [answer for answer in self.answers if not answer.error]
        bad = [answer.error for answer in self.answers if answer.error]
        firsts = present(answer.first_token_s for answer in good)
        gaps = [gap for answer in good for gap in answer.gaps_ms]
        return Row(
            server,
            concurrency,
            len(self.answers),
            len(bad),
            median(present(answer.prompt_tokens for answer in good)),
            median([answer.generated_tokens for answer in good]),
            median(self.output_tps) if good else None,
            median(present(answer.decode_tps for answer in good)),
            median(firsts),
            quantile(firsts, 0.95),
            median(gaps),
            quantile(gaps, 0.99),
            max(gaps, default=None),
            bad[0] if bad else "",
            schema,
        )


def run(
    servers: Sequence[Server], text: HeldOutText, plan: Plan, advance: Callable[[], None]
) -> list[Row]:
    """Measure. `advance` is called `plan.steps(len(servers))` times."""
    return asyncio.run(_run(servers, text, plan, advance))


async def _run(
    servers: Sequence[Server], text: HeldOutText, plan: Plan, advance: Callable[[], None]
) -> list[Row]:
    samples = {
        (server, many, form): Samples()
        for server in servers
        for many in plan.concurrency
        for form in plan.forms
    }
    async with http_client() as client:
        for turn in range(plan.rounds + 1):
            for many, form in itertools.product(plan.concurrency, plan.forms):
                for server in in_turn(servers, turn):
                    answers, seconds = await _burst(client, server, text, plan, many, turn, form)
                    if turn:  # the first warms up: kernels are compiled, pages are there
                        samples[server, many, form].add(answers, seconds)
                    advance()
    rows = {key: found.row(key[0].name, *key[1:]) for key, found in samples.items()}
    return [
        replace(row, overhead=_overhead(rows[server, many, False], row)) if form else row
        for (server, many, form), row in rows.items()
    ]


def _overhead(free: Row, forced: Row) -> float | None:
    if not free.decode_tps or not forced.decode_tps:
        return None
    return free.decode_tps / forced.decode_tps - 1


async def _burst(
    client: httpx.AsyncClient,
    server: Server,
    text: HeldOutText,
    plan: Plan,
    many: int,
    turn: int,
    form: bool,
) -> tuple[list[Reply], float]:
    """`many` requests at once: their answers, and the seconds until the last was complete."""
    names = [f"{turn}/{many}/{i}{'/schema' * form}" for i in range(many)]
    prompts = [text.prompt(name, plan.prompt_tokens) for name in names]
    tokens = plan.generation_tokens if turn else min(plan.generation_tokens, 8)
    bodies = [{"prompt": prompt, "max_tokens": tokens} for prompt in prompts]
    if form:
        described = {"name": "listing", "schema": SCHEMA}
        wanted = {"type": "json_schema", "json_schema": described}
        bodies = [{**body, "response_format": wanted} for body in bodies]
    began = time.perf_counter()
    answers = await asyncio.gather(*(stream(client, server, body) for body in bodies))
    return answers, time.perf_counter() - began


def present(values: Any) -> list[Any]:
    """`values` without what was not measured."""
    return [value for value in values if value is not None]


def median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def quantile(values: Sequence[float], share: float) -> float | None:
    """The value that `share` of all do not exceed (nearest rank)."""
    return sorted(values)[math.ceil(len(values) * share) - 1] if values else None


def as_json(rows: Sequence[Any], servers: Sequence[Server], **about: Any) -> dict[str, Any]:
    """The figures with what was measured: names end in their unit; tps is tokens per second."""
    listed = [server.as_dict() for server in servers]
    return {**about, "servers": listed, "rows": [asdict(row) for row in rows]}
