"""Reading a server's stream: what is counted, merged, and told when it fails."""

from __future__ import annotations

import asyncio

import httpx
import orjson
import pytest

from tqstack.bench.servers import Server
from tqstack.bench.streams import Reply, stream

SERVER = Server("other", "http://other", "m", "secret")


def ask(response: httpx.Response, requests: list[httpx.Request] | None = None, **options) -> Reply:
    def handle(request: httpx.Request) -> httpx.Response:
        if requests is not None:
            requests.append(request)
        return response

    async def run() -> Reply:
        async with httpx.AsyncClient(transport=httpx.MockTransport(handle)) as client:
            return await stream(client, SERVER, {"prompt": "x", "max_tokens": 4}, **options)

    return asyncio.run(run())


def events(*values) -> bytes:
    return b"".join(b"data: " + orjson.dumps(value) + b"\n\n" for value in values)


def text(piece: str, reason: str | None = None) -> dict:
    return {"choices": [{"text": piece, "finish_reason": reason}]}


def delta(**fields) -> dict:
    return {"choices": [{"delta": fields, "finish_reason": None}]}


def test_the_servers_own_count_comes_before_the_number_of_pieces():
    usage = {"completion_tokens": 5, "prompt_tokens": 9}
    pieces = events(text("a"), text(""), text("b"), text("", "length"))
    body = pieces + events({"choices": [], "usage": usage}) + b"data: [DONE]\n\n"
    answer = ask(httpx.Response(200, content=body))
    assert (answer.error, answer.generated_tokens, answer.prompt_tokens) == ("", 5, 9)
    assert len(answer.arrivals) == 2 and answer.cached_tokens is None
    assert ask(httpx.Response(200, content=pieces + b"data: [DONE]\n\n")).generated_tokens == 2


def test_an_answer_without_text_has_a_first_token():
    answer = ask(httpx.Response(200, content=events(text("", "stop")) + b"data: [DONE]\n\n"))
    assert answer.first_token_s is not None and answer.gaps_ms == []


def test_pieces_of_a_chat_become_the_message_that_goes_back():
    answer = Reply()
    call = {"index": 0, "id": "c1", "function": {"name": "run", "arguments": '{"a"'}}
    rest = {"index": 0, "function": {"arguments": ": 1}"}}
    parts = [{"role": "assistant", "content": ""}, {"reasoning_content": "so"}, {"content": "yes"}]
    for now, fields in enumerate([*parts, {"tool_calls": [call]}, {"tool_calls": [rest]}]):
        answer.take(delta(**fields), now)
    assert answer.arrivals == [1, 2, 3, 4]
    assert answer.message["content"] == "yes" and answer.message["reasoning_content"] == "so"
    function = {"name": "run", "arguments": '{"a": 1}'}
    assert answer.message["tool_calls"] == [{"type": "function", "id": "c1", "function": function}]


@pytest.mark.parametrize(
    ("response", "error"),
    [
        (httpx.Response(503, json={"error": {"message": "full"}}), "503: full"),
        (httpx.Response(404, json={"error": "no model"}), "404: no model"),
        (httpx.Response(502, text="bad gateway"), "502: bad gateway"),
        (httpx.Response(200, content=events({"error": {"message": "gone"}})), "gone"),
        (httpx.Response(200, content=events(text("a"))), "the stream ended without [DONE]"),
    ],
)
def test_a_failure_is_told(response, error):
    assert ask(response).error == error


def test_comments_tell_how_much_is_read_and_a_client_may_leave():
    body = b": prefill 512/2048\n\n" + events(text("a"))
    answer = ask(httpx.Response(200, content=body), leave=lambda answer: True)
    assert (answer.tokens_read, answer.tokens_told, answer.error) == (512, 2048, "")


def test_the_key_and_the_model_are_sent():
    requests: list[httpx.Request] = []
    ask(httpx.Response(500), requests)
    assert requests[0].url == "http://other/v1/completions"
    assert requests[0].headers["authorization"] == "Bearer secret"
    body = orjson.loads(requests[0].content)
    assert body["model"] == "m" and body["stream_options"] == {"include_usage": True}
    assert "key" not in SERVER.as_dict()
