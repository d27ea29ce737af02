"""`/v1/responses`: tools that chat does not have, histories, references to answers, life."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest

from router.agent import answer, parallel, works
from router.scripted import SSE, Wire, answers, delta, says
from router.stack import Stack

GRAMMAR = {"type": "grammar", "syntax": "lark", "definition": 'start: "*** Begin Patch"'}
PATCH = {"type": "custom", "name": "apply_patch", "description": "Edits files.", "format": GRAMMAR}
AGENTS = {
    "type": "namespace",
    "name": "agents",
    "tools": [{"type": "function", "name": "spawn", "parameters": {"type": "object"}}],
}
SHELL = {"type": "local_shell"}
LOOK = {"type": "function", "name": "look", "parameters": {"type": "object"}}


@pytest.fixture(scope="module")
def stack():
    with Stack() as stack:
        yield stack


@pytest.fixture(autouse=True)
def in_order(stack):
    stack.sidecar.script = says("fine")
    stack.sidecar.seen.clear()


def create(stack, items="hi", **options):
    return stack.openai.responses.create(model="tq:", input=items, **options)


def output_of(stack, items="hi", **options):
    """The output items, which must be the same whole and streamed, but for their ids."""
    whole = [item.to_dict() for item in create(stack, items, **options).output]
    with create(stack, items, stream=True, **options) as stream:
        streamed = [e.item.to_dict() for e in stream if e.type == "response.output_item.done"]
    for item in (*whole, *streamed):
        item.pop("id")
    assert whole == streamed
    return whole


def test_a_free_form_tool_is_called_with_text(stack):
    stack.sidecar.script = works("apply_patch", lambda _: {"input": "*** Begin Patch\n"})
    [_, call] = output_of(stack, tools=[PATCH])
    assert call["type"] == "custom_tool_call"
    assert (call["name"], call["input"]) == ("apply_patch", "*** Begin Patch\n")
    [tool] = stack.sidecar.seen[-1].json["tools"]
    assert GRAMMAR["definition"] in tool["function"]["description"]
    with create(stack, tools=[PATCH], stream=True) as stream:
        deltas = [e.delta for e in stream if e.type == "response.custom_tool_call_input.delta"]
    assert "".join(deltas) == "*** Begin Patch\n"


def test_a_namespaces_tools_are_called_by_their_own_names(stack):
    stack.sidecar.script = works("agents__spawn", lambda _: {})
    [_, call] = output_of(stack, tools=[AGENTS, LOOK])
    assert (call["type"], call["namespace"], call["name"]) == ("function_call", "agents", "spawn")
    again = {**call, "id": "fc_1"}
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "done"}
    create(stack, [{"role": "user", "content": "hi"}, again, result], tools=[AGENTS])
    [called] = [m for m in stack.sidecar.seen[-1].json["messages"] if m["role"] == "assistant"]
    assert called["tool_calls"][0]["function"]["name"] == "agents__spawn"


def test_a_local_shell_is_called_with_an_action(stack):
    stack.sidecar.script = works("local_shell", lambda _: {"command": ["ls", "-l"]})
    [_, call] = output_of(stack, tools=[SHELL])
    assert call["type"] == "local_shell_call"
    assert (call["action"]["type"], call["action"]["command"]) == ("exec", ["ls", "-l"])


def test_hosted_tools_are_left_out_and_the_header_says_so(stack):
    raw = stack.openai.responses.with_raw_response.create(
        model="tq:", input="hi", tools=[{"type": "web_search"}, LOOK]
    )
    assert raw.headers["x-tqstack-left-out"] == "web_search"
    tools = stack.sidecar.seen[-1].json["tools"]
    assert [tool["function"]["name"] for tool in tools] == ["look"]


def test_allowed_tools_are_those_that_are_sent(stack):
    choice = {
        "type": "allowed_tools",
        "mode": "required",
        "tools": [{"type": "function", "name": "look"}],
    }
    create(stack, tools=[PATCH, LOOK], tool_choice=choice)
    sent = stack.sidecar.seen[-1].json
    assert [tool["function"]["name"] for tool in sent["tools"]] == ["look"]
    assert sent["tool_choice"] == "required"


def test_a_history_is_never_refused(stack):
    items = [
        {"role": "user", "content": "fix it"},
        {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "Hm."}]},
        {"type": "custom_tool_call", "call_id": "c1", "name": "apply_patch", "input": "*** x"},
        {"type": "custom_tool_call_output", "call_id": "c1", "output": "ok"},
        {"type": "local_shell_call", "call_id": "c2", "status": "completed",
         "action": {"type": "exec", "command": ["ls"], "env": {}}},
        {"type": "local_shell_call_output", "id": "c2", "output": "a.py"},
        {"type": "web_search_call", "id": "ws_1", "status": "completed"},
        {"type": "compaction", "encrypted_content": "x"},
        {"type": "item_reference", "id": "msg_1"},
        {"type": "something_new"},
        {"role": "user", "content": "go on"},
    ]  # fmt: skip
    raw = stack.openai.responses.with_raw_response.create(model="tq:", input=items)
    left_out = "compaction, item_reference, something_new, web_search_call"
    assert raw.headers["x-tqstack-left-out"] == left_out
    sent = stack.sidecar.seen[-1].json["messages"]
    assert [m["role"] for m in sent] == ["user", "assistant", "tool", "assistant", "tool", "user"]
    assert sent[1]["reasoning_content"] == "Hm."
    assert json.loads(sent[1]["tool_calls"][0]["function"]["arguments"]) == {"input": "*** x"}
    assert json.loads(sent[3]["tool_calls"][0]["function"]["arguments"]) == {"command": ["ls"]}
    assert sent[4]["tool_call_id"] == "c2"


def test_reasoning_comes_back_from_a_client_that_stores_nothing(stack):
    stack.sidecar.script = works("look", lambda _: {})
    first = create(stack, tools=[LOOK], store=False, include=["reasoning.encrypted_content"])
    reasoning, call = (item.to_dict() for item in first.output)
    reasoning.pop("content")  # as Codex does
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "a cat"}
    second = create(stack, [{"role": "user", "content": "hi"}, reasoning, call, output])
    assert second.output_text == "The tool gave: a cat"
    assert stack.sidecar.seen[-1].json["messages"][1]["reasoning_content"] == "I need a tool."


@pytest.mark.parametrize("index", [0, None])
@pytest.mark.parametrize("stream", [False, True])
def test_parallel_calls_stay_apart_whatever_their_index(stack, index, stream):
    stack.sidecar.script = parallel("one", "two", index=index)
    if stream:
        with create(stack, stream=True) as events:
            calls = [e.item for e in events if e.type == "response.output_item.done"]
    else:
        calls = create(stack).output
    found = {call.call_id: (call.name, json.loads(call.arguments)) for call in calls}
    assert found == {f"call_{n}": (n, {"of": n}) for n in ("one", "two")}


# Requests that refer to an answer.


def texts_seen(stack):
    return [message["content"] for message in stack.sidecar.seen[-1].json["messages"]]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_gone_on_from(stack, stream):
    def ask(text, **options):
        if not stream:
            return create(stack, text, **options)
        with create(stack, text, stream=True, **options) as events:
            return list(events)[-1].response

    first = ask("one", instructions="be brief")
    second = ask("two", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    ask("three", previous_response_id=second.id)
    assert texts_seen(stack) == ["one", "fine", "two", "fine", "three"]
    ask("other", previous_response_id=first.id)
    assert texts_seen(stack) == ["one", "fine", "other"]


def test_an_answer_that_was_not_stored_is_not_there(stack):
    for name in (create(stack, store=False).id, "resp_nothing"):
        with pytest.raises(openai.BadRequestError) as error:
            create(stack, previous_response_id=name)
        assert error.value.code == "previous_response_not_found"


def test_answers_of_a_backend_that_speaks_the_api_are_gone_on_from_too():
    message = {"type": "message", "role": "assistant", "content": "native"}
    body = {"id": "resp_n", "object": "response", "status": "completed", "output": [message]}
    with Stack() as stack:
        stack.ollama.script = answers(200, json.dumps(body).encode())
        stack.post("/v1/responses", model="qwen", input="one")
        stack.post("/v1/responses", model="qwen", input="two", previous_response_id="resp_n")
        sent = stack.ollama.seen[-1].json
        assert "previous_response_id" not in sent
        assert [item["content"] for item in sent["input"]] == ["one", "native", "two"]


# Life and death of a stream.


def test_a_waiting_client_sees_events_and_not_only_comments():
    async def slow(wire: Wire) -> None:
        await asyncio.sleep(0.5)
        await says("fine")(wire)

    with Stack(router_ping_seconds=0.1) as stack:
        stack.sidecar.script = slow
        with create(stack, stream=True) as stream:
            events = list(stream)
        kinds = [event.type for event in events]
        assert kinds.count("response.created") == 1 and kinds[0] == "response.created"
        assert kinds.count("response.in_progress") > 2
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert events[-1].response.id == events[0].response.id
        assert events[-1].response.output_text == "fine"


def test_a_stream_that_breaks_says_why_to_codex_and_to_the_sdk(stack):
    async def breaks(wire: Wire) -> None:
        await wire.raw(SSE)
        await wire.chunk(delta("one"))
        wire.cut()

    stack.sidecar.script = breaks
    body = {"model": "tq:", "input": "hi", "stream": True}
    text = stack.http.post("/v1/responses", json=body).text
    failed, error = (json.loads(event.split("data: ")[1]) for event in text.split("\n\n")[-3:-1])
    assert (
        failed["type"] == "response.failed" and "sidecar" in failed["response"]["error"]["message"]
    )
    assert error["type"] == "error" and "sidecar" in error["message"]


@pytest.mark.parametrize(
    "field, value",
    [
        ("background", True),
        ("conversation", "conv_1"),
        ("prompt", {"id": "pmpt_1"}),
        ("truncation", "auto"),
        ("text", {"verbosity": "low"}),
        ("tools", [{"type": "web_search"}]),
        ("tool_choice", {"type": "function", "name": "nobody"}),
        ("reasoning", {"effort": "endless"}),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_sentence(stack, field, value):
    response = stack.post("/v1/responses", input="hi", **{field: value})
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["param"].startswith(field)
    assert len(error["message"].split()) > 5


@pytest.mark.parametrize("told, sent", [("xhigh", "high"), ("minimal", "low"), ("none", "none")])
def test_effort_is_told_in_words_that_every_backend_knows(stack, told, sent):
    create(stack, reasoning={"effort": told})
    assert stack.sidecar.seen[-1].json["reasoning_effort"] == sent


def test_reasoning_that_was_counted_is_told(stack):
    async def script(wire: Wire) -> None:
        await answer(wire, {"reasoning_content": "hm", "content": "x"})

    stack.sidecar.script = script
    assert create(stack).usage.input_tokens_details.cached_tokens == 20
