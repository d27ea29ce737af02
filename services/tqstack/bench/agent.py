"""`tqstack bench agent`: how much of an agent's prompts a server uses again, and what that saves.

The scripts of `agent_scripts` are replayed on every server, turn by turn. What could have been used
again is the longest beginning that a prompt has in common with any earlier prompt, or prompt and
answer, of this run on that server; what was used again is what the server says in
`usage.prompt_tokens_details.cached_tokens`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from tqstack.bench.agent_scripts import SCRIPTS, TOOLS, Message, Script, Turn, Writer
from tqstack.bench.prompt_tokens import History, PromptTokens
from tqstack.bench.servers import Server
from tqstack.bench.serving import median, present
from tqstack.bench.streams import Reply, http_client, stream

# Where the server does not tell how much of a prompt it has read: this share of the time that it
# should take; seconds, if no prompt was read before.
LEAVE_AFTER, LEAVE_AFTER_S = 0.6, 2.0
PAUSE_S = 0.5  # after a client has left: nobody sends again at once


@dataclass(frozen=True)
class Row:
    """A turn. None where it is not known.

    Attributes:
        reusable_tokens: of the prompt, that the server had seen before.
        cached_tokens: of the prompt, that it says it did not compute again.
    """

    scenario: str
    server: str
    turn: int
    cold: bool
    prompt_tokens: int | None
    reusable_tokens: int | None
    cached_tokens: int | None
    generated_tokens: int
    first_token_s: float | None
    note: str
    error: str


@dataclass(frozen=True)
class Summary:
    """A scenario on one server.

    Attributes:
        reusable_tokens, reused_tokens: sums over turns whose two figures are both known.
        share: reused of reusable, from 0 to 1.
        cold_first_token_s, warm_first_token_s: medians over turns that begin like nothing before
            them, and over the others.
        ratio: warm by cold.
    """

    scenario: str
    server: str
    reusable_tokens: int | None
    reused_tokens: int | None
    share: float | None
    cold_first_token_s: float | None
    warm_first_token_s: float | None
    ratio: float | None


class Replay:
    """One server, with what it has been sent in this run."""

    def __init__(self, client: httpx.AsyncClient, server: Server, folder: Path | None, limit: int):
        self._client = client
        self.server = server
        self._limit = limit  # tokens of an answer
        self._tokens = PromptTokens(client, server, folder)
        self._history = History()
        self._seconds_per_token: float | None = None  # of a cold prompt

    async def warm_up(self) -> None:
        chat = {"messages": [{"role": "user", "content": "warm up"}], "max_tokens": 4}
        await stream(self._client, self.server, {**chat, "tools": TOOLS})

    async def run(self, turn: Turn) -> tuple[Reply, int | None]:
        """The answer, and how much of the prompt could have been used again."""
        messages = [_sendable(message) for message in turn.messages]
        prompt = await self._tokens.of(messages, TOOLS)
        reusable = None if prompt is None else self._history.reusable(prompt)
        body = {"messages": messages, "tools": TOOLS, "max_tokens": self._limit}
        if turn.leave:
            answer = await self._leave(body, 0 if prompt is None else len(prompt))
            if prompt is not None and not answer.error:
                self._history.add(prompt)  # some servers read on, all of it
            return answer, reusable
        answer = await stream(self._client, self.server, body)
        if turn.cold and answer.first_token_s and answer.prompt_tokens:
            self._seconds_per_token = answer.first_token_s / answer.prompt_tokens
        if prompt is not None and not answer.error:
            # Rendered with its answer, and no further than the server has gone.
            extended = await self._tokens.of([*messages, answer.message], TOOLS)
            length = len(prompt) + answer.generated_tokens
            self._history.add(prompt if extended is None else extended[:length])
        return answer, reusable

    async def _leave(self, body: dict[str, Any], tokens: int) -> Reply:
        """Close the connection once about half of the prompt's `tokens` have been read."""
        answer = Reply()
        seconds = LEAVE_AFTER * (self._seconds_per_token or 0) * tokens or LEAVE_AFTER_S

        def enough(answer: Reply) -> bool:
            read, total = answer.tokens_read or 0, answer.tokens_told or 0
            return bool(answer.arrivals) or 0 < total <= 2 * read

        asking = asyncio.create_task(stream(self._client, self.server, body, answer, enough))
        await asyncio.wait([asking], timeout=seconds)
        if answer.tokens_told is None:
            asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking
        await asyncio.sleep(PAUSE_S)
        return answer


