"""Anthropic's Messages API (`POST /v1/messages`) as chat completions."""

from __future__ import annotations

from typing import Any

import orjson

from tqstack.openai_api.errors import ApiError, bad_request
from tqstack.openai_api.messages import merge_leading
from tqstack.router.dialects.blocks import (
    Block,
    BlockStream,
    blocks_of,
    copied,
    effort,
    items,
    named_event,
    new_id,
    text_field,
    unsupported,
)
from tqstack.router.dialects.conversation import conversation, dropped, without_attribution

_STOP_REASONS = {
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "content_filter": "refusal",
}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
# Tokens of a thinking budget, up to which it is a low or a medium effort.
_LOW_BUDGET, _MEDIUM_BUDGET = 4096, 16384
_NO_THREADS = "thread_unsupported_request"
REFUSED = {
    "container": "no code runs here",
    "mcp_servers": "connect to MCP servers from the client, and send their tools",
    "fallbacks": "the router chooses who answers",
    "compaction": "nothing compacts a conversation here; the client can",
}

_BLOCKS = {
    "type": "array",
    "items": {"type": "object", "required": ["type"], "properties": {"type": {"type": "string"}}},
}
_SAID = {"anyOf": [{"type": "string"}, _BLOCKS]}
_TURN = {"role": {"enum": ["user", "assistant", "system"]}, "content": _SAID}
# A request's JSON schema, as far as its fields differ from chat's.
BODY = {
    "type": "object",
    "required": ["messages", "max_tokens"],
    "properties": {
        "messages": {
            "type": "array",
            "minItems": 1,
            "items": {"type": "object", "required": [*_TURN], "properties": _TURN},
        },
        "system": _SAID,
        "model": {"type": "string"},
        "stream": {"type": "boolean"},
        "max_tokens": {"type": "integer", "minimum": 1},
        "stop_sequences": {"type": "array", "items": {"type": "string"}},
        "tools": {"type": "array", "items": {"type": "object", "required": ["name"]}},
        "thinking": {"type": "object"},
    },
}
COUNT_BODY = {**BODY, "required": ["messages"]}


