"""Which backend answers, why, and which one is next if it fails. Pure: no clock, no socket."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from tqstack.openai_api.errors import ApiError, bad_request
from tqstack.openai_api.schema import ANY_MODEL

Kind = Literal["sidecar", "ollama", "openai"]
Role = Literal["short", "long", "any"]
State = Literal["up", "sick", "loading", "down", "off"]

# Before a colon and a model's name: any backend of this kind. A backend's own name means just it.
PREFIXES: dict[str, Kind] = {
    "tq": "sidecar",
    "turbo": "sidecar",
    "sidecar": "sidecar",
    "ollama": "ollama",
    "local": "ollama",
}
# Prompts of at least so many tokens go to the sidecar, by the architecture of its model: a hybrid's
# cache is small in any case, so that compressing it pays later.
THRESHOLDS = {"softmax": 6_000, "hybrid": 16_000}
# A prompt goes where its beginning was read, if so much of it was (one part in so many), unless the
# first token would come much later there: moving on leaves a cache behind.
_WARM_PART = 8
_PATIENCE, _PATIENT_SECONDS = 2.0, 2.0
# Of two backends that can take a request, the one that is better off.
_RANK: dict[State, int] = {"up": 0, "sick": 1, "loading": 2, "down": 3, "off": 4}


@dataclass(frozen=True, slots=True)
class View:
    """What is known of a backend when a request arrives.

    Attributes:
        state: `sick` answers its probes but fails requests; `off` is switched off for good.
        models: names it serves, with the tokens that each can hold, if known; empty if it never
            told.
        own_model: the one it is asked for when the client's name is not its own.
        architecture: its model's: `softmax`, `hybrid`, or unknown.
        role: the length of the prompts that it is for.
        priority: of those that a prompt may go to, the lowest comes first.
        busy: it has requests running.
        lacks: features that it is known not to have: `tools`, `images`, `logprobs`, ...
        ignores: features whose fields it reads over.
        cuts: it drops what it cannot hold, and says nothing.
    """

    name: str
    state: State
    models: Mapping[str, int | None] = field(default_factory=dict)
    own_model: str = ""
    architecture: str = ""
    kind: Kind = "openai"
    role: Role = "any"
    priority: int = 0
    busy: bool = False
    lacks: frozenset[str] = frozenset()
    ignores: frozenset[str] = frozenset()
    cuts: bool = False

    def knows(self, model: str) -> str | None:
        """The model's name as this backend spells it: Ollama takes any case, and no `:latest`."""
        for name in (model, f"{model}:latest"):
            if name in self.models:
                return name
        meant = (model.lower(), f"{model.lower()}:latest")
        return next((name for name in self.models if name.lower() in meant), None)

    def name_for(self, model: str) -> str:
        """What this backend is asked for when the client wants `model`."""
        return self.knows(model) or self.own_model or model

    def context(self, model: str) -> int | None:
        """Tokens that it can hold when the client wants `model`."""
        return self.models.get(self.name_for(model))


@dataclass(frozen=True, slots=True)
class Ask:
    """What a request needs of a backend.

    Attributes:
        model: as the client wrote it, prefix included.
        tokens: estimated prompt tokens, by backend (their tokenizers differ).
        slack: how far the estimate may be off; 0.1 means 10 %.
        needs: features it uses.
        background: a prompt that a client sends by itself (titles, tags, follow-ups).
        warm: of the tokens, those at its front that a backend has read before.
        seconds: until the first token would come, by backend.
    """

    model: str
    tokens: Mapping[str, int]
    slack: float = 0.0
    needs: frozenset[str] = frozenset()
    background: bool = False
    warm: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A backend that a request may go to.

    Attributes:
        model: the name to ask this backend for.
        reason: a word or two, for the header, the metrics and the log.
        fallback_from: the backend that should have answered, if this one stands in for it.
    """

    backend: str
    model: str
    tokens: int
    reason: str
    fallback_from: str | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes: to the first candidate, and to the next if that fails before the client
    had a byte.

    Attributes:
        alone: why there is nobody else, if there is one candidate only.
    """

    candidates: tuple[Candidate, ...]
    alone: str = ""


