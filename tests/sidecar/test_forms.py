"""Forms: schemas on the demo model."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import load

from engine.jobs import finished, submit
from sidecar.forms import ASKED, REFUSED, walk
from tqstack import demo_model
from tqstack.engine.grammar import Grammar, GrammarError, Grammars
from tqstack.engine.sampling import Sampling
from tqstack.engine.worker import Worker
from tqstack.models.runtime import load_runtime
from tqstack.openai_api.errors import ApiError
from tqstack.openai_api.schema import ChatRequest
from tqstack.settings import Settings
from tqstack.sidecar.forced import json_body
from tqstack.sidecar.forms import bad_form, grammar_of

NAMES = st.sampled_from(["id", "name", "a b", "é", "items", "x"])
LOW, HIGH = st.integers(-50, 0), st.integers(1, 50)
SCALARS = st.one_of(
    st.builds(lambda a, b: {"type": "integer", "minimum": a, "maximum": b}, LOW, HIGH),
    st.builds(lambda a, b: {"type": "number", "exclusiveMinimum": a, "maximum": b}, LOW, HIGH),
    st.builds(lambda n: {"type": "string", "minLength": n % 3, "maxLength": n}, st.integers(2, 9)),
    st.sampled_from(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"const": {"deep": [1, "a"]}},
            {"enum": ["red", 7, None, "grün"]},
            {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,3}$"},
            {"type": "string", "format": "date"},
            {"type": ["integer", "null"]},
        ]
    ),
)


@st.composite
def objects(draw, children):
    properties = draw(st.dictionaries(NAMES, children, max_size=3))
    required = [name for name in properties if draw(st.booleans())]
    schema = {"type": "object", "properties": properties, "required": required}
    return {**schema, "additionalProperties": draw(st.sampled_from([False, {"type": "null"}]))}


def arrays(children):
    def made(items, low):
        return {"type": "array", "items": items, "minItems": low, "maxItems": low + 1}

    return st.builds(made, children, st.integers(0, 2))


def referring(schema, own):
    """With a reference beside it to a definition at the root."""
    pair = {"schema": schema, "own": {"$ref": "#/$defs/own"}}
    closed = {"type": "object", "required": ["own"], "additionalProperties": False}
    return {**closed, "properties": pair, "$defs": {"own": own}}


NESTED = st.recursive(
    SCALARS,
    lambda children: st.one_of(
        objects(children),
        arrays(children),
        st.builds(lambda a, b: {"anyOf": [a, b]}, children, children),
    ),
    max_leaves=4,
)
SCHEMAS = st.one_of(NESTED, NESTED, NESTED, st.builds(referring, NESTED, SCALARS))


@pytest.fixture(scope="module")
def runtime():
    return replace(load_runtime(Settings(sidecar_model="demo")), batch_size=64)


def schemas_of(count):
    found: list = []

    @settings(max_examples=count, deadline=None, database=None, derandomize=True)
    @given(SCHEMAS)
    def gather(schema):
        found.append(schema)

    gather()
    return found[:count]


def all_at_once(worker, monkeypatch):
    """Let nobody decode while somebody may still join: large batches, few steps."""
    scheduler = worker._scheduler
    real = scheduler.next

    def step():
        found = real()
        return replace(found, decode=found.decode and not found.read)

    monkeypatch.setattr(scheduler, "next", step)
    return worker


def test_two_hundred_schemas_are_kept_to_greedy_and_sampled(runtime, monkeypatch):
    worker = all_at_once(Worker(runtime, queue=1000), monkeypatch)
    schemas, text, jobs = schemas_of(200), demo_model.held_out_tokens(), []
    for i, schema in enumerate(schemas):
        grammar = Grammar("lark", f"start: {json_body(schema)}")
        for sampling in (Sampling(temperature=0), Sampling(seed=i)):
            options = {"grammar": grammar, "cache_prompt": False}
            jobs.append(submit(worker, text[i : i + 1].tolist(), 40, sampling, **options))
    answers, done = finished(worker, *jobs), 0
    for i, tokens in enumerate(answers):
        if tokens[-1] in runtime.end_tokens:
            done += 1
            value = json.loads(runtime.tokenizer.decode(tokens[:-1]))
            jsonschema.validate(value, schemas[i // 2])
    # Of 400 answers 249 were done with 40 tokens, 340 with 160: the others were inside a number's
    # endless digits, a long text or white space.
    assert len(answers) == 2 * len(schemas) and done > len(answers) / 2


def test_whatever_two_hundred_schemas_allow_is_valid():
    tokenizer, rng, done = load(demo_model.PATH), random.Random(2), 0
    grammars = Grammars(tokenizer, frozenset(tokenizer.eos_token_ids))
    for schema in schemas_of(200):
        grammar = Grammar("lark", f"start: {json_body(schema)}")
        tokens = walk(grammars, tokenizer, grammar, rng)
        if tokens is not None:
            done += 1
            jsonschema.validate(json.loads(tokenizer.decode(tokens)), schema)
    assert done > 150


# Of a schema that cannot be forced: what the refusal names, and what it tells to do.


@pytest.mark.parametrize("schema, told", REFUSED, ids=[str(schema) for schema, _ in REFUSED])
def test_a_schema_that_cannot_be_forced_is_refused_with_what_to_do(schema, told):
    tokenizer = load(demo_model.PATH)
    grammars = Grammars(tokenizer, frozenset(tokenizer.eos_token_ids))
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(ApiError, match=f"^response_format: .*{told}"):
        found = grammar_of(tokenizer, ChatRequest(messages=ASKED, response_format=form))
        assert found is not None
        try:
            grammars.form(found[0])
        except GrammarError as error:
            raise bad_form(str(error), found[1]) from None