class Messages:
    """The dialect."""

    def resolve(self, request: dict[str, Any]) -> dict[str, Any]:
        if request.get("thread"):
            raise bad_request(
                "thread: no conversation is kept here; send all of its messages",
                "thread",
                _NO_THREADS,
            )
        return without_attribution(request)

    def keep(self, request: dict[str, Any], answer: dict[str, Any]) -> None:
        """No request refers to an answer."""

    def to_chat(self, request: dict[str, Any]) -> dict[str, Any]:
        for name, why in REFUSED.items():
            if request.get(name):
                raise bad_request(f"{name} is not supported: {why}", name, "unsupported_value")
        chat = copied(
            request,
            "model",
            "stream",
            "max_tokens",
            "temperature",
            "top_p",
            "top_k",
            stop="stop_sequences",
        )
        if chat.get("max_tokens") is None:
            raise bad_request("max_tokens is required", "max_tokens")
        chat["messages"] = merge_leading(conversation(request))
        if chat["messages"][-1]["role"] == "assistant":  # the answer is to go on from there
            chat |= {"continue_final_message": True, "add_generation_prompt": False}
        if tools := _tools(request)[0]:
            chat["tools"] = tools
        choice = request.get("tool_choice")
        if isinstance(choice, dict):
            chat["tool_choice"] = _tool_choice(choice)
            if choice.get("disable_parallel_tool_use"):
                chat["parallel_tool_calls"] = False
        _add_format(request, chat)
        _add_effort(request, chat)
        if chat.get("stream"):
            chat["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
        return chat

    def left_out(self, request: dict[str, Any]) -> list[str]:
        return [*_tools(request)[1], *dropped(request)]

    def from_chat(self, answer: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
        blocks, choice = blocks_of(answer)
        message = _message(str(answer.get("model") or request.get("model")))
        message["content"] = [_content(block) for block in blocks]
        message |= _stop(choice)
        message["usage"] = _usage(answer.get("usage") or {})
        return message

    def stream(self, request: dict[str, Any], prompt_tokens: int) -> MessageStream:
        return MessageStream(str(request.get("model")), prompt_tokens)

    def error_body(self, error: ApiError) -> dict[str, Any]:
        """Both APIs' clients find what they look for."""
        body = {"type": "error", **error.body}
        if body["error"]["type"] == "server_error":
            body["error"]["type"] = "overloaded_error" if error.status == 503 else "api_error"
        if error.code == _NO_THREADS:  # the SDK then sends the whole conversation by itself
            body["error"]["details"] = {"error_code": error.code, "unsupported": ["thread"]}
        return body


class TokenCount(Messages):
    """`POST /v1/messages/count_tokens`: a request for a message that is only to be counted."""

    def to_chat(self, request: dict[str, Any]) -> dict[str, Any]:
        return super().to_chat({**request, "max_tokens": 1, "stream": False})


def message_tokens(tokens: int) -> dict[str, Any]:
    return {"input_tokens": tokens}


class MessageStream(BlockStream):
    """`message_start`, then each block between its start and stop, then `message_stop`."""

    def __init__(self, model: str, prompt_tokens: int):
        super().__init__()
        self._model = model
        self._prompt_tokens = prompt_tokens

    def ping(self, text: str) -> bytes:
        return named_event({"type": "ping"})

    def begin(self, chunk: dict[str, Any]) -> bytes:
        message = _message(str(chunk.get("model") or self._model))
        # Of a backend that counts at the end only, the estimate: clients show it meanwhile.
        message["usage"] = _usage(chunk.get("usage") or {"prompt_tokens": self._prompt_tokens})
        return named_event({"type": "message_start", "message": message})

    def open(self, block: Block) -> bytes:
        empty = _content(Block(block.kind, call_id=block.call_id, name=block.name))
        return self._event("content_block_start", content_block=empty)

    def delta(self, block: Block, text: str) -> bytes:
        delta = {
            "reasoning": {"type": "thinking_delta", "thinking": text},
            "text": {"type": "text_delta", "text": text},
            "tool": {"type": "input_json_delta", "partial_json": text},
        }[block.kind]
        return self._event("content_block_delta", delta=delta)

    def close(self, block: Block) -> bytes:
        return self._event("content_block_stop")

    def finish(self) -> bytes:
        closing = {"type": "message_delta", "delta": _stop(self.choice), "usage": self._used()}
        return named_event(closing) + named_event({"type": "message_stop"})

    def _used(self) -> dict[str, int]:
        return _usage({"prompt_tokens": self._prompt_tokens, **self.usage})

    def fail(self, error: ApiError) -> bytes:
        return named_event(Messages().error_body(error))

    def _event(self, kind: str, **data: Any) -> bytes:
        return named_event({"type": kind, "index": len(self.blocks) - 1, **data})


def _message(model: str) -> dict[str, Any]:
    return {
        "id": new_id("msg"),
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _usage({}),
    }


def _stop(choice: dict[str, Any]) -> dict[str, Any]:
    """Why an answer ended. `stop_reason` of a chat choice is vLLM's and the sidecar's: the stop
    string that was found."""
    reason, found = choice.get("finish_reason") or "stop", choice.get("stop_reason")
    if reason == "stop" and isinstance(found, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": found}
    return {"stop_reason": _STOP_REASONS.get(reason, "end_turn"), "stop_sequence": None}


def _usage(usage: dict[str, Any]) -> dict[str, int]:
    """Anthropic's `input_tokens` are those that came from no cache."""
    prompt = usage.get("prompt_tokens") or 0
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return {
        "input_tokens": prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage.get("completion_tokens") or 0,
    }


def _content(block: Block) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": block.text, "signature": ""}
    if block.kind == "text":
        return {"type": "text", "text": block.text}
    try:
        arguments = orjson.loads(block.text or "{}")
    except orjson.JSONDecodeError:
        arguments = {"arguments": block.text}
    return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": arguments}


def _add_format(request: dict[str, Any], chat: dict[str, Any]) -> None:
    """`output_config.format`; `output_format` is its name of before."""
    config = request.get("output_config")
    config = config if isinstance(config, dict) else {}
    form = config.get("format") or request.get("output_format")
    if isinstance(form, dict):
        if form.get("type") != "json_schema" or not isinstance(form.get("schema"), dict):
            raise bad_request(
                "output_config.format must be of type json_schema, with a schema", "output_config"
            )
        schema = {"name": "answer", "schema": form["schema"], "strict": True}
        chat["response_format"] = {"type": "json_schema", "json_schema": schema}
    if config.get("task_budget"):
        raise unsupported("output_config.task_budget", "output_config")


def _add_effort(request: dict[str, Any], chat: dict[str, Any]) -> None:
    """`thinking` and `output_config.effort` as chat's one word for both."""
    config, thinking = request.get("output_config"), request.get("thinking")
    wanted = config.get("effort") if isinstance(config, dict) else None
    word = effort(wanted, "output_config.effort")
    if isinstance(thinking, dict):
        budget = thinking.get("budget_tokens")
        if thinking.get("type") == "disabled":
            word = "none"
        elif word is None and isinstance(budget, int):
            word = "low" if budget <= _LOW_BUDGET else "high"
            word = "medium" if _LOW_BUDGET < budget <= _MEDIUM_BUDGET else word
    if word:
        chat["reasoning_effort"] = word


def _tools(request: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """The tools as functions, and the types of those that run at Anthropic.

    Raises:
        ApiError: 400, if one is malformed, or none is left.
    """
    if not request.get("tools"):
        return [], []
    given = items(request["tools"], "tools")
    kept = [_tool(tool) for tool in given if "input_schema" in tool]
    hosted = [str(tool.get("type")) for tool in given if "input_schema" not in tool]
    if not kept:
        raise bad_request(
            f"tools: {', '.join(hosted)} would run on Anthropic's servers, or need a model that "
            "was trained on them; send tools with an input_schema",
            "tools",
            "unsupported_value",
        )
    return kept, hosted


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    function = {
        "name": text_field(tool, "name", "tools"),
        **copied(tool, "description", "strict", parameters="input_schema"),
    }
    return {"type": "function", "function": function}


def _tool_choice(choice: dict[str, Any]) -> Any:
    if choice.get("type") == "tool":
        return {"type": "function", "function": {"name": text_field(choice, "name", "tool_choice")}}
    if choice.get("type") in _CHOICES:
        return _CHOICES[choice["type"]]
    raise unsupported(f"a tool choice of type {choice.get('type')!r}", "tool_choice")