@lru_cache(maxsize=256)
def split_model(model: str, names: frozenset[str]) -> tuple[str | None, str]:
    """The prefix, in small letters, and the name without it.

    Args:
        names: the backends'.
    """
    word, colon, rest = model.partition(":")
    word = word.lower()
    if colon and (word in names or word in PREFIXES):
        return word, rest.strip()
    return None, model


def threshold_for(setting: int | Literal["auto"], measure: View | None) -> int:
    """Tokens from which on a prompt is long, by the backend that measures it."""
    if setting != "auto":
        return setting
    architecture = measure.architecture if measure else ""
    return THRESHOLDS.get(architecture, THRESHOLDS["hybrid"])


def measure_of_length(views: Mapping[str, View]) -> View | None:
    """The backend by whose tokens a prompt is long or short: the first one for long prompts."""
    return next((v for v in views.values() if v.role == "long" and v.state != "off"), None)


def decide(ask: Ask, views: Mapping[str, View], threshold: int) -> Route:
    """Who may answer a request, the best first.

    Raises:
        ApiError: 400 for a model that nobody has, or a prompt that nobody can hold; 503 if nobody
            who could answer is there.
    """
    prefix, model = split_model(ask.model, frozenset(views))
    enabled = [view for view in views.values() if view.state != "off"]
    _check_known(ask.model, model, enabled)
    named = _named_by(prefix, views)
    order, reason = _preference(ask, model, named, views, threshold)
    if prefix:
        reason = "prefix"
    contexts = {view.name: view.context(model) for view in enabled}
    longest = max(filter(None, contexts.values()), default=None)
    able = [view for view in order if _holds(view, contexts[view.name] or longest, ask)]
    if not able:
        raise _too_long(ask, model, order)
    # Where an estimate may be over what a backend would cut, another one is better.
    able = [
        view for view in able if not (view.cuts and _may_cut(view, contexts[view.name], ask))
    ] or able
    capable = [view for view in able if not (ask.needs & view.lacks)] or able
    if not prefix:
        capable.sort(key=lambda view: bool(ask.needs & view.ignores))
    if capable[0] is not order[0]:
        reason = "features" if order[0] in able else "context"
    ready = [view for view in capable if view.state in ("up", "sick")]
    if not ready:
        raise _nobody(capable)
    ready.sort(key=lambda view: _RANK[view.state])
    chosen = ready[0]
    # A backend that was set aside for its state, or against a prefix, is named as missing.
    wanted, state = capable[0].name, capable[0].state
    if prefix and capable[0].name not in named:
        meant = order[0] if order[0].name in named else None
        wanted = meant.name if meant else PREFIXES.get(prefix, prefix)
        state = meant.state if meant else "off"
    missing = None
    if chosen.name != wanted:
        missing, reason = wanted, reason if state == "up" else f"{wanted}-{state}"
    candidates = [_candidate(chosen, model, ask, reason, missing)]
    candidates += [_candidate(view, model, ask, reason, chosen.name) for view in ready[1:]]
    alone = "" if len(ready) > 1 else _why_alone(chosen, enabled, able, capable)
    return Route(tuple(candidates), alone)


def _candidate(view: View, model: str, ask: Ask, reason: str, instead_of: str | None) -> Candidate:
    return Candidate(view.name, view.name_for(model), ask.tokens[view.name], reason, instead_of)


def _named_by(prefix: str | None, views: Mapping[str, View]) -> set[str]:
    """The backends that a prefix means: the one of this name, else those of a kind."""
    if prefix is None:
        return set()
    if prefix in views:
        return {prefix}
    return {view.name for view in views.values() if view.kind == PREFIXES[prefix]}


