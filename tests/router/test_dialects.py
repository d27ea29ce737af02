"""`/v1/responses` and `/v1/messages`, with the official clients, translated and passed on."""

from __future__ import annotations

import json

import anthropic
import openai
import pytest

from router.scripted import SSE, Script, Wire, answers, delta, says, usage_of
from router.stack import LONG, Stack

TOOL = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
}
CALL = {"id": "call_1", "type": "function"}


def thinks_and_calls(finish: str = "tool_calls") -> Script:
    """Reasoning, text and a tool call, as the sidecar streams them."""
    parts = [
        {"reasoning_content": "let me "},
        {"reasoning_content": "see"},
        {"content": "Look"},
        {"content": "ing."},
        {"tool_calls": [{"index": 0, **CALL, "function": {"name": "weather", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city": '}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"Rome"}'}}]},
    ]

    async def script(wire: Wire) -> None:
        if wire.seen.json.get("stream"):
            await wire.raw(SSE)
            for part in parts:
                choice = {"index": 0, "delta": part, "finish_reason": None}
                event = {"id": "c", "model": "demo", "choices": [choice]}
                await wire.chunk(b"data: " + json.dumps(event).encode() + b"\n\n")
            await wire.chunk(delta("", finish))
            await wire.chunk(
                b"data: "
                + json.dumps({"choices": [], "usage": usage_of(30, 9)}).encode()
                + b"\n\ndata: [DONE]\n\n"
            )
            await wire.end()
            return
        function = {"name": "weather", "arguments": '{"city": "Rome"}'}
        message = {
            "role": "assistant",
            "content": "Looking.",
            "reasoning_content": "let me see",
            "tool_calls": [{**CALL, "function": function}],
        }
        answer = {
            "id": "c",
            "model": "demo",
            "choices": [{"index": 0, "message": message, "finish_reason": finish}],
            "usage": usage_of(30, 9),
        }
        await wire.answer(200, json.dumps(answer).encode())

    return script


@pytest.fixture(scope="module")
def stack():
    with Stack() as stack:
        yield stack


@pytest.fixture(autouse=True)
def in_order(request):
    if "stack" in request.fixturenames:
        stack = request.getfixturevalue("stack")
        stack.sidecar.script = thinks_and_calls()
        stack.sidecar.seen.clear()
        stack.ollama.script = not_found
        stack.ollama.seen.clear()


async def not_found(wire: Wire) -> None:
    """A backend that knows chat completions only."""
    if wire.seen.path != "/v1/chat/completions":
        await wire.answer(404, b"Not Found", "text/plain")
    else:
        await thinks_and_calls()(wire)


MODELS = pytest.mark.parametrize("model", ["tq:", "ollama:"])


def check_message(message: anthropic.types.Message) -> None:
    thinking, text, tool = message.content
    assert (thinking.type, thinking.thinking) == ("thinking", "let me see")
    assert (text.type, text.text) == ("text", "Looking.")
    assert (tool.type, tool.name, tool.input) == ("tool_use", "weather", {"city": "Rome"})
    assert tool.id == "call_1"
    assert message.stop_reason == "tool_use"
    assert (message.usage.input_tokens, message.usage.output_tokens) == (30, 9)


@MODELS
def test_anthropic_messages_in_one_piece(stack, model):
    message = stack.anthropic.messages.create(
        model=model, max_tokens=100, messages=[{"role": "user", "content": "weather?"}]
    )
    check_message(message)


@MODELS
def test_anthropic_messages_streamed(stack, model):
    with stack.anthropic.messages.stream(
        model=model, max_tokens=100, messages=[{"role": "user", "content": "weather?"}]
    ) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    assert text == "Looking."
    check_message(message)


def test_a_conversation_with_tools_and_images_reaches_the_backend_as_chat(stack):
    stack.anthropic.messages.create(
        model="ollama:",
        max_tokens=50,
        system=[{"type": "text", "text": "be brief"}],
        stop_sequences=["END"],
        tools=[{"name": "weather", "description": "the weather", "input_schema": TOOL}],
        tool_choice={"type": "any"},
        messages=[
            {"role": "user", "content": "weather?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "Looking."},
                    {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "a"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "call_1", "content": "rain"},
                    {"type": "text", "text": "and this?"},
                    {
                        "type": "image",
                        "source": {"type": "base64", "media_type": "image/png", "data": "QUJD"},
                    },
                ],
            },
        ],
    )
    sent = stack.ollama.seen[-1].json
    assert stack.ollama.seen[-1].path == "/v1/chat/completions"
    assert (sent["model"], sent["max_tokens"], sent["stop"]) == ("llama3:latest", 50, ["END"])
    assert sent["tool_choice"] == "required"
    assert sent["tools"][0]["function"]["parameters"] == TOOL
    system, user, assistant, tool, last = sent["messages"]
    assert system == {"role": "system", "content": "be brief"}
    assert user == {"role": "user", "content": "weather?"}
    assert assistant["tool_calls"][0]["function"] == {
        "name": "weather",
        "arguments": '{"city":"a"}',
    }
    assert tool == {"role": "tool", "tool_call_id": "call_1", "content": "rain"}
    assert last["content"][1]["image_url"]["url"] == "data:image/png;base64,QUJD"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"max_tokens": 5},
        {"max_tokens": 5, "messages": []},
        {"max_tokens": 5, "messages": [{"role": "user", "content": [{"type": "video"}]}]},
        {"max_tokens": "5", "messages": [{"role": "user", "content": "a"}]},
        {"max_tokens": 5, "messages": [{"role": "king", "content": "a"}]},
    ],
)
def test_anthropic_errors_have_the_form_that_its_client_reads(stack, body):
    response = stack.http.post("/v1/messages", json=body)
    assert response.status_code == 400
    assert response.json()["type"] == "error"
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_anthropic_errors_reach_the_sdk_before_and_within_a_stream(stack):
    with pytest.raises(anthropic.BadRequestError, match="no model"):
        stack.anthropic.messages.create(
            model="nobody", max_tokens=5, messages=[{"role": "user", "content": "a"}]
        )

    async def script(wire: Wire) -> None:
        await wire.raw(SSE)
        await wire.chunk(delta("one"))
        wire.cut()

    stack.sidecar.script = script
    with (
        pytest.raises(anthropic.APIError, match="sidecar"),
        stack.anthropic.messages.stream(
            model="tq:", max_tokens=5, messages=[{"role": "user", "content": "a"}]
        ) as stream,
    ):
        for _ in stream:
            pass


