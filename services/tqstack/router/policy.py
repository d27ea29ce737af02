"""Which backend answers, why, and which one is next if it fails. Pure: no clock, no socket."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from tqstack.openai_api.errors import ApiError, bad_request
from tqstack.router.offers import PREFIXES, Offer, Offers, Role, State, View

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
class Ask:
    """What a request needs of a backend.

    Attributes:
        tokens: estimated prompt tokens, by backend (their tokenizers differ).
        slack: how far the estimate may be off; 0.1 means 10 %.
        needs: features it uses.
        background: a prompt that a client sends by itself (titles, tags, follow-ups).
        warm: of the tokens, those at its front that a backend has read before.
        home: backends that have read most of the prompt.
        seconds: until the first token would come, by backend.
        busy: backends that have requests running; of interest to background prompts only.
    """

    tokens: Mapping[str, int]
    slack: float = 0.0
    needs: frozenset[str] = frozenset()
    background: bool = False
    warm: Mapping[str, int] = field(default_factory=dict)
    home: frozenset[str] = frozenset()
    seconds: Mapping[str, float] = field(default_factory=dict)
    busy: frozenset[str] = frozenset()


class Candidate(NamedTuple):
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


class Route(NamedTuple):
    """Where a request goes: to the first candidate, and to the next if that fails before the client
    had a byte.

    Attributes:
        alone: why there is nobody else, if there is one candidate only.
    """

    candidates: tuple[Candidate, ...]
    alone: str = ""


def threshold_for(setting: int | Literal["auto"], measure: View | None) -> int:
    """Tokens from which on a prompt is long, by the backend that measures it."""
    if setting != "auto":
        return setting
    architecture = measure.architecture if measure else ""
    return THRESHOLDS.get(architecture, THRESHOLDS["hybrid"])


def decide(ask: Ask, offers: Offers, threshold: int) -> Route:
    """Who may answer a request, the best first.

    Raises:
        ApiError: 400 for a prompt that nobody can hold; 503 if nobody who could answer is there.
    """
    prefix, named = offers.prefix, offers.named
    order, reason = _preference(ask, offers, threshold)
    if prefix:
        reason = "prefix"
    able = _able(order, ask, offers)
    capable = able
    if ask.needs & offers.lacked:
        capable = [offer for offer in able if not (ask.needs & offer.view.lacks)] or able
    if ask.needs & offers.ignored and not prefix:
        capable = sorted(capable, key=lambda offer: bool(ask.needs & offer.view.ignores))
    best = capable[0]
    if best is not order[0]:
        reason = "features" if order[0] in able else "context"
    ready = capable
    if not offers.all_up:
        ready = [offer for offer in capable if offer.view.state in ("up", "sick")]
        if not ready:
            raise _nobody(capable)
        ready.sort(key=lambda offer: _RANK[offer.view.state])
    chosen = ready[0]
    # A backend that was set aside for its state, or against a prefix, is named as missing.
    wanted, state = best.backend, best.view.state
    if prefix and wanted not in named:
        meant = order[0] if order[0].backend in named else None
        wanted = meant.backend if meant else PREFIXES.get(prefix, prefix)
        state = meant.view.state if meant else "off"
    missing = None
    if chosen.backend != wanted:
        missing, reason = wanted, reason if state == "up" else f"{wanted}-{state}"
    candidates = [
        Candidate(
            offer.backend,
            offer.model,
            ask.tokens[offer.backend],
            reason,
            missing if offer is chosen else chosen.backend,
        )
        for offer in ready
    ]
    alone = "" if len(ready) > 1 else _why_alone(chosen, offers.all, able, capable)
    return Route(tuple(candidates), alone)


def _preference(ask: Ask, offers: Offers, threshold: int) -> tuple[list[Offer], str]:
    """Who should answer, the best first, whatever they can do; and why the first one."""
    measure = offers.measure
    unfit: Role | None = None
    if measure is None:
        reason = "only-backend" if len(offers.all) == 1 else "priority"
    else:
        long = ask.tokens[measure.name] >= threshold
        unfit, reason = ("short", "long-prompt") if long else ("long", "short-prompt")
        if long and ask.background and _all_busy(ask, offers):
            unfit, reason = "long", "background"
        elif not long and ask.warm and _was_long(ask, offers, threshold):
            unfit, reason = "short", "warm-prefix"
    tiers, equals = offers.ranking(unfit)
    order = [offer for tier in tiers for offer in _by_seconds(tier, ask)]
    if equals > 1 and ask.warm and (warm := _home(order[:equals], ask)):
        order.remove(warm)
        return [warm, *order], "warm-prefix"
    if reason == "priority" and order[0].view.priority == order[1].view.priority:
        reason = "least-wait"
    return order, reason


def _by_seconds(tier: Sequence[Offer], ask: Ask) -> Sequence[Offer]:
    seconds = ask.seconds
    if len(tier) == 1 or not seconds:
        return tier
    return sorted(tier, key=lambda offer: seconds[offer.backend])


def _all_busy(ask: Ask, offers: Offers) -> bool:
    return all(offer.backend in ask.busy for offer in offers.all if offer.view.role != "short")


def _was_long(ask: Ask, offers: Offers, threshold: int) -> bool:
    """Whether the prompt goes on with a conversation that was long once: it does not go back."""
    long = (offer.backend for offer in offers.all if offer.view.role == "long")
    return any(ask.warm.get(backend, 0) >= threshold / 2 for backend in long)


def _home(equals: list[Offer], ask: Ask) -> Offer | None:
    """The one of these with which the conversation stays, if it does not wait too long there."""

    def seconds(offer: Offer) -> float:
        return ask.seconds.get(offer.backend, 0.0)

    def key(offer: Offer) -> tuple:
        # Its home is where it went on when another backend was down, also once that is back.
        return offer.view.state != "up", offer.backend not in ask.home, seconds(offer)

    read, tokens = ask.warm, ask.tokens
    warm = [o for o in equals if read.get(o.backend, 0) * _WARM_PART >= tokens[o.backend]]
    if not warm:
        return None
    well = [seconds(offer) for offer in equals if offer.view.state == "up"]
    longest = _PATIENCE * min(well, default=math.inf) + _PATIENT_SECONDS
    return min((o for o in warm if seconds(o) <= longest), key=key, default=None)


def _able(order: list[Offer], ask: Ask, offers: Offers) -> list[Offer]:
    """Those of them that can hold the prompt.

    Raises:
        ApiError: nobody can.
    """
    if max(ask.tokens.values()) * (1 + ask.slack) < offers.least_trusted:
        return order
    able = [offer for offer in order if _holds(offer, ask)]
    if not able:
        raise _too_long(ask, order)
    # Where an estimate may be over what a backend would cut, another one is better.
    return [offer for offer in able if not _may_cut(offer, ask)] or able


def _holds(offer: Offer, ask: Ask) -> bool:
    return ask.tokens[offer.backend] * (1 - ask.slack) < offer.trusted


def _may_cut(offer: Offer, ask: Ask) -> bool:
    if not offer.view.cuts or offer.context is None or ask.slack >= 1:  # nothing is known
        return False
    return ask.tokens[offer.backend] * (1 + ask.slack / 2) >= offer.context


def _why_alone(
    chosen: Offer, offers: Sequence[Offer], able: list[Offer], capable: list[Offer]
) -> str:
    reasons = []
    for offer in offers:
        if offer is chosen:
            continue
        if offer not in able:
            reasons.append(f"{offer.backend} cannot hold a prompt of this length")
        elif offer not in capable:
            reasons.append(f"{offer.backend} cannot do what this request asks for")
        else:
            reasons.append(f"{offer.backend} is {offer.view.state}")
    return "; ".join(reasons) or "there is no other backend"


def _too_long(ask: Ask, order: list[Offer]) -> ApiError:
    largest = max(order, key=lambda offer: offer.context or 0)
    return bad_request(
        f"the prompt has about {ask.tokens[largest.backend]} tokens, and the longest context here "
        f"is {largest.context} ({largest.backend}); send a shorter prompt",
        "messages",
        "context_length_exceeded",
    )


def _nobody(capable: list[Offer]) -> ApiError:
    if any(offer.view.state == "loading" for offer in capable):
        return ApiError(
            503, "the model is still loading; ask again shortly", code="loading", retry_after=5
        )
    names = " and ".join(offer.backend for offer in capable)
    return ApiError(
        503,
        f"no backend can answer: {names} cannot be reached; start one (`tqstack up`, `ollama "
        "serve`), or see what `tqstack doctor` says",
        code="backend_unavailable",
        retry_after=2,
    )
