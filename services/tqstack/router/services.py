"""What all requests share, and what differs between the paths that they come to."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tqstack.openai_api.schema import Passing
from tqstack.router.backends.roster import Roster
from tqstack.router.clients import Clients
from tqstack.router.dialects import Dialect
from tqstack.router.estimate import Estimator
from tqstack.router.exact import ExactCounter
from tqstack.router.journal import Journal
from tqstack.router.metrics import Metrics
from tqstack.router.prefixes import Prefixes
from tqstack.router.slots import Slots
from tqstack.router.upstream import Upstream
from tqstack.settings import Settings

VIA = "x-tqstack-via"  # header: ids of the routers that a request has passed, with commas


@dataclass(frozen=True)
class Services:
    """What all exchanges share.

    Attributes:
        id: this router's, by which it knows requests of its own that come back to it.
    """

    settings: Settings
    upstream: Upstream
    backends: Roster
    estimator: Estimator
    counter: ExactCounter
    prefixes: Prefixes
    slots: Slots
    clients: Clients
    journal: Journal
    metrics: Metrics
    id: str = field(default_factory=lambda: secrets.token_hex(8))


class Endpoint(NamedTuple):
    """A path that goes to a backend.

    Attributes:
        schema: what its request must look like, in terms of chat if there is a dialect.
        dialect: how to translate it for a backend that does not know the path.
        needs: what a backend must be able to do, whatever the request holds.
        counted: the answer to a request that asks for its prompt's tokens only.
    """

    path: str
    schema: type[Passing]
    dialect: Dialect | None = None
    needs: frozenset[str] = frozenset()
    counted: Callable[[int], dict[str, Any]] | None = None
