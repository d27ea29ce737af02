"""What a request asks of a backend beyond text in, text out."""

from __future__ import annotations

from typing import Any

_NONE: frozenset[str] = frozenset()


def needs_of(request: dict[str, Any], images: int = 0) -> frozenset[str]:
    """Features that it uses: `tools`, `logprobs`, `json_object`, `json_schema`, `images`."""
    found = [name for name in ("tools", "logprobs") if request.get(name)]
    form = request.get("response_format")
    if isinstance(form, dict) and form.get("type") in ("json_object", "json_schema"):
        found.append(form["type"])
    if images:
        found.append("images")
    return frozenset(found) if found else _NONE


def is_background(request: dict[str, Any]) -> bool:
    """A prompt that Open WebUI sends by itself, for a title, tags or follow-up questions."""
    messages = request.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    content = last.get("content") if isinstance(last, dict) else None
    return isinstance(content, str) and content.startswith("### Task:")
