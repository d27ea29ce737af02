"""Every decision, without a process, a clock or a socket."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tqstack.openai_api.errors import ApiError
from tqstack.router import policy
from tqstack.router.offers import PREFIXES, Offers, View, offers_of, split_model
from tqstack.router.policy import Ask, Route, threshold_for

THRESHOLD = 1000
SIDECAR = {"models": {"demo": 100_000}, "own_model": "demo", "kind": "sidecar", "role": "long"}
OLLAMA = {
    "models": {"llama3:latest": 8_000, "qwen": None},
    "own_model": "llama3:latest",
    "kind": "ollama",
    "role": "short",
}


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
    return {
        **views(sidecar),
        "ollama": View("ollama", "up", **{**OLLAMA, "models": models}, cuts=True),
    }


def ask(model="auto", tokens=10, **facts):
    return model, Ask({"sidecar": tokens, "ollama": tokens}, **facts)


def decide(request, seen) -> Route:
    model, asked = request
    return policy.decide(asked, Offers(tuple(seen.values()), model), THRESHOLD)


def route(request, seen):
    first, *others = decide(request, seen).candidates
    following = others[0].backend if others else None
    return first.backend, first.reason, first.fallback_from, following


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
            ask(tokens=5000, background=True, busy=frozenset({"sidecar"})),
            views(),
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
            decide(ask(model), views())
    else:
        first = decide(ask(model), views()).candidates[0]
        assert (first.backend, first.model) == (backend, name)


REPLICAS = {name: View(name, "up", {"m": 100_000}, "m", role="any") for name in "abc"}


def choose(warm, seconds):
    most = max(warm.values(), default=0)
    home = frozenset(name for name, read in warm.items() if read == most)
    request = "m", Ask(dict.fromkeys(seconds, 800), warm=warm, home=home, seconds=seconds)
    first = decide(request, {name: REPLICAS[name] for name in seconds}).candidates[0]
    return first.backend, first.reason


@pytest.mark.parametrize(
    "warm, seconds, expected",
    [
        # A cold prompt goes where its first token comes first.
        ({}, {"a": 3, "b": 1, "c": 2}, ("b", "least-wait")),
        # A warm one stays, also where it waits a little,
        ({"c": 700}, {"a": 3, "b": 1, "c": 2}, ("c", "warm-prefix")),
        # but not where it waits for long,
        ({"c": 700}, {"a": 3, "b": 1, "c": 9}, ("b", "least-wait")),
        # nor for the few tokens that all conversations have in common.
        ({"c": 90}, {"a": 3, "b": 1, "c": 2}, ("b", "least-wait")),
        # Of two that have read as much of it, the one that is there first,
        ({"a": 500, "b": 500}, {"a": 2, "b": 1, "c": 1}, ("b", "warm-prefix")),
        # else the one that has read more, while it does not wait for long there.
        ({"a": 500, "c": 700}, {"a": 1, "b": 1, "c": 2}, ("c", "warm-prefix")),
        ({"a": 500, "c": 700}, {"a": 1, "b": 1, "c": 9}, ("a", "warm-prefix")),
    ],
)
def test_a_prompt_goes_where_its_first_token_comes_first(warm, seconds, expected):
    assert choose(warm, seconds) == expected


@pytest.mark.parametrize("state", ["down", "sick", "loading"])
def test_a_conversation_whose_backend_went_stays_where_it_moved_to(state):
    """Also where others are there first, and when that backend is back."""
    seconds = {"a": 0.0, "b": 1.0, "c": 0.5}
    facts = Ask(dict.fromkeys("abc", 800), warm={"a": 700, "b": 780}, seconds=seconds)
    gone = {**REPLICAS, "a": replace(REPLICAS["a"], state=state)}
    first = decide(("m", facts), gone).candidates[0]
    assert (first.backend, first.reason) == ("b", "warm-prefix")
    at_home = replace(facts, home=frozenset("b"))
    assert decide(("m", at_home), REPLICAS).candidates[0].backend == "b"


def test_a_warm_prefix_comes_before_priority():
    seen = {"a": REPLICAS["a"], "b": replace(REPLICAS["b"], priority=1)}
    cold = Ask(dict.fromkeys(seen, 800))
    assert decide(("m", cold), seen).candidates[0].reason == "priority"
    request = replace(cold, warm={"b": 700})
    assert decide(("m", request), seen).candidates[0].backend == "b"


def test_a_conversation_that_crossed_the_threshold_does_not_go_back():
    assert route(ask(tokens=900), views())[:2] == ("ollama", "short-prompt")
    warm = {"sidecar": 600, "ollama": 600}
    assert route(ask(tokens=900, warm=warm), views())[:2] == ("sidecar", "warm-prefix")
    assert route(ask(tokens=900, warm={"ollama": 600}), views())[:2] == ("ollama", "short-prompt")
    # What was read in a short prompt does not hold a long one back.
    assert route(ask(tokens=1000, warm=warm), views())[:2] == ("sidecar", "long-prompt")


def test_what_a_name_means_is_worked_out_once_while_no_view_changes():
    seen = tuple(views().values())
    assert offers_of(seen, "tq:demo") is offers_of(seen, "tq:demo")
    assert offers_of(tuple(views("down").values()), "tq:demo").all[0].view.state == "down"


def test_a_name_is_unknown_only_when_every_list_is_known():
    seen = {**views(), "ollama": View("ollama", "up")}
    assert decide(ask("new-model"), seen).candidates[0].model == "new-model"


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
        decide(ask(), views(sidecar, ollama))
    assert (error.value.status, error.value.code) == (503, code)
    assert error.value.retry_after


def test_an_estimate_within_its_slack_of_the_context_is_not_refused():
    route = decide(ask(tokens=9_000, slack=0.25), views("down"))
    assert route.candidates[0].backend == "ollama"
    with pytest.raises(ApiError) as error:
        decide(ask(tokens=11_000, slack=0.25), views("off"))
    assert error.value.code == "context_length_exceeded"


def test_a_prompt_over_every_known_context_is_refused():
    with pytest.raises(ApiError) as error:
        decide(ask("qwen", 200_000), views())
    assert error.value.code == "context_length_exceeded"
    assert "200000" in error.value.message and "100000" in error.value.message


NAMES = frozenset({"sidecar", "ollama", "studio", "desk.2"})


@settings(deadline=None)
@given(st.sampled_from([*PREFIXES, *NAMES]), st.text())
def test_a_prefix_is_stripped_once(prefix, name):
    assert split_model(f"{prefix.upper()}:{name}", NAMES) == (prefix, name.strip())


@settings(deadline=None)
@given(st.text())
def test_a_model_s_own_colon_is_no_prefix(name):
    assert split_model(f"llama3:{name}", NAMES) == (None, f"llama3:{name}")


@pytest.mark.parametrize(
    "setting, architecture, expected",
    [("auto", "softmax", 6_000), ("auto", "hybrid", 16_000), ("auto", "", 16_000), (7, "x", 7)],
)
def test_the_threshold_follows_the_architecture(setting, architecture, expected):
    measure = View("sidecar", "up", architecture=architecture)
    assert threshold_for(setting, measure) == expected


STATES = st.sampled_from(["up", "sick", "loading", "down"])
NEEDS = st.frozensets(st.sampled_from(["images", "tools", "guided"]))


@st.composite
def fleets(draw):
    """Up to six backends, and their tokens of a prompt."""
    seen = {}
    for i in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["sidecar", "ollama", "openai"]))
        models = draw(st.dictionaries(st.sampled_from("abc"), st.none() | st.integers(1, 10_000)))
        seen[f"b{i}"] = View(
            f"b{i}",
            draw(STATES | st.just("off") if i and kind == "sidecar" else STATES),
            models,
            draw(st.sampled_from([*models, ""])),
            kind=kind,
            role=draw(st.sampled_from(["short", "long", "any"])),
            priority=draw(st.integers(0, 2)),
            lacks=draw(NEEDS),
            ignores=draw(NEEDS),
            cuts=draw(st.booleans()),
        )
    return seen


@settings(deadline=None)
@given(
    fleets(),
    st.integers(1, 12_000),
    st.sampled_from(["auto", "tq:", "ollama:", "b0:", "b1:a", "a", "b"]),
    st.floats(0, 1),
    NEEDS,
    st.booleans(),
)
def test_candidates_are_there_hold_the_prompt_and_come_once(
    seen, tokens, model, slack, needs, background
):
    busy = frozenset(seen) if background else frozenset()
    request = model, Ask(dict.fromkeys(seen, tokens), slack, needs, background, busy=busy)
    try:
        route = decide(request, seen)
    except ApiError as error:
        assert error.status in (400, 503)
        return
    names = [candidate.backend for candidate in route.candidates]
    assert names and len(set(names)) == len(names)
    assert bool(route.alone) == (len(names) == 1)
    first, *others = route.candidates
    assert first.fallback_from != first.backend
    for candidate in route.candidates:
        view = seen[candidate.backend]
        assert view.state in ("up", "sick")
        context = view.models.get(candidate.model)
        assert context is None or tokens * (1 - slack) < context
        assert candidate.reason
    for candidate in others:
        assert candidate.fallback_from == first.backend
    # A sick one is asked only after all that are well.
    states = [seen[name].state for name in names]
    assert states == sorted(states, key=["up", "sick"].index)
    # Who has what is asked for comes before who has not; then all have not.
    lacking = [bool(needs & seen[name].lacks) for name in names]
    assert all(lacking) or not any(lacking)


@settings(deadline=None)
@given(fleets(), st.integers(1, 900), st.sampled_from(["sidecar", "ollama", "openai"]))
def test_a_prefix_of_a_kind_is_answered_by_it_while_one_is_well(seen, tokens, kind):
    prefix = {"sidecar": "tq:", "ollama": "local:", "openai": "b0:"}[kind]
    meant = [v for v in seen.values() if v.kind == kind]
    if kind == "openai":
        meant = [seen["b0"]]
    if not any(v.state == "up" and (v.context("") or 10_000) > 900 for v in meant):
        return
    views_ = {name: replace(v, cuts=False, models={}) for name, v in seen.items()}
    first = decide((prefix, Ask(dict.fromkeys(seen, tokens))), views_).candidates[0]
    assert first.backend in {v.name for v in meant}
