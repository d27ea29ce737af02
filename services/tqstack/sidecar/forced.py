"""How an answer is made to be tool calls, in the model family's own form: as a grammar.

Families are known by mlx-lm's parser of their calls. Of those that are not in the table only the
start of a call is forced.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from tqstack.openai_api.errors import bad_request
from tqstack.sidecar.parameters import (
    ANY_TEXT,
    options_of,
    refuse_least_properties,
    resolved,
    text_form,
    types_of,
)

Schema = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """Texts of a call; START, END and other markers in angle brackets may be tokens.

    Attributes:
        name: around the function's name.
        end: what closes a call.
        parameter: around a parameter's name, and behind its value; None: the arguments are JSON.
        section: around all calls.
        between: two calls.
        json_name: the name is written as JSON.
    """

    name: tuple[str, str]
    end: str
    parameter: tuple[str, str, str] | None = None
    section: tuple[str, str] = ("", "")
    between: str = "\n"
    json_name: bool = False


START, END = "{start}", "{end}"
FAMILIES = {
    "json_tools": Family((START + '\n{"name": ', ', "arguments": '), "}\n" + END, json_name=True),
    "qwen3_coder": Family(
        (START + "\n<function=", ">\n"),
        "</function>\n" + END,
        ("<parameter=", ">\n", "\n</parameter>\n"),
    ),
    "glm47": Family(
        (START, "\n"),
        END,
        ("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n"),
    ),
    "minimax_m2": Family(
        ('<invoke name="', '">\n'),
        "</invoke>\n",
        ('<parameter name="', '">', "</parameter>\n"),
        (START + "\n", END),
        "",
    ),
    "kimi_k2": Family(
        ("<|tool_call_begin|>functions.", ":0<|tool_call_argument_begin|>"),
        "<|tool_call_end|>",
        section=(START, END),
        between="",
    ),
    "mistral": Family((START, "[ARGS]"), "", between=""),
}
_LISTED = Family(('{"name": ', ', "arguments": '), "}", None, (START + "[", "]"), ", ", True)


def forced_tool(
    choice: Any, tools: list[dict[str, Any]] | None, field: str = "tool_choice"
) -> str | None:
    """The name of the tool that must be called; "" for any; None if none must be.

    Args:
        field: the request's, which wants that.

    Raises:
        ApiError: 400, if it is not there.
    """
    if choice in (None, "auto", "none"):
        return None
    names = [tool["function"]["name"] for tool in tools or ()]
    if not names:
        raise bad_request(f"{field}: there are no tools to choose from", field)
    if choice == "required":
        return ""
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if choice.get("type") != "function" or name not in names:
        raise bad_request(f"{field}: there is no tool {name!r} in tools", field)
    return str(name)


class Rules:
    """The rules of a grammar in llguidance's dialect of Lark, in the making."""

    def __init__(self, tokenizer: TokenizerWrapper):
        self._tokenizer, self._markers = tokenizer, _markers(tokenizer)
        self.lines: list[str] = []

    def add(self, body: str, options: str = "") -> str:
        """A rule of its own; returns its name."""
        name = f"r{len(self.lines)}"
        self.lines.append(f"{name}{options}: {body}")
        return name

    def text(self, text: str) -> str:
        """Text as it stands, its markers as the tokens that they are."""
        own = self._tokenizer
        text = text.replace(START, own.tool_call_start or "").replace(END, own.tool_call_end or "")
        parts, plain = [], ""
        while text:
            marker = next((m for m in self._markers if text.startswith(m)), None)
            if marker is None:
                plain, text = plain + text[0], text[1:]
                continue
            parts += [quoted(plain)] if plain else []
            parts, plain = [*parts, f"<[{self._markers[marker]}]>"], ""
            text = text[len(marker) :]
        return " ".join([*parts, quoted(plain)] if plain or not parts else parts)

    def json(self, schema: Schema, strict: bool) -> str:
        return self.add(json_body(schema, strict))

    def text_without(self, token: str) -> str:
        """Any text without this token, which may not be a special one; its name."""
        token = re.escape(token).replace("/", "\\/")
        name = f"T{len(self.lines)}"
        self.lines.append(f"{name}: /(?s:.*)/ & ~/(?s:.*){token}(?s:.*)/")
        return name

    def text_until(self, end: str, form: str = ANY_TEXT) -> str:
        """A text of this form, and `end` behind it."""
        plain = end.partition(END)[0]
        if not plain:
            return f"{self.text_without(self._tokenizer.tool_call_end or '')} {self.text(end)}"
        rest = end.removeprefix(plain)
        text = self.add(form, f"[suffix={quoted(plain)}]")
        return f"{text} {self.text(rest)}" if rest else text

    def is_token(self, text: str | None) -> bool:
        return text in self._markers


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def json_body(schema: Schema, strict: bool = True) -> str:
    """A schema. White space is enough for a usual layout: small models fill all that they may.

    Args:
        strict: what of it cannot be forced is an error; else it is left open.
    """
    options: Schema = {"whitespace_pattern": r"( |\n {0,16}|\n\t{1,8})?"}
    if not strict:
        options |= {"lenient": True, "coerce_one_of": True}
    return f"%json {json.dumps({**schema, 'x-guidance': options}, ensure_ascii=False)}"


