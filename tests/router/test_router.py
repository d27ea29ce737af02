"""The router's promises, through real sockets and the OpenAI SDK."""

from __future__ import annotations

import asyncio
import json
import time

import openai
import pytest

from router.scripted import SSE, Wire, answers, delta, says, whole
from router.stack import HYBRID, LONG, Stack, answer_of

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def stack():
    with Stack() as stack:
        yield stack


@pytest.fixture(autouse=True)
def backends_in_order(request):
    if "stack" in request.fixturenames:
        stack = request.getfixturevalue("stack")
        stack.sidecar.script = says("from ", "the ", "sidecar")
        stack.ollama.script = says("from ", "ollama")
        stack.sidecar.seen.clear()
        stack.ollama.seen.clear()


def stream_text(stream) -> str:
    return "".join(c.choices[0].delta.content or "" for c in stream if c.choices)


def test_a_short_prompt_goes_to_ollama_and_a_long_one_to_the_sidecar(stack):
    assert answer_of(stack.chat("hello")) == ("from ollama", "ollama", None)
    long = stack.chat(LONG)
    assert answer_of(long) == ("from the sidecar", "sidecar", None)
    assert int(long.headers["x-tqstack-prompt-tokens"]) == pytest.approx(20_000, rel=0.3)
    assert long.headers["x-tqstack-reason"] == "long-prompt"


@pytest.mark.parametrize("prefix", ["tq:", "turbo:", "sidecar:", "TQ:"])
def test_a_sidecar_prefix_forces_the_sidecar_and_is_stripped(stack, prefix):
    response = stack.chat(model=prefix + "demo")
    assert answer_of(response)[1] == "sidecar"
    assert response.headers["x-tqstack-reason"] == "prefix"
    assert stack.sidecar.seen[0].json["model"] == "demo"


@pytest.mark.parametrize("prefix", ["ollama:", "local:"])
def test_an_ollama_prefix_forces_ollama(stack, prefix):
    assert answer_of(stack.chat(LONG, model=prefix + "qwen"))[1] == "ollama"
    assert stack.ollama.seen[0].json["model"] == "qwen"


def test_a_name_that_the_chosen_backend_lacks_gives_way_to_its_own(stack):
    stack.chat("hello", model="demo")
    stack.chat("hello", model="auto")
    stack.chat("hello", model="llama3")
    names = [seen.json["model"] for seen in stack.ollama.seen]
    assert names == ["llama3:latest", "llama3:latest", "llama3:latest"]
    stack.chat(LONG, model="qwen")
    assert stack.sidecar.seen[0].json["model"] == "demo"


def test_the_body_arrives_as_it_was_sent_but_for_the_model(stack):
    body = b'{ "model":"tq:demo","messages" : [{"role":"user","content":"\\u00e9 \\"model\\""}]'
    body += b', "seed":1.0e0, "x":[1e400]}'
    body = body.replace(b'"seed":1.0e0, ', b"").replace(b"[1e400]", b"[1.50]")
    stack.http.post("/v1/chat/completions", content=body)
    assert stack.sidecar.seen[0].body == body.replace(b"tq:demo", b"demo")
    assert stack.sidecar.seen[0].path == "/v1/chat/completions"


def test_the_answer_passes_as_bytes(stack):
    body = whole("caf\u00e9 \u2028 \U0001f600").replace(b'"id"', b' "id"')
    stack.ollama.script = answers(200, body)
    assert stack.chat().content == body


def test_the_sdk_streams_through_either_backend(stack):
    for model, text in (("tq:", "from the sidecar"), ("ollama:", "from ollama")):
        stream = stack.openai.chat.completions.create(model=model, messages=HELLO, stream=True)
        assert stream_text(stream) == text
        assert stream.response.headers["content-type"].startswith("text/event-stream")


def test_text_completions_pass(stack):
    async def script(wire: Wire) -> None:
        answer = {"id": "c", "object": "text_completion", "choices": [{"index": 0, "text": "two"}]}
        await wire.answer(200, json.dumps(answer).encode())

    stack.ollama.script = script
    assert stack.openai.completions.create(model="auto", prompt="one").choices[0].text == "two"
    assert stack.ollama.seen[0].path == "/v1/completions"


def test_a_dead_backend_is_replaced_by_the_other_and_the_headers_say_so():
    with Stack(sidecar=False) as stack:
        response = stack.chat(LONG)
        assert answer_of(response) == ("from ollama", "ollama", "sidecar")
        assert response.headers["x-tqstack-reason"] == "sidecar-down"
    with Stack(ollama=False) as stack:
        assert answer_of(stack.chat("hello")) == ("from the sidecar", "sidecar", "ollama")
        assert answer_of(stack.chat(model="ollama:"))[1:] == ("sidecar", "ollama")


