"""A backend that refuses is in good health, and its refusal reaches the client as it was meant."""

from __future__ import annotations

import json

import pytest

from router.scripted import SSE, Wire, answers, says
from router.stack import Stack

FULL = {"error": {"message": "it does not fit in memory", "code": "insufficient_memory"}}
BODY = json.dumps(FULL).encode()


async def refuses_late(wire: Wire) -> None:
    """With an error event, after the headers of a stream."""
    await wire.raw(SSE)
    await wire.chunk(b": prefill 0/900\n\ndata: " + BODY + b"\n\n")
    await wire.end()


@pytest.mark.parametrize(
    "script", [answers(503, BODY, **{"x_should_retry": "false"}), refuses_late], ids=["503", "200"]
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_a_full_memory_is_a_503_and_no_illness(script, path):
    with Stack(ollama=False) as stack:
        stack.sidecar.script = script
        messages = [{"role": "user", "content": "hi"}]
        body = {"messages": messages, "input": "hi", "max_tokens": 5, "stream": True}
        for _ in range(4):
            response = stack.http.post(path, json=body)
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "insufficient_memory"
            assert response.headers["x-should-retry"] == "false"
        assert stack.http.get("/health").json()["sidecar_available"] is True
        stack.sidecar.script = says("fine")
        assert stack.http.post(path, json=body).status_code == 200


def test_another_backend_may_still_hold_it():
    with Stack() as stack:
        stack.sidecar.script = refuses_late
        response = stack.chat(model="tq:", stream=True)
        assert response.headers["x-tqstack-fallback-from"] == "sidecar"
        assert "ollama" in response.text


def test_a_prompt_that_ollama_finds_too_long_goes_to_the_sidecar():
    said = "request (40020 tokens) exceeds the available context size (4096 tokens)"
    inner = {"code": 400, "message": said, "type": "exceed_context_size_error", "n_ctx": 4096}
    outer = {"message": json.dumps({"error": inner}), "type": "invalid_request_error", "code": None}
    with Stack() as stack:
        stack.ollama.script = answers(400, json.dumps({"error": outer}).encode())
        response = stack.chat(stream=True)
        assert response.headers["x-tqstack-fallback-from"] == "ollama"
    with Stack(sidecar_enabled="0") as stack:
        stack.ollama.script = answers(400, json.dumps({"error": outer}).encode())
        error = stack.chat().json()["error"]
        assert (error["code"], error["message"].split(" (there")[0]) == (
            "context_length_exceeded",
            said,
        )


@pytest.mark.parametrize(
    "status, said, told",
    [
        (500, "image input is not supported - hint: provide the mmproj", "vision"),
        (
            400,
            "Multimodal data provided, but model does not support multimodal",
            "vision",
        ),
        (
            501,
            "This server does not support embeddings. Start it with",
            "pull nomic",
        ),
        (400, "invalid input type", "send texts"),
        (401, "unauthorized", "ollama signin"),
    ],
)
def test_what_a_model_cannot_do_is_told_with_what_to_do_and_is_no_illness(status, said, told):
    with Stack(sidecar_enabled="0") as stack:
        inner = json.dumps({"error": {"code": status, "message": said}})
        stack.ollama.script = answers(status, json.dumps({"error": {"message": inner}}).encode())
        for _ in range(4):
            response = stack.chat()
            assert response.status_code == (502 if status == 401 else 400)
            assert told in response.json()["error"]["message"]
        stack.ollama.script = says("fine")
        assert stack.http.get("/health").json()["backends"]["ollama"]["state"] == "up"
