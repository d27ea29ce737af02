"""From a request to prompt tokens: the model's own chat template, with its tools."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from jinja2 import TemplateError
from mlx_lm.tokenizer_utils import TokenizerWrapper

from tqstack.engine.logprobs import Logprob
from tqstack.engine.places import MERGES
from tqstack.openai_api.errors import bad_request
from tqstack.openai_api.messages import SYSTEM, fold_system, merge_leading
from tqstack.openai_api.schema import ChatRequest, Message, TextRequest
from tqstack.sidecar.template import template_options

_REFUSALS = (TemplateError, ValueError, TypeError, KeyError, AttributeError, IndexError)

HEADER_TOKENS = 4  # most tokens between two markers of a message's header


@dataclass(frozen=True)
class Prompt:
    """
    Attributes:
        boundaries: positions behind its messages, ascending: the next turn's prompt is the same up
            to one of them.
        reasoning: whether the template has opened a reasoning block, or the model may open one.
        told: log-probabilities of its tokens by position, as they come.
    """

    tokens: list[int]
    boundaries: tuple[int, ...] = ()
    reasoning: Literal["open", "possible", "none"] = "none"
    told: dict[int, Logprob] = field(default_factory=dict)


def text_prompts(tokenizer: TokenizerWrapper, request: TextRequest) -> list[Prompt]:
    return [_text_prompt(tokenizer, prompt) for prompt in request.prompts]


def _text_prompt(tokenizer: TokenizerWrapper, prompt: str | list[int]) -> Prompt:
    if isinstance(prompt, str):
        return Prompt(tokenizer.encode(prompt))
    check_tokens(tokenizer, prompt, "prompt")
    return Prompt(list(prompt))


def check_tokens(tokenizer: TokenizerWrapper, tokens: list[int], where: str) -> None:
    """
    Raises:
        ApiError: 400, if one is not in the vocabulary.
    """
    if not all(0 <= token < len(tokenizer) for token in tokens):
        raise bad_request(f"{where}: tokens must be from 0 to {len(tokenizer) - 1}", where)


def chat_prompt(tokenizer: TokenizerWrapper, request: ChatRequest) -> Prompt:
    """Render the chat.

    Raises:
        ApiError: 400, where the model's template cannot take these messages.
    """
    if not tokenizer.has_chat_template:
        raise bad_request("this model has no chat template: ask it through /v1/completions")
    text, closed = _render(tokenizer, request)
    if not text:
        raise bad_request("the chat template made an empty prompt of these messages", "messages")
    opening = text[len(closed) :] if text.startswith(closed) else ""
    reasoning = _reasoning(tokenizer, opening or text)
    if reasoning == "open" and request.reasoning_effort == "none":
        text, reasoning = f"{text.rstrip()}\n\n{tokenizer.think_end}\n\n", "none"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    boundaries = _after_markers(tokens, _markers(tokenizer))
    if not boundaries and opening:  # a template of plain text
        end = len(tokens) - len(tokenizer.encode(opening, add_special_tokens=False)) - MERGES
        boundaries = (end,) if end > 0 else ()
    return Prompt(tokens, boundaries, reasoning)


def _render(tokenizer: TokenizerWrapper, request: ChatRequest) -> tuple[str, str]:
    """The prompt's text, and the same without the opening of a new turn.

    Raises:
        ApiError: 400, where the template refuses.
    """
    plain = [_plain(message, i) for i, message in enumerate(request.messages)]
    messages = merge_leading(plain)
    options = template_options(tokenizer, request)

    def render(messages: list[dict[str, Any]]) -> tuple[str, str]:
        closed = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=False, **options
        )
        if request.continues:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, continue_final_message=True, **options
            )
            return text, ""
        if request.add_generation_prompt is False:
            return closed, ""
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **options
        )
        return text, closed

    later = [m["content"] for i, m in enumerate(messages) if i and m["role"] in SYSTEM]
    try:
        if later:
            with suppress(*_REFUSALS):  # not every template takes them where they are
                rendered = render(messages)
                if all(content in rendered[0] for content in later):
                    return rendered
            messages = fold_system(messages)
        return render(messages)
    except _REFUSALS as error:
        raise bad_request(f"the model's chat template refuses this: {error}", "messages") from None


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


def _reasoning(tokenizer: TokenizerWrapper, tail: str) -> Literal["open", "possible", "none"]:
    start, end = tokenizer.think_start, tokenizer.think_end
    if start is None or end is None:
        return "none"
    opened, closed = tail.rfind(start), tail.rfind(end)
    if opened == closed:  # neither is there
        # Many vocabularies have the markers; a model that uses them has them in its template.
        return "possible" if start in str(tokenizer.chat_template) else "none"
    return "open" if opened > closed else "none"


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
    _use_newer_names(plain)
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


def _use_newer_names(message: dict[str, Any]) -> None:
    """Messages as they were before tools, and the newer name of the system's role. Templates know
    reasoning by `reasoning_content`."""
    if message["role"] == "developer":
        message["role"] = "system"
    if message["role"] == "function":
        message["role"] = "tool"
    if function := message.pop("function_call", None):
        message.setdefault("tool_calls", []).append({"type": "function", "function": function})
    if isinstance(message.get("reasoning"), str):
        message.setdefault("reasoning_content", message["reasoning"])
