"""Tool calls that are forced, in each family's own way."""

from __future__ import annotations

import json
import random

import jsonschema
import pytest
from mlx_lm.tokenizer_utils import load
from mlx_lm.tool_parsers import glm47, json_tools, kimi_k2, minimax_m2, mistral, qwen3_coder

from sidecar.forms import ASKED, REFUSED, walk
from sidecar.tokenizers import tokenizer_of
from tqstack import demo_model
from tqstack.engine.grammar import GrammarError, Grammars
from tqstack.openai_api.errors import ApiError
from tqstack.openai_api.schema import ChatRequest
from tqstack.sidecar import forced as forced_calls
from tqstack.sidecar.forced import FAMILIES, family_of
from tqstack.sidecar.forms import grammar_of
from tqstack.sidecar.text import AnswerReader, ToolCall

PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["C", "F"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 2},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"tag": {"enum": ["a", "b"]}},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]
PARSERS = {m.__name__.rpartition(".")[2]: m for m in
           (glm47, json_tools, kimi_k2, minimax_m2, mistral, qwen3_coder)}  # fmt: skip


def forced(tokenizer, tool_choice="required", reasoning="none", **fields):
    fields = {"messages": ASKED, "tools": TOOLS, "tool_choice": tool_choice, **fields}
    found = grammar_of(tokenizer, ChatRequest(**fields), reasoning)
    assert found is not None
    return found[0]


def calls_in(tokenizer, tokens, tools=TOOLS):
    reader = AnswerReader(tokenizer, tools=tools)
    parts = [part for token in tokens for part in reader.feed(token)] + reader.finish()
    assert all(isinstance(part, ToolCall) or not part.text.strip() for part in parts), parts
    return [part for part in parts if isinstance(part, ToolCall)]


def wild():
    """A copy of the tools whose strings end soon, for a walk at random."""
    short = {**PARAMETERS["properties"], "city": {"enum": ["Rome", "Bern"]}}
    first = {"name": "weather", "parameters": {**PARAMETERS, "properties": short}}
    return [{"type": "function", "function": first}, TOOLS[1]]


@pytest.mark.parametrize("schema", [schema for schema, told in REFUSED if "cannot be" in told])
def test_a_tool_that_is_not_strict_is_forced_as_far_as_it_can_be(schema):
    tokenizer = tokenizer_of(json_tools)
    grammars = Grammars(tokenizer, frozenset(tokenizer.eos_token_ids))
    parameters = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    tool = {"type": "function", "function": {"name": "now", "parameters": parameters}}
    grammars.form(forced(tokenizer, tools=[tool]))
    tool["function"]["strict"] = True
    with pytest.raises((ApiError, GrammarError)):
        grammars.form(forced(tokenizer, tools=[tool]))


@pytest.mark.parametrize("family", sorted(PARSERS))
@pytest.mark.parametrize("one", [True, False])
def test_whatever_a_family_s_grammar_allows_is_calls_with_valid_arguments(family, one):
    assert set(PARSERS) == set(FAMILIES)
    tokenizer, rng = tokenizer_of(PARSERS[family]), random.Random(1)
    grammars = Grammars(tokenizer, frozenset(tokenizer.eos_token_ids))
    tools = wild()
    grammar = forced(tokenizer, tools=tools, parallel_tool_calls=not one)
    names, counts = set(), set()
    for _ in range(12):
        tokens = walk(grammars, tokenizer, grammar, rng)
        if tokens is None:
            continue
        found = calls_in(tokenizer, tokens, tools)
        counts.add(len(found))
        for call in found:
            names.add(call.name)
            if call.name == "weather":
                schema = tools[0]["function"]["parameters"]
                jsonschema.validate(json.loads(call.arguments), schema)
    assert names == {"weather", "now"} and (counts == {1} if one else max(counts) > 1)


