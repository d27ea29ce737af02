"""From a request to prompt tokens: the model's own chat template, with its tools."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from mlx_lm.tokenizer_utils import TokenizerWrapper

from tqstack.openai_api.errors import bad_request
from tqstack.openai_api.schema import ChatRequest, Message, TextRequest


@dataclass(frozen=True)
class Prompt:
    """Tokens of a prompt, cut where its prefix may be used again.

    `reusable` tokens, up to the end of the last message, are the same in the next turn's prompt.
    """

    tokens: list[int]
    reusable: int = 0
    reasoning: bool = False  # the template has opened a reasoning block

    @property
    def segments(self) -> list[list[int]]:
        if not 0 < self.reusable < len(self.tokens):
            return [self.tokens]
        return [self.tokens[: self.reusable], self.tokens[self.reusable :]]


def text_prompt(tokenizer: TokenizerWrapper, request: TextRequest) -> Prompt:
    prompt = request.prompt
    if isinstance(prompt, str):
        return Prompt(tokenizer.encode(prompt))
    if not all(0 <= token < len(tokenizer) for token in prompt):
        raise bad_request(f"prompt: tokens must be from 0 to {len(tokenizer) - 1}", "prompt")
    return Prompt(list(prompt))


def chat_prompt(tokenizer: TokenizerWrapper, request: ChatRequest) -> Prompt:
    """Render the chat.

    Raises:
        ApiError: 400, where the model's template cannot take these messages.
    """
    if not tokenizer.has_chat_template:
        raise bad_request("this model has no chat template: ask it through /v1/completions")
    messages = [_plain(message, i) for i, message in enumerate(request.messages)]
    options = dict(request.chat_template_kwargs or {})
    if request.tools and request.tool_choice != "none":
        options["tools"] = request.tools
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **options
        )
        closed = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=False, **options
        )
    except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise bad_request(f"the model's chat template refuses this: {error}", "messages") from None
    if not text:
        raise bad_request("the chat template made an empty prompt of these messages", "messages")
    tokens = tokenizer.encode(text, add_special_tokens=False)
    opening = text[len(closed) :] if text.startswith(closed) else ""
    tail = tokenizer.encode(opening, add_special_tokens=False) if opening else []
    reusable = len(tokens) - len(tail) if tail and tokens[-len(tail) :] == tail else 0
    return Prompt(tokens, reusable, _opens_reasoning(tokenizer, opening or text))


def _opens_reasoning(tokenizer: TokenizerWrapper, tail: str) -> bool:
    start, end = tokenizer.think_start, tokenizer.think_end
    return start is not None and end is not None and tail.rfind(start) > tail.rfind(end)


def _plain(message: Message, index: int) -> dict[str, Any]:
    """A message as templates expect it: text content, arguments of tool calls as objects."""
    plain = message.model_dump(exclude_none=True)
    if isinstance(message.content, list):
        texts = [part.get("text") for part in message.content if part.get("type") == "text"]
        if len(texts) < len(message.content) or not all(isinstance(t, str) for t in texts):
            raise bad_request(
                "only parts of type 'text' are supported by this model", f"messages.{index}.content"
            )
        plain["content"] = "".join(str(text) for text in texts)
    plain.setdefault("content", "")
    for call in plain.get("tool_calls", []):
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"] or "{}")
            except json.JSONDecodeError:
                raise bad_request(
                    "arguments of a tool call must be JSON", f"messages.{index}.tool_calls"
                ) from None
    return plain
