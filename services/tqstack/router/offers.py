"""What each backend offers to those who ask for a model, as far as the prompt does not matter.

This is worked out once for a model's name, and kept while the backends stay as they are: a request
then costs little more with ten backends than with two. Pure: no clock, no socket.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from typing import Literal, NamedTuple

from tqstack.openai_api.errors import bad_request
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


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """What is known of a backend; made anew when that changes.

    Attributes:
        state: `sick` answers its probes but fails requests; `off` is switched off for good.
        models: names it serves, with the tokens that each can hold, if known; empty if it never
            told.
        own_model: the one it is asked for when the client's name is not its own.
        architecture: its model's: `softmax`, `hybrid`, or unknown.
        role: the length of the prompts that it is for.
        priority: of those that a prompt may go to, the lowest comes first.
        lacks: features that it is known not to have: `tools`, `images`, `logprobs`, ...
        ignores: features whose fields it reads over.
        cuts: it drops what it cannot hold, and says nothing.
        router: its id, if it is another router.
    """

    name: str
    state: State
    models: Mapping[str, int | None] = field(default_factory=dict)
    own_model: str = ""
    architecture: str = ""
    kind: Kind = "openai"
    role: Role = "any"
    priority: int = 0
    lacks: frozenset[str] = frozenset()
    ignores: frozenset[str] = frozenset()
    cuts: bool = False
    router: str | None = None

    def knows(self, model: str) -> str | None:
        """The model's name as this backend spells it: Ollama takes any case, and no `:latest`."""
        for name in (model, f"{model}:latest"):
            if name in self.models:
                return name
        meant = (model.lower(), f"{model.lower()}:latest")
        return next((name for name in self.models if name.lower() in meant), None)

    def context(self, model: str) -> int | None:
        """Tokens that it can hold when the client wants `model`."""
        return self.models.get(self.knows(model) or self.own_model or model)


@dataclass(frozen=True, slots=True, eq=False)
class Offer:
    """What a backend offers.

    Attributes:
        model: what it is asked for, by its own name.
        known: it has the model that the client wants.
        context: tokens that it can hold, if it tells.
        trusted: tokens that a prompt for it may have: its context, or, where it tells none, the
            longest one that is known.
    """

    view: View
    backend: str
    model: str
    known: bool
    context: int | None
    trusted: float


class Ranking(NamedTuple):
    """Who should answer, the best first, whatever a prompt needs.

    Attributes:
        tiers: those of a tier are as good as each other.
        equals: how many, from the first one on, are meant for such a prompt.
    """

    tiers: tuple[tuple[Offer, ...], ...]
    equals: int


class Offers:
    """Of all backends that are not switched off.

    Args:
        written: the model as the client wrote it, prefix included.

    Attributes:
        prefix: what stands before the model's name and means a backend or a kind of them.
        named: the backends that the prefix means.
        measure: the backend by whose tokens a prompt is long or short.
        all_up: none of them is sick, loading or down.
        least_trusted: tokens that fit everywhere.
        lacked, ignored: features that some of them lack, and read over.

    Raises:
        ApiError: 400, if nobody has this model.
    """

    def __init__(self, views: tuple[View, ...], written: str):
        self._views = {view.name: view for view in views}
        self.prefix, model = split_model(written, frozenset(self._views))
        self.model = model
        self.named = self._named_by(self.prefix)
        enabled = [view for view in views if view.state != "off"]
        _check_known(written, model, enabled)
        longest = max(filter(None, (view.context(model) for view in enabled)), default=math.inf)
        self.all = tuple(_offer(view, model, longest) for view in enabled)
        self.models = frozenset(offer.model for offer in self.all)
        self.measure = measure_of_length(views)
        self.all_up = all(view.state == "up" for view in enabled)
        self.least_trusted = min((offer.trusted for offer in self.all), default=math.inf)
        self.lacked = frozenset().union(*(view.lacks for view in enabled))
        self.ignored = frozenset().union(*(view.ignores for view in enabled))
        self._rankings = {unfit: self._rank(unfit) for unfit in ("short", "long", None)}

    def ranking(self, unfit: Role | None) -> Ranking:
        """With those of the `unfit` role behind the others."""
        return self._rankings[unfit]

    def _named_by(self, prefix: str | None) -> frozenset[str]:
        """The backends that a prefix means: the one of this name, else those of a kind."""
        if prefix is None or prefix in self._views:
            return frozenset({prefix} if prefix else ())
        kind = PREFIXES[prefix]
        return frozenset(view.name for view in self._views.values() if view.kind == kind)

    def _rank(self, unfit: Role | None) -> Ranking:
        def group(offer: Offer) -> tuple[bool, bool]:
            return offer.backend not in self.named, offer.view.role == unfit

        def key(offer: Offer) -> tuple:
            return *group(offer), not offer.known, offer.view.priority

        order = sorted(self.all, key=key)
        equals = sum(group(offer) == group(order[0]) for offer in order)
        return Ranking(tuple(tuple(tier) for _, tier in groupby(order, key)), equals)


# Names that nobody has raise, and are not kept.
offers_of = lru_cache(maxsize=256)(Offers)


def _offer(view: View, model: str, longest: float) -> Offer:
    known = view.knows(model)
    name = known or view.own_model or model
    context = view.models.get(name)
    return Offer(view, view.name, name, known is not None, context, context or longest)


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


def measure_of_length(views: tuple[View, ...]) -> View | None:
    """The backend by whose tokens a prompt is long or short: the first one for long prompts."""
    return next((v for v in views if v.role == "long" and v.state != "off"), None)


def _check_known(written: str, model: str, enabled: list[View]) -> None:
    if model.lower() in ANY_MODEL or any(view.knows(model) or not view.models for view in enabled):
        return
    names = ", ".join([name for view in enabled for name in view.models][:20])
    raise bad_request(
        f"there is no model {written!r}; send `auto` to let the router choose, or one of: {names}",
        "model",
        "model_not_found",
    )
