"""The input of the Responses API as chat messages.

A client resends its whole history with every request, and cannot change it: an item without a
counterpart in chat is left out, never refused.
"""

from __future__ import annotations

from typing import Any

from tqstack.openai_api.errors import bad_request
from tqstack.router.dialects.blocks import items, text_field, unsupported
from tqstack.router.dialects.stored import input_items
from tqstack.router.dialects.tools import call_of_item

CALLS = ("function_call", "custom_tool_call", "local_shell_call")
OUTPUTS = ("function_call_output", "custom_tool_call_output", "local_shell_call_output")
_SEALED = "tqstack:"  # begins what we send as encrypted reasoning


def seal(reasoning: str) -> str:
    """Reasoning as `encrypted_content`: what a client that stores nothing sends back unchanged. It
    is the user's own machine, so nothing is hidden."""
    return _SEALED + reasoning


def history(request: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages.

    Raises:
        ApiError: 400, if the input is malformed or empty.
    """
    messages: list[dict[str, Any]] = []
    if request.get("instructions"):
        text = text_field(request, "instructions", "instructions")
        messages.append({"role": "system", "content": text})
    before, reasoning = len(messages), ""
    for item in input_items(request):
        if item.get("type") == "reasoning":
            reasoning += _reasoning(item)
        else:
            reasoning = _add(item, messages, reasoning)
    if len(messages) == before:
        raise bad_request("input must not be empty", "input")
    return messages


def dropped(request: dict[str, Any]) -> list[str]:
    """The types of the items that have no counterpart."""
    kinds = (item.get("type") or "message" for item in input_items(request))
    known = ("message", "reasoning", *CALLS, *OUTPUTS)
    return [str(kind) for kind in kinds if kind not in known]


def _add(item: dict[str, Any], messages: list[dict[str, Any]], reasoning: str) -> str:
    """Appends one item. Tool calls join the assistant's message before them. Gives back reasoning
    that still waits for the message that it led to."""
    kind = item.get("type") or "message"
    if kind == "message":
        role = text_field(item, "role", "input")
        message = {"role": role, "content": _content(item.get("content"))}
        if role == "developer":
            message["role"] = "system"
        if role != "assistant":
            messages.append(message)
            return ""
        messages.append(_with_reasoning(message, reasoning))
    elif kind in CALLS:
        if reasoning or not messages or messages[-1]["role"] != "assistant":
            messages.append(_with_reasoning({"role": "assistant", "content": ""}, reasoning))
        messages[-1].setdefault("tool_calls", []).append(call_of_item(item))
    elif kind in OUTPUTS:
        call_id = item.get("call_id") or item.get("id")
        if not isinstance(call_id, str):
            raise bad_request("input.call_id must be a string", "input")
        output = _content(item.get("output"))
        text = output if isinstance(output, str) else _texts(output)
        messages.append({"role": "tool", "tool_call_id": call_id, "content": text})
        if not isinstance(output, str):  # chat's tool messages hold text only
            messages.append({"role": "user", "content": [p for p in output if not _is_text(p)]})
    else:
        return reasoning
    return ""


def _with_reasoning(message: dict[str, Any], reasoning: str) -> dict[str, Any]:
    return {**message, "reasoning_content": reasoning} if reasoning else message


def _reasoning(item: dict[str, Any]) -> str:
    """A reasoning item's text: as it was, or as the client sends it back unread."""
    sealed = item.get("encrypted_content")
    for name in ("content", "summary"):
        parts = item.get(name)
        parts = parts if isinstance(parts, list) else []
        texts = [p["text"] for p in parts if isinstance(p, dict) and isinstance(p.get("text"), str)]
        if texts:
            return "\n".join(texts)
    if isinstance(sealed, str) and sealed.startswith(_SEALED):
        return sealed[len(_SEALED) :]
    return ""


def _content(content: Any) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    parts = [_content_part(part) for part in items(content, "input.content")]
    return _texts(parts) if all(map(_is_text, parts)) else parts


def _content_part(part: dict[str, Any]) -> dict[str, Any]:
    kind = part.get("type")
    if kind in ("input_text", "output_text", "text", "summary_text", "reasoning_text"):
        return {"type": "text", "text": text_field(part, "text", "input.content")}
    if kind == "refusal":
        return {"type": "text", "text": text_field(part, "refusal", "input.content")}
    if kind == "input_image":
        url = text_field(part, "image_url", "input.content")
        return {"type": "image_url", "image_url": {"url": url}}
    raise unsupported(f"a content part of type {kind!r}", "input.content")


def _is_text(part: dict[str, Any]) -> bool:
    return part["type"] == "text"


def _texts(parts: list[dict[str, Any]]) -> str:
    return "\n".join(part["text"] for part in parts if _is_text(part))
