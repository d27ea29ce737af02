"""The form that a request wants its answer in, as a grammar for the engine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from llguidance.gbnf_to_lark import any_to_lark
from mlx_lm.tokenizer_utils import TokenizerWrapper

from tqstack.engine.grammar import Grammar
from tqstack.openai_api.errors import ApiError, bad_request
from tqstack.openai_api.schema import ChatRequest, TextRequest
from tqstack.sidecar.forced import (
    Rules,
    calls,
    forced_tool,
    json_body,
    quoted,
    strict_calls,
)
from tqstack.sidecar.parameters import refuse_least_properties, regex

ANY_OBJECT = {"type": "object"}
_BREAK = '"\\n\\n"? '  # what many models write behind their reasoning; it is no part of a choice


@dataclass(frozen=True)
class Shape:
    """What an answer's text must look like.

    Attributes:
        body: of a rule; for a lark grammar: all of it.
        param: the field that wants it.
    """

    kind: Literal["json", "regex", "choice", "lark"]
    body: str
    param: str


def grammar_of(
    tokenizer: TokenizerWrapper,
    request: ChatRequest | TextRequest,
    reasoning: Literal["open", "possible", "none"] = "none",
) -> tuple[Grammar, str] | None:
    """The answer's grammar, and the field that wants it; None: any text.

    Args:
        reasoning: whether the prompt has opened a block of it, or the model may open one itself.

    Raises:
        ApiError: 400, if there is no such form.
    """
    shape = _shape(request)
    rules = Rules(tokenizer)
    tools = _callable(tokenizer, request)
    name = None
    if isinstance(request, ChatRequest):
        field = "function_call" if request.legacy_functions else "tool_choice"
        name = forced_tool(request.tool_choice, tools, field)
    free = shape is None and name is None
    if request.ignore_eos and not free:
        raise bad_request("ignore_eos: an answer that has a form ends with it", "ignore_eos")
    if name is not None:
        assert isinstance(request, ChatRequest) and tools
        one = bool(name) or request.parallel_tool_calls is False or request.legacy_functions
        body, param = calls(rules, tokenizer, tools, name, one), "tool_choice"
    elif shape is None:
        one = isinstance(request, ChatRequest) and request.parallel_tool_calls is False
        found = strict_calls(rules, tokenizer, tools or [], one)
        if found is None:
            return None
        body, param = found, "tools"
    else:
        param = shape.param
        if shape.kind == "lark":
            if tools:
                raise bad_request(
                    f"{param}: no tool can be called beside a grammar; send tool_choice none", param
                )
            return Grammar("lark", shape.body, **_after(tokenizer, reasoning)), param
        body = rules.add(shape.body)
        if tools and tokenizer.tool_call_start:
            body += f" | {calls(rules, tokenizer, tools, '', False)}"
    broken = reasoning == "open" and not free and (shape is None or shape.kind == "json")
    lines = [f"start: {_BREAK if broken else ''}({body})", *rules.lines]
    return Grammar("lark", "\n".join(lines), **_after(tokenizer, reasoning)), param


def _after(tokenizer: TokenizerWrapper, reasoning: str) -> dict[str, Any]:
    """Where the form begins."""
    if reasoning == "none" or not tokenizer.think_end_tokens:
        return {}
    after = {"after": tuple(tokenizer.think_end_tokens)}
    if reasoning == "open":
        return after
    first = tokenizer.think_start_tokens or ()
    return {**after, "opening": first[0]} if len(first) == 1 else {}


def _callable(
    tokenizer: TokenizerWrapper, request: ChatRequest | TextRequest
) -> list[dict[str, Any]] | None:
    """Tools that the answer may call."""
    if isinstance(request, TextRequest) or request.tool_choice == "none":
        return None
    return request.tools


def _shape(request: ChatRequest | TextRequest) -> Shape | None:
    """
    Raises:
        ApiError: 400, if the form is none, or there are several.
    """
    found = [
        shape
        for name, read in _READERS.items()
        if (value := getattr(request, name, None)) not in (None, False)
        and (shape := read(value, name))
    ]
    if len(found) > 1:
        fields = " and ".join(shape.param for shape in found)
        raise bad_request(f"{fields}: an answer has one form; send one of them", found[1].param)
    return found[0] if found else None


def _response_format(value: dict[str, Any], param: str) -> Shape | None:
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return _json(ANY_OBJECT, param)
    if kind == "json_schema":
        described = value.get("json_schema")
        schema = described.get("schema") if isinstance(described, dict) else None
        if schema is None:
            raise bad_request(f"{param}.json_schema.schema: the schema is missing", param)
        return _json(schema, param)
    raise bad_request(f"{param}.type: text, json_object and json_schema are known", param)


def _json(value: Any, param: str) -> Shape:
    """A schema, as an object or as text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise bad_request(f"{param}: the schema is not valid JSON: {error}", param) from None
    if value is True:
        value = {}
    if not isinstance(value, dict):
        raise bad_request(f"{param}: a schema is a JSON object", param)
    refuse_least_properties(value, param)
    return Shape("json", json_body(value), param)


