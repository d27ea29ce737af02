"""What the router believes of Ollama, held against one that is installed."""

from __future__ import annotations

import json

import httpx
import pytest

from processes import wait_until
from router import puppet
from router.real_ollama import GIVEN, NOT_HERE, NUM_CTX, program, real_ollama
from router.stack import Stack, answer_of
from tqstack.openai_api.fields import OLLAMA_IGNORES

pytestmark = pytest.mark.skipif(not program(), reason=NOT_HERE)
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SAID = "Hello there friend"
PARAMETERS = {"type": "object", "properties": {"at": {"type": "string"}}}
FUNCTION = {"name": "look", "description": "looks", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALLS = [("look", {"at": "one"}), ("look", {"at": "two"})]
MODELS = pytest.mark.parametrize("model", ["puppet", "own"])


@pytest.fixture(scope="module")
def ollama(tmp_path_factory):
    with real_ollama(tmp_path_factory.mktemp("ollama")) as found:
        yield found


@pytest.fixture(scope="module")
def stack(ollama):
    """A router with it, and a scripted sidecar that does all that ours does."""
    with Stack(ollama=False, ollama_base_url=ollama.url, ollama_model="puppet") as stack:
        stack.sidecar.health["capabilities"] = ["json_object", "json_schema", "logprobs"]
        stack.probe()
        yield stack


def say(stack, word, model, **fields):
    return stack.chat(f"please {word}", model=f"ollama:{model}", **fields)


def told(value):
    """A word's answer by Ollama itself, for a request with this field."""
    return value["choices"][0].get("text") or value["choices"][0]["message"]["content"]


@MODELS
def test_an_answer_comes_whole_and_streamed_with_its_usage(stack, model):
    whole = say(stack, "SAY", model)
    assert answer_of(whole) == (SAID, "ollama", None)
    *chunks, last = stack.openai.chat.completions.create(
        model=f"ollama:{model}",
        messages=[{"role": "user", "content": "please SAY"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == SAID
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert last.usage.model_dump(exclude_none=True) == whole.json()["usage"]


@MODELS
def test_two_calls_are_two_by_index_and_id_over_every_api(stack, model):
    name = f"ollama:{model}"
    asked = [{"role": "user", "content": "please CALL"}]
    stream = stack.openai.chat.completions.create(
        model=name, messages=asked, tools=TOOLS, stream=True
    )
    pieces = [call for chunk in stream for call in chunk.choices[0].delta.tool_calls or []]
    assert [piece.index for piece in pieces] == [0, 1]
    assert len({piece.id for piece in pieces}) == 2
    tools = [{"type": "function", **FUNCTION}]
    answer = stack.openai.responses.create(model=name, input="please CALL", tools=tools)
    calls = [(item.name, json.loads(item.arguments)) for item in answer.output]
    assert calls == CALLS
    tools = [{"name": "look", "input_schema": PARAMETERS}]
    with stack.anthropic.messages.stream(
        model=name, max_tokens=50, messages=asked, tools=tools
    ) as stream:
        message = stream.get_final_message()
    assert [(block.name, block.input) for block in message.content] == CALLS
    assert message.stop_reason == "tool_use"


def test_what_ollama_s_own_responses_api_drops_or_fails_on_is_done(ollama, stack):
    tools = [{"type": "function", **FUNCTION}, {"type": "custom", "name": "patch"}]
    asked = {"model": "puppet", "input": "please CALL", "tools": tools}
    own = httpx.post(f"{ollama.url}/v1/responses", json=asked, timeout=60, trust_env=False)
    assert own.status_code == 500  # when this fails, it may be asked itself again
    routed = stack.post("/v1/responses", **{**asked, "model": "ollama:puppet"}).json()
    assert len([item for item in routed["output"] if item["type"] == "function_call"]) == 2
    form = {"format": {"type": "json_object"}}
    routed = stack.post("/v1/responses", model="ollama:puppet", input="SAY", text=form).json()
    assert isinstance(json.loads(routed["output"][-1]["content"][0]["text"]), dict)


@MODELS
def test_what_a_client_has_begun_is_not_repeated(stack, model):
    begun = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "ab SAY"}]
    assert answer_of(stack.post(model=f"ollama:{model}", messages=begun))[0] == SAID
    message = stack.anthropic.messages.create(
        model=f"ollama:{model}", max_tokens=20, messages=begun
    )
    assert message.content[0].text == SAID


@MODELS
def test_reasoning_has_both_names(stack, model):
    message = say(stack, "THINK", model).json()["choices"][0]["message"]
    assert message["content"] == "42"
    assert message["reasoning"] == message["reasoning_content"] == "hmm"
    assert '"reasoning_content":"hmm"' in say(stack, "THINK", model, stream=True).text


def test_a_result_goes_back(stack):
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "SAY"},
    ]
    assert answer_of(stack.post(model="ollama:puppet", messages=messages))[0] == SAID


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_a_form_is_kept_to_when_a_client_asks_the_router(stack, kind):
    form = {"type": kind, "json_schema": {"name": "n", "schema": {"type": "object"}}}
    text = answer_of(say(stack, "SAY", "puppet", response_format=form, max_tokens=200))[0]
    assert isinstance(json.loads(text), dict)