@pytest.mark.parametrize("stream", [False, True])
def test_a_backend_that_dies_after_its_probe_is_replaced(stream):
    with Stack() as stack:
        assert stack.chat(LONG).headers["x-tqstack-backend"] == "sidecar"
        stack.run(stack.sidecar.stop())
        response = stack.chat(LONG, stream=stream)
        assert response.headers["x-tqstack-backend"] == "ollama"
        assert response.headers["x-tqstack-fallback-from"] == "sidecar"
        assert response.headers["x-tqstack-reason"] == "long-prompt; sidecar refused"


def test_a_backend_that_comes_back_is_used_again_at_once():
    with Stack() as stack:
        stack.run(stack.sidecar.stop())
        assert stack.chat(LONG).headers["x-tqstack-backend"] == "ollama"
        stack.run(stack.sidecar.start())
        deadline = time.time() + 5
        while stack.chat(LONG).headers["x-tqstack-backend"] != "sidecar":
            assert time.time() < deadline
            time.sleep(0.05)


def test_with_both_backends_gone_the_answer_is_503_with_retry_after():
    with Stack(sidecar=False, ollama=False) as stack:
        response = stack.chat("hello")
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "backend_unavailable"
        assert int(response.headers["retry-after"]) > 0
        assert stack.http.get("/health").status_code == 503
        # Bad input is refused all the same.
        assert stack.post(messages=[]).status_code == 400


def test_without_a_sidecar_ollama_answers_alone():
    with Stack(sidecar_enabled="0") as stack:
        response = stack.chat(LONG)
        assert answer_of(response) == ("from ollama", "ollama", None)
        assert response.headers["x-tqstack-reason"] == "only-backend"
        assert stack.sidecar.probes == 0


def test_a_sidecar_that_loads_its_model_is_waited_for_by_nobody():
    with Stack() as stack:
        stack.sidecar.health, stack.sidecar.health_status = {"status": "loading"}, 503
        stack.probe()
        response = stack.chat(LONG)
        assert answer_of(response)[1:] == ("ollama", "sidecar")
        assert response.headers["x-tqstack-reason"] == "sidecar-loading"
        stack.run(stack.ollama.stop())
        assert stack.chat(LONG).status_code == 503  # the request that finds out
        response = stack.chat(LONG)
        assert response.json()["error"]["code"] == "loading"
        assert response.headers["retry-after"] == "5"


def test_after_the_first_byte_a_failure_is_an_error_event(stack):
    async def script(wire: Wire) -> None:
        await wire.raw(SSE)
        await wire.chunk(delta("one "))
        await asyncio.sleep(0.05)
        await wire.chunk(delta("two ")[:20])
        wire.cut()

    stack.sidecar.script = script
    stream = stack.openai.chat.completions.create(model="tq:", messages=HELLO, stream=True)
    got = []
    with pytest.raises(openai.APIError, match="sidecar"):
        for chunk in stream:
            got.append(chunk.choices[0].delta.content)
    assert got == ["one "]
    assert stack.ollama.seen == []


def test_comments_of_a_backend_are_no_answer_yet(stack):
    async def script(wire: Wire) -> None:
        await wire.raw(SSE)
        await wire.chunk(b": prefill 2048/12000\n\n")
        wire.cut()

    stack.sidecar.script = script
    stream = stack.openai.chat.completions.create(model="tq:", messages=HELLO, stream=True)
    assert stream_text(stream) == "from ollama"
    assert stream.response.headers["x-tqstack-fallback-from"] == "sidecar"


def test_a_stream_that_ends_without_a_finish_reason_is_a_failure(stack):
    for tail in (b"", b"data: [DONE]\n\n"):

        async def script(wire: Wire, tail: bytes = tail) -> None:
            await wire.raw(SSE)
            await wire.chunk(delta("half"))
            await asyncio.sleep(0.05)
            if tail:
                await wire.chunk(tail)
            await wire.end()

        stack.ollama.script = script
        response = stack.chat(stream=True)
        *_, last, rest = response.text.split("\n\n")
        assert rest == ""
        assert "finish reason" in json.loads(last.removeprefix("data: "))["error"]["message"]
        assert "[DONE]" not in response.text


def test_errors_of_a_backend_arrive_in_the_envelope(stack):
    stack.ollama.script = answers(400, b'{"error": "prompt is too spicy"}')
    response = stack.chat()
    error = response.json()["error"]
    assert response.status_code == 400
    assert set(error) == {"message", "type", "param", "code"}
    assert "prompt is too spicy" in error["message"]
    assert response.headers["x-tqstack-backend"] == "ollama"
    assert stack.sidecar.seen == []