def _regex(value: str, param: str) -> Shape:
    return Shape("regex", regex(value), param)


def _choice(value: list[str], param: str) -> Shape:
    if not value or not all(isinstance(one, str) and one for one in value):
        raise bad_request(f"{param}: send a list of texts", param)
    return Shape("choice", " | ".join(quoted(one) for one in value), param)


def _grammar(value: str, param: str) -> Shape:
    """GBNF, as llama.cpp has it, or Lark."""
    try:
        return Shape("lark", any_to_lark(value), param)
    except Exception as error:  # of its parser's own, without a common base
        raise bad_request(f"{param}: {error}", param) from None


def _structured(value: dict[str, Any], param: str) -> Shape | None:
    """vLLM's newer name for all of them."""
    given = {name: one for name, one in value.items() if one not in (None, False)}
    if unknown := set(given) - set(_STRUCTURED):
        names = ", ".join(_STRUCTURED)
        raise bad_request(f"{param}: {unknown.pop()} is not known; send one of {names}", param)
    if len(given) != 1:
        raise bad_request(f"{param}: send one of {', '.join(_STRUCTURED)}", param)
    name, wanted = given.popitem()
    kinds = {"choice": list, "regex": str, "grammar": str}
    if name in kinds and not isinstance(wanted, kinds[name]):
        raise bad_request(f"{param}.{name}: this is no {kinds[name].__name__}", param)
    return _STRUCTURED[name](wanted, param)


def _object(value: Any, param: str) -> Shape:
    return _json(ANY_OBJECT, param)


Read = Callable[[Any, str], Shape | None]
_STRUCTURED: dict[str, Read] = {
    "json": _json,
    "json_object": _object,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
}
_READERS: dict[str, Read] = {
    "response_format": _response_format,
    "guided_json": _json,
    "json_schema": _json,
    "guided_regex": _regex,
    "guided_choice": _choice,
    "guided_grammar": _grammar,
    "grammar": _grammar,
    "structured_outputs": _structured,
}


# What the engine says of a form: what it means, and what to do.
_SAID = {
    r"Unimplemented keys: \[(.+)\]": "{} cannot be forced; take it out of the schema, and look at "
    "the answer for it yourself",
    r"oneOf constraints are not supported": "of a oneOf more than one option may hold here, which "
    "cannot be forced; write anyOf, or give each option a property with a const of its own, and "
    "require it",
    r"Unknown format: (.+)": "the format {} is not known; take a pattern, or leave it out",
    r"Pointer '(.+)' does not exist": "the reference #{} leads nowhere; add what it names",
    r"Resource '(.+)' is not present": "the reference {} is not looked up; put what it names under "
    "$defs, and refer to that",
    r"lookarounds not supported yet|look-around": "a regular expression cannot look around (\\b, "
    "(?=...), ^ or $ in its middle) here; write it without",
    r"regex parse error:[\s\S]*\nerror: (.+)": "a regular expression is not valid ({}); mend it",
    r"Unsatisfiable schema: (.+)": "no value meets this schema ({}); loosen it",
    r"Invalid type: (.+)": "the type {} is none of JSON's; write string, number, integer, boolean, "
    "object, array or null",
}


def bad_form(why: str, param: str) -> ApiError:
    """A form that the engine cannot make."""
    for said, means in _SAID.items():
        if found := re.search(said, why):
            named = found[1].replace('"', "") if found.groups() else ""
            return bad_request(f"{param}: {means.format(named)}", param, "invalid_schema")
    why = re.sub(r"^at \d+\(\d+\): |^failed to compile JSON schema: ", "", why.split("\n")[0])
    why = why.removeprefix("failed to compile JSON schema: ")
    return bad_request(f"{param}: {why}", param, "invalid_schema")
