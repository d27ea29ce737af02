"""When the model is in memory: loaded at the start or when first needed, unloaded when idle."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqstack.models.planning import ModelFacts


class Lifecycle:
    """Where the model is; changed by the engine's thread, read by any.

    Args:
        unloaded: facts of a model that is loaded when it is first needed; None: at the start.
        idle_seconds: without a request for so long, it is unloaded; 0: never.
    """

    def __init__(self, unloaded: ModelFacts | None = None, idle_seconds: float = 0):
        self.facts = unloaded
        self.idle_seconds = idle_seconds
        self._state = "unloaded"
        self._loads = self._unloads = 0
        self._load_seconds: float | None = None

    @property
    def starting(self) -> bool:
        """The first load, by a sidecar that does not wait for a request."""
        return self.facts is None

    @contextmanager
    def loading(self) -> Iterator[None]:
        self._state, started = "loading", time.perf_counter()
        try:
            yield
        finally:
            self._state = "unloaded"
        self._load_seconds = round(time.perf_counter() - started, 2)

    def loaded(self, facts: ModelFacts) -> None:
        self.facts, self._state = facts, "loaded"
        self._loads += 1

    def unloaded(self) -> None:
        self._state = "unloaded"
        self._unloads += 1

    def as_dict(self) -> dict[str, Any]:
        return {
            "state": self._state,
            "loads": self._loads,
            "unloads": self._unloads,
            "load_seconds": self._load_seconds,
            "idle_unload_seconds": self.idle_seconds,
        }
