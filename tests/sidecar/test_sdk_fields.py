"""Each field that a current SDK can send is done or refused by the live sidecar, never ignored.

What is done shows in the answer; a label may have any value without showing anywhere.
"""

from __future__ import annotations

import json

import pytest
from anthropic.types import message_create_params
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from openai_api.test_fields import fields_of
from tqstack.openai_api.errors import ApiError
from tqstack.openai_api.fields import CHAT, COMPLETIONS, MESSAGES, RESPONSES
from tqstack.router.dialects.messages import Messages
from tqstack.router.dialects.responses import Responses

ASKED = [{"role": "user", "content": "hello"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {
            "type": "object",
            "properties": {"at": {"enum": ["a"]}},
            "required": ["at"],
            "additionalProperties": False,
        },
    },
}
JSON = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["one"]}}}
FORCED = {"type": "function", "function": {"name": "look"}}


def answered(client, path, body):
    response = client.post(path, json=body)
    if body.get("stream"):
        lines = [line[6:] for line in response.text.split("\n") if line.startswith("data: {")]
        return 200, {"events": [json.loads(line) for line in lines]}
    return response.status_code, response.json()


def choice(answer):
    return answer["choices"][0]


def calls(answer):
    return [call["function"] for call in choice(answer)["message"]["tool_calls"]]


def said(answer):
    """The text by the tokens whose log-probabilities were told."""
    return "".join(one["token"] for one in choice(answer)["logprobs"]["content"])


def used(answer):
    return answer["usage"]["completion_tokens"]


def other(value):
    """What shows that a value has an effect: another answer than without it."""
    return value, lambda answer, plain: text(answer) != text(plain)


def text(answer):
    one = choice(answer)
    return one["text"] if "text" in one else one["message"]["content"]


# Field: a value, and what shows that it was done; further fields may be needed with it.
SHOWN = {
    "max_tokens": (3, lambda a, _: used(a) == 3),
    "temperature": other(1.9),
    "top_p": (0.0, lambda a, plain: text(a) == text(plain), {"temperature": 1.9}),
    "frequency_penalty": other(2.0),
    "presence_penalty": other(2.0),
    "logit_bias": ({"50": 100}, lambda a, _: len(set(text(a))) == 1),
    "n": (2, lambda a, _: len(a["choices"]) == 2),
    "seed": (7, lambda a, plain: text(a) != text(plain), {"temperature": 1.0}),
    "stop": (["e", "a", " "], lambda a, _: choice(a)["finish_reason"] == "stop"),
    "stream": (True, lambda a, _: len(a["events"]) > 2),
    "stream_options": (
        {"include_usage": True},
        lambda a, _: a["events"][-1]["usage"]["prompt_tokens"],
        {"stream": True},
    ),
}
CHAT_SHOWN = {
    **SHOWN,
    "max_completion_tokens": (3, lambda a, _: used(a) == 3),
    "logprobs": (True, lambda a, _: said(a) == text(a)),
    "top_logprobs": (
        2,
        lambda a, _: len(choice(a)["logprobs"]["content"][0]["top_logprobs"]) == 2,
        {"logprobs": True},
    ),
    "response_format": (JSON, lambda a, _: text(a) == '"one"'),
    "tools": (
        [TOOL],
        lambda a, _: calls(a)[0]["name"] == "look",
        {"tool_choice": "required", "max_tokens": 60},
    ),
    "tool_choice": (
        FORCED,
        lambda a, _: calls(a)[0]["arguments"] == '{"at": "a"}',
        {"tools": [TOOL], "max_tokens": 60},
    ),
    "parallel_tool_calls": (
        False,
        lambda a, _: len(calls(a)) == 1,
        {"tools": [TOOL], "tool_choice": "required", "max_tokens": 60},
    ),
    "functions": (
        [TOOL["function"]],
        lambda a, _: choice(a)["message"]["function_call"]["name"] == "look",
        {"function_call": {"name": "look"}, "max_tokens": 60},
    ),
    "function_call": ({"name": "nobody"}, 400, {"functions": [TOOL["function"]]}),
    "messages": ([{"role": "user", "content": "def"}], lambda a, plain: text(a) != text(plain)),
    "model": ("nobody", 400),
    "modalities": (["audio"], 400),
    "verbosity": ("low", 400),
}
TEXT_SHOWN = {
    **SHOWN,
    "prompt": other("class A:"),
    "model": ("nobody", 400),
    "echo": (True, lambda a, _: text(a).startswith("import os")),
    "best_of": (2, lambda a, _: used(a) == 32),
    "logprobs": (2, lambda a, _: len(choice(a)["logprobs"]["tokens"]) == used(a)),
}
TEXT_SHOWN["logit_bias"] = ({"50": 100}, lambda a, _: len(set(text(a))) == 1)
# Without an effect that is to be seen on a model that does not reason.
UNSEEN = {"reasoning_effort": "low"}


