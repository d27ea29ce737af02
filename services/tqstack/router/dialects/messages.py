"""Anthropic's Messages API (`POST /v1/messages`) as chat completions."""

from __future__ import annotations

import itertools
from typing import Any

import orjson

from tqstack.openai_api.errors import ApiError, bad_request
from tqstack.router.dialects.blocks import (
    Block,
    BlockStream,
    blocks_of,
    copied,
    items,
    named_event,
    text_field,
    unsupported,
)

_ids = itertools.count(1)
_STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class Messages:
    """The dialect."""

    def to_chat(self, request: dict[str, Any]) -> dict[str, Any]:
        chat = copied(
            request, "model", "stream", "max_tokens", "temperature", "top_p", stop="stop_sequences"
        )
        if chat.get("max_tokens") is None:
            raise bad_request("max_tokens is required", "max_tokens")
        messages: list[dict[str, Any]] = []
        if request.get("system"):
            messages.append({"role": "system", "content": _text(request["system"], "system")})
        for message in items(request.get("messages"), "messages"):
            messages += _to_chat_messages(message)
        if not messages:
            raise bad_request("messages must not be empty", "messages")
        chat["messages"] = messages
        if request.get("tools"):
            chat["tools"] = [_tool(tool) for tool in items(request["tools"], "tools")]
        choice = request.get("tool_choice")
        if isinstance(choice, dict):
            chat["tool_choice"] = _tool_choice(choice)
        if chat.get("stream"):
            chat["stream_options"] = {"include_usage": True}
        return chat

    def from_chat(self, answer: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
        blocks, reason = blocks_of(answer)
        message = _message(str(answer.get("model") or request.get("model")))
        message["content"] = [_content(block) for block in blocks]
        message["stop_reason"] = _STOP_REASONS.get(reason, "end_turn")
        message["usage"] = _usage(answer.get("usage") or {})
        return message

    def stream(self, request: dict[str, Any]) -> MessageStream:
        return MessageStream(str(request.get("model")))

    def error_body(self, error: ApiError) -> dict[str, Any]:
        """Both APIs' clients find what they look for."""
        body = {"type": "error", **error.body}
        if body["error"]["type"] == "server_error":
            body["error"]["type"] = "overloaded_error" if error.status == 503 else "api_error"
        return body

    def error_event(self, error: ApiError) -> bytes:
        return named_event(self.error_body(error))


class TokenCount(Messages):
    """`POST /v1/messages/count_tokens`: a request for a message that is only to be counted."""

    def to_chat(self, request: dict[str, Any]) -> dict[str, Any]:
        return super().to_chat({**request, "max_tokens": 1, "stream": False})


class MessageStream(BlockStream):
    """`message_start`, then each block between its start and stop, then `message_stop`."""

    def __init__(self, model: str):
        super().__init__()
        self._model = model

    def begin(self, chunk: dict[str, Any]) -> bytes:
        message = _message(str(chunk.get("model") or self._model))
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
        reason = _STOP_REASONS.get(self.finish_reason, "end_turn")
        delta = {"stop_reason": reason, "stop_sequence": None}
        closing = {"type": "message_delta", "delta": delta, "usage": _usage(self.usage)}
        return named_event(closing) + named_event({"type": "message_stop"})

    def _event(self, kind: str, **data: Any) -> bytes:
        return named_event({"type": kind, "index": len(self.blocks) - 1, **data})


def _message(model: str) -> dict[str, Any]:
    return {
        "id": f"msg_{next(_ids)}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _usage({}),
    }


def _usage(usage: dict[str, Any]) -> dict[str, int]:
    return {
        "input_tokens": usage.get("prompt_tokens") or 0,
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


def _to_chat_messages(message: dict[str, Any]) -> list[dict[str, Any]]:
    """One message as one or more: tool results are messages of their own in chat."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant"):
        raise bad_request("messages.role must be user or assistant", "messages")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    parts: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for block in items(content, "messages.content"):
        kind = block.get("type")
        if kind == "text":
            text = text_field(block, "text", "messages.content")
            parts.append({"type": "text", "text": text})
        elif kind == "image":
            parts.append({"type": "image_url", "image_url": {"url": _image(block)}})
        elif kind == "tool_use":
            calls.append(_call(block))
        elif kind == "tool_result":
            result = _text(block.get("content") or "", "messages.content")
            call_id = text_field(block, "tool_use_id", "messages.content")
            results.append({"role": "tool", "tool_call_id": call_id, "content": result})
        elif kind not in ("thinking", "redacted_thinking"):
            raise unsupported(f"a content block of type {kind!r}", "messages.content")
    made: dict[str, Any] = {"role": role, "content": _joined(parts)}
    if calls:
        made["tool_calls"] = calls
    return [*results, made] if parts or calls or not results else results


def _joined(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Plain text where that is all: not every chat template takes a list of parts."""
    if all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return parts


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(text_field(block, "text", where) for block in items(content, where))


def _call(block: dict[str, Any]) -> dict[str, Any]:
    function = {
        "name": text_field(block, "name", "messages.content"),
        "arguments": orjson.dumps(block.get("input") or {}).decode(),
    }
    return {"id": block.get("id") or "", "type": "function", "function": function}


def _image(block: dict[str, Any]) -> str:
    source = block.get("source")
    if isinstance(source, dict) and isinstance(source.get("url"), str):
        return source["url"]
    if isinstance(source, dict) and isinstance(source.get("data"), str):
        return f"data:{source.get('media_type', 'image/png')};base64,{source['data']}"
    raise bad_request("an image needs a source with `url` or `data`", "messages.content")


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    if "input_schema" not in tool:
        raise unsupported(f"a tool of type {tool.get('type')!r}", "tools")
    function = {
        "name": text_field(tool, "name", "tools"),
        **copied(tool, "description", parameters="input_schema"),
    }
    return {"type": "function", "function": function}


def _tool_choice(choice: dict[str, Any]) -> Any:
    if choice.get("type") == "tool":
        return {"type": "function", "function": {"name": text_field(choice, "name", "tool_choice")}}
    if choice.get("type") in _CHOICES:
        return _CHOICES[choice["type"]]
    raise unsupported(f"a tool choice of type {choice.get('type')!r}", "tool_choice")
