from __future__ import annotations

import pytest
from mlx_lm.tokenizer_utils import load
from transformers import AutoTokenizer

from tqstack import demo_model
from tqstack.openai_api.errors import ApiError
from tqstack.openai_api.schema import ChatRequest, TextRequest, validate
from tqstack.sidecar.prompt import chat_prompt, text_prompts

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
    assert [p.tokens for p in text_prompts(TOKENIZER, TextRequest(prompt=[5, 6]))] == [[5, 6]]
    with pytest.raises(ApiError, match="from 0 to 8191"):
        text_prompts(TOKENIZER, TextRequest(prompt=[5, 999_999]))


def test_each_of_several_prompts_is_one():
    for several in (["a", "b"], [[5], [6]]):
        assert len(text_prompts(TOKENIZER, TextRequest(prompt=several))) == 2


def text_of(*messages, template=None, **fields):
    """The prompt as text, with a template of one's own."""
    tokenizer = load(demo_model.PATH)
    if template:
        tokenizer.chat_template = template
    request = ChatRequest(messages=list(messages), **fields)
    return PLAIN.decode(chat_prompt(tokenizer, request).tokens)


RAISES = "{{ raise_exception('System message must be at the beginning.') }}"
SYSTEM_FIRST = (
    "{% for m in messages %}"
    "{% if m.role == 'system' and not loop.first %}"
    + RAISES
    + "{% elif m.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('Unexpected message role.') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def said(role, content):
    return {"role": role, "content": content}


def test_leading_system_messages_are_one_and_a_developer_is_the_system():
    messages = [said("system", "one"), said("developer", "two"), said("user", "hi")]
    text = text_of(*messages, template=SYSTEM_FIRST)
    assert text.startswith("<|im_start|>system\none\n\ntwo<|im_end|>\n<|im_start|>user\nhi")
    assert "system\nbe" in text_of(
        said("developer", "be"), said("user", "a"), template=SYSTEM_FIRST
    )


def test_a_later_system_message_stays_where_the_template_takes_it():
    messages = [
        said("user", "hi"),
        said("assistant", "yes"),
        said("system", "now"),
        said("user", "go"),
    ]
    assert "<|im_start|>system\nnow<|im_end|>" in text_of(*messages)


def test_elsewhere_it_begins_the_next_turn_and_what_comes_before_stays():
    before = [said("user", "hi"), said("assistant", "yes")]
    without = text_of(*before, said("user", "go"), template=SYSTEM_FIRST)
    text = text_of(*before, said("system", "now"), said("user", "go"), template=SYSTEM_FIRST)
    assert text == without.replace("user\ngo", "user\nnow\n\ngo")
    last = text_of(*before, said("system", "now"), template=SYSTEM_FIRST)
    assert "<|im_start|>user\nnow<|im_end|>" in last
    silent = SYSTEM_FIRST.replace(RAISES, "{% continue %}")
    dropped = text_of(*before, said("system", "now"), said("user", "go"), template=silent)
    assert "user\nnow\n\ngo" in dropped


def test_an_answer_that_has_begun_is_gone_on_with():
    messages = [said("user", "hi"), said("assistant", "The answer is")]
    assert text_of(*messages).endswith("<|im_start|>assistant\nThe answer is")
    assert text_of(*messages, continue_final_message=False).endswith("<|im_start|>assistant\n")
    assert text_of(*messages[:1], add_generation_prompt=False).endswith("hi<|im_end|>\n")


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "messages", "no_such_name"])
def test_a_request_sets_no_more_than_the_template_knows(name):
    with pytest.raises(ApiError, match="chat_template_kwargs"):
        prompt_of(said("user", "hi"), chat_template_kwargs={name: False})


SWITCH = "{% if enable_thinking is false %}<off>{% else %}<on>{% endif %}{{ tone }}"
THINKS = SYSTEM_FIRST.replace("assistant\n{% endif %}", "assistant\n" + SWITCH + "{% endif %}")


@pytest.mark.parametrize(
    "fields, end",
    [
        ({"reasoning_effort": "none"}, "<off>"),
        ({"reasoning_effort": "high"}, "<on>"),
        ({"chat_template_kwargs": {"enable_thinking": False, "tone": "!"}}, "<off>!"),
    ],
)
def test_effort_and_the_template_s_own_names_reach_it(fields, end):
    assert text_of(said("user", "hi"), template=THINKS, **fields).endswith(end)


def test_functions_of_before_tools_are_tools():
    call = {"name": "look", "arguments": "{}"}
    request = ChatRequest(
        messages=[
            said("user", "hi"),
            {"role": "assistant", "content": None, "function_call": call},
            {"role": "function", "name": "look", "content": "a cat"},
        ],
        functions=[{"name": "look", "parameters": {"type": "object"}}],
        function_call={"name": "look"},
    )
    assert request.tools == [
        {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    ]
    assert request.tool_choice == {"type": "function", "function": {"name": "look"}}


@pytest.mark.parametrize(
    "tools", [[{"type": "web"}], [{"function": {}}], [{"type": "function", "function": "f"}]]
)
def test_malformed_tools_are_refused(tools):
    with pytest.raises(ApiError, match="tools"):
        validate(ChatRequest, {"messages": [said("user", "hi")], "tools": tools})
