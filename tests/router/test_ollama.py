"""What Ollama can hold, loaded or not: a prompt that is longer loses its oldest messages there."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from router.scripted import fails
from router.stack import LONG, Stack
from tqstack.router.backends.ollama import Contexts

MIDDLE = "word " * 9_000  # short enough for Ollama, by the threshold


NUM_CTX = 'stop                           "<|eot|>"\nnum_ctx                        {}'


class Ollama:
    """Answers like Ollama's own paths, with one model that is not loaded at first."""

    def __init__(self, trained: int = 131_072, given: int = 4_096, parameters: str = ""):
        self.given = given
        self.asked: list[str] = []
        self.loaded: list[dict[str, Any]] = []
        info = {"general.architecture": "llama", "llama.context_length": trained}
        self.shown = {"model_info": info, "parameters": parameters, "license": "..."}

    def show(self, body: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(body["model"])
        return self.shown

    def load(self, body: dict[str, Any]) -> dict[str, Any]:
        self.loaded = [{"name": body["model"], "context_length": self.given}]
        return {"model": body["model"], "done": True, "done_reason": "load"}

    def stack(self, **settings: Any) -> Stack:
        stack = Stack(**settings)
        stack.ollama.models = ["llama3:latest"]
        stack.ollama.extra = {
            "/api/ps": lambda _: {"models": self.loaded},
            "/api/show": self.show,
            "/api/generate": self.load,
        }
        return stack


@pytest.mark.parametrize(
    "told", [{"trained": 8_192}, {"parameters": NUM_CTX.format(4096)}], ids=str
)
def test_a_long_prompt_does_not_fall_back_to_a_model_that_would_cut_it(told):
    ollama = Ollama(**told)
    with ollama.stack() as stack:
        stack.sidecar.script = fails
        response = stack.chat(LONG)
        assert response.status_code == 500
        assert "ollama cannot hold a prompt of this length" in response.json()["error"]["message"]
        assert stack.ollama.seen == []
        assert ollama.loaded == []


def test_a_long_prompt_falls_back_to_a_model_whose_num_ctx_holds_it():
    ollama = Ollama(parameters=NUM_CTX.format(65536))
    with ollama.stack() as stack:
        stack.sidecar.script = fails
        assert stack.chat(LONG).headers["x-tqstack-fallback-from"] == "sidecar"
        assert ollama.loaded == []


def test_ollamas_context_is_found_out_before_a_prompt_it_may_cut():
    ollama = Ollama(given=4_096)
    with ollama.stack() as stack:
        assert stack.chat("hello").headers["x-tqstack-backend"] == "ollama"
        assert ollama.loaded == []  # nothing is loaded for what any model holds
        response = stack.chat(MIDDLE)
        assert response.headers["x-tqstack-backend"] == "sidecar"
        assert response.headers["x-tqstack-reason"] == "short-prompt; ollama context"
        # Now it is known.
        assert stack.chat(MIDDLE).headers["x-tqstack-reason"] == "context"
        assert len(stack.ollama.seen) == 1


def test_a_model_that_turns_out_to_hold_the_prompt_gets_it():
    ollama = Ollama(given=32_768)
    with ollama.stack() as stack:
        response = stack.chat(MIDDLE, stream=True)
        assert response.headers["x-tqstack-backend"] == "ollama"
        assert response.headers["x-tqstack-reason"] == "short-prompt"
        assert ollama.loaded


def test_with_nobody_else_the_error_names_what_ollama_holds():
    with Ollama(given=4_096).stack(sidecar_enabled="0") as stack:
        response = stack.chat(MIDDLE)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
        assert "4096" in error["message"] and "OLLAMA_CONTEXT_LENGTH" in error["message"]


def test_each_model_is_shown_once_and_again_when_it_has_changed():
    ollama = Ollama()
    with ollama.stack() as stack:
        for _ in range(3):
            stack.probe()
        assert ollama.asked == ["llama3:latest"]
        stack.ollama.models.append("qwen")
        stack.probe()
        assert ollama.asked == ["llama3:latest", "qwen"]


def test_another_server_is_asked_for_ollama_s_paths_once():
    with Stack() as stack:
        stack.probe()
        before = stack.ollama.probes
        for _ in range(3):
            stack.probe()
        assert stack.ollama.probes == before + 3  # for its models
        assert stack.chat(MIDDLE).headers["x-tqstack-backend"] == "ollama"


def test_an_ollama_in_trouble_is_still_one():
    async def ask(path, body, seconds):
        return 500, {"error": "boom"}

    contexts = Contexts(ask)
    assert asyncio.run(contexts.fill_in([{"id": "a"}])) == [{"id": "a"}]
    assert contexts.is_ollama


def test_a_batch_of_texts_to_embed_is_no_long_prompt():
    with Ollama(trained=2_048).stack() as stack:
        response = stack.post("/v1/embeddings", input=["word " * 500] * 100)
        assert response.headers["x-tqstack-backend"] == "ollama"
        assert response.status_code == 200


def test_an_ollama_whose_own_paths_fail_still_serves():
    ollama = Ollama()
    stack = ollama.stack()
    stack.ollama.extra.pop("/api/show")  # 404, though it is Ollama
    stack.ollama.extra["/api/generate"] = lambda _: "no object"
    with stack:
        assert stack.chat(MIDDLE).headers["x-tqstack-backend"] == "ollama"
