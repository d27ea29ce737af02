"""What a request asks of a backend beyond text in, text out."""

from __future__ import annotations

from typing import Any

# All that a request can ask for, in the words of a `/health`'s `capabilities`.
FEATURES = frozenset(
    {
        "tools",
        "tool_choice",
        "choices",
        "prompts",
        "embeddings",
        "images",
        "tokenize",
        "logprobs",
        "text_logprobs",
        "logit_bias",
        "echo",
        "json_object",
        "json_schema",
        "guided",
    }
)
_NONE: frozenset[str] = frozenset()
_AS_FIELDS = frozenset({"tools", "logprobs", "logit_bias", "echo"})
# Names that vLLM and llama.cpp have for the form of an answer.
_GUIDES = frozenset(
    {
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "structured_outputs",
        "json_schema",
        "grammar",
    }
)


def needs_of(request: dict[str, Any], images: int = 0) -> frozenset[str]:
    """Features that it uses, in the words of the sidecar's `capabilities`."""
    found = {name for name in _AS_FIELDS & request.keys() if request[name]}
    if any(request[name] for name in _GUIDES & request.keys()):
        found.add("guided")
    form, choice = request.get("response_format"), request.get("tool_choice")
    if isinstance(form, dict) and form.get("type") in ("json_object", "json_schema"):
        found.add(form["type"])
    if choice == "required" or isinstance(choice, dict):
        found.add("tool_choice")
    if "prompt" in request:
        found |= _needs_of_text(request)
    if any(isinstance(count := request.get(n), int) and count > 1 for n in ("n", "best_of")):
        found.add("choices")
    if images:
        found.add("images")
    return frozenset(found) if found else _NONE


def _needs_of_text(request: dict[str, Any]) -> set[str]:
    prompt, found = request["prompt"], set()
    # One text in a list is as good as the text.
    if isinstance(prompt, list) and not (len(prompt) == 1 and isinstance(prompt[0], str)):
        found.add("prompts")
    if request.get("logprobs"):
        found.add("text_logprobs")
    return found


def is_background(request: dict[str, Any]) -> bool:
    """A prompt that Open WebUI sends by itself, for a title, tags or follow-up questions."""
    messages = request.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    content = last.get("content") if isinstance(last, dict) else None
    return isinstance(content, str) and content.startswith("### Task:")
