"""A request in the words that Ollama reads, and what of a request it does not."""

from __future__ import annotations

from typing import Any

from tqstack.openai_api.fields import OLLAMA_IGNORES

_DEFAULTS: dict[str, Any] = {"tool_choice": "auto", "n": 1, "verbosity": "medium", "best_of": 1}
_OFF_BY_DEFAULT = frozenset({"parallel_tool_calls", "add_generation_prompt"})  # when true


# Some of its templates leave the form `json_object` alone; a schema they all keep to.
_ANY_OBJECT = {
    "type": "json_schema",
    "json_schema": {"name": "object", "schema": {"type": "object"}},
}


def amended(request: dict[str, Any]) -> dict[str, Any]:
    """The request itself, unless something has to be said in another way."""
    changes: dict[str, Any] = {}
    prompt, form = request.get("prompt"), request.get("response_format")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        changes["prompt"] = prompt[0]
    if isinstance(form, dict) and form.get("type") == "json_object":
        changes["response_format"] = _ANY_OBJECT
    limit = request.get("max_completion_tokens")
    if limit is not None and request.get("max_tokens") is None:
        changes["max_tokens"] = limit
    messages = request.get("messages") or []
    if any(message.get("role") == "developer" for message in messages):
        changes["messages"] = [
            {**message, "role": "system"} if message.get("role") == "developer" else message
            for message in messages
        ]
    return {**request, **changes} if changes else request


def ignored(path: str, request: dict[str, Any]) -> list[str]:
    """Fields of a request that ask for something and that Ollama does not read."""
    names = OLLAMA_IGNORES.get(path, set()) & request.keys()
    return sorted(name for name in names if _asks(name, request[name]))


def _asks(name: str, value: Any) -> bool:
    if value in (None, "", [], {}) or value == _DEFAULTS.get(name):
        return False
    return not value if name in _OFF_BY_DEFAULT else bool(value)
