"""OpenAI's Responses API (`POST /v1/responses`) as chat completions. It keeps no state."""

from __future__ import annotations

import itertools
import time
from typing import Any

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
# Fields of the request that the answer repeats.
_ECHOED = ("instructions", "temperature", "top_p", "max_output_tokens", "metadata")


class Responses:
    """The dialect."""

    def to_chat(self, request: dict[str, Any]) -> dict[str, Any]:
        for name in ("previous_response_id", "conversation", "prompt"):
            if request.get(name):
                raise bad_request(
                    f"{name} is not supported: nothing is stored here; send the whole input", name
                )
        chat = copied(
            request,
            "model",
            "stream",
            "temperature",
            "top_p",
            "parallel_tool_calls",
            max_tokens="max_output_tokens",
        )
        chat["messages"] = _messages(request)
        if request.get("tools"):
            chat["tools"] = [_tool(tool) for tool in items(request["tools"], "tools")]
        choice = request.get("tool_choice")
        if isinstance(choice, dict):
            name = text_field(choice, "name", "tool_choice")
            chat["tool_choice"] = {"type": "function", "function": {"name": name}}
        elif choice is not None:
            chat["tool_choice"] = choice
        form = (request.get("text") or {}).get("format") if _is_dict(request, "text") else None
        if isinstance(form, dict) and form.get("type") == "json_schema":
            schema = copied(form, "name", "schema", "strict", "description")
            chat["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif isinstance(form, dict) and form.get("type") == "json_object":
            chat["response_format"] = {"type": "json_object"}
        if _is_dict(request, "reasoning"):
            chat |= copied(request["reasoning"], reasoning_effort="effort")
        if chat.get("stream"):
            chat["stream_options"] = {"include_usage": True}
        return chat

    def from_chat(self, answer: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
        blocks, reason = blocks_of(answer)
        response = _response(request, answer)
        output = [_item(block, _item_id(block), "completed") for block in blocks]
        return _completed(response, output, reason, answer.get("usage") or {})

    def stream(self, request: dict[str, Any]) -> ResponseStream:
        return ResponseStream(request)

    def error_body(self, error: ApiError) -> dict[str, Any]:
        return error.body

    def error_event(self, error: ApiError) -> bytes:
        inner = error.body["error"]
        return named_event({**inner, "type": "error", "sequence_number": 0})


class ResponseStream(BlockStream):
    """`response.created`, then each item from added to done, then `response.completed`."""

    def __init__(self, request: dict[str, Any]):
        super().__init__()
        self._request = request
        self._response: dict[str, Any] = {}
        self._output: list[dict[str, Any]] = []
        self._item_id = ""
        self._number = itertools.count()

    def begin(self, chunk: dict[str, Any]) -> bytes:
        self._response = _response(self._request, chunk)
        return b"".join(
            self._event(kind, response=self._response)
            for kind in ("response.created", "response.in_progress")
        )

    def open(self, block: Block) -> bytes:
        self._item_id = _item_id(block)
        item = _item(block, self._item_id, "in_progress")
        added = self._event("response.output_item.added", output_index=len(self._output), item=item)
        if block.kind != "text":
            return added
        return added + self._part("response.content_part.added", part=_text_part(""))

    def delta(self, block: Block, text: str) -> bytes:
        if block.kind == "tool":
            return self._of_item("response.function_call_arguments.delta", delta=text)
        if block.kind == "reasoning":
            return self._part("response.reasoning_text.delta", delta=text)
        return self._part("response.output_text.delta", delta=text, logprobs=[])

    def close(self, block: Block) -> bytes:
        text = block.text
        if block.kind == "tool":
            kind = "response.function_call_arguments.done"
            events = self._of_item(kind, arguments=text, name=block.name)
        elif block.kind == "reasoning":
            events = self._part("response.reasoning_text.done", text=text)
        else:
            events = self._part("response.output_text.done", text=text, logprobs=[])
            events += self._part("response.content_part.done", part=_text_part(text))
        item = _item(block, self._item_id, "completed")
        index = len(self._output)
        self._output.append(item)
        return events + self._event("response.output_item.done", output_index=index, item=item)

    def finish(self) -> bytes:
        done = _completed(self._response, self._output, self.finish_reason, self.usage)
        return self._event(f"response.{done['status']}", response=done)

    def _part(self, kind: str, **data: Any) -> bytes:
        return self._of_item(kind, content_index=0, **data)

    def _of_item(self, kind: str, **data: Any) -> bytes:
        return self._event(kind, item_id=self._item_id, output_index=len(self._output), **data)

    def _event(self, kind: str, **data: Any) -> bytes:
        return named_event({"type": kind, "sequence_number": next(self._number), **data})


def _response(request: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": f"resp_{next(_ids)}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "model": str(answer.get("model") or request.get("model") or ""),
        "output": [],
        "error": None,
        "incomplete_details": None,
        "parallel_tool_calls": request.get("parallel_tool_calls") is not False,
        "tool_choice": request.get("tool_choice") or "auto",
        "tools": request.get("tools") or [],
        "usage": None,
        **{name: request.get(name) for name in _ECHOED},
    }


def _completed(
    response: dict[str, Any], output: list[dict[str, Any]], reason: str, usage: dict[str, Any]
) -> dict[str, Any]:
    cut = reason == "length"
    prompt, answer = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return {
        **response,
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": output,
        "usage": {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": cached},
            "output_tokens": answer,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + answer,
        },
    }


def _item_id(block: Block) -> str:
    prefix = {"reasoning": "rs", "text": "msg", "tool": "fc"}[block.kind]
    return f"{prefix}_{next(_ids)}"


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _item(block: Block, item_id: str, status: str) -> dict[str, Any]:
    item: dict[str, Any] = {"id": item_id, "status": status}
    text = block.text
    if block.kind == "tool":
        call = {"call_id": block.call_id, "name": block.name, "arguments": text}
        return {**item, "type": "function_call", **call}
    if block.kind == "reasoning":
        content = [{"type": "reasoning_text", "text": text}] if text else []
        return {**item, "type": "reasoning", "summary": [], "content": content}
    content = [_text_part(text)] if text else []
    return {**item, "type": "message", "role": "assistant", "content": content}


def _messages(request: dict[str, Any]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if request.get("instructions"):
        text = text_field(request, "instructions", "request")
        messages.append({"role": "system", "content": text})
    given = request.get("input")
    if isinstance(given, str) and given:
        return [*messages, {"role": "user", "content": given}]
    for item in items(given, "input"):
        _add(item, messages)
    if not messages:
        raise bad_request("input must not be empty", "input")
    return messages


def _add(item: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    """Appends one input item; tool calls join the assistant's message before them."""
    kind = item.get("type") or "message"
    if kind == "message":
        role = text_field(item, "role", "input")
        content = _content(item.get("content"))
        messages.append({"role": "system" if role == "developer" else role, "content": content})
    elif kind == "function_call":
        function = {name: text_field(item, name, "input") for name in ("name", "arguments")}
        call_id = text_field(item, "call_id", "input")
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        calls = messages[-1].setdefault("tool_calls", [])
        calls.append({"id": call_id, "type": "function", "function": function})
    elif kind == "function_call_output":
        call_id, output = text_field(item, "call_id", "input"), _content(item.get("output"))
        messages.append({"role": "tool", "tool_call_id": call_id, "content": output})
    elif kind != "reasoning":
        raise unsupported(f"an input item of type {kind!r}", "input")


def _content(content: Any) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    parts = [_content_part(part) for part in items(content, "input.content")]
    if all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return parts


def _content_part(part: dict[str, Any]) -> dict[str, Any]:
    kind = part.get("type")
    if kind in ("input_text", "output_text", "text"):
        return {"type": "text", "text": text_field(part, "text", "input.content")}
    if kind == "refusal":
        return {"type": "text", "text": text_field(part, "refusal", "input.content")}
    if kind == "input_image":
        url = text_field(part, "image_url", "input.content")
        return {"type": "image_url", "image_url": {"url": url}}
    raise unsupported(f"a content part of type {kind!r}", "input.content")


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise unsupported(f"a tool of type {tool.get('type')!r}", "tools")
    name = text_field(tool, "name", "tools")
    return {
        "type": "function",
        "function": {"name": name, **copied(tool, "description", "parameters", "strict")},
    }


def _is_dict(request: dict[str, Any], name: str) -> bool:
    return isinstance(request.get(name), dict)
