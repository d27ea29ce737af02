"""`/v1/messages` as agents use it: what Claude Code sends, structured answers, thoughts, usage."""

from __future__ import annotations

import asyncio

import anthropic
import pydantic
import pytest

from router.agent import answer, parallel, says_json, works
from router.scripted import Wire, says
from router.stack import Stack

LOOK = {"name": "look", "description": "looks", "input_schema": {"type": "object"}}
CALL = {"type": "tool_use", "id": "t1", "name": "look", "input": {}}
HELLO = [{"role": "user", "content": "hello"}]
# As Claude Code sends them: a line that changes with every request, then what stays.
SYSTEM = [
    {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.9; cch=1f2e3;"},
    {"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral"}},
]


@pytest.fixture(scope="module")
def stack():
    with Stack() as stack:
        yield stack


@pytest.fixture(autouse=True)
def in_order(stack):
    stack.sidecar.script = says("fine")
    stack.sidecar.seen.clear()


def create(stack, messages=HELLO, **options):
    return stack.anthropic.messages.create(model="tq:", max_tokens=50, messages=messages, **options)


def sent(stack):
    return stack.sidecar.seen[-1].json


def test_claude_code_s_wire_format(stack):
    thought = {"type": "thinking", "thinking": "I should look.", "signature": ""}
    cached = {"type": "text", "text": "fix", "cache_control": {"type": "ephemeral"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "no such file"}
    messages = [
        {"role": "user", "content": [cached]},
        {"role": "assistant", "content": [thought, CALL]},
        {"role": "user", "content": [{**result, "is_error": True}]},
        {"role": "system", "content": "The date has changed."},
        {"role": "user", "content": "go on"},
    ]
    body = {
        "model": "tq:", "max_tokens": 50, "system": SYSTEM, "messages": messages, "tools": [LOOK],
        "thinking": {"type": "adaptive"}, "output_config": {"effort": "xhigh"},
        "metadata": {"user_id": "u"}, "stream": True,
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    }  # fmt: skip
    assert stack.http.post("/v1/messages?beta=true", json=body).status_code == 200
    chat = sent(stack)
    roles = ["system", "user", "assistant", "tool", "system", "user"]
    assert [message["role"] for message in chat["messages"]] == roles
    assert chat["messages"][0]["content"] == "You are an agent."
    assert chat["messages"][2]["reasoning_content"] == "I should look."
    assert chat["messages"][3]["content"] == "Error: no such file"
    assert chat["reasoning_effort"] == "high"


def test_the_attribution_line_reaches_no_backend_of_the_same_api():
    with Stack() as stack:
        for system in (SYSTEM, f"{SYSTEM[0]['text']}\n\nYou are an agent."):
            stack.post("/v1/messages", model="qwen", max_tokens=5, messages=HELLO, system=system)
            assert b"billing" not in stack.ollama.seen[-1].body
            assert b"You are an agent." in stack.ollama.seen[-1].body


def test_a_schema_is_passed_on_and_parsed_by_the_sdk(stack):
    class City(pydantic.BaseModel):
        name: str
        people: int

    stack.sidecar.health["capabilities"] = ["json_schema"]
    stack.probe()
    stack.sidecar.script = says_json({"name": "Rome", "people": 3})
    message = stack.anthropic.messages.parse(
        model="tq:", max_tokens=50, messages=HELLO, output_format=City
    )
    assert message.parsed_output == City(name="Rome", people=3)
    form = sent(stack)["response_format"]
    assert form["type"] == "json_schema"
    assert set(form["json_schema"]["schema"]["properties"]) == {"name", "people"}


def test_the_sdk_s_tool_runner_runs_a_tool_and_sends_its_result_back(stack):
    @anthropic.beta_tool
    def add(a: int, b: int) -> str:
        """Adds two numbers."""
        return str(a + b)

    stack.sidecar.script = works("add", lambda _: {"a": 40, "b": 2})
    runner = stack.anthropic.beta.messages.tool_runner(
        model="tq:", max_tokens=50, tools=[add], messages=HELLO
    )
    assert runner.until_done().content[0].text == "The tool gave: 42"
    assert sent(stack)["messages"][1]["reasoning_content"] == "I need a tool."


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_is_told(stack, stream):
    async def script(wire: Wire) -> None:
        await answer(wire, {"content": "one "}, stop_reason="END")

    stack.sidecar.script = script
    if stream:
        with stack.anthropic.messages.stream(
            model="tq:", max_tokens=50, messages=HELLO, stop_sequences=["END"]
        ) as events:
            message = events.get_final_message()
    else:
        message = create(stack, stop_sequences=["END"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "END")
    # The scripted backend read 20 of 30 prompt tokens from its cache.
    usage = message.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens) == (10, 20)


def test_message_start_tells_an_estimate_until_the_backend_counts(stack):
    with stack.anthropic.messages.stream(model="tq:", max_tokens=50, messages=HELLO) as events:
        started = next(event for event in events if event.type == "message_start")
    assert started.message.usage.input_tokens > 0


def test_a_waiting_client_is_pinged(stack):
    async def slow(wire: Wire) -> None:
        await asyncio.sleep(0.4)
        await says("fine")(wire)

    with Stack(router_ping_seconds=0.1) as own:
        own.sidecar.script = slow
        body = {"model": "tq:", "max_tokens": 5, "messages": HELLO, "stream": True}
        text = own.http.post("/v1/messages", json=body).text
    assert text.startswith('event: ping\ndata: {"type":"ping"}\n\n')
    assert text.count("event: message_start") == 1


@pytest.mark.parametrize("index", [0, None])
def test_parallel_calls_stay_apart(stack, index):
    stack.sidecar.script = parallel("one", "two", index=index)
    with stack.anthropic.messages.stream(
        model="tq:", max_tokens=50, messages=HELLO, tools=[LOOK]
    ) as events:
        calls = events.get_final_message().content
    assert [(call.id, call.input) for call in calls] == [
        ("call_one", {"of": "one"}),
        ("call_two", {"of": "two"}),
    ]


def test_documents_and_images_in_results_are_carried(stack):
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QQ"}}
    result = {"type": "tool_result", "tool_use_id": "t1"}
    plain = {"type": "text", "media_type": "text/plain", "data": "all of it"}
    messages = [
        {"role": "user", "content": [{"type": "document", "source": plain, "title": "Notes"}]},
        {"role": "assistant", "content": [CALL]},
        {
            "role": "user",
            "content": [{**result, "content": [{"type": "text", "text": "see"}, image]}],
        },
    ]
    stack.sidecar.health["capabilities"] = ["images"]
    stack.probe()
    create(stack, messages, tools=[LOOK])
    user, _, tool, follows = sent(stack)["messages"]
    assert user["content"] == "Notes\nall of it"
    assert tool["content"] == "see"
    assert follows["content"][0]["image_url"]["url"] == "data:image/png;base64,QQ"


@pytest.mark.parametrize(
    "options, wanted",
    [
        ({"top_k": 7}, {"top_k": 7}),
        ({"thinking": {"type": "disabled"}}, {"reasoning_effort": "none"}),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, {"reasoning_effort": "low"}),
        ({"thinking": {"type": "enabled", "budget_tokens": 20_000}}, {"reasoning_effort": "high"}),
        (
            {"tools": [LOOK], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
            {"parallel_tool_calls": False, "tool_choice": "auto"},
        ),
    ],
)
def test_fields_reach_the_backend(stack, options, wanted):
    body = {"model": "tq:", "max_tokens": 5, "messages": HELLO}
    assert stack.http.post("/v1/messages", json={**body, **options}).status_code == 200
    assert {name: sent(stack).get(name) for name in wanted} == wanted


def test_an_answer_that_has_begun_is_to_be_gone_on_with(stack):
    create(stack, [*HELLO, {"role": "assistant", "content": "The answer is ("}])
    assert sent(stack)["continue_final_message"] is True
    assert sent(stack)["add_generation_prompt"] is False


def test_threads_are_refused_with_what_the_sdk_falls_back_by(stack):
    body = {"max_tokens": 5, "messages": HELLO, "thread": {"type": "create"}}
    error = stack.post("/v1/messages", **body).json()["error"]
    details = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    assert error["details"] == details


PDF = {"type": "base64", "media_type": "application/pdf", "data": "QQ"}


@pytest.mark.parametrize(
    "field, value",
    [
        ("container", "c_1"),
        ("mcp_servers", [{"type": "url", "url": "http://x", "name": "x"}]),
        ("tools", [{"type": "web_search_20250305", "name": "web_search"}]),
        ("output_config", {"effort": "endless"}),
        ("output_config", {"format": {"type": "xml"}}),
        ("messages", [{"role": "user", "content": [{"type": "document", "source": PDF}]}]),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_sentence(stack, field, value):
    body = {"max_tokens": 5, "messages": HELLO, field: value}
    response = stack.post("/v1/messages", **body)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"].startswith(field)
    assert len(error["message"].split()) > 5


def test_hosted_tools_beside_others_are_left_out_and_a_header_says_so(stack):
    raw = stack.anthropic.messages.with_raw_response.create(
        model="tq:", max_tokens=5, messages=HELLO,
        tools=[LOOK, {"type": "web_search_20250305", "name": "web_search"}],
    )  # fmt: skip
    assert raw.headers["x-tqstack-left-out"] == "web_search_20250305"
    assert [tool["function"]["name"] for tool in sent(stack)["tools"]] == ["look"]