@pytest.mark.parametrize("family", ["qwen3_coder", "glm47", "minimax_m2"])
def test_a_text_among_parameters_is_any(family):
    texts = {
        "qwen3_coder": "<tool_call>\n<function=weather>\n<parameter=city>\n{}\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
        "glm47": "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>{}</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
        "minimax_m2": '<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">{}'
        '</parameter>\n<parameter name="days">3</parameter>\n</invoke>\n</minimax:tool_call>',
    }
    tokenizer = tokenizer_of(PARSERS[family])
    grammars = Grammars(tokenizer, frozenset(tokenizer.eos_token_ids))
    city = 'St. "Gallen" <b>\nund {Umgebung}'
    tokens = tokenizer.encode(texts[family].format(city), add_special_tokens=False)
    named = {"type": "function", "function": {"name": "weather"}}
    form = grammars.form(forced(tokenizer, named))
    for token in tokens:
        assert form.allowed(len(tokenizer))[token]
        form.take(token)
    [call] = calls_in(tokenizer, tokens)
    assert json.loads(call.arguments) == {"city": city, "days": 3}


def one_parameter(family, schema, defs, value, strict=True):
    """Whether a forced call may have this value; then what its arguments are read as."""
    tokenizer = tokenizer_of(PARSERS[family])
    parameters = {"type": "object", "properties": {"a": schema}, "required": ["a"], "$defs": defs}
    function = {"name": "now", "parameters": parameters, "strict": strict}
    tools = [{"type": "function", "function": function}]
    grammars = Grammars(tokenizer, frozenset(tokenizer.eos_token_ids))
    text = written(tokenizer, family_of(tokenizer), "now", {"a": value})
    if not takes(grammars, tokenizer, forced(tokenizer, tools=tools), text):
        return None
    [call] = calls_in(tokenizer, tokenizer.encode(text, add_special_tokens=False), tools)
    return json.loads(call.arguments)


XML = ["qwen3_coder", "glm47", "minimax_m2"]


@pytest.mark.parametrize("family", XML)
@pytest.mark.parametrize(
    "schema, good, bad",
    [
        ({"minLength": 2, "maxLength": 3}, ["ab", "a\nb"], ["a", "abcd"]),
        ({"pattern": "^[A-Z]{2}-[0-9]+$"}, ["AB-7"], ["AB-", "xAB-7", "AB-7 "]),
        ({"pattern": "/[a-c]"}, ["/b", "x/a\ny"], ["/d"]),
        ({"pattern": "a$", "minLength": 2}, ["ba"], ["a", "ab"]),
        ({"format": "date"}, ["2026-02-03"], ["2026-2-3", "2026-13-01"]),
        ({"format": "date-time"}, ["2026-02-03T10:00:00Z"], ["2026-02-03 10:00"]),
        ({"format": "uri"}, ["http://a.b/c?d=e"], ["a b"]),
        ({}, ["a", "x <b>\ny"], []),
    ],
)
def test_a_text_among_parameters_keeps_to_a_strict_schema(family, schema, good, bad):
    for own in ({"type": "string", **schema}, {"anyOf": [{"type": "string", **schema}]}):
        for value in good:
            assert one_parameter(family, own, {}, value) == {"a": value}
        for value in bad:
            assert one_parameter(family, own, {}, value) is None, value
            assert one_parameter(family, own, {}, value, strict=False) is not None


@pytest.mark.parametrize("family", XML)
@pytest.mark.parametrize(
    "schema, values",
    [
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, [3, None]),
        ({"type": ["boolean", "null"]}, [True, None]),
        ({"anyOf": [{"type": "integer"}, {"type": "boolean"}]}, [3, True]),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, ["12", "a", None]),
        ({"$ref": "#/$defs/colour"}, ["red"]),
        ({"anyOf": [{"$ref": "#/$defs/colour"}, {"type": "null"}]}, ["red", None]),
        ({"$ref": "#/$defs/place"}, [{"x": 1}]),
        ({"anyOf": [{"$ref": "#/$defs/place"}, {"type": "null"}]}, [{"x": 1}, None]),
        ({"type": "string"}, ["null", "12"]),
    ],
)
def test_a_parameter_is_read_as_its_schema_has_it(family, schema, values):
    defs = {"colour": {"enum": ["red", "green"]}}
    defs["place"] = {"type": "object", "properties": {"x": {"type": "integer"}}}
    for value in values:
        assert one_parameter(family, schema, defs, value) == {"a": value}