def test_ollama_itself_may_leave_json_object_alone(ollama):
    """Why it is sent as a schema: when this fails, `amend.py` need not do that any more."""
    form = {"type": "json_object"}
    assert told(direct(ollama, CHAT, response_format=form)) == SAID


# A value of each field that would show in the answer, if it were read.
WOULD_SHOW = {
    "n": 2,
    "best_of": 2,
    "logit_bias": {"65": 100},
    "echo": True,
    "ignore_eos": True,
    "min_tokens": 9,
    "stop_token_ids": list(range(257, 280)),
    "include_stop_str_in_output": True,
    "top_k": 1,
    "min_p": 0.5,
    "repetition_penalty": 50.0,
    "prompt_logprobs": 2,
    "guided_json": {"const": 7},
    "json_schema": {"const": 7},
    "guided_regex": "[0-9]",
    "guided_choice": ["x"],
    "guided_grammar": 'root ::= "x"',
    "grammar": 'root ::= "x"',
    "structured_outputs": {"regex": "[0-9]"},
    "response_format": {"type": "json_schema", "json_schema": {"schema": {"const": 7}}},
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "functions": [FUNCTION],
    "function_call": {"name": "look"},
    "chat_template_kwargs": {"messages": []},
    "add_generation_prompt": False,
    "verbosity": "low",
    "logprobs": 2,
}
NOWHERE = {"top_k", "min_p", "verbosity"}  # of a model that is sure


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_what_the_table_says_is_not_read_is_not(ollama, path):
    fields = OLLAMA_IGNORES[path]
    assert fields - NOWHERE <= WOULD_SHOW.keys()
    plain = direct(ollama, path)
    for field in sorted(fields):
        tools = {"tools": TOOLS} if field in ("tool_choice", "parallel_tool_calls") else {}
        answer = direct(ollama, path, **{field: WOULD_SHOW[field]}, **tools)
        assert answer["choices"] == plain["choices"], field


