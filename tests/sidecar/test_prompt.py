from __future__ import annotations

import pytest
from mlx_lm.tokenizer_utils import load
from transformers import AutoTokenizer

from tqstack import demo_model
from tqstack.openai_api.errors import ApiError
from tqstack.openai_api.schema import ChatRequest, TextRequest
from tqstack.sidecar.prompt import chat_prompt, text_prompt

TOKENIZER = load(demo_model.PATH)
PLAIN = AutoTokenizer.from_pretrained(demo_model.PATH)


def prompt_of(*messages, **fields):
    return chat_prompt(TOKENIZER, ChatRequest(messages=list(messages), **fields))


def test_the_prompt_is_the_models_own_template():
    prompt = prompt_of({"role": "user", "content": "Hi"})
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.tokens == PLAIN.encode(text)
    head, tail = prompt.segments
    assert PLAIN.decode(head) == "<|im_start|>user\nHi<|im_end|>\n"
    assert PLAIN.decode(tail) == "<|im_start|>assistant\n"


def test_text_parts_are_joined_and_other_parts_refused():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert "ab" in PLAIN.decode(prompt_of({"role": "user", "content": parts}).tokens)
    with pytest.raises(ApiError, match="only parts of type 'text'"):
        prompt_of({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]})


def test_arguments_of_earlier_tool_calls_reach_the_template_as_objects():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    assert prompt_of({"role": "assistant", "tool_calls": [call]}).tokens
    call["function"]["arguments"] = "{a: 1"
    with pytest.raises(ApiError, match="must be JSON"):
        prompt_of({"role": "assistant", "tool_calls": [call]})


def test_a_template_that_refuses_is_a_400():
    tokenizer = load(demo_model.PATH)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    request = ChatRequest(messages=[{"role": "user", "content": "Hi"}])
    with pytest.raises(ApiError, match="roles must alternate") as error:
        chat_prompt(tokenizer, request)
    assert error.value.status == 400


def test_prompt_tokens_outside_the_vocabulary_are_refused():
    assert text_prompt(TOKENIZER, TextRequest(prompt=[5, 6])).tokens == [5, 6]
    with pytest.raises(ApiError, match="from 0 to 8191"):
        text_prompt(TOKENIZER, TextRequest(prompt=[5, 999_999]))