def _sendable(message: Message) -> Message:
    return {name: value for name, value in message.items() if name != "stripped"}


def run(
    servers: Sequence[Server],
    writer: Writer,
    scenarios: Sequence[str],
    answer_tokens: int,
    folder: Path | None,
    advance: Callable[[], None],
) -> list[Row]:
    """Replay. `advance` is called once for each turn on each server."""
    return asyncio.run(_run(servers, writer, scenarios, answer_tokens, folder, advance))


async def _run(
    servers: Sequence[Server],
    writer: Writer,
    scenarios: Sequence[str],
    answer_tokens: int,
    folder: Path | None,
    advance: Callable[[], None],
) -> list[Row]:
    rows: list[Row] = []
    async with http_client() as client:
        replays = [Replay(client, server, folder, answer_tokens) for server in servers]
        for replay in replays:
            await replay.warm_up()
        for name in scenarios:
            rows += await _scenario(name, writer, replays, advance)
    return rows


async def _scenario(
    name: str, writer: Writer, replays: list[Replay], advance: Callable[[], None]
) -> list[Row]:
    """Turn by turn, so that noise hits all servers. One that fails is left out of the rest.

    What follows a client that left is asked at once: a server that reads on for nobody would get
    that time as a gift, and take it from the server whose turn it is.
    """
    rows: list[Row] = []
    scripts = [(replay, SCRIPTS[name](writer)) for replay in replays]
    turns = {replay: next(script) for replay, script in scripts}
    number = 0
    while turns:
        number += 1
        for replay, script in scripts:
            turn, again = turns.pop(replay, None), 0
            while turn:
                left = turn.leave
                row, message = await _turn(replay, turn, name, number + again)
                rows.append(row)
                advance()
                turn = None if row.error else _next(script, message)
                if turn and not left:
                    turns[replay] = turn
                    break
                again += 1
    return rows


def _next(script: Script, answer: Message) -> Turn | None:
    try:
        return script.send(answer)
    except StopIteration:
        return None


async def _turn(replay: Replay, turn: Turn, name: str, number: int) -> tuple[Row, Message]:
    answer, reusable = await replay.run(turn)
    told = answer.tokens_told if turn.leave else answer.prompt_tokens
    row = Row(
        scenario=name,
        server=replay.server.name,
        turn=number,
        cold=turn.cold,
        prompt_tokens=told,
        reusable_tokens=reusable,
        cached_tokens=answer.cached_tokens,
        generated_tokens=answer.generated_tokens,
        first_token_s=None if turn.leave else answer.first_token_s,
        note=turn.note,
        error=answer.error,
    )
    return row, answer.message


def summaries(rows: Sequence[Row]) -> list[Summary]:
    """A summary for each scenario and server, in the rows' order."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.scenario, row.server), []).append(row)
    return [_summary(*names, group) for names, group in groups.items()]


def _summary(scenario: str, server: str, rows: list[Row]) -> Summary:
    known = [
        (row.reusable_tokens, row.cached_tokens)
        for row in rows
        if row.reusable_tokens is not None and row.cached_tokens is not None
    ]
    reusable = sum(pair[0] for pair in known) if known else None
    reused = sum(pair[1] for pair in known) if known else None
    cold = median(present(row.first_token_s for row in rows if row.cold))
    warm = median(present(row.first_token_s for row in rows if not row.cold))
    share = reused / reusable if reused is not None and reusable else None
    ratio = warm / cold if warm is not None and cold else None
    return Summary(scenario, server, reusable, reused, share, cold, warm, ratio)


def as_json(
    rows: Sequence[Row],
    summaries: Sequence[Summary],
    servers: Sequence[Server],
    about: dict[str, Any],
) -> dict[str, Any]:
    """Turns and summaries, with what was measured; times are in seconds."""
    return {
        **about,
        "servers": [server.as_dict() for server in servers],
        "scenarios": [asdict(summary) for summary in summaries],
        "rows": [asdict(row) for row in rows],
    }
