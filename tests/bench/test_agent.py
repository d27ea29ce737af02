"""The scripts, and the account of a server that remembers its last prompt, without a real one."""

from __future__ import annotations

import asyncio

import httpx
import numpy as np
import orjson
import pytest

from tqstack.bench import agent
from tqstack.bench.agent_scripts import SCRIPTS, Writer, turns
from tqstack.bench.prompt_tokens import common_prefix
from tqstack.bench.prompts import HeldOutText
from tqstack.bench.servers import Server


@pytest.fixture(scope="module")
def writer() -> Writer:
    text = HeldOutText(None, "test")
    return Writer(text, turns=3, system_tokens=60, document_tokens=90)


def replayed(name: str, writer: Writer) -> list:
    """All turns of a scenario, with answers that are counted."""
    script, found = SCRIPTS[name](writer), []
    try:
        found.append(next(script))
        while True:
            answer = {"role": "assistant", "content": f"thought {len(found)} said {len(found)}"}
            found.append(script.send(answer))
    except StopIteration:
        return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_the_same_each_time_and_begin_cold(name, writer):
    first, second = replayed(name, writer), replayed(name, writer)
    assert first == second and len(first) == turns(name, writer)
    assert first[0].cold
    for turn in first:
        assert turn.messages[0]["role"] == "system" and turn.messages[-1]["role"] != "assistant"


def test_no_scenario_begins_like_another(writer):
    beginnings = {replayed(name, writer)[0].messages[0]["content"] for name in SCRIPTS}
    assert len(beginnings) == len(SCRIPTS)


def test_a_tool_session_appends_what_the_server_answered(writer):
    script = SCRIPTS["tool-session"](writer)
    first = next(script)
    calls = [{"id": name, "type": "function", "function": {}} for name in ("a", "b")]
    answer = {"role": "assistant", "content": None, "tool_calls": calls}
    second = script.send(answer)
    assert second.messages[: len(first.messages) + 1] == [*first.messages, answer]
    results = second.messages[len(first.messages) + 1 :]
    assert [message["tool_call_id"] for message in results] == ["a", "b"]


def test_earlier_answers_lose_their_reasoning_when_a_user_turn_begins(writer):
    turns = replayed("stripped-reasoning", writer)
    kept = [m["content"] for m in turns[2].messages if m["role"] == "assistant"]
    assert kept == ["thought 1 said 1", "thought 2 said 2"]
    dropped = [m["content"] for m in turns[3].messages if m["role"] == "assistant"]
    assert dropped == ["1 said 1", "2 said 2", "3 said 3"]
    later = [m["content"] for m in turns[6].messages if m["role"] == "assistant"]
    assert later[:3] == dropped  # they are cut once
    assert "stripped" not in agent._sendable(turns[6].messages[2])


class Rememberer:
    """A server that uses again what its last prompt and the new one have in common: a token is a
    character, and an answer is the number of the request."""

    def __init__(self, tells: bool = True):
        self._last, self._tells, self.requests = np.array([]), tells, 0

    def handle(self, request: httpx.Request) -> httpx.Response:
        body = orjson.loads(request.content)
        text = "".join(f"<{m['role']}>{m['content']}" for m in body["messages"]) + "<assistant>"
        tokens = np.array([ord(letter) for letter in text])
        if request.url.path == "/tokenize":
            return httpx.Response(200, json={"tokens": tokens.tolist()})
        self.requests += 1
        cached, self._last = common_prefix(self._last, tokens), tokens
        usage = {"prompt_tokens": len(tokens), "completion_tokens": 3}
        if self._tells:
            usage["prompt_tokens_details"] = {"cached_tokens": cached}
        chunk = {"choices": [{"delta": {"content": "yes"}, "finish_reason": "stop"}]}
        events = [chunk, {"choices": [], "usage": usage}]
        data = b"".join(b"data: " + orjson.dumps(event) + b"\n\n" for event in events)
        return httpx.Response(200, content=data + b"data: [DONE]\n\n")


def account(monkeypatch, server: Rememberer, writer: Writer, *names: str):
    transport = httpx.MockTransport(server.handle)
    monkeypatch.setattr(agent, "http_client", lambda: httpx.AsyncClient(transport=transport))
    monkeypatch.setattr(agent, "PAUSE_S", 0)
    servers = [Server("r", "http://r", "m")]
    rows = agent.run(servers, writer, names, 8, None, lambda: None)
    return rows, agent.summaries(rows)


def test_the_account_tells_what_was_used_again_of_what_could_be(monkeypatch, writer):
    rows, (tools, chats) = account(monkeypatch, Rememberer(), writer, "tool-session", "round-robin")
    assert [row.turn for row in rows[:3]] == [1, 2, 3]
    second = rows[1]
    # The whole first prompt and the answer's three letters; the server kept the prompt alone.
    assert second.reusable_tokens == rows[0].prompt_tokens + 3
    assert second.cached_tokens == rows[0].prompt_tokens
    assert tools.share and tools.share > 0.98 and tools.ratio is not None
    assert chats.share and chats.share < 0.3  # it remembers one conversation


def test_who_left_asks_again_before_the_next_server_has_its_turn(monkeypatch, writer):
    transport = httpx.MockTransport(Rememberer().handle)
    monkeypatch.setattr(agent, "http_client", lambda: httpx.AsyncClient(transport=transport))
    monkeypatch.setattr(agent, "PAUSE_S", 0)
    servers = [Server(name, f"http://{name}", "m") for name in "ab"]
    rows = agent.run(servers, writer, ["cancelled"], 8, None, lambda: None)
    assert [(row.server, row.turn) for row in rows] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert rows[1].prompt_tokens and rows[1].reusable_tokens == rows[1].prompt_tokens - 1
    rows = agent.run(servers, writer, ["edited-message"], 8, None, lambda: None)
    assert [(row.server, row.turn) for row in rows[:4]] == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]


def test_a_server_that_does_not_tell_is_shown_without_a_share(monkeypatch, writer):
    rows, (summary,) = account(monkeypatch, Rememberer(tells=False), writer, "edited-message")
    assert all(row.cached_tokens is None and row.reusable_tokens is not None for row in rows)
    assert summary.share is None and summary.reusable_tokens is None
    assert summary.warm_first_token_s is not None


def test_a_scenario_ends_where_the_server_fails(monkeypatch, writer):
    server = Rememberer()

    def handle(request: httpx.Request) -> httpx.Response:
        failing = server.requests > 2 and request.url.path != "/tokenize"
        return httpx.Response(503, json={"error": "full"}) if failing else server.handle(request)

    transport = httpx.MockTransport(handle)
    monkeypatch.setattr(agent, "http_client", lambda: httpx.AsyncClient(transport=transport))
    rows = agent.run([Server("r", "http://r", "m")], writer, ["tool-session"], 8, None, lambda: 0)
    assert [row.error for row in rows] == ["", "", "503: full"]


def test_without_a_tokenizer_nothing_is_claimed(monkeypatch, writer):
    server = Rememberer()

    def handle(request: httpx.Request) -> httpx.Response:
        return httpx.Response(404) if request.url.path == "/tokenize" else server.handle(request)

    transport = httpx.MockTransport(handle)
    monkeypatch.setattr(agent, "http_client", lambda: httpx.AsyncClient(transport=transport))

    async def run():
        async with agent.http_client() as client:
            replay = agent.Replay(client, Server("r", "http://r", "m"), None, 8)
            return await replay.run(next(SCRIPTS["tool-session"](writer)))

    answer, reusable = asyncio.run(run())
    assert answer.cached_tokens == 0 and reusable is None