@pytest.mark.parametrize(
    "field, value, text",
    [
        ("max_tokens", 2, "Hello there"),
        ("stop", " friend", "Hello there"),
        ("stop", [" there", "x"], "Hello"),
        ("temperature", 0.0, SAID),
        ("seed", 4, SAID),
    ],
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_what_the_table_says_is_done_is_done(ollama, path, field, value, text):
    assert told(direct(ollama, path, **{field: value})) == text


def test_logprobs_are_told_in_chats(stack):
    answer = say(stack, "SAY", "puppet", logprobs=True, top_logprobs=2).json()
    told = answer["choices"][0]["logprobs"]["content"]
    assert [len(one["top_logprobs"]) for one in told][:3] == [2, 2, 2]


def direct(ollama, path, **fields):
    said = {"messages": [{"role": "user", "content": "please SAY"}]}
    said = said if path == CHAT else {"prompt": "SAY"}
    body = {"model": "puppet", **said, **fields}
    response = httpx.post(ollama.url + path, json=body, timeout=60, trust_env=False)
    assert response.status_code == 200, response.text
    return response.json()


def test_names_are_known_with_and_without_latest(stack):
    for name in ("puppet", "puppet:latest", "Puppet", "own"):
        assert answer_of(stack.chat("SAY", model=name))[:2] == (SAID, "ollama")
    error = stack.chat("SAY", model="nobody").json()["error"]
    assert error["code"] == "model_not_found" and "puppet:latest" in error["message"]
    listed = [entry["id"] for entry in stack.http.get("/v1/models").json()["data"]]
    assert {"puppet:latest", "own:latest"} <= set(listed)


def contexts(stack):
    stack.probe()
    return stack.app.state.services.backends["ollama"].view().models


def unload(ollama, *models):
    for model in models:
        body = {"model": model, "keep_alive": 0}
        httpx.post(f"{ollama.url}/api/generate", json=body, timeout=60, trust_env=False)
    wait_until(lambda: not ollama.runners(), "the models are gone")


def test_what_a_model_holds_is_known_before_and_after_it_is_loaded(ollama, stack):
    unload(ollama, "puppet", "own")
    before = contexts(stack)
    assert before["puppet:latest"] == puppet.CONTEXT  # no more than that, at any rate
    assert before["own:latest"] == NUM_CTX
    assert answer_of(say(stack, "SAY", "puppet"))[0] == SAID  # which loads it
    assert contexts(stack)["puppet:latest"] == GIVEN
    assert answer_of(say(stack, "SAY", "own"))[0] == SAID
    assert contexts(stack)["own:latest"] == NUM_CTX


def test_a_model_is_loaded_to_see_whether_it_would_cut_a_prompt(ollama):
    unload(ollama, "puppet", "own")
    with Stack(ollama=False, ollama_base_url=ollama.url) as stack:
        response = say(stack, "word " * 5_800, "puppet")
        assert response.headers["x-tqstack-backend"] == "sidecar"
        assert response.headers["x-tqstack-reason"] == "prefix; ollama context"
    assert ollama.runners()


def test_a_prompt_that_would_be_cut_goes_to_the_sidecar(ollama, stack):
    cut = direct(ollama, CHAT, model="own", messages=[{"role": "user", "content": "a " * 900}])
    assert cut["usage"]["prompt_tokens"] < NUM_CTX  # and not a word of it
    response = stack.chat("a " * 900 + "SAY", model="own", temperature=0)
    assert response.headers["x-tqstack-backend"] == "sidecar"
    assert response.headers["x-tqstack-reason"] == "context"


def test_one_message_that_ollama_refuses_as_too_long_goes_to_the_sidecar(ollama):
    text = "word " * 2_000  # many more tokens than it looks: each byte is one
    with Stack(ollama=False, ollama_base_url=ollama.url) as stack:
        response = say(stack, text, "puppet", stream=True)
        assert response.headers["x-tqstack-fallback-from"] == "ollama"
        assert "status-400" in response.headers["x-tqstack-reason"]
        assert stack.app.state.services.backends["ollama"].view().state == "up"


@pytest.mark.parametrize("stream", [True, False])
@MODELS
def test_a_dying_runner_is_an_error_and_the_next_request_is_answered(ollama, stack, model, stream):
    say(stack, "SAY", model)

    def kill():
        for runner in ollama.runners():
            runner.kill()

    if stream:
        body = {"model": f"ollama:{model}", "stream": True, "max_tokens": 100_000}
        body["messages"] = [{"role": "user", "content": "LOOP"}]
        with stack.http.stream("POST", CHAT, json=body) as response:
            lines = response.iter_lines()
            seen = [next(lines)]
            kill()
            seen += lines
        assert "[DONE]" not in seen[-2] and '"error"' in "".join(seen[-4:])
    else:
        kill()
    assert answer_of(say(stack, "SAY", model))[0] == SAID
