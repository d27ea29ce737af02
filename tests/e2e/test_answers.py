"""A person asks through the router, with the real OpenAI client."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import anthropic
import httpx
import openai
import pytest


def text_of(stream) -> str:
    return "".join(c.choices[0].delta.content or "" for c in stream if c.choices)


def test_a_short_prompt_goes_to_the_other_backend(stack, needle_of):
    needle = needle_of(60)
    raw = stack.ask(needle)
    assert raw.headers["x-tqstack-backend"] == "ollama"
    assert "x-tqstack-fallback-from" not in raw.headers
    assert raw.parse().choices[0].message.content == needle.code


def test_a_needle_in_12000_tokens_is_recalled_through_the_compressed_cache(stack, needle_of):
    needle = needle_of(12_000)
    raw = stack.ask(needle)
    answer = raw.parse()
    assert raw.headers["x-tqstack-backend"] == "sidecar"
    assert answer.usage.prompt_tokens > 11_900
    assert answer.choices[0].message.content == needle.code
    measured = answer.model_extra["tqstack"]
    assert measured["cache_tokens"] == answer.usage.total_tokens
    # The newest 264 tokens are exact, in float32 on a CPU.
    tail = 264 * 2 * 2 * 2 * 256 * 4
    assert measured["cache_bytes"] < 0.26 * measured["cache_bytes_fp16"] + tail
    estimate = int(raw.headers["x-tqstack-prompt-tokens"])
    assert abs(estimate - answer.usage.prompt_tokens) < 0.5 * answer.usage.prompt_tokens


def test_five_concurrent_streams_give_the_tokens_of_five_single_ones(stack, needle_of):
    prompts = [needle_of(n, seed=n) for n in (700, 60, 1100, 900, 300)]

    def answer(needle):
        raw = stack.ask(needle, model="tq:demo", stream=True, max_tokens=24)
        return text_of(raw.parse())

    single = [answer(prompt) for prompt in prompts]
    with ThreadPoolExecutor(5) as pool:
        together = list(pool.map(answer, prompts))
    assert together == single
    assert single[0] == prompts[0].code


@pytest.mark.parametrize("prefix, backend", [("tq:", "sidecar"), ("ollama:", "ollama")])
def test_a_prefix_chooses_the_backend(stack, needle_of, prefix, backend):
    raw = stack.ask(needle_of(60), model=f"{prefix}auto")
    assert raw.headers["x-tqstack-backend"] == backend


def test_a_stream_ends_with_reason_usage_and_measurements(stack, needle_of):
    raw = stack.ask(
        needle_of(600),
        stream=True,
        max_tokens=3,
        stream_options={"include_usage": True},
    )
    chunks = list(raw.parse())
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 3
    assert any("tqstack" in (c.model_extra or {}) for c in chunks)


def test_a_seed_gives_the_same_text_again_and_another_seed_another(stack):
    def story(seed):
        return (
            stack.client(stack.sidecar)
            .completions.create(
                model="demo", prompt="def ", max_tokens=30, temperature=1.2, top_p=0.95, seed=seed
            )
            .choices[0]
            .text
        )

    assert story(1) == story(1) != story(2)


def test_a_stop_string_ends_the_answer_and_is_not_shown(stack):
    client = stack.client(stack.sidecar)
    options = {"model": "demo", "prompt": "import ", "temperature": 0, "max_tokens": 40}
    whole = client.completions.create(**options).choices[0].text
    stop = whole[5:9]
    cut = client.completions.create(**options, stop=[stop]).choices[0]
    assert (cut.text, cut.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_the_next_turn_reuses_the_prompt_and_gives_a_cold_ones_tokens(stack, needle_of):
    needle, client = needle_of(1500, seed=3), stack.client(stack.sidecar)
    first = client.chat.completions.create(
        model="demo", messages=needle.messages, temperature=0, max_tokens=12
    )
    turns = [
        *needle.messages,
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": needle.question},
    ]
    options = {"model": "demo", "temperature": 0, "max_tokens": 12}
    warm = client.chat.completions.create(messages=turns, **options)
    assert warm.usage.prompt_tokens_details.cached_tokens > 1400
    # One character more in the first message: nothing of the stored prompt can be used.
    changed = [{**turns[0], "content": "." + turns[0]["content"]}, *turns[1:]]
    cold = client.chat.completions.create(messages=changed, **options)
    assert cold.usage.prompt_tokens_details.cached_tokens == 0
    assert warm.choices[0].message.content == cold.choices[0].message.content == needle.code


def test_models_of_both_backends_are_listed(stack):
    names = {model.id for model in stack.client().models.list()}
    assert "demo" in names and len(names) > 2


def test_health_tells_layers_codec_and_bytes(stack):
    health = httpx.get(f"{stack.sidecar}/health").json()
    assert health["model"]["compressed_layers"] == [3, 7]
    assert (health["model"]["softmax_layers"], health["model"]["recurrent_layers"]) == ([3, 7], 6)
    assert health["cache"]["codec"] == "tq4"
    assert health["cache"]["bytes_per_token"] == 2 * 2 * 2 * 130
    assert health["cache"]["bytes_per_token_fp16"] == 2 * 2 * 2 * 512
    assert health["memory_plan"]["max_tokens"] > 32768


def test_the_sidecars_metrics_count_tokens_and_bytes(stack, needle_of):
    def count(name):
        lines = httpx.get(f"{stack.sidecar}/metrics").text.splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith(name)))

    before = count("tqstack_sidecar_output_tokens_total")
    stack.ask(needle_of(60), model="tq:demo", max_tokens=3)
    assert count("tqstack_sidecar_output_tokens_total") == before + 3
    assert count("tqstack_sidecar_cache_bytes") == 0


HELLO = [{"role": "user", "content": "hello"}]
BAD_REQUESTS = [
    ({"model": "no-such-model", "messages": HELLO}, "model"),
    ({"model": "tq:no-such-model", "messages": HELLO}, "model"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages.0"),
    ({"messages": HELLO, "max_tokens": -1}, "max_tokens"),
    ({"messages": HELLO, "temperature": "hot"}, "temperature"),
    ({"messages": HELLO, "stream": "yes"}, "stream"),
]


@pytest.mark.parametrize("service", ["router", "sidecar"])
@pytest.mark.parametrize("body, param", BAD_REQUESTS)
def test_bad_input_is_a_400_in_the_openai_envelope(stack, service, body, param):
    url = f"{getattr(stack, service)}/v1/chat/completions"
    if service == "router":  # which lets the backend judge what is the backend's
        body = {"model": "tq:", **body}
    response = httpx.post(url, json=body, timeout=30)
    assert response.status_code == 400
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


@pytest.mark.parametrize("service", ["router", "sidecar"])
def test_a_body_that_is_no_json_is_a_400(stack, service):
    url = f"{getattr(stack, service)}/v1/chat/completions"
    for body in (b"", b"{", b"[1, 2]", b"\xff"):
        response = httpx.post(url, content=body, timeout=30)
        assert response.status_code == 400, body
        assert "JSON" in response.json()["error"]["message"]


def test_a_body_that_is_too_large_is_a_413(stack):
    for url in (stack.router, stack.sidecar):
        response = httpx.post(f"{url}/v1/chat/completions", content=b" " * (65 << 20), timeout=60)
        assert response.status_code == 413
        assert "ROUTER_BODY_LIMIT_MB" in response.json()["error"]["message"]


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(stack):
    messages = [{"role": "user", "content": "word " * 40_000}]
    for url in (stack.router, stack.sidecar):
        with pytest.raises(openai.BadRequestError) as error:
            stack.client(url).chat.completions.create(
                model="tq:demo" if url == stack.router else "demo", messages=messages
            )
        assert error.value.code == "context_length_exceeded"
        numbers = [
            int(word.strip(".,;"))
            for word in error.value.message.split()
            if word.strip(".,;").isdigit()
        ]
        assert 32768 in numbers and any(n > 39_000 for n in numbers)


@pytest.mark.parametrize("service", ["router", "sidecar"])
def test_unknown_paths_and_methods_are_errors_in_the_envelope(stack, service):
    url = getattr(stack, service)
    assert httpx.get(f"{url}/v1/nothing").json()["error"]["message"]
    assert httpx.get(f"{url}/v1/chat/completions").status_code == 405


def test_both_services_still_serve_after_all_that(stack, needle_of):
    for url in (stack.router, stack.sidecar):
        assert (
            stack.client(url)
            .chat.completions.create(model="auto", messages=HELLO, max_tokens=2)
            .choices[0]
            .finish_reason
        )


def test_tokens_are_counted_as_the_sidecar_then_reads_them(stack, needle_of):
    needle = needle_of(700)
    tools: list = [{"name": "look", "description": "a" * 40, "input_schema": {"type": "object"}}]
    with anthropic.Anthropic(base_url=stack.router, api_key="none") as client:
        request = {"model": "tq:demo", "messages": needle.messages, "tools": tools}
        counted = client.messages.count_tokens(**request)
        answer = client.messages.create(**request, max_tokens=2)
    read = answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)
    assert counted.input_tokens == read > 650
