"""A scripted model that works as an agent's would: it calls a tool once, reads what the tool gave,
and says so."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from router.scripted import SSE, Script, Wire, usage_of

Arguments = Callable[[dict[str, Any]], dict[str, Any]]


def works(tool: str, arguments: Arguments, says: str = "The tool gave: ") -> Script:
    """Calls `tool` with `arguments` of its function; then repeats the result.

    A request without that tool is answered with a few words.
    """

    async def script(wire: Wire) -> None:
        request = wire.seen.json
        functions = {t["function"]["name"]: t["function"] for t in request.get("tools") or ()}
        results = [m["content"] for m in request["messages"] if m["role"] == "tool"]
        if results:
            message: dict[str, Any] = {"content": says + str(results[-1])[-200:]}
        elif tool in functions:
            function = {"name": tool, "arguments": json.dumps(arguments(functions[tool]))}
            call = {"id": "call_1", "type": "function", "function": function}
            message = {"reasoning_content": "I need a tool.", "tool_calls": [call]}
        else:
            message = {"content": "No such tool."}
        await answer(wire, message)

    return script


def parallel(*names: str, index: int | None = 0) -> Script:
    """Calls several tools at once, and gives all of them the same index, or none."""

    async def script(wire: Wire) -> None:
        calls = [
            {
                "id": f"call_{name}",
                "type": "function",
                "function": {"name": name, "arguments": json.dumps({"of": name})},
                **({} if index is None else {"index": index}),
            }
            for name in names
        ]
        await answer(wire, {"tool_calls": calls})

    return script


def says_json(value: Any) -> Script:
    async def script(wire: Wire) -> None:
        await answer(wire, {"content": json.dumps(value)})

    return script


async def answer(wire: Wire, message: dict[str, Any], **choice: Any) -> None:
    """One message as the request wants it: whole, or as a stream of one delta for each part."""
    finish = choice.pop("finish_reason", "tool_calls" if message.get("tool_calls") else "stop")
    usage = {**usage_of(30, 9), "prompt_tokens_details": {"cached_tokens": 20}}
    if not wire.seen.json.get("stream"):
        whole = {"role": "assistant", "content": None, **message}
        made = {"index": 0, "message": whole, "finish_reason": finish, **choice}
        body = {"id": "c", "object": "chat.completion", "created": 1, "model": "demo"}
        await wire.answer(200, json.dumps({**body, "choices": [made], "usage": usage}).encode())
        return
    await wire.raw(SSE)
    for name, value in message.items():
        for one in value if isinstance(value, list) else [value]:
            delta = {name: [one] if isinstance(value, list) else one}
            await wire.chunk(_chunk({"index": 0, "delta": delta, "finish_reason": None}))
    await wire.chunk(_chunk({"index": 0, "delta": {}, "finish_reason": finish, **choice}))
    await wire.chunk(_chunk(None, usage=usage))
    await wire.chunk(b"data: [DONE]\n\n")
    await wire.end()


def _chunk(choice: dict[str, Any] | None, **extra: Any) -> bytes:
    body = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "demo"}
    body |= {"choices": [choice] if choice else [], **extra}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


ROME = {"name": "Rome", "people": 3}


def helpful(wire: Wire) -> Awaitable[None]:
    """Adds with the tool `add`; names a city in the form that is asked for; else just talks."""
    request = wire.seen.json
    names = {t["function"]["name"] for t in request.get("tools") or ()}
    names |= {f["name"] for f in request.get("functions") or ()}
    if "add" in names:
        return works("add", lambda _: {"a": 40, "b": 2})(wire)
    if request.get("functions"):
        function = {"name": min(names), "arguments": json.dumps(ROME)}
        return answer(wire, {"function_call": function}, finish_reason="function_call")
    if names:
        return works(min(names), lambda _: ROME)(wire)
    asked = str(request["messages"]).lower()
    return (
        says_json(ROME)(wire) if "json" in asked or request.get("response_format") else talk(wire)
    )


async def talk(wire: Wire) -> None:
    await answer(wire, {"content": "It is 42."})