@pytest.mark.parametrize(
    ("path", "params", "shown", "table", "plain"),
    [
        (
            "/v1/chat/completions",
            chat_create_params.CompletionCreateParamsNonStreaming,
            CHAT_SHOWN,
            CHAT,
            {"messages": ASKED, "temperature": 0, "max_tokens": 16},
        ),
        (
            "/v1/completions",
            completion_create_params.CompletionCreateParamsNonStreaming,
            TEXT_SHOWN,
            COMPLETIONS,
            {"prompt": "import os\n", "temperature": 0, "max_tokens": 16},
        ),
    ],
)
def test_each_field_of_the_openai_sdk_is_done_or_refused(client, path, params, shown, table, plain):
    _, without = answered(client, path, plain)
    for name in sorted(fields_of(params) | {"stream"}):
        value, check, *more = shown.get(name, (UNSEEN.get(name, {"a": "b"}), None))
        status, answer = answered(client, path, {**plain, **(more[0] if more else {}), name: value})
        if name not in table or check == 400:
            assert status == 400 and answer["error"]["param"] == name, (name, answer)
        elif check is None:
            label = table[name].sidecar.startswith(("a label", "nothing to do"))
            assert status == 200 and (label or name in UNSEEN), (name, answer)
        else:
            assert status == 200 and check(answer, without), (name, answer)


CHAT_OF = {
    "input": "hello",
    "max_output_tokens": 3,
    "temperature": 0.5,
    "top_p": 0.5,
    "stream": True,
    "instructions": "be",
    "parallel_tool_calls": False,
    "tools": [{"type": "function", "name": "look", "parameters": {"type": "object"}}],
    "tool_choice": "none",
    "text": {"format": {"type": "json_object"}},
    "model": "demo",
    "reasoning": {"effort": "low"},
    "top_logprobs": 2,
    "include": ["message.output_text.logprobs"],
    "stop_sequences": ["x"],
    "top_k": 5,
    "max_tokens": 3,
    "system": "be",
    "messages": ASKED,
    "thinking": {"type": "disabled"},
    "output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}},
}


@pytest.mark.parametrize(
    ("dialect", "params", "table", "plain"),
    [
        (
            Responses(),
            response_create_params.ResponseCreateParamsNonStreaming,
            RESPONSES,
            {"input": "hi"},
        ),
        (
            Messages(),
            message_create_params.MessageCreateParamsNonStreaming,
            MESSAGES,
            {"messages": ASKED[:], "max_tokens": 2},
        ),
    ],
)
def test_each_field_of_the_other_apis_reaches_the_sidecar_or_is_refused(
    client, dialect, params, table, plain
):
    base = dialect.to_chat(plain)
    for name in sorted(fields_of(params)):
        value = CHAT_OF.get(name, {"a": "b"})
        value = [{"role": "user", "content": "other"}] if name == "messages" else value
        value = (
            value
            if name != "tools" or "input" in plain
            else [{"name": "look", "input_schema": {"type": "object"}}]
        )
        try:
            request = {**plain, name: value}
            if name == "tool_choice":
                request["tools"] = (
                    CHAT_OF["tools"] if "input" in plain else [{"name": "l", "input_schema": {}}]
                )
                request[name] = "none" if "input" in plain else {"type": "none"}
            chat = dialect.to_chat(request)
        except ApiError as error:
            assert error.status == 400 and name in error.message, name
            continue
        told = table[name].sidecar
        if chat == base:
            quiet = ("a label", "nothing to do", "false: not kept", "disabled", "done, of answers")
            assert told.startswith(quiet) or name in ("include",), (name, told)
        else:
            status, answer = answered(client, "/v1/chat/completions", {**chat, "max_tokens": 2})
            assert status == 200, (name, answer)


def test_log_probabilities_reach_a_response_whole_and_streamed(client):
    dialect = Responses()
    request = {"input": "hi", "temperature": 0, "max_output_tokens": 5, "top_logprobs": 2}
    chat = dialect.to_chat(request)
    _, answer = answered(client, "/v1/chat/completions", chat)
    [part] = dialect.from_chat(answer, request)["output"][0]["content"]
    assert "".join(one["token"] for one in part["logprobs"]) == part["text"]
    assert all(len(one["top_logprobs"]) == 2 for one in part["logprobs"])
    request["stream"] = True
    stream = dialect.stream(request, 0)
    raw = client.post("/v1/chat/completions", json=dialect.to_chat(request)).content
    written = (stream.feed(raw) + stream.end()).decode().split("\n\n")
    events = [json.loads(event.split("data: ")[1]) for event in written if event]
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    streamed = [one for event in deltas for one in event["logprobs"]]
    assert [one["token"] for one in streamed] == [one["token"] for one in part["logprobs"]]
    final = events[-1]["response"]["output"][0]["content"][0]
    assert final["logprobs"] == streamed
