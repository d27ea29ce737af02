"""Which backend answers, why, and which one is next if it fails. Pure: no clock, no socket."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from tqstack.openai_api.errors import ApiError, bad_request
from tqstack.openai_api.schema import ANY_MODEL

Name = Literal["sidecar", "ollama"]
State = Literal["up", "sick", "loading", "down", "off"]

PREFIXES: dict[str, Name] = {
    "tq:": "sidecar",
    "turbo:": "sidecar",
    "sidecar:": "sidecar",
    "ollama:": "ollama",
    "local:": "ollama",
}
# Prompts of at least so many tokens go to the sidecar, by the architecture of its model: a hybrid's
# cache is small in any case, so that compressing it pays later.
THRESHOLDS = {"softmax": 6_000, "hybrid": 16_000}
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
        busy: it has requests running.
        lacks: features that it is known not to have: `tools`, `images`, `logprobs`, ...
        ignores: features whose fields it reads over.
        cuts: it drops what it cannot hold, and says nothing.
    """

    name: Name
    state: State
    models: Mapping[str, int | None] = field(default_factory=dict)
    own_model: str = ""
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
    """

    model: str
    tokens: Mapping[Name, int]
    slack: float = 0.0
    needs: frozenset[str] = frozenset()
    background: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a request goes.

    Attributes:
        model: the name to ask this backend for.
        reason: a word or two, for the header, the metrics and the log.
        fallback_from: the backend that should have answered, if this one stands in for it.
        next: what to do if this backend fails before the client had a byte.
        no_next: why there is no next.
    """

    backend: Name
    model: str
    tokens: int
    reason: str
    fallback_from: Name | None = None
    next: Decision | None = None
    no_next: str = ""


@lru_cache(maxsize=256)
def split_model(model: str) -> tuple[Name | None, str]:
    """The backend that a prefix forces, and the name without the prefix."""
    for prefix, backend in PREFIXES.items():
        if model[: len(prefix)].lower() == prefix:
            return backend, model[len(prefix) :].strip()
    return None, model


def threshold_for(setting: int | Literal["auto"], architecture: str | None) -> int:
    if setting != "auto":
        return setting
    return THRESHOLDS.get(architecture or "hybrid", THRESHOLDS["hybrid"])


def decide(ask: Ask, views: Mapping[Name, View], threshold: int) -> Decision:
    """The decision for a request.

    Raises:
        ApiError: 400 for a model that nobody has, or a prompt that nobody can hold; 503 if nobody
            who could answer is there.
    """
    forced, model = split_model(ask.model)
    enabled = [view for view in views.values() if view.state != "off"]
    _check_known(ask.model, model, enabled)
    first, reason = _preference(ask, forced, views, threshold)
    order = sorted(enabled, key=lambda view: view.name != first)
    able = [view for view in order if _holds(view, model, ask, _longest(enabled, model))]
    if not able:
        raise _too_long(ask, model, order)
    # Where an estimate may be over what a backend would cut, another one is better.
    able = [view for view in able if not (view.cuts and _may_cut(view, model, ask))] or able
    capable = [view for view in able if not (ask.needs & view.lacks)] or able
    if not forced:
        capable.sort(key=lambda view: bool(ask.needs & view.ignores))
    if capable[0].name != first and views[first].state != "off":
        reason = "context" if views[first] not in able else "features"
    ready = [view for view in capable if view.state in ("up", "sick")]
    if not ready:
        raise _nobody(capable)
    ready.sort(key=lambda view: _RANK[view.state])
    chosen = ready[0]
    # A backend that was set aside for its state, or against a prefix, is named as missing.
    wanted = forced or capable[0].name
    missing: Name | None = None
    if chosen.name != wanted:
        missing, state = wanted, views[wanted].state
        reason = reason if state == "up" else f"{wanted}-{state}"
    following, why = None, ""
    if len(ready) > 1:
        other = ready[1]
        following = Decision(
            other.name, other.name_for(model), ask.tokens[other.name], reason, chosen.name
        )
    else:
        why = _why_alone(views["ollama" if chosen.name == "sidecar" else "sidecar"], able, capable)
    return Decision(
        chosen.name,
        chosen.name_for(model),
        ask.tokens[chosen.name],
        reason,
        missing,
        following,
        why,
    )


def _why_alone(other: View, able: list[View], capable: list[View]) -> str:
    if other.state == "off":
        return "there is no other backend"
    if other not in able:
        return f"{other.name} cannot hold a prompt of this length"
    if other not in capable:
        return f"{other.name} cannot do what this request asks for"
    return f"{other.name} is {other.state}"


def _check_known(written: str, model: str, enabled: list[View]) -> None:
    if model.lower() in ANY_MODEL or any(view.knows(model) or not view.models for view in enabled):
        return
    names = ", ".join([name for view in enabled for name in view.models][:20])
    raise bad_request(
        f"there is no model {written!r}; send `auto` to let the router choose, or one of: {names}",
        "model",
        "model_not_found",
    )


def _preference(
    ask: Ask, forced: Name | None, views: Mapping[Name, View], threshold: int
) -> tuple[Name, str]:
    if forced:
        return forced, "prefix"
    sidecar = views["sidecar"]
    if sidecar.state == "off":
        return "ollama", "only-backend"
    if ask.tokens["sidecar"] < threshold:
        return "ollama", "short-prompt"
    if ask.background and sidecar.busy:
        return "ollama", "background"
    return "sidecar", "long-prompt"


def _longest(views: list[View], model: str) -> int | None:
    return max((context for view in views if (context := view.context(model))), default=None)


def _holds(view: View, model: str, ask: Ask, longest: int | None) -> bool:
    """Whether the prompt fits. A backend that does not tell its context is trusted with what the
    longest known one holds, and no more."""
    context = view.context(model) or longest
    return context is None or ask.tokens[view.name] * (1 - ask.slack) < context


def _may_cut(view: View, model: str, ask: Ask) -> bool:
    context = view.context(model)
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