def test_a_format_that_cannot_be_forced_is_refused_where_it_is_strict():
    with pytest.raises(ApiError, match="'duration' cannot be forced; take a pattern, or leave str"):
        one_parameter("qwen3_coder", {"type": "string", "format": "duration"}, {}, "x")


@pytest.mark.parametrize("family", sorted(PARSERS))
def test_calls_of_strict_tools_keep_to_their_schemas_and_others_need_not(family):
    tokenizer = tokenizer_of(PARSERS[family])
    markers = filter(None, (tokenizer.tool_call_start, tokenizer.tool_call_end))
    tokenizer._tokenizer.add_tokens([*markers])
    grammars = Grammars(tokenizer, frozenset(tokenizer.eos_token_ids))
    strict = [{**TOOLS[0], "function": {**TOOLS[0]["function"], "strict": True}}, TOOLS[1]]
    grammar = forced(tokenizer, "auto", tools=strict)
    good, bad = {"city": "Rome", "days": 3}, {"city": "Rome", "days": 30}
    any_others = {"whatever": "x", "days": 30}
    for name, arguments, allowed in (
        ("weather", good, True),
        ("weather", bad, False),
        ("now", any_others, True),
        ("nobody", good, False),
    ):
        text = "Let me see.\n" + written(tokenizer, family_of(tokenizer), name, arguments)
        assert takes(grammars, tokenizer, grammar, text) is allowed, text
    assert takes(grammars, tokenizer, grammar, 'No, {"days": 30} is too far.')
    asked = ChatRequest(messages=ASKED, tools=TOOLS)
    assert grammar_of(tokenizer, asked) is None  # nothing is forced, nothing is paid for it


def written(tokenizer, family, name, arguments):
    """A call in the family's form."""
    body = json.dumps(arguments)
    if family.parameter:
        before, behind, end = family.parameter
        values = {k: v if isinstance(v, str) else json.dumps(v) for k, v in arguments.items()}
        body = "".join(f"{before}{key}{behind}{value}{end}" for key, value in values.items())
    name = json.dumps(name) if family.json_name else name
    text = family.section[0] + name.join(family.name) + body + family.end + family.section[1]
    text = text.replace(forced_calls.START, tokenizer.tool_call_start)
    return text.replace(forced_calls.END, tokenizer.tool_call_end)


def takes(grammars, tokenizer, grammar, text):
    """Whether the grammar allows this text, and an end behind it."""
    form = grammars.form(grammar)
    for token in tokenizer.encode(text, add_special_tokens=False):
        if not form.allowed(len(tokenizer))[token]:
            return False
        form.take(token)
    mask = form.allowed(len(tokenizer))
    return any(mask[token] for token in tokenizer.eos_token_ids)


def test_reasoning_comes_before_what_is_forced():
    tokenizer = load(demo_model.PATH)
    opened = forced(tokenizer, reasoning="open")
    assert opened.after == tuple(tokenizer.think_end_tokens) and opened.opening is None
    assert forced(tokenizer, reasoning="possible").opening == tokenizer.think_start_id
    assert not forced(tokenizer).after


def test_a_call_that_cannot_be_forced_is_refused():
    tokenizer = load(demo_model.PATH)
    wrong = {"type": "function", "function": {"name": "nobody"}}
    for fields in ({"tools": None}, {"tool_choice": wrong}, {"tool_choice": {"type": "custom"}}):
        with pytest.raises(ApiError, match="tool_choice"):
            forced(tokenizer, **fields)
