"""What the router remembers of prompts, and what it makes of it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.fleet import Fleet
from router.scripted import SSE, Scripted, Wire, delta, usage_of, whole
from router.stack import LONG, Stack
from tqstack.router.backends.load import Load
from tqstack.router.prefixes import Prefixes, boundaries


def chat(*texts: str) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]}


def test_a_conversation_that_goes_on_is_warm_where_it_was_read():
    memory = Prefixes()
    first = boundaries("m", chat("a" * 100))
    memory.remember("desk", first, 50)
    longer = boundaries("m", chat("a" * 100, "b", "c" * 100))
    assert memory.read(longer).tokens == {"desk": 50}
    memory.remember("shed", longer, 120)
    assert memory.read(longer).tokens == {"desk": 50, "shed": 120}
    assert memory.read(longer).furthest == {"shed"}
    # A part of a prompt has its part of the tokens.
    other = boundaries("m", chat("a" * 100, "x"))
    assert memory.read(other).tokens == {"desk": 50, "shed": round(120 * 100 / 201)}
    assert memory.read(other).furthest == {"desk", "shed"}
    memory.forget("shed", longer)
    assert memory.read(longer).tokens == {"desk": 50}


@pytest.mark.parametrize(
    "one, other",
    [
        (("m", chat("a")), ("n", chat("a"))),
        (("m", chat("a")), ("m", {**chat("a"), "tools": [{"type": "function"}]})),
        (("m", chat("a", "b")), ("m", chat("a", "c"))),
        (("m", chat("a")), ("m", {"messages": [{"role": "user", "content": ["a"]}]})),
        (("m", chat("a")), ("m", {"messages": [{"role": "tool", "content": "a"}]})),
    ],
)
def test_what_differs_in_model_tools_or_messages_is_another_prompt(one, other):
    assert boundaries(*one)[-1].key != boundaries(*other)[-1].key


@given(
    st.lists(
        st.tuples(st.sampled_from("xy"), st.lists(st.sampled_from("ab"), min_size=1)), max_size=30
    )
)
def test_the_memory_is_bounded_and_tells_only_what_was_read(turns):
    memory, read = Prefixes(limit=8), {"x": [], "y": []}
    for backend, texts in turns:
        prompt = boundaries("m", chat(*texts))
        memory.remember(backend, prompt, 10 * len(texts))
        read[backend].append(texts)
        assert len(memory) <= 8
        for name, tokens in memory.read(prompt).tokens.items():
            common = max(_common(texts, one) for one in read[name])
            assert 0 < tokens <= 10 * common + 5
        assert memory.read(prompt).tokens[backend] == 10 * len(texts)


def _common(one: list[str], other: list[str]) -> int:
    same = [a == b for a, b in zip(one, other, strict=False)]
    return same.index(False) if False in same else len(same)


def test_a_prompt_waits_for_those_before_it_and_for_what_is_unread():
    load = Load()
    load.learn_speed(10_000, 10)
    assert load.seconds(500) == pytest.approx(0.5)
    load.running += 1
    first = load.begin(2_000)
    assert load.seconds(500) == pytest.approx(2.0 + 0.5 * 1.25, abs=0.2)
    load.has_read(first)
    assert load.seconds(500) == pytest.approx(0.5 * 1.25)
    load.end(first)
    load.running -= 1
    assert load.seconds(500) == pytest.approx(0.5)


def test_a_backend_that_keeps_nothing_is_not_trusted_with_prefixes():
    load = Load()
    for _ in range(4):
        load.learn_cached(1_000, 0)
    assert load.warm(1_000) < 100
    for _ in range(4):
        load.learn_cached(1_000, 1_200)
    assert load.warm(1_000) > 900


class Caching:
    """A script of a backend that keeps every prompt, and tells; or tells that it keeps nothing."""

    def __init__(self, backend: Scripted):
        self.backend, self.keeps, self.known = backend, True, set()

    async def __call__(self, wire: Wire) -> None:
        messages = [json.dumps(m) for m in wire.seen.json["messages"]]
        read = {tuple(messages[: i + 1]) for i in range(len(messages))}
        known = [len(one) for one in read & self.known if self.keeps]
        self.known |= read
        tokens = 500 * len(messages)
        usage = usage_of(tokens, 2)
        usage["prompt_tokens_details"] = {"cached_tokens": 500 * max(known, default=0)}
        if not wire.seen.json.get("stream"):
            answer = json.loads(whole(self.backend.name))
            return await wire.answer(200, json.dumps({**answer, "usage": usage}).encode())
        await wire.raw(SSE)
        await wire.chunk(delta(self.backend.name, "stop", usage=usage) + b"data: [DONE]\n\n")
        await wire.end()


@pytest.fixture
def fleet(tmp_path):
    fleet = Fleet(tmp_path, desk={}, shed={}, attic={})
    for backend in fleet.scripted[2:]:
        backend.script = Caching(backend)
    with fleet:
        fleet.probe()
        yield fleet


def turn(fleet: Stack, messages: list[dict], **body) -> str:
    """Takes a turn of a conversation; gives back who answered."""
    messages.append({"role": "user", "content": f"turn {len(messages)} " * 200})
    response = fleet.post(messages=messages, **body)
    messages.append({"role": "assistant", "content": "hm " * 100})
    fleet.settle()
    return response.headers["x-tqstack-backend"]


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
def test_conversations_stay_where_their_cache_is_and_move_once(fleet, stream):
    talks = {name: [{"role": "system", "content": name * 2000}] for name in ("x", "y", "z")}
    homes = {}
    for i, (name, messages) in enumerate(talks.items()):
        # Each begins at another backend.
        backend = ("desk", "shed", "attic")[i]
        homes[name] = turn(fleet, messages, stream=stream, model=f"{backend}:m")
        assert homes[name] == backend
    for _ in range(3):
        for name, messages in talks.items():
            assert turn(fleet, messages, stream=stream, model="m") == homes[name]
    last = fleet.http.get("/status").json()["recent"][0]
    assert (last["reason"], last["cached_tokens"]) == (
        "warm-prefix",
        500 * (last["prompt_tokens"] // 500 - 2),
    )
    fleet.run(fleet["shed"].stop())
    moved = turn(fleet, talks["y"], stream=stream, model="m")
    assert moved != "shed"
    fleet.run(fleet["shed"].start())
    fleet.probe()
    for _ in range(3):
        assert turn(fleet, talks["y"], stream=stream, model="m") == moved


def test_a_backend_whose_usage_shows_no_cache_is_no_longer_preferred(fleet):
    fleet["shed"].script.keeps = False
    messages = [{"role": "system", "content": "x" * 2000}]
    turn(fleet, messages, model="shed:m")
    asked = [turn(fleet, messages, model="m") for _ in range(8)]
    assert asked[0] == "shed"
    assert asked[-1] != "shed"
    report = fleet.http.get("/status").json()["recent"][0]
    assert report["reason"] == "warm-prefix"


@pytest.mark.parametrize("path", ["/tokenize", "/v1/embeddings", "/v1/chat/completions"])
@pytest.mark.parametrize("messages", [[1], ["a"], [{"role": ["x"], "content": {}}], {}, [None]])
def test_messages_that_are_none_are_no_fault(fleet, path, messages):
    assert fleet.post(path, messages=messages, input="x", model="m").status_code < 500


def test_what_two_apis_say_is_one_conversation(fleet):
    text = "hello " * 300
    first = fleet.post(messages=[{"role": "user", "content": text}], model="attic:m")
    assert first.headers["x-tqstack-backend"] == "attic"
    fleet.settle()
    answer = fleet.post(
        "/v1/messages",
        model="m",
        max_tokens=5,
        messages=[
            {"role": "user", "content": text},
            {"role": "assistant", "content": "hm"},
            {"role": "user", "content": "go on"},
        ],
    )
    assert answer.headers["x-tqstack-backend"] == "attic"
    assert answer.headers["x-tqstack-reason"] == "warm-prefix"


def test_a_conversation_that_shrank_stays_at_the_sidecar():
    with Stack(prompt_token_threshold=18_000) as stack:
        messages = [{"role": "user", "content": LONG}, {"role": "assistant", "content": "hm"}]
        stack.post(messages=[*messages, {"role": "user", "content": "and " * 5_000}])
        stack.settle()
        shorter = stack.post(messages=[*messages[:1], {"role": "user", "content": "no"}])
        assert shorter.headers["x-tqstack-backend"] == "sidecar"
