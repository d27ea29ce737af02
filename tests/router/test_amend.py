"""What an Ollama does not read is said in its words, or said to the client."""

from __future__ import annotations

import pytest

from router.scripted import says
from router.stack import Stack, answer_of, stream_answer
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


BEGUN = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "ab "}]


@pytest.mark.parametrize("words", [["ab cd", " e"], ["cd", " e"], ["abcd", " e"]])
@pytest.mark.parametrize("stream", [True, False])
def test_what_a_client_has_begun_is_not_repeated(words, stream):
    wanted = "abcd e" if words[0] == "abcd" else "cd e"
    with ollama() as stack:
        stack.ollama.script = says(*words)
        response = stack.post(model="ollama:", messages=BEGUN, stream=stream)
        text = stream_answer(response)[0] if stream else answer_of(response)[0]
        assert text == wanted
        message = stack.post("/v1/messages", model="ollama:", max_tokens=9, messages=BEGUN).json()
        assert message["content"][0]["text"] == wanted


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
