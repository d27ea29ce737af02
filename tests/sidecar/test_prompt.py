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


def test_boundaries_are_behind_the_ends_of_messages():
    prompt = prompt_of(
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Say something about the weather of today."},
    )
    ends = [PLAIN.decode(prompt.tokens[:end]) for end in prompt.boundaries[-2:]]
    assert ends[0] == "<|im_start|>system\nBe brief.<|im_end|>"
    assert ends[1].endswith("of today.<|im_end|>")


def test_a_template_of_plain_text_has_a_boundary_before_what_may_merge():
    tokenizer = load(demo_model.PATH)
    tokenizer.chat_template = (
        "{% for m in messages %}### {{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant:{% endif %}"
    )
    text = "Say something about the weather of today, and of tomorrow, and of the day after."
    request = ChatRequest(messages=[{"role": "user", "content": text}])
    prompt = chat_prompt(tokenizer, request)
    (end,) = prompt.boundaries
    kept = PLAIN.decode(prompt.tokens[:end])
    assert f"### user: {text}".startswith(kept) and len(kept) > 40


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
