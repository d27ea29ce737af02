"""When the model is in memory: loaded at the start or when first needed, unloaded when idle, and
Ollama asked to make room before it is loaded."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from tqstack.settings import Settings, Switch
from tqstack.sidecar.geometry import UnknownGeometryError
from tqstack.sidecar.memory import MemoryPlan
from tqstack.sidecar.model import ModelNotFoundError
from tqstack.sidecar.planning import plan_model
from tqstack.sidecar.runtime import Runtime, cache_codecs, codec_name, load_runtime

log = logging.getLogger(__name__)

LEAVE_SECONDS = 30.0  # for Ollama's models, which finish the answers that they are giving
USEFUL_TOKENS = 32_768  # a context that there should be room for


@dataclass(frozen=True)
class Facts:
    """What is told about a model, loaded or not."""

    about: dict[str, Any]
    codec: str
    plan: MemoryPlan


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
    """Loads the model that the settings name, once Ollama has made room for it."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self.freed: dict[str, int] = {}  # what Ollama gave back last: model -> bytes

    def planned(self) -> Facts:
        """Facts of the model from its files.

        Raises:
            ModelNotFoundError, BrokenFileError, UnknownGeometryError, SettingsError
        """
        planned = plan_model(self._settings)
        codec = codec_name(cache_codecs(self._settings))
        return Facts({**planned.describe(), "compressed_layers": []}, codec, planned.plan)

    def load(self) -> Runtime:
        self.freed = self._make_room()
        return load_runtime(self._settings)

    def _make_room(self) -> dict[str, int]:
        if self._settings.sidecar_frees_ollama == "0":
            return {}
        try:
            plan = plan_model(self._settings).plan
        except (UnknownGeometryError, ModelNotFoundError):
            plan = None
        with httpx.Client(
            base_url=self._settings.ollama_base_url, trust_env=False, timeout=5
        ) as ollama:
            try:
                held = models_held(ollama)
                if must_free(self._settings.sidecar_frees_ollama, plan, sum(held.values())):
                    log.info("asking Ollama to unload %s", ", ".join(held))
                    free(ollama, list(held))
                    return held
            except httpx.HTTPError as error:
                log.info("Ollama was not asked for memory: %s", error)
        return {}


def must_free(switch: Switch, plan: MemoryPlan | None, held: int) -> bool:
    """Whether Ollama's `held` bytes are needed for this model and a context of useful length."""
    if not held or switch == "0":
        return False
    return switch == "1" or (plan is not None and not plan.fits(USEFUL_TOKENS, held))


def models_held(ollama: httpx.Client) -> dict[str, int]:
    """Ollama's models in memory, and their bytes; none if it is another kind of server."""
    response = ollama.get("/api/ps")
    if not response.is_success:
        return {}
    try:
        models = response.json().get("models") or []
        return {str(model["name"]): int(model.get("size") or 0) for model in models}
    except (ValueError, AttributeError, KeyError, TypeError):
        return {}


def free(ollama: httpx.Client, names: list[str]) -> None:
    """Have models unloaded, and wait until they are; answers under way are finished first."""
    for name in names:
        ollama.post("/api/generate", json={"model": name, "keep_alive": 0}).raise_for_status()
    deadline = time.monotonic() + LEAVE_SECONDS
    while models_held(ollama).keys() & set(names) and time.monotonic() < deadline:
        time.sleep(0.2)
