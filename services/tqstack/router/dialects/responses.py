"""OpenAI's Responses API (`POST /v1/responses`) as chat completions."""

from __future__ import annotations

import itertools
import time
from typing import Any

from tqstack.openai_api.errors import ApiError, bad_request
from tqstack.openai_api.messages import merge_leading
from tqstack.router.dialects.blocks import (
    Block,
    BlockStream,
    blocks_of,
    copied,
    effort,
    named_event,
    new_id,
)
from tqstack.router.dialects.history import dropped, history, seal
from tqstack.router.dialects.stored import ResponseStore
from tqstack.router.dialects.tools import (
    Tool,
    call_item,
    choose_tools,
    free_text,
    read_tools,
)

# Fields of the request that the answer repeats.
_ECHOED = (
    "instructions",
    "temperature",
    "top_p",
    "max_output_tokens",
    "metadata",
    "previous_response_id",
    "store",
    "text",
    "reasoning",
    "top_logprobs",
)
_SEALED = "reasoning.encrypted_content"
_LOGPROBS = "message.output_text.logprobs"
REFUSED = {
    "conversation": "no conversations are kept here; send previous_response_id or the whole input",
    "prompt": "there are no stored prompts here; send instructions and input",
    "background": "an answer is given while the client waits; leave background out",
    "moderation": "nothing is moderated here",
    "context_management": "nothing compacts a conversation here; leave it out",
    "multi_agent": "one model answers here; leave it out",
}

_ITEM = {
    "type": "object",
    "properties": {
        "type": {"type": "string"},
        "role": {"type": "string"},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]},
    },
}
# A request's JSON schema, as far as its fields differ from chat's.
BODY = {
    "type": "object",
    "required": ["input"],
    "properties": {
        "input": {"anyOf": [{"type": "string"}, {"type": "array", "items": _ITEM}]},
        "instructions": {"type": ["string", "null"]},
        "model": {"type": "string"},
        "stream": {"type": "boolean"},
        "tools": {"type": "array", "items": {"type": "object", "required": ["type"]}},
        "max_output_tokens": {"type": "integer", "minimum": 1},
        "include": {"type": "array", "items": {"type": "string"}},
        "text": {"type": "object"},
        "reasoning": {"type": "object"},
        "previous_response_id": {"type": ["string", "null"]},
    },
}


