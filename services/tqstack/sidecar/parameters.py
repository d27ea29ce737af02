"""What the parameters of a tool may be, for families that write them one by one: texts as they
are, all else as JSON. Their parsers read `type` alone."""

from __future__ import annotations

from typing import Any

from tqstack.openai_api.errors import bad_request

ANY_TEXT = "/(?s:.*)/"
_DATE = "[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])"  # a day that every month has
_CLOCK = "([01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_CLOCK}:[0-5][0-9](\.[0-9]{{1,6}})?(Z|[+-]{_CLOCK})"
_BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = rf"{_LABEL}(\.{_LABEL})*"
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    "ipv4": rf"{_BYTE}(\.{_BYTE}){{3}}",
    "hostname": _HOST,
    "email": rf"[A-Za-z0-9_+-]+(\.[A-Za-z0-9_+-]+)*@{_HOST}",
    "uri": r"[A-Za-z][A-Za-z0-9+.-]*:([A-Za-z0-9._~:/?#@!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+",
}
Schema = dict[str, Any]
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
_TYPES |= {list: "array", dict: "object"}
_VALUES = frozenset({"const", "enum", "default", "examples"})  # no schemas in these
_HOPS = 16  # references that lead to references


def resolved(schema: Any, root: Schema) -> Schema:
    """What a reference inside `root` names; the schema itself if it is none, or leads nowhere."""
    for _ in range(_HOPS):
        reference = schema.get("$ref") if isinstance(schema, dict) else None
        if not isinstance(reference, str) or not reference.startswith("#/"):
            break
        target: Any = root
        for name in reference[2:].split("/"):
            target = target.get(name) if isinstance(target, dict) else None
        if not isinstance(target, dict):
            break
        schema = target
    return schema if isinstance(schema, dict) else {}


def options_of(schema: Schema) -> list[Any]:
    found = schema.get("anyOf") or schema.get("oneOf")
    return found if isinstance(found, list) else []


def types_of(schema: Any, root: Schema, depth: int = 0) -> frozenset[str]:
    """JSON's words for what it allows; none: it does not say."""
    schema = resolved(schema, root)
    if isinstance(kind := schema.get("type"), str):
        return frozenset({kind})
    if isinstance(kind, list):
        return frozenset(map(str, kind))
    if "const" in schema or isinstance(schema.get("enum"), list):
        values = [schema["const"]] if "const" in schema else schema["enum"]
        return frozenset(_TYPES[type(value)] for value in values)
    each = [types_of(one, root, depth + 1) for one in options_of(schema)] if depth < _HOPS else []
    return frozenset().union(*each) if all(each) else frozenset()


def with_one_type(tools: list[Schema] | None) -> list[Schema] | None:
    """The tools, each parameter with the type that a parser is to read it as.

    One that may be null, or is a reference, has its own type; of several types without text
    `array` stands for all, for that is read as JSON.
    """
    return [_with_one_type(tool) for tool in tools] if tools else tools


def _with_one_type(tool: Schema) -> Schema:
    root, properties = _parameters(tool)
    if not properties:
        return tool
    read = {name: _one_type(own, types_of(own, root)) for name, own in properties.items()}
    return {**tool, "function": {**tool["function"], "parameters": {**root, "properties": read}}}


def _one_type(own: Any, types: frozenset[str]) -> Any:
    types -= {"null"}
    if len(types) > 1 and "string" in types:
        return {"anyOf": [{"type": kind} for kind in sorted(types)]}
    return {"type": next(iter(types)) if len(types) == 1 else "array"} if types else own


def with_nulls(arguments: Any, name: str, tools: list[Schema]) -> Any:
    """Arguments as they were read, where `null` was taken for a text and a null is meant, or the
    other way round."""
    tool = next((tool for tool in tools if tool["function"]["name"] == name), None)
    if tool is None or not isinstance(arguments, dict):
        return arguments
    root, properties = _parameters(tool)
    return {
        key: _null(value, types_of(properties[key], root)) if key in properties else value
        for key, value in arguments.items()
    }


def _null(value: Any, types: frozenset[str]) -> Any:
    if value == "null" and "null" in types:
        return None
    return "null" if value is None and types == {"string"} else value


def _parameters(tool: Schema) -> tuple[Schema, Schema]:
    """A tool's schema, and its properties."""
    root = tool["function"].get("parameters")
    properties = root.get("properties") if isinstance(root, dict) else None
    return (root, properties) if root and isinstance(properties, dict) else ({}, {})


def refuse_least_properties(schema: Any, param: str) -> None:
    """
    Raises:
        ApiError: 400, if an object inside wants more properties than it names as required: a name
            that is free may come twice, and counts once.
    """
    if isinstance(schema, list):
        for one in schema:
            refuse_least_properties(one, param)
    if not isinstance(schema, dict):
        return
    least, required = schema.get("minProperties"), schema.get("required")
    named = len(required) if isinstance(required, list) else 0
    if isinstance(least, int) and least > max(1, named):
        raise bad_request(
            f"{param}: minProperties {least} cannot be forced; name as many in required, or take "
            "it out of the schema",
            param,
            "invalid_schema",
        )
    for key, value in schema.items():
        if key not in _VALUES:
            refuse_least_properties(value, param)


def text_form(schema: Schema) -> str:
    """What a text may be, as regular expressions in llguidance's dialect of Lark.

    Raises:
        ApiError: 400, for a `format` that is not known here.
    """
    low, high = schema.get("minLength") or 0, schema.get("maxLength")
    parts = []
    if low or high is not None:
        parts.append(f"(?s:.{{{low},{'' if high is None else high}}})")
    if kind := schema.get("format"):
        if kind not in _FORMATS:
            raise bad_request(
                f"tools: in a text that is written without quotes, as this model does, the format "
                f"{kind!r} cannot be forced; take a pattern, or leave strict out",
                "tools",
                "invalid_schema",
            )
        parts.append(_FORMATS[kind])
    if pattern := schema.get("pattern"):
        # A pattern is found anywhere, unless it says where it begins and ends.
        inner = pattern.removeprefix("^")
        closed = inner.endswith("$") and not inner.endswith("\\$")
        before, after = ("" if inner != pattern else "(?s:.*)"), ("" if closed else "(?s:.*)")
        parts.append(f"{before}(?:{inner[:-1] if closed else inner}){after}")
    return " & ".join(regex(part) for part in parts) or ANY_TEXT


def regex(text: str) -> str:
    """A regular expression, between Lark's slashes."""
    text = text.replace("\\/", "/").replace("/", "\\/").replace("\n", "\\n")
    return f"/{text}/"
