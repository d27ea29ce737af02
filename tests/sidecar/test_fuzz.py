"""Whatever a request holds, the sidecar answers, or refuses in the envelope."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from sidecar.clients import demo_client

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
ROLES = ["system", "developer", "user", "assistant", "tool", "function", "king"]
SAID = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "developer", "user", "assistant", "king"]),
        "content": st.text(max_size=20),
    }
)
MESSAGE = SAID | st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "function"])},
    optional=dict.fromkeys(("content", "tool_calls", "function_call", "reasoning", "name"), VALUES),
)
TOOL = st.fixed_dictionaries(
    {"type": st.just("function"), "function": st.just({"name": "look", "parameters": {}}) | VALUES}
)
NAMES = """temperature top_p top_k min_p seed stop stop_token_ids n echo best_of logprobs logit_bias
    tool_choice parallel_tool_calls functions function_call response_format reasoning_effort
    chat_template_kwargs add_generation_prompt continue_final_message stream_options suffix
    repetition_penalty presence_penalty include_stop_str_in_output modalities cache_prompt"""
GOOD = {
    "n": st.integers(1, 3),
    "tool_choice": st.sampled_from(["none", "auto", "required"]),
    "stream_options": st.just({"include_usage": True, "continuous_usage_stats": True}),
    "stop": st.lists(st.text(max_size=2), max_size=2),
    "top_k": st.integers(-1, 9000),
    "min_p": st.floats(0, 1),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "reasoning_effort": st.sampled_from(["none", "high"]),
}
NAMED = st.sampled_from(NAMES.split())
# A request that is right but for a field or two, so that many are answered.
ODD = st.dictionaries(NAMED, VALUES, max_size=2)
RIGHT = st.fixed_dictionaries({}, optional=GOOD)
PARTS = {
    "messages": st.lists(SAID, min_size=1, max_size=3) | st.lists(MESSAGE, max_size=3),
    "prompt": st.text(min_size=1, max_size=9) | st.lists(st.text(max_size=5), max_size=3),
    "tokens": st.lists(st.integers(-2, 9000), max_size=5),
}
MORE = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 3), "stream": st.booleans()},
    optional={"tools": st.lists(TOOL, max_size=2)},
)
PATHS = {
    "/v1/chat/completions": ["messages"],
    "/v1/completions": ["prompt"],
    "/tokenize": ["messages", "prompt"],
    "/detokenize": ["tokens"],
}


@st.composite
def requests(draw):
    """A path and a body."""
    path = draw(st.sampled_from([*PATHS, *list(PATHS)[:2]]))
    name = draw(st.sampled_from(PATHS[path]))
    body = {name: draw(PARTS[name]), **draw(MORE), **draw(RIGHT), **draw(ODD)}
    return path, body


@pytest.fixture(scope="module")
def client():
    with demo_client(raise_server_exceptions=False) as client:
        yield client


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(requests())
def test_no_request_is_answered_with_a_fault(client, request_):
    path, body = request_
    response = client.post(path, content=json.dumps(body))
    event(f"{path}: {response.status_code}")
    assert response.status_code in (200, 400), response.text
    if response.status_code == 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    elif body.get("stream") and path.startswith("/v1"):
        assert response.text.endswith("data: [DONE]\n\n"), response.text[-300:]