def _preference(
    ask: Ask, model: str, named: set[str], views: Mapping[str, View], threshold: int
) -> tuple[list[View], str]:
    """Who should answer, the best first, whatever they can do; and why the first one."""
    enabled = [view for view in views.values() if view.state != "off"]
    measure, unfit = measure_of_length(views), "none"
    if measure is None:
        reason = "only-backend" if len(enabled) == 1 else "priority"
    else:
        long = ask.tokens[measure.name] >= threshold
        unfit, reason = ("short", "long-prompt") if long else ("long", "short-prompt")
        if long and ask.background and all(v.busy for v in enabled if v.role != "short"):
            unfit, reason = "long", "background"
        elif not long and any(_was_long(view, ask, threshold) for view in enabled):
            unfit, reason = "short", "warm-prefix"

    def group(view: View) -> tuple[bool, bool]:
        return view.name not in named, view.role == unfit

    def key(view: View) -> tuple:
        unknown = view.knows(model) is None
        return *group(view), unknown, view.priority, ask.seconds.get(view.name, 0.0)

    order = sorted(enabled, key=key)
    equals = [view for view in order if group(view) == group(order[0])]
    if len(equals) > 1 and (warm := _warmest(equals, ask)):
        order.remove(warm)
        return [warm, *order], "warm-prefix"
    if reason == "priority" and order[0].priority == order[1].priority:
        reason = "least-wait"
    return order, reason


def _was_long(view: View, ask: Ask, threshold: int) -> bool:
    """Whether the prompt goes on with a conversation that was long once: it does not go back."""
    return view.role == "long" and ask.warm.get(view.name, 0) >= threshold / 2


def _warmest(views: list[View], ask: Ask) -> View | None:
    """The one of these that has read the front of the prompt and is there first, if that pays."""
    seconds = ask.seconds
    warm = [v for v in views if ask.warm.get(v.name, 0) * _WARM_PART >= ask.tokens[v.name]]
    if not warm:
        return None
    best = min(warm, key=lambda view: seconds.get(view.name, 0.0))
    least = min(seconds.get(view.name, 0.0) for view in views)
    waits = seconds.get(best.name, 0.0) > _PATIENCE * least + _PATIENT_SECONDS
    return None if waits else best


def _why_alone(chosen: View, enabled: list[View], able: list[View], capable: list[View]) -> str:
    reasons = []
    for view in enabled:
        if view is chosen:
            continue
        if view not in able:
            reasons.append(f"{view.name} cannot hold a prompt of this length")
        elif view not in capable:
            reasons.append(f"{view.name} cannot do what this request asks for")
        else:
            reasons.append(f"{view.name} is {view.state}")
    return "; ".join(reasons) or "there is no other backend"


def _check_known(written: str, model: str, enabled: list[View]) -> None:
    if model.lower() in ANY_MODEL or any(view.knows(model) or not view.models for view in enabled):
        return
    names = ", ".join([name for view in enabled for name in view.models][:20])
    raise bad_request(
        f"there is no model {written!r}; send `auto` to let the router choose, or one of: {names}",
        "model",
        "model_not_found",
    )


def _holds(view: View, context: int | None, ask: Ask) -> bool:
    """Whether the prompt fits. A backend that does not tell its context is trusted with what the
    longest known one holds, and no more."""
    return context is None or ask.tokens[view.name] * (1 - ask.slack) < context


def _may_cut(view: View, context: int | None, ask: Ask) -> bool:
    if context is None or ask.slack >= 1:  # nothing is known, of the one or the other
        return False
    return ask.tokens[view.name] * (1 + ask.slack / 2) >= context


def _too_long(ask: Ask, model: str, order: list[View]) -> ApiError:
    largest = max(order, key=lambda view: view.context(model) or 0)
    return bad_request(
        f"the prompt has about {ask.tokens[largest.name]} tokens, and the longest context here is "
        f"{largest.context(model)} ({largest.name}); send a shorter prompt",
        "messages",
        "context_length_exceeded",
    )


def _nobody(capable: list[View]) -> ApiError:
    if any(view.state == "loading" for view in capable):
        return ApiError(
            503, "the model is still loading; ask again shortly", code="loading", retry_after=5
        )
    names = " and ".join(view.name for view in capable)
    return ApiError(
        503,
        f"no backend can answer: {names} cannot be reached; start one (`tqstack up`, `ollama "
        "serve`), or see what `tqstack doctor` says",
        code="backend_unavailable",
        retry_after=2,
    )