def check_response(response: openai.types.responses.Response) -> None:
    reasoning, message, call = response.output
    assert reasoning.content[0].text == "let me see"
    assert message.content[0].text == response.output_text == "Looking."
    assert (call.name, call.arguments, call.call_id) == ("weather", '{"city": "Rome"}', "call_1")
    assert response.status == "completed"
    assert (response.usage.input_tokens, response.usage.output_tokens) == (30, 9)


@MODELS
def test_responses_in_one_piece(stack, model):
    check_response(stack.openai.responses.create(model=model, input="weather?"))


@MODELS
def test_responses_streamed(stack, model):
    with stack.openai.responses.stream(model=model, input="weather?") as stream:
        kinds = [event.type for event in stream]
        check_response(stream.get_final_response())
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert kinds.count("response.output_text.delta") == 2
    assert kinds.count("response.function_call_arguments.delta") == 2


def test_an_answer_that_was_cut_short_is_incomplete(stack):
    stack.sidecar.script = thinks_and_calls(finish="length")
    response = stack.openai.responses.create(model="tq:", input="a")
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    with stack.openai.responses.stream(model="tq:", input="a") as stream:
        assert [event.type for event in stream][-1] == "response.incomplete"


def test_responses_input_reaches_the_backend_as_chat(stack):
    stack.openai.responses.create(
        model="ollama:",
        instructions="be brief",
        input=[
            {"role": "developer", "content": "always"},
            {"role": "user", "content": [{"type": "input_text", "text": "weather?"}]},
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        ],
        tools=[{"type": "function", "name": "weather", "parameters": TOOL, "strict": True}],
        text={"format": {"type": "json_schema", "name": "x", "schema": TOOL}},
        max_output_tokens=50,
    )
    sent = stack.ollama.seen[-1].json
    assert [m["role"] for m in sent["messages"]] == [
        "system", "user", "assistant", "tool",
    ]  # fmt: skip
    assert sent["messages"][0]["content"] == "be brief\n\nalways"
    assert sent["messages"][2]["tool_calls"][0]["id"] == "c1"
    assert sent["max_tokens"] == 50
    assert sent["response_format"]["json_schema"]["schema"] == TOOL
    assert sent["tools"][0]["function"]["name"] == "weather"


