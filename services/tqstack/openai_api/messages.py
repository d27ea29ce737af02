"""What both services do to the messages of a chat before a model's template sees them."""

from __future__ import annotations

from typing import Any

SYSTEM = ("system", "developer")  # the second is OpenAI's newer name for the first


def merge_leading(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The chat with one system message at its beginning, where there were several: templates of
    many families take one, and there only. Later ones stay where they are."""
    leading: list[dict[str, Any]] = []
    for message in messages:
        if message.get("role") not in SYSTEM:
            break
        leading.append(message)
    if not leading or (len(leading) == 1 and leading[0]["role"] == "system"):
        return messages
    rest = messages[len(leading) :]
    merged = {**leading[0], "role": "system", "content": _joined(leading)}
    return [merged, *rest]


def _joined(messages: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    contents = [message["content"] for message in messages if message.get("content")]
    if all(isinstance(content, str) for content in contents):
        return "\n\n".join(contents)
    parts: list[dict[str, Any]] = []
    for content in contents:
        text = {"type": "text", "text": content}
        parts += [text] if isinstance(content, str) else content
    return parts


def fold_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The chat without system messages past its beginning, for templates that refuse those: each
    becomes the beginning of the user's next turn, or a turn of the user's own, so that what comes
    before stays as it was."""
    folded: list[dict[str, Any]] = []
    held: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        role = message.get("role")
        if i and role in SYSTEM:
            held.append(message)
            continue
        if held and role == "user":
            message = {**message, "content": _joined([*held, message])}
        elif held:
            folded.append({"role": "user", "content": _joined(held)})
        held = []
        folded.append(message)
    return [*folded, {"role": "user", "content": _joined(held)}] if held else folded