class Responses:
    """The dialect.

    Args:
        store: answers that requests may refer to.
    """

    def __init__(self, store: ResponseStore | None = None):
        self._store = store or ResponseStore()

    def resolve(self, request: dict[str, Any]) -> dict[str, Any]:
        return self._store.resolve(request)

    def keep(self, request: dict[str, Any], answer: dict[str, Any]) -> None:
        self._store.keep(request, answer)

    def to_chat(self, request: dict[str, Any]) -> dict[str, Any]:
        _refuse(request)
        chat = copied(
            request,
            "model",
            "stream",
            "temperature",
            "top_p",
            "parallel_tool_calls",
            "top_logprobs",
            max_tokens="max_output_tokens",
        )
        if chat.get("top_logprobs") or _LOGPROBS in _included(request):
            chat["logprobs"] = True
        chat["messages"] = merge_leading(history(request))
        tools, choice = choose_tools(request, read_tools(request)[0])
        if tools:
            chat["tools"] = [{"type": "function", "function": tool.function} for tool in tools]
        if choice is not None:
            chat["tool_choice"] = choice
        form = _object(request, "text").get("format")
        if isinstance(form, dict) and form.get("type") == "json_schema":
            schema = copied(form, "name", "schema", "strict", "description")
            chat["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif isinstance(form, dict) and form.get("type") == "json_object":
            chat["response_format"] = {"type": "json_object"}
        if wanted := effort(_object(request, "reasoning").get("effort"), "reasoning.effort"):
            chat["reasoning_effort"] = wanted
        if chat.get("stream"):
            chat["stream_options"] = {"include_usage": True}
        return chat

    def left_out(self, request: dict[str, Any]) -> list[str]:
        return [*read_tools(request)[1], *dropped(request)]

    def from_chat(self, answer: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
        blocks, choice = blocks_of(answer)
        writer = _Items(request)
        output = [writer.item(block, writer.new_id(block), "completed") for block in blocks]
        reason = choice.get("finish_reason") or "stop"
        response = _response(request, str(answer.get("model") or ""))
        return _completed(response, output, reason, answer.get("usage") or {})

    def stream(self, request: dict[str, Any], prompt_tokens: int) -> ResponseStream:
        return ResponseStream(request)

    def error_body(self, error: ApiError) -> dict[str, Any]:
        return error.body


class InputTokens(Responses):
    """`POST /v1/responses/input_tokens`: a request for an answer that is only to be counted."""

    def to_chat(self, request: dict[str, Any]) -> dict[str, Any]:
        return super().to_chat({**request, "stream": False})


def input_tokens(tokens: int) -> dict[str, Any]:
    return {"object": "response.input_tokens", "input_tokens": tokens}


class _Items:
    """Writes blocks as output items."""

    def __init__(self, request: dict[str, Any]):
        self._tools = read_tools(request)[0]
        self._sealed = _SEALED in _included(request)

    def tool(self, block: Block) -> Tool | None:
        return self._tools.get(block.name)

    def new_id(self, block: Block) -> str:
        return new_id({"reasoning": "rs", "text": "msg", "tool": "fc"}[block.kind])

    def item(self, block: Block, item_id: str, status: str) -> dict[str, Any]:
        text = block.text
        if block.kind == "tool":
            return call_item(block, self.tool(block), item_id, status)
        item: dict[str, Any] = {"id": item_id, "status": status}
        if block.kind == "reasoning":
            content = [{"type": "reasoning_text", "text": text}] if text else []
            item |= {"type": "reasoning", "summary": [], "content": content}
            return {**item, "encrypted_content": seal(text)} if self._sealed else item
        content = [_text_part(text, block.logprobs)] if text else []
        return {**item, "type": "message", "role": "assistant", "content": content}


class ResponseStream(BlockStream):
    """`response.created`, then each item from added to done, then `response.completed`."""

    def __init__(self, request: dict[str, Any]):
        super().__init__()
        self._items = _Items(request)
        self._response = _response(request, "")
        self.final: dict[str, Any] | None = None
        self._output: list[dict[str, Any]] = []
        self._item_id = ""
        self._created = False
        self._number = itertools.count()

    def ping(self, text: str) -> bytes:
        """Codex gives up after 300 s without an event; comments do not count."""
        return self._create() or self._event("response.in_progress", response=self._response)

    def begin(self, chunk: dict[str, Any]) -> bytes:
        self._response["model"] = str(chunk.get("model") or self._response["model"])
        return self._create()

    def _create(self) -> bytes:
        if self._created:
            return b""
        self._created = True
        return b"".join(
            self._event(kind, response=self._response)
            for kind in ("response.created", "response.in_progress")
        )

    def open(self, block: Block) -> bytes:
        self._item_id = self._items.new_id(block)
        item = self._items.item(block, self._item_id, "in_progress")
        added = self._event("response.output_item.added", output_index=len(self._output), item=item)
        if block.kind != "text":
            return added
        return added + self._part("response.content_part.added", part=_text_part(""))

    def delta(self, block: Block, text: str) -> bytes:
        if block.kind == "tool":
            tool = self._items.tool(block)
            if tool and tool.kind != "function":
                return b""  # its text is inside JSON: sent when that is whole
            return self._of_item("response.function_call_arguments.delta", delta=text)
        if block.kind == "reasoning":
            return self._part("response.reasoning_text.delta", delta=text)
        return self._part("response.output_text.delta", delta=text, logprobs=self.told)

    def close(self, block: Block) -> bytes:
        text = block.text
        if block.kind == "tool":
            events = self._close_call(block)
        elif block.kind == "reasoning":
            events = self._part("response.reasoning_text.done", text=text)
        else:
            told = block.logprobs
            events = self._part("response.output_text.done", text=text, logprobs=told)
            events += self._part("response.content_part.done", part=_text_part(text, told))
        item = self._items.item(block, self._item_id, "completed")
        index = len(self._output)
        self._output.append(item)
        return events + self._event("response.output_item.done", output_index=index, item=item)

    def _close_call(self, block: Block) -> bytes:
        tool = self._items.tool(block)
        if tool and tool.kind == "local_shell":
            return b""
        if tool and tool.kind == "custom":
            text = free_text(block.text)
            delta = self._of_item("response.custom_tool_call_input.delta", delta=text)
            return delta + self._of_item("response.custom_tool_call_input.done", input=text)
        name = tool.own_name if tool else block.name
        kind = "response.function_call_arguments.done"
        return self._of_item(kind, arguments=block.text, name=name)

    def finish(self) -> bytes:
        reason = self.choice.get("finish_reason") or "stop"
        final = self.final = _completed(self._response, self._output, reason, self.usage)
        return self._event(f"response.{final['status']}", response=final)

    def fail(self, error: ApiError) -> bytes:
        """Codex reads why from the first event, the SDK from the second."""
        inner = error.body["error"]
        told = {"code": inner["code"] or "server_error", "message": inner["message"]}
        failed = {**self._response, "status": "failed", "error": told, "output": self._output}
        return self._event("response.failed", response=failed) + self._event("error", **inner)

    def _part(self, kind: str, **data: Any) -> bytes:
        return self._of_item(kind, content_index=0, **data)

    def _of_item(self, kind: str, **data: Any) -> bytes:
        return self._event(kind, item_id=self._item_id, output_index=len(self._output), **data)

    def _event(self, kind: str, **data: Any) -> bytes:
        return named_event({**data, "type": kind, "sequence_number": next(self._number)})


def _refuse(request: dict[str, Any]) -> None:
    for name, why in REFUSED.items():
        if request.get(name):
            raise bad_request(f"{name} is not supported: {why}", name, "unsupported_value")
    if request.get("truncation") not in (None, "disabled"):
        raise bad_request(
            "truncation: nothing is cut from a conversation here; a prompt that is too long is "
            "refused, so send a shorter one",
            "truncation",
            "unsupported_value",
        )
    if _object(request, "text").get("verbosity") not in (None, "medium"):
        raise bad_request(
            "text.verbosity: models here have no such dial; say it in the instructions",
            "text.verbosity",
            "unsupported_value",
        )


def _response(request: dict[str, Any], model: str) -> dict[str, Any]:
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "model": model or str(request.get("model") or ""),
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
    thought = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    return {
        **response,
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": output,
        "usage": {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": cached},
            "output_tokens": answer,
            "output_tokens_details": {"reasoning_tokens": thought},
            "total_tokens": prompt + answer,
        },
    }


def _text_part(text: str, logprobs: list[Any] | None = None) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs or []}


def _included(request: dict[str, Any]) -> list[Any]:
    value = request.get("include")
    return value if isinstance(value, list) else []


def _object(request: dict[str, Any], name: str) -> dict[str, Any]:
    value = request.get(name)
    return value if isinstance(value, dict) else {}
