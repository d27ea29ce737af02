"""Tools of the Responses API as functions, the one kind that chat has, and their calls back again.

A namespace's tools get its name in front of theirs; a tool that takes free text becomes a function
with one string. What runs at OpenAI (searching the web, ...) cannot run here, and is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from tqstack.openai_api.errors import bad_request
from tqstack.router.dialects.blocks import Block, copied, items, text_field

TEXT = "input"  # the argument that holds a free-form tool's text
_FREE_FORM = {
    "type": "object",
    "properties": {TEXT: {"type": "string", "description": "The tool's whole input, as it is."}},
    "required": [TEXT],
    "additionalProperties": False,
}
_SHELL = {
    "type": "object",
    "properties": {
        "command": {"type": "array", "items": {"type": "string"}},
        "working_directory": {"type": "string"},
        "timeout_ms": {"type": "integer"},
    },
    "required": ["command"],
}


@dataclass(frozen=True)
class Tool:
    """A tool of a request.

    Attributes:
        kind: `function`, `custom` or `local_shell`.
        name: as chat knows it.
        own_name: as the client does, within its `namespace`.
    """

    kind: str
    name: str
    own_name: str
    namespace: str | None
    function: dict[str, Any]


def flat_name(name: str, namespace: Any) -> str:
    """A tool's name in chat."""
    if not isinstance(namespace, str) or not namespace:
        return name
    return f"{namespace}{name}" if namespace.endswith("__") else f"{namespace}__{name}"


def read_tools(request: dict[str, Any]) -> tuple[dict[str, Tool], list[str]]:
    """The tools by their names in chat, and the types of those that are left out.

    Raises:
        ApiError: 400, if one is malformed, or none is left.
    """
    if not request.get("tools"):
        return {}, []
    tools: dict[str, Tool] = {}
    left_out: list[str] = []
    for tool in items(request["tools"], "tools"):
        _read(tool, None, tools, left_out)
    if not tools:
        raise bad_request(
            f"tools: {', '.join(left_out)} would run on OpenAI's servers, and nothing runs it "
            "here; send tools of type function or custom",
            "tools",
            "unsupported_value",
        )
    return tools, left_out


def _read(
    tool: dict[str, Any], namespace: str | None, tools: dict[str, Tool], left_out: list[str]
) -> None:
    kind = tool.get("type")
    if kind == "namespace":
        for inner in items(tool.get("tools"), "tools"):
            _read(inner, text_field(tool, "name", "tools"), tools, left_out)
    elif kind in ("function", "custom"):
        name = text_field(tool, "name", "tools")
        flat = flat_name(name, namespace)
        function = {"name": flat, **copied(tool, "description", "parameters", "strict")}
        if kind == "custom":
            function = {"name": flat, "description": _described(tool), "parameters": _FREE_FORM}
        tools[flat] = Tool(kind, flat, name, namespace, function)
    elif kind == "local_shell":
        function = {"name": kind, "description": "Runs a command.", "parameters": _SHELL}
        tools[kind] = Tool(kind, kind, kind, None, function)
    else:
        left_out.append(str(kind))


def _described(tool: dict[str, Any]) -> str:
    """A free-form tool's description, with the grammar that its text must follow."""
    form, text = tool.get("format"), str(tool.get("description") or "")
    if isinstance(form, dict) and form.get("type") == "grammar":
        text += f"\n\nThe input must follow this {form.get('syntax')} grammar:\n"
        text += str(form.get("definition") or "")
    return text.strip()


def choose_tools(request: dict[str, Any], tools: dict[str, Tool]) -> tuple[list[Tool], Any]:
    """The tools that may be called, and chat's `tool_choice`.

    Raises:
        ApiError: 400, if a tool is chosen that is not there.
    """
    choice = request.get("tool_choice")
    if not isinstance(choice, dict):
        return list(tools.values()), choice
    if choice.get("type") == "allowed_tools":
        allowed = [_chosen(one, tools) for one in items(choice.get("tools"), "tool_choice.tools")]
        return allowed, choice.get("mode") or "auto"
    name = _chosen(choice, tools).name
    return list(tools.values()), {"type": "function", "function": {"name": name}}


def _chosen(choice: dict[str, Any], tools: dict[str, Tool]) -> Tool:
    name = choice.get("name") or choice.get("type")
    flat = flat_name(str(name), choice.get("namespace"))
    if flat not in tools:
        raise bad_request(f"tool_choice: there is no tool {name!r} here", "tool_choice")
    return tools[flat]


def call_item(block: Block, tool: Tool | None, item_id: str, status: str) -> dict[str, Any]:
    """A tool call as an output item of the kind that its tool has."""
    item = {"id": item_id, "status": status, "call_id": block.call_id}
    kind = tool.kind if tool else "function"
    if tool and kind == "local_shell":
        action = {"type": "exec", "env": {}, **_arguments(block.text)}
        return {**item, "type": "local_shell_call", "action": action}
    item["name"] = tool.own_name if tool else block.name
    if tool and tool.namespace:
        item["namespace"] = tool.namespace
    if kind == "custom":
        return {**item, "type": "custom_tool_call", "input": free_text(block.text)}
    return {**item, "type": "function_call", "arguments": block.text}


def free_text(arguments: str) -> str:
    """The text of a free-form call; the arguments themselves, if the model wrote them so."""
    text = _arguments(arguments).get(TEXT)
    return text if isinstance(text, str) else arguments


def call_of_item(item: dict[str, Any]) -> dict[str, Any]:
    """A call of the history as chat's tool call.

    Raises:
        ApiError: 400, if it is malformed.
    """
    kind = item.get("type")
    call_id = item.get("call_id") or item.get("id") or ""
    if kind == "local_shell_call":
        action = item.get("action")
        wanted = copied(action if isinstance(action, dict) else {}, *_SHELL["properties"])
        function = {"name": "local_shell", "arguments": orjson.dumps(wanted).decode()}
    elif kind == "custom_tool_call":
        arguments = orjson.dumps({TEXT: text_field(item, "input", "input")}).decode()
        name = flat_name(text_field(item, "name", "input"), item.get("namespace"))
        function = {"name": name, "arguments": arguments}
    else:
        name = flat_name(text_field(item, "name", "input"), item.get("namespace"))
        function = {"name": name, "arguments": text_field(item, "arguments", "input")}
    return {"id": call_id, "type": "function", "function": function}


def _arguments(text: str) -> dict[str, Any]:
    try:
        value = orjson.loads(text or "{}")
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}
