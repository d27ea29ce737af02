"""Indexes of tool calls in a chat stream, as backends get them wrong."""

from __future__ import annotations

import json

import pytest

from router.agent import answer, parallel
from router.scripted import Wire
from router.stack import Stack
from tqstack.router.repair import ChatRepair
from tqstack.router.tool_calls import CallNumbers

NAMES = ("reasoning", "reasoning_content")


def delta(index, call_id="", name="", arguments=""):
    call = {"function": {"name": name, "arguments": arguments}}
    return {
        **call,
        **({"id": call_id} if call_id else {}),
        **({} if index is None else {"index": index}),
    }


@pytest.mark.parametrize(
    "deltas, numbers",
    [
        ([delta(0, "a", "f"), delta(0, "", "", "{}"), delta(1, "b", "f")], [0, 0, 1]),
        ([delta(0, "a", "f", "{}"), delta(0, "b", "f", "{}")], [0, 1]),
        ([delta(None, "a", "f", "{}"), delta(None, "b", "g", "{}")], [0, 1]),
        ([delta(0, "a", "f"), delta(0, "a", "f", "{}"), delta(0, "a", "", "")], [0, 0, 0]),
        ([delta(0, "", "f", "{}"), delta(0, "", "f", "{}")], [0, 1]),
        ([delta(3, "a", "f", "{}"), delta(5, "b", "f", "{}"), delta(3, "", "", "x")], [0, 1, 0]),
    ],
)
def test_calls_are_told_apart_by_id_then_by_name(deltas, numbers):
    calls = CallNumbers()
    assert [calls.number(one) for one in deltas] == numbers


def test_what_is_right_passes_byte_by_byte():
    right = (
        b'data: {"choices": [{"index":0,"delta":{"tool_calls":[{"index":0,"id":"a"}]}}]}\r\n\r\n'
    )
    other = b'data: {"choices":[{"delta":{"content":"tool_calls"}}]}\n\n: hm\n\ndata: [DONE]\n\n'
    for data in (right, other, b'data: {"tool_calls": broken\n\n', b'data: ["tool_calls"]\n\n'):
        assert ChatRepair().feed(data) == data


@pytest.mark.parametrize("name, other", [NAMES, NAMES[::-1]])
@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_has_both_names_that_clients_read(name, other, stream):
    async def script(wire: Wire) -> None:
        await answer(wire, {name: "hm", "content": "yes"})

    with Stack() as stack:
        stack.sidecar.script = script
        response = stack.chat(model="tq:", stream=stream)
        if stream:
            first = json.loads(response.text.split("\n")[0][6:])["choices"][0]["delta"]
        else:
            first = response.json()["choices"][0]["message"]
        assert first[name] == first[other] == "hm"


@pytest.mark.parametrize("index", [0, None])
def test_a_chat_client_sees_repaired_indexes(index):
    with Stack() as stack:
        stack.sidecar.script = parallel("one", "two", index=index)
        messages: list = [{"role": "user", "content": "hi"}]
        with stack.openai.chat.completions.stream(model="tq:", messages=messages) as stream:
            message = stream.get_final_completion().choices[0].message
        calls = message.tool_calls or []
        assert [json.loads(c.function.arguments) for c in calls] == [{"of": "one"}, {"of": "two"}]
