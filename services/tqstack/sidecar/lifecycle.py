"""When the model is in memory: loaded at the start or when first needed, unloaded when idle."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqstack.models.planning import Facts, read_facts
from tqstack.models.runtime import Runtime, load_runtime
from tqstack.models.spec import ModelNotFoundError
from tqstack.settings import Settings, SettingsError
from tqstack.sidecar.ollama import make_room


class Lifecycle:
    """Where the model is; changed by the engine's thread, read by any.

    Args:
        unloaded: facts of a model that is loaded when it is first needed; None: at the start.
        idle_seconds: without a request for so long, it is unloaded; 0: never.
    """

    def __init__(self, unloaded: Facts | None = None, idle_seconds: float = 0):
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

    def loaded(self, facts: Facts) -> None:
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


class Loader:
    """Loads the model that the settings name, once Ollama has made room for it.

    Raises:
        SettingsError: the engine cannot use the cache that is asked for.
    """

    def __init__(self, settings: Settings):
        if settings.tq_cache_version == "native":
            raise SettingsError(
                "TQ_CACHE_VERSION='native': mlx-lm's quantized cache cannot serve requests "
                "together; allowed for the sidecar: turboquant, affine, none"
            )
        self._settings = settings
        self.freed: dict[str, int] = {}  # what Ollama gave back last: model -> bytes

    def planned(self) -> Facts:
        """Facts of the model from its files.

        Raises:
            ModelNotFoundError, BrokenFileError, NotCompressedError, SettingsError
        """
        return read_facts(self._settings)

    def load(self) -> Runtime:
        try:
            plan = self.planned().plan
        except ModelNotFoundError:  # it is downloaded first
            plan = None
        self.freed = make_room(self._settings, plan)
        return load_runtime(self._settings)
