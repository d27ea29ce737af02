"""The messages of Anthropic's Messages API as chat messages."""

from __future__ import annotations

from typing import Any

import orjson

from tqstack.openai_api.errors import bad_request
from tqstack.router.dialects.blocks import items, text_field, unsupported

WHERE = "messages.content"
# Claude Code's first line of the system prompt. It changes with every request, so that no prompt
# would begin as the one before.
ATTRIBUTION = "x-anthropic-billing-header:"
# What tools that run at Anthropic, or its compaction, have left in a history.
_HOSTED = ("server_tool_use", "mcp_tool_use", "container_upload", "compaction", "fallback")
_SILENT = ("redacted_thinking", "tool_reference")


def without_attribution(request: dict[str, Any]) -> dict[str, Any]:
    """The request without that line."""
    system = request.get("system")
    if isinstance(system, str) and system.startswith(ATTRIBUTION):
        return {**request, "system": system.partition("\n")[2].lstrip("\n")}
    if isinstance(system, list):
        kept = [block for block in system if not _is_attribution(block)]
        if len(kept) < len(system):
            return {**request, "system": kept}
    return request


def _is_attribution(block: Any) -> bool:
    text = block.get("text") if isinstance(block, dict) else None
    return isinstance(text, str) and text.startswith(ATTRIBUTION)


def conversation(request: dict[str, Any]) -> list[dict[str, Any]]:
    """System prompt and messages.

    Raises:
        ApiError: 400, if they are malformed, or hold what chat cannot.
    """
    messages: list[dict[str, Any]] = []
    if request.get("system"):
        messages.append({"role": "system", "content": text_of(request["system"], "system")})
    given = items(request.get("messages"), "messages")
    if not given:
        raise bad_request("messages must not be empty", "messages")
    for message in given:
        messages += _Turn(message).messages()
    return messages


def dropped(request: dict[str, Any]) -> list[str]:
    """The types of the blocks that have no counterpart in chat."""
    found = []
    for message in items(request.get("messages"), "messages"):
        content = message.get("content")
        blocks = content if isinstance(content, list) else []
        found += [block["type"] for block in blocks if isinstance(block, dict) and _drops(block)]
    return found


def _drops(block: dict[str, Any]) -> bool:
    kind = block.get("type")
    if not isinstance(kind, str):
        return False
    hosted_result = kind.endswith("_tool_result")  # `web_search_tool_result` and its like
    return kind in _HOSTED or kind in _SILENT or hosted_result


class _Turn:
    """One message as one or more: tool results are messages of their own in chat."""

    def __init__(self, message: dict[str, Any]):
        self._role = message.get("role")
        if self._role not in ("user", "assistant", "system"):
            raise bad_request("messages.role must be user, assistant or system", "messages")
        self._parts: list[dict[str, Any]] = []
        self._calls: list[dict[str, Any]] = []
        self._results: list[dict[str, Any]] = []
        self._reasoning: list[str] = []
        content = message.get("content")
        if isinstance(content, str):
            self._parts.append(_text_part(content))
        else:
            for block in items(content, WHERE):
                self._add(block)

    def messages(self) -> list[dict[str, Any]]:
        made: dict[str, Any] = {"role": self._role, "content": _joined(self._parts)}
        if self._reasoning:
            made["reasoning_content"] = "\n".join(self._reasoning)
        if self._calls:
            made["tool_calls"] = self._calls
        only_results = self._results and not (self._parts or self._calls)
        return self._results if only_results else [*self._results, made]

    def _add(self, block: dict[str, Any]) -> None:
        kind = block.get("type")
        if kind == "thinking":
            self._reasoning.append(text_field(block, "thinking", WHERE))
        elif kind == "tool_use":
            self._calls.append(_call(block))
        elif kind == "tool_result":
            self._add_result(block)
        elif not _drops(block):
            self._parts += _parts_of(block)

    def _add_result(self, block: dict[str, Any]) -> None:
        """Chat's tool messages hold text: images of a result follow in the user's message."""
        content = block.get("content") or ""
        if isinstance(content, str):
            parts = [_text_part(content)]
        else:
            blocks = [one for one in items(content, WHERE) if not _drops(one)]
            parts = [part for one in blocks for part in _parts_of(one)]
        text = "\n".join(part["text"] for part in parts if part["type"] == "text")
        if block.get("is_error") and not text.lower().startswith("error"):
            text = f"Error: {text}"
        call_id = text_field(block, "tool_use_id", WHERE)
        self._results.append({"role": "tool", "tool_call_id": call_id, "content": text})
        self._parts += [part for part in parts if part["type"] != "text"]


def _parts_of(block: dict[str, Any]) -> list[dict[str, Any]]:
    """A block of content as parts of a chat message."""
    kind = block.get("type")
    if kind == "text":
        return [_text_part(text_field(block, "text", WHERE))]
    if kind == "image":
        return [{"type": "image_url", "image_url": {"url": _image(block)}}]
    if kind == "document":
        return _document(block)
    if kind == "search_result":
        text = text_of(block.get("content") or "", WHERE)
        head = f"{block.get('title') or ''} ({block.get('source') or ''})"
        return [_text_part(f"{head}\n{text}")]
    raise unsupported(f"a content block of type {kind!r}", WHERE)


def _document(block: dict[str, Any]) -> list[dict[str, Any]]:
    source = block.get("source")
    source = source if isinstance(source, dict) else {}
    if source.get("type") == "text":
        parts = [_text_part(text_field(source, "data", WHERE))]
    elif source.get("type") == "content":
        content = source.get("content")
        if isinstance(content, str):
            parts = [_text_part(content)]
        else:
            parts = [part for one in items(content, WHERE) for part in _parts_of(one)]
    else:
        raise bad_request(
            "a document must have a source of type text or content here: nothing reads PDF; send "
            "its text",
            WHERE,
            "unsupported_value",
        )
    heads = [str(block[name]) for name in ("title", "context") if block.get(name)]
    return [*map(_text_part, heads), *parts]


def _joined(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Plain text where that is all: not every chat template takes a list of parts."""
    if all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return parts


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def text_of(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(text_field(block, "text", where) for block in items(content, where))


def _call(block: dict[str, Any]) -> dict[str, Any]:
    function = {
        "name": text_field(block, "name", WHERE),
        "arguments": orjson.dumps(block.get("input") or {}).decode(),
    }
    return {"id": block.get("id") or "", "type": "function", "function": function}


def _image(block: dict[str, Any]) -> str:
    source = block.get("source")
    if isinstance(source, dict) and isinstance(source.get("url"), str):
        return source["url"]
    if isinstance(source, dict) and isinstance(source.get("data"), str):
        return f"data:{source.get('media_type', 'image/png')};base64,{source['data']}"
    raise bad_request("an image needs a source with `url` or `data`", WHERE)
