"""From a request to prompt tokens: the model's own chat template, with its tools."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from mlx_lm.tokenizer_utils import TokenizerWrapper

from tqstack.openai_api.errors import bad_request
from tqstack.openai_api.schema import ChatRequest, Message, TextRequest

HEADER_TOKENS = 4  # most tokens between two markers of a message's header
MERGES = 8  # last tokens of a text that other text may merge with differently


@dataclass(frozen=True)
class Prompt:
    """
    Attributes:
        boundaries: positions behind its messages, ascending: the next turn's prompt is the same up
            to one of them.
        reasoning: the template has opened a reasoning block.
    """

    tokens: list[int]
    boundaries: tuple[int, ...] = ()
    reasoning: bool = False


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
    boundaries = _after_markers(tokens, _markers(tokenizer))
    if not boundaries and opening:  # a template of plain text
        end = len(tokens) - len(tokenizer.encode(opening, add_special_tokens=False)) - MERGES
        boundaries = (end,) if end > 0 else ()
    return Prompt(tokens, boundaries, _opens_reasoning(tokenizer, opening or text))


def _markers(tokenizer: TokenizerWrapper) -> frozenset[int]:
    """Tokens that templates put between messages; no text merges with them."""
    added = tokenizer.added_tokens_decoder.items()
    special = {int(i) for i, token in added if token.special}
    return frozenset(special | set(tokenizer.all_special_ids) | set(tokenizer.eos_token_ids))


def _after_markers(tokens: list[int], markers: frozenset[int]) -> tuple[int, ...]:
    """Positions behind the first of each run of markers: what ends a message comes before what
    names the role of the next."""
    ends, last = [], -2 * HEADER_TOKENS
    for i, token in enumerate(tokens):
        if token in markers:
            if i - last > HEADER_TOKENS:
                ends.append(i + 1)
            last = i
    return tuple(ends)


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