@pytest.mark.parametrize(
    "body, param",
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": "a", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools"),
        ({"input": "a", "max_output_tokens": -1}, "max_tokens"),
        ({"input": "a", "stream": "yes"}, "stream"),
    ],
)
def test_a_response_request_that_cannot_be_met_is_a_400_that_says_why(stack, body, param):
    response = stack.http.post("/v1/responses", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_a_backend_that_speaks_the_api_itself_gets_the_request_as_it_is():
    body = b'{"id": "resp_native", "object": "response", "output": [], "status": "completed"}'
    with Stack() as stack:
        stack.ollama.script = answers(200, body)
        for _ in range(2):
            response = stack.post("/v1/responses", model="qwen", input="hi", store=False)
            assert response.content == body
        assert [seen.path for seen in stack.ollama.seen] == ["/v1/responses"] * 2
        sent = {"model": "qwen", "input": "hi", "store": False}
        assert stack.ollama.seen[0].json == sent


def test_a_backend_that_does_not_is_asked_only_once():
    with Stack() as stack:
        stack.ollama.script = not_found
        for _ in range(2):
            assert stack.post("/v1/responses", input="hi").status_code == 200
        paths = [seen.path for seen in stack.ollama.seen]
        assert paths == ["/v1/responses", "/v1/chat/completions", "/v1/chat/completions"]


@pytest.mark.parametrize("last", ["message_stop", "response.completed", None])
def test_a_native_stream_passes_as_bytes_and_its_end_is_known(last):
    events = [{"type": "message_start", "message": {"usage": {"input_tokens": 7}}}]
    events += [{"type": last}] if last else []
    stream = b"".join(
        b"event: %s\ndata: %s\n\n" % (e["type"].encode(), json.dumps(e).encode()) for e in events
    )

    async def native(wire: Wire) -> None:
        await wire.raw(SSE)
        await wire.chunk(stream)
        await wire.end()

    with Stack() as stack:
        stack.ollama.script = native
        body = {"max_tokens": 5, "messages": [{"role": "user", "content": "a"}], "stream": True}
        response = stack.http.post("/v1/messages", json=body)
        stack.settle()
        if last:
            assert response.content == stream
            assert stack.app.state.services.journal.recent[-1].prompt_tokens == 7
        else:
            assert response.content.startswith(stream)
            assert b"event: error\n" in response.content


def test_a_long_request_falls_back_in_any_dialect():
    with Stack() as stack:
        stack.run(stack.sidecar.stop())

        async def script(wire: Wire) -> None:
            if wire.seen.path == "/v1/responses":
                await wire.answer(404, b"")
            else:
                await says("from ", "ollama")(wire)

        stack.ollama.script = script
        with stack.openai.responses.stream(model="auto", input=LONG) as stream:
            assert stream.get_final_response().output_text == "from ollama"


def test_embeddings_go_to_ollama_by_themselves():
    async def script(wire: Wire) -> None:
        assert wire.seen.path == "/v1/embeddings"
        data = [{"object": "embedding", "index": 0, "embedding": [0.5, 1.0]}]
        answer = {"object": "list", "data": data, "usage": {"prompt_tokens": 3}}
        await wire.answer(200, json.dumps(answer).encode())

    with Stack() as stack:
        stack.ollama.script = script
        answer = stack.openai.embeddings.create(model="auto", input=LONG, encoding_format="float")
        assert answer.data[0].embedding == [0.5, 1.0]
        assert stack.sidecar.seen == []
