"""Every decision, without a process, a clock or a socket."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tqstack.openai_api.errors import ApiError
from tqstack.router.policy import PREFIXES, Ask, View, decide, split_model, threshold_for

THRESHOLD = 1000
SIDECAR = {"models": {"demo": 100_000}, "own_model": "demo"}
OLLAMA = {"models": {"llama3:latest": 8_000, "qwen": None}, "own_model": "llama3:latest"}


def views(sidecar="up", ollama="up", **sidecar_facts):
    return {
        "sidecar": View("sidecar", sidecar, **{**SIDECAR, **sidecar_facts}),
        "ollama": View("ollama", ollama, **OLLAMA),
    }


FORCED = frozenset({"tool_choice"})


def ignoring(sidecar="up"):
    seen = views(sidecar)
    return {**seen, "ollama": replace(seen["ollama"], ignores=FORCED)}


def cutting(sidecar="up"):
    models = {"llama3:latest": 1_000}
    return {**views(sidecar), "ollama": View("ollama", "up", models, "llama3:latest", cuts=True)}


def ask(model="auto", tokens=10, **facts):
    return Ask(model, {"sidecar": tokens, "ollama": tokens}, **facts)


def route(request, seen):
    decision = decide(request, seen, THRESHOLD)
    following = decision.next.backend if decision.next else None
    return decision.backend, decision.reason, decision.fallback_from, following


@pytest.mark.parametrize(
    "request_, seen, expected",
    [
        (ask(), views(), ("ollama", "short-prompt", None, "sidecar")),
        (ask(tokens=999), views(), ("ollama", "short-prompt", None, "sidecar")),
        (ask(tokens=1000), views(), ("sidecar", "long-prompt", None, "ollama")),
        (ask("tq:"), views(), ("sidecar", "prefix", None, "ollama")),
        (ask("local:qwen", 5000), views(), ("ollama", "prefix", None, "sidecar")),
        # The name alone chooses nothing.
        (ask("demo"), views(), ("ollama", "short-prompt", None, "sidecar")),
        (ask("qwen", 5000), views(), ("sidecar", "long-prompt", None, "ollama")),
        # A backend that is not there is replaced, and named.
        (ask(tokens=5000), views("down"), ("ollama", "sidecar-down", "sidecar", None)),
        (ask(tokens=5000), views("loading"), ("ollama", "sidecar-loading", "sidecar", None)),
        (ask(tokens=5000), views("sick"), ("ollama", "sidecar-sick", "sidecar", "sidecar")),
        (ask(), views("up", "down"), ("sidecar", "ollama-down", "ollama", None)),
        (ask("tq:"), views("down"), ("ollama", "sidecar-down", "sidecar", None)),
        # Switched off is not missing.
        (ask(tokens=5000), views("off"), ("ollama", "only-backend", None, None)),
        (ask("tq:"), views("off"), ("ollama", "sidecar-off", "sidecar", None)),
        # A sick backend is still better than none.
        (ask(), views("down", "sick"), ("ollama", "short-prompt", None, None)),
        # What cannot hold the prompt is no choice and no fallback.
        (ask(tokens=9_000), views(), ("sidecar", "long-prompt", None, None)),
        (ask("local:", 9_000), views(), ("sidecar", "context", "ollama", None)),
        # A context that is not told is trusted with what the longest known one holds.
        (ask("qwen", 90_000), views("down"), ("ollama", "sidecar-down", "sidecar", None)),
        # Nor is what cannot do what is asked, unless nobody can.
        (
            ask(tokens=5000, needs=frozenset({"images"})),
            views(lacks=frozenset({"images"})),
            ("ollama", "features", None, None),
        ),
        (
            ask(tokens=9000, needs=frozenset({"images"})),
            views(lacks=frozenset({"images"})),
            ("sidecar", "long-prompt", None, None),
        ),
        # What only one does is asked of that one, unless it is away or the other was named.
        (ask(needs=FORCED), ignoring(), ("sidecar", "features", None, "ollama")),
        (ask(needs=FORCED), ignoring("down"), ("ollama", "sidecar-down", "sidecar", None)),
        (ask(needs=FORCED), ignoring("off"), ("ollama", "only-backend", None, None)),
        (ask("local:", needs=FORCED), ignoring(), ("ollama", "prefix", None, "sidecar")),
        # A prompt that may be cut goes where it is not.
        (ask(tokens=900, slack=0.25), cutting(), ("sidecar", "context", None, None)),
        (ask(tokens=850, slack=0.25), cutting(), ("ollama", "short-prompt", None, "sidecar")),
        (
            ask(tokens=900, slack=0.25),
            cutting("off"),
            ("ollama", "only-backend", None, None),
        ),
        # Titles and tags stay away from a sidecar that is at work.
        (ask(tokens=5000, background=True), views(), ("sidecar", "long-prompt", None, "ollama")),
        (
            ask(tokens=5000, background=True),
            views(busy=True),
            ("ollama", "background", None, "sidecar"),
        ),
    ],
)
def test_decisions(request_, seen, expected):
    assert route(request_, seen) == expected


@pytest.mark.parametrize(
    "model, backend, name",
    [
        ("tq:demo", "sidecar", "demo"),
        ("tq:nobody-but-long", None, None),
        ("ollama:llama3", "ollama", "llama3:latest"),
        ("ollama:Llama3:Latest", "ollama", "llama3:latest"),
        ("QWEN", "ollama", "qwen"),
        ("ollama:", "ollama", "llama3:latest"),
        ("ollama:demo", "ollama", "llama3:latest"),
        ("", "ollama", "llama3:latest"),
        ("Default", "ollama", "llama3:latest"),
    ],
)
def test_names(model, backend, name):
    if backend is None:
        with pytest.raises(ApiError, match="no model"):
            decide(ask(model), views(), THRESHOLD)
    else:
        decision = decide(ask(model), views(), THRESHOLD)
        assert (decision.backend, decision.model) == (backend, name)


def test_a_name_is_unknown_only_when_every_list_is_known():
    seen = {**views(), "ollama": View("ollama", "up")}
    assert decide(ask("new-model"), seen, THRESHOLD).model == "new-model"


@pytest.mark.parametrize(
    "sidecar, ollama, code",
    [
        ("down", "down", "backend_unavailable"),
        ("loading", "down", "loading"),
        ("off", "down", "backend_unavailable"),
    ],
)
def test_with_nobody_there_the_error_is_503_and_says_when_to_ask_again(sidecar, ollama, code):
    with pytest.raises(ApiError) as error:
        decide(ask(), views(sidecar, ollama), THRESHOLD)
    assert (error.value.status, error.value.code) == (503, code)
    assert error.value.retry_after


def test_an_estimate_within_its_slack_of_the_context_is_not_refused():
    assert decide(ask(tokens=9_000, slack=0.25), views("down"), THRESHOLD).backend == "ollama"
    with pytest.raises(ApiError) as error:
        decide(ask(tokens=11_000, slack=0.25), views("off"), THRESHOLD)
    assert error.value.code == "context_length_exceeded"


def test_a_prompt_over_every_known_context_is_refused_though_one_backend_tells_none():
    with pytest.raises(ApiError) as error:
        decide(ask("qwen", 200_000), views(), THRESHOLD)
    assert error.value.code == "context_length_exceeded"
    assert "200000" in error.value.message and "100000" in error.value.message


@settings(deadline=None)
@given(st.sampled_from([*PREFIXES, ""]), st.text())
def test_a_prefix_is_stripped_once_and_forces_its_backend(prefix, name):
    forced, model = split_model(prefix + name)
    if prefix:
        assert (forced, model) == (PREFIXES[prefix], name.strip())


@pytest.mark.parametrize(
    "setting, architecture, expected",
    [("auto", "softmax", 6_000), ("auto", "hybrid", 16_000), ("auto", None, 16_000), (7, "x", 7)],
)
def test_the_threshold_follows_the_architecture(setting, architecture, expected):
    assert threshold_for(setting, architecture) == expected


STATES = st.sampled_from(["up", "sick", "loading", "down", "off"])


@settings(deadline=None)
@given(
    STATES,
    STATES.filter(lambda state: state != "off"),  # Ollama cannot be switched off
    st.integers(1, 300_000),
    st.sampled_from(["auto", "tq:", "ollama:", "qwen", "demo"]),
    st.booleans(),
)
def test_a_decision_names_who_can_answer_and_never_the_same_backend_twice(
    sidecar, ollama, tokens, model, background
):
    seen = views(sidecar, ollama)
    try:
        decision = decide(ask(model, tokens, background=background), seen, THRESHOLD)
    except ApiError as error:
        assert error.status in (400, 503)
        return
    assert seen[decision.backend].state in ("up", "sick")
    assert decision.fallback_from != decision.backend
    assert bool(decision.next) != bool(decision.no_next)
    if decision.next:
        assert decision.next.backend != decision.backend
        assert decision.next.fallback_from == decision.backend