def test_models_lists_both_backends_from_memory_and_the_prefixes(stack):
    stack.chat()
    names = [model.id for model in stack.openai.models.list()]
    assert names[:4] == ["auto", "demo", "llama3:latest", "qwen"]
    assert {"tq:demo", "ollama:qwen"} <= set(names)
    assert stack.openai.models.retrieve("ollama:qwen").id == "ollama:qwen"
    with pytest.raises(openai.NotFoundError, match="no model"):
        stack.openai.models.retrieve("nobody")


def test_models_are_still_listed_when_a_backend_is_gone():
    with Stack() as stack:
        stack.chat()
        stack.run(stack.ollama.stop())
        stack.chat()
        assert "qwen" in [model.id for model in stack.openai.models.list()]


def test_a_client_that_goes_away_cancels_the_backend_at_once(stack):
    async def script(wire: Wire) -> None:
        await asyncio.sleep(20)

    stack.ollama.script = script
    for stream in (False, True):
        with pytest.raises(openai.APITimeoutError):
            stack.openai.with_options(timeout=0.3).chat.completions.create(
                model="auto", messages=HELLO, stream=stream
            )
        left = time.perf_counter()
        deadline = left + 2
        while (closed := stack.ollama.seen[-1].closed_at) is None:
            assert time.perf_counter() < deadline
            time.sleep(0.002)
        assert closed - left < 0.1


def test_health_tells_what_is_up(stack):
    report = stack.http.get("/health").json()
    assert report["status"] == "ok"
    assert report["sidecar_available"] is True
    assert report["threshold"] == 16_000
    assert report["backends"]["sidecar"]["state"] == "up"
    assert report["backends"]["sidecar"]["context_length"] == 262_144


BAD = [
    (b"", "body"),
    (b"{", "body"),
    (b"[]", "body"),
    (b'{"messages": []}', "messages"),
    (b'{"messages": ["hello"]}', "messages"),
    (b'{"messages": [{"role": "user", "content": "a"}], "model": "nobody"}', "nobody"),
    (b'{"messages": [{"role": "user", "content": "a"}], "stream": "yes"}', "stream"),
]


@pytest.mark.parametrize("body, mention", BAD)
def test_bad_input_is_a_400_in_the_envelope_and_reaches_no_backend(stack, body, mention):
    response = stack.http.post("/v1/chat/completions", content=body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert mention in error["message"]
    assert stack.ollama.seen == stack.sidecar.seen == []
    assert stack.chat().status_code == 200


@pytest.mark.parametrize(
    "fields",
    [{"n": 2}, {"top_k": -1}, {"max_tokens": -1}, {"temperature": 9}, {"some": "thing"}],
)
def test_what_a_backend_may_understand_is_the_backend_s_to_judge(stack, fields):
    assert stack.chat(**fields).status_code == 200
    assert stack.ollama.seen[-1].json.items() >= fields.items()


def test_a_list_of_prompts_passes(stack):
    body = {"model": "ollama:", "prompt": ["a", "b"]}
    assert stack.http.post("/v1/completions", json=body).status_code == 200
    assert stack.ollama.seen[-1].json["prompt"] == ["a", "b"]


def test_an_unknown_model_has_its_own_code(stack):
    with pytest.raises(openai.BadRequestError) as error:
        stack.openai.chat.completions.create(model="nobody", messages=HELLO)
    assert error.value.code == "model_not_found"


def test_a_prompt_too_long_for_every_backend_is_refused_with_both_numbers():
    with Stack() as stack:
        stack.sidecar.health = {**HYBRID, "model": {"context_length": 9_000}}
        stack.ollama.contexts = {"llama3:latest": 4_000, "qwen": 40_000}
        stack.probe()
        response = stack.chat(LONG)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
        assert "9000" in error["message"]
        assert f"about {response.headers['x-tqstack-prompt-tokens']} tokens" in error["message"]
        # What one backend cannot hold goes to the other, whatever the threshold says.
        assert answer_of(stack.chat(LONG, model="qwen"))[1] == "ollama"
        assert answer_of(stack.chat("word " * 7_000))[1] == "sidecar"


def test_a_body_over_the_limit_is_a_413():
    with Stack(router_body_limit_mb=1) as stack:
        response = stack.chat("x" * (1 << 20))
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"


def test_an_unknown_path_or_method_has_the_envelope(stack):
    assert stack.http.get("/v1/chat/completions").status_code == 405
    for response in (stack.http.get("/v1/nothing"), stack.http.get("/v1/chat/completions")):
        assert response.json()["error"]["type"] == "invalid_request_error"
