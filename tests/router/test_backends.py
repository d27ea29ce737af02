"""What the router knows of its backends, and how it comes to know it."""

from __future__ import annotations

import asyncio
import time

import pytest

from router.scripted import SSE, Wire, answers, delta, fails, says
from router.stack import LONG, Stack, answer_of
from tqstack.router.backends import probe


def state(stack: Stack, name: str) -> str:
    return stack.app.state.services.backends[name].view().state


def test_a_good_probe_is_kept_and_not_repeated():
    with Stack() as stack:
        for _ in range(20):
            stack.chat()
        stack.settle()
        assert stack.sidecar.probes == 2  # /health and /v1/models, once
        assert stack.ollama.probes == 2  # /v1/models and /api/ps


def test_a_view_is_made_anew_only_when_a_probe_or_failures_change_it():
    with Stack() as stack:
        backend = stack.app.state.services.backends["sidecar"]
        stack.probe()
        before = backend.view()
        stack.chat(LONG)
        assert backend.view() is before
        stack.sidecar.models = ["another"]
        stack.probe()
        assert list(backend.view().models) == ["another"]


def test_after_a_failure_it_is_probed_again_at_once():
    with Stack() as stack:
        stack.chat()
        before = stack.sidecar.probes

        async def script(wire: Wire) -> None:
            wire.cut()

        stack.sidecar.script = script
        stack.chat(LONG)
        deadline = time.monotonic() + 2
        while stack.sidecar.probes == before:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_three_failures_in_a_row_make_it_sick_until_a_trial_succeeds():
    with Stack() as stack:
        stack.sidecar.script = fails
        for _ in range(3):
            assert answer_of(stack.chat(LONG))[1] == "ollama"
        assert state(stack, "sidecar") == "sick"
        asked = len(stack.sidecar.seen)
        response = stack.chat(LONG)
        assert response.headers["x-tqstack-reason"] == "sidecar-sick"
        assert len(stack.sidecar.seen) == asked
        stack.sidecar.script = says("well again")
        deadline = time.monotonic() + 5
        while answer_of(stack.chat(LONG))[1] != "sidecar":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert state(stack, "sidecar") == "up"


def test_errors_of_the_client_make_nobody_sick():
    refuses = answers(400, b'{"error": {"message": "bad", "code": "x"}}')
    is_full = answers(503, b'{"error": {"message": "no", "code": "insufficient_memory"}}')
    with Stack() as stack:
        for script in (refuses, is_full):
            stack.sidecar.script = script
            for _ in range(4):
                stack.chat(LONG)
        assert state(stack, "sidecar") == "up"


def test_a_backend_whose_tokens_come_is_alive_whatever_its_probes_say(monkeypatch):
    monkeypatch.setattr(probe, "PROBE_SECONDS", 0.1)

    async def busy(wire: Wire) -> None:
        await wire.raw(SSE)
        for _ in range(6):
            await wire.chunk(delta("x"))
            await asyncio.sleep(0.05)
        await wire.chunk(delta("", "stop") + b"data: [DONE]\n\n")
        await wire.end()

    with Stack() as stack:
        stack.chat()
        stack.ollama.script = busy
        stack.ollama.silent = True
        stack.chat(stream=True)
        stack.probe()
        assert state(stack, "ollama") == "up"
        monkeypatch.setattr(probe, "KEEP_SECONDS", 0.05)
        time.sleep(0.1)
        stack.probe()
        assert state(stack, "ollama") == "down"


def test_what_ollama_has_loaded_limits_what_falls_back_to_it():
    stack = Stack()
    models = [{"name": "llama3:latest", "context_length": 4096}]
    stack.ollama.extra = {"/api/ps": {"models": models}}
    with stack:
        stack.sidecar.script = fails
        response = stack.chat(LONG)
        assert response.status_code == 500
        assert "ollama cannot hold a prompt of this length" in response.json()["error"]["message"]
        assert stack.ollama.seen == []


def test_background_prompts_stay_away_from_a_sidecar_at_work():

    title = "### Task:\nGive a title.\n" + LONG
    with Stack() as stack:
        assert stack.chat(title).headers["x-tqstack-backend"] == "sidecar"
        stack.sidecar.health["requests"] = {"running": 1, "waiting": 0}
        stack.probe()
        response = stack.chat(title)
        assert response.headers["x-tqstack-backend"] == "ollama"
        assert response.headers["x-tqstack-reason"] == "background"


def test_a_slow_backend_does_not_keep_the_model_list_waiting():
    with Stack() as stack:
        stack.chat()
        stack.ollama.silent = stack.sidecar.silent = True
        began = time.monotonic()
        assert len(stack.http.get("/v1/models").json()["data"]) > 3
        assert time.monotonic() - began < 0.5


def test_the_status_page_s_look_refreshes_what_is_known():
    with Stack() as stack:
        stack.chat()
        stack.sidecar.health["cache"] = {"bytes": 5, "bytes_fp16": 20}
        deadline = time.monotonic() + 5
        while "cache" not in stack.http.get("/status").json()["backends"]["sidecar"]["health"]:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": True},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}},
    ],
)
def test_what_the_sidecar_cannot_do_goes_to_ollama_however_long(fields):
    with Stack() as stack:
        response = stack.chat(LONG, **fields)
        assert response.headers["x-tqstack-backend"] == "ollama"
        assert response.headers["x-tqstack-reason"] == "features"
        assert (
            stack.chat(LONG, response_format={"type": "text"}, tools=[]).headers[
                "x-tqstack-backend"
            ]
            == "sidecar"
        )