def _markers(tokenizer: TokenizerWrapper) -> dict[str, int]:
    """Added tokens, the longest first: a grammar names them, for text does not become them."""
    added = tokenizer.added_tokens_decoder.items()
    found = {str(token.content): int(i) for i, token in added if str(token.content).strip()}
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def strict_calls(
    rules: Rules, tokenizer: TokenizerWrapper, tools: list[dict[str, Any]], one: bool
) -> str | None:
    """A rule for any text, in which calls of tools that are `strict` keep to their schemas.

    None: there are no such tools, or it is not known where a call of this model begins.
    """
    start = tokenizer.tool_call_start
    strict = any(tool["function"].get("strict") for tool in tools)
    if not strict or not start or not rules.is_token(start) or family_of(tokenizer) is None:
        return None
    text = rules.text_without(start)
    return f"{text} ({calls(rules, tokenizer, tools, '', one, lenient=True)} {text})?"


def calls(
    rules: Rules,
    tokenizer: TokenizerWrapper,
    tools: list[dict[str, Any]],
    name: str,
    one: bool,
    lenient: bool = False,
) -> str:
    """A rule for calls of the tool `name`, or of any ("").

    Args:
        one: a single call.
        lenient: arguments of tools that are not `strict` may be any.

    Raises:
        ApiError: 400, if it is not known how this model calls tools.
    """
    family = family_of(tokenizer)
    if not tokenizer.tool_call_start or (name and family is None):
        raise bad_request(
            "tool_choice: this model cannot be made to call a tool; send auto", "tool_choice"
        )
    if family is None:
        return rules.add(f"{rules.text(START)} /(?s:.*)/")
    functions = [tool["function"] for tool in tools if name in ("", tool["function"]["name"])]
    each = [
        _call(rules, family, function, any_arguments=lenient and not function.get("strict"))
        for function in functions
    ]
    call = rules.add(" | ".join(each))
    between = f"{rules.text(family.between)} " if family.between else ""
    several = "" if one else f" ({between}{call})*"
    before, after = (f"{rules.text(text)} " if text else "" for text in family.section)
    return rules.add(f"{before}{call}{several} {after}".rstrip())


def family_of(tokenizer: TokenizerWrapper) -> Family | None:
    """How a model writes calls, as far as that is known."""
    parser = getattr(tokenizer.tool_parser, "__module__", "").rpartition(".")[2]
    if parser == "mistral" and "[ARGS]" not in tokenizer.get_vocab():
        return _LISTED
    return FAMILIES.get(parser)


def _call(
    rules: Rules, family: Family, function: dict[str, Any], any_arguments: bool = False
) -> str:
    before, after = family.name
    name, strict = function["name"], bool(function.get("strict"))
    head = rules.text(before + (json.dumps(name) if family.json_name else name) + after)
    schema = function.get("parameters") or {"type": "object", "properties": {}}
    if strict:
        refuse_least_properties(schema, "tools")
    if family.parameter is None:
        arguments = rules.json({"type": "object"} if any_arguments else schema, strict)
    elif any_arguments:
        return rules.add(f"{head} {rules.text_until(family.end)}")
    else:
        arguments = " ".join(_parameters(rules, family.parameter, schema, strict))
    end = rules.text(family.end) if family.end else ""
    return rules.add(" ".join(filter(None, (head, arguments, end))))


def _parameters(
    rules: Rules, form: tuple[str, str, str], schema: Schema, strict: bool
) -> list[str]:
    """Parameters in the schema's order; those that are not required may be left out."""
    before, behind, end = form
    required = schema.get("required") or ()
    found = []
    for name, own in (schema.get("properties") or {}).items():
        value = _value(rules, own, schema, end, strict)
        rule = rules.add(f"{rules.text(before + name + behind)} {value}")
        found.append(rule if name in required else f"{rule}?")
    return found


def _value(rules: Rules, own: Any, root: Schema, end: str, strict: bool) -> str:
    """A parameter's value, and what ends it: a string as it is, all else as JSON."""
    own = resolved(own, root)
    is_text = "string" in types_of(own, root)
    if is_text and (options := options_of(own)):
        each = (_value(rules, option, root, end, strict) for option in options)
        return f"({' | '.join(each)})"
    choices = own.get("enum") or ([own["const"]] if "const" in own else [])
    if choices and all(isinstance(choice, str) for choice in choices):
        listed = " | ".join(rules.text(choice) for choice in choices)
        return f"({listed}) {rules.text(end)}"
    if is_text:
        return rules.text_until(end, text_form(own) if strict else ANY_TEXT)
    shared = {key: root[key] for key in ("$defs", "definitions") if key in root}
    return f"{rules.json({**own, **shared}, strict)} {rules.text(end)}"
