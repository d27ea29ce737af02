from __future__ import annotations

import pytest

from tqstack.openai_api.errors import ApiError
from tqstack.openai_api.schema import ChatRequest, TextRequest, parse_json, validate

HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    "fields, param",
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages.0"),
        ({"messages": [{"content": "no role"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": HELLO, "max_tokens": -1}, "max_tokens"),
        ({"messages": HELLO, "max_tokens": "5"}, "max_tokens"),
        ({"messages": HELLO, "temperature": "hot"}, "temperature"),
        ({"messages": HELLO, "temperature": 9}, "temperature"),
        ({"messages": HELLO, "top_p": -0.1}, "top_p"),
        ({"messages": HELLO, "stream": "yes"}, "stream"),
        ({"messages": HELLO, "tools": "none"}, "tools"),
        ({"messages": HELLO, "model": 7}, "model"),
        ({"messages": HELLO, "n": 0}, "n"),
    ],
)
def test_a_wrong_field_is_a_400_that_names_it(fields, param):
    with pytest.raises(ApiError) as error:
        validate(ChatRequest, fields)
    assert (error.value.status, error.value.param) == (400, param)


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"text"', b"\xff\xfe", b"{'a': 1}"])
def test_a_body_that_is_no_json_object_is_a_400(body):
    with pytest.raises(ApiError) as error:
        parse_json(body)
    assert error.value.body["error"]["type"] == "invalid_request_error"


def test_fields_that_we_do_not_know_pass():
    request = validate(ChatRequest, {"messages": HELLO, "user": "me", "metadata": {"a": 1}})
    assert request.messages[0].content == "hello"


def test_a_prompt_may_be_text_or_tokens():
    assert validate(TextRequest, {"prompt": "a"}).prompt == "a"
    assert validate(TextRequest, {"prompt": [1, 2]}).prompt == [1, 2]
    with pytest.raises(ApiError):
        validate(TextRequest, {"prompt": ""})
