"""What an Ollama does not read is said in its words, or said to the client."""

from __future__ import annotations

import pytest

from router.stack import Stack
from tqstack.router.amend import amended, ignored

CHAT = "/v1/chat/completions"


def ollama():
    stack = Stack()
    stack.ollama.extra["/api/ps"] = {"models": []}
    return stack


def test_ollama_gets_its_own_words():
    messages = [{"role": "developer", "content": "a"}, {"role": "user", "content": "b"}]
    with ollama() as stack:
        stack.post(model="ollama:", messages=messages, max_completion_tokens=7)
        sent = stack.ollama.seen[-1].json
        assert sent["max_tokens"] == 7
        assert [message["role"] for message in sent["messages"]] == ["system", "user"]
        stack.chat(model="ollama:", response_format={"type": "json_object"})
        form = stack.ollama.seen[-1].json["response_format"]
        assert form["json_schema"]["schema"] == {"type": "object"}
        stack.post("/v1/completions", model="ollama:", prompt=["one"])
        assert stack.ollama.seen[-1].json["prompt"] == "one"
        stack.post("/v1/messages", model="ollama:", max_tokens=5, messages=messages[1:])
        assert stack.ollama.seen[-1].path == CHAT  # it speaks that too, and drops half


def test_what_needs_no_change_is_the_same_request():
    request = {"messages": [{"role": "user"}], "max_tokens": 3, "max_completion_tokens": 4}
    assert amended(request) is request


@pytest.mark.parametrize(
    "fields, names",
    [
        ({"tool_choice": "required", "n": 2}, ["n", "tool_choice"]),
        ({"tool_choice": "auto", "n": 1, "top_k": None, "verbosity": "medium"}, []),
        ({"parallel_tool_calls": False}, ["parallel_tool_calls"]),
        ({"parallel_tool_calls": True}, []),
        ({"metadata": {"a": "b"}, "user": "me"}, []),
    ],
)
def test_what_it_does_not_read_is_told(fields, names):
    assert ignored(CHAT, fields) == names
    with ollama() as stack:
        told = stack.chat(model="ollama:", **fields).headers.get("x-tqstack-left-out", "")
        assert [name for name in told.split(", ") if name] == names
