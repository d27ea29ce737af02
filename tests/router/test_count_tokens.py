"""`/v1/messages/count_tokens`, with the official client: exact where somebody can tell."""

from __future__ import annotations

import anthropic
import pytest

from router.stack import Stack
from router.test_estimate import ENGLISH

TEXT = "".join(ENGLISH) * 10
TOOLS = [{"name": "weather", "description": TEXT, "input_schema": {"type": "object"}}]


def count(stack: Stack, model: str = "auto", text: str = TEXT, **options) -> int:
    with anthropic.Anthropic(base_url=stack.url, api_key="none", max_retries=0) as client:
        messages: list = [{"role": "user", "content": text}]
        return client.messages.count_tokens(model=model, messages=messages, **options).input_tokens


def test_a_backend_that_can_tokenize_counts_system_messages_and_tools():
    with Stack() as stack:
        asked = []
        stack.sidecar.extra["/tokenize"] = lambda body: asked.append(body) or {"count": 1234}
        assert count(stack, "tq:demo", system="be brief", tools=TOOLS) == 1234
        [body] = asked
        assert body["model"] == "demo"
        assert [message["role"] for message in body["messages"]] == ["system", "user"]
        assert body["tools"][0]["function"]["name"] == "weather"
        assert stack.sidecar.seen == []  # nobody was asked to write


def test_without_such_a_backend_the_sidecar_s_tokenizer_counts():
    with Stack(sidecar_model="demo") as stack:
        short, long = count(stack, "tq:demo", "hello"), count(stack, "tq:demo")
        assert long - short == pytest.approx(160 * len(ENGLISH), rel=0.5)
        before = stack.sidecar.probes
        assert count(stack, "tq:demo") == long
        assert stack.sidecar.probes == before  # it said once that it cannot


def test_the_responses_api_counts_too():
    with Stack() as stack:
        asked = []
        stack.sidecar.extra["/tokenize"] = lambda body: asked.append(body) or {"count": 77}
        counted = stack.openai.responses.input_tokens.count(
            model="tq:demo", input="hello", instructions="be brief"
        )
        assert (counted.input_tokens, counted.object) == (77, "response.input_tokens")
        assert [message["role"] for message in asked[0]["messages"]] == ["system", "user"]


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_text_and_tokens_are_the_sidecar_s_to_tell(path):
    with Stack() as stack:
        stack.sidecar.extra["/tokenize"] = {"count": 1, "tokens": [5]}
        stack.sidecar.extra["/detokenize"] = {"prompt": "a"}
        response = stack.post(path, prompt="a", tokens=[5])
        assert response.json() == stack.sidecar.extra[path]
        assert response.headers["x-tqstack-backend"] == "sidecar"


def test_otherwise_it_is_the_estimate():
    with Stack() as stack:
        body = {"model": "ollama:", "messages": [{"role": "user", "content": TEXT}]}
        estimate = stack.post(**body).headers["x-tqstack-prompt-tokens"]
        assert count(stack, "ollama:") == int(estimate)


def test_what_nobody_holds_and_nobody_is_there_for_is_counted_all_the_same():
    with Stack(ollama=False) as stack:
        stack.sidecar.health["model"] = {"id": "demo", "architecture": "hybrid"}
        stack.sidecar.contexts = {"demo": 100}
        assert count(stack) > 500
    with Stack(ollama=False, sidecar=False) as stack:
        assert count(stack) > 500


def test_errors_have_anthropic_s_form():
    with Stack() as stack:
        with pytest.raises(anthropic.BadRequestError) as error:
            count(stack, "no-such-model")
        assert error.value.body["error"]["code"] == "model_not_found"
        for body in ({}, {"messages": []}, {"messages": "hello"}):
            response = stack.post("/v1/messages/count_tokens", model="auto", **body)
            assert response.status_code == 400
            assert response.json()["type"] == "error"
