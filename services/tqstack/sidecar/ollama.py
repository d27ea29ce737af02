"""Ollama asked to make room before a model is loaded."""

from __future__ import annotations

import logging
import time

import httpx

from tqstack.models.plan import Plan
from tqstack.settings import Settings, Switch

log = logging.getLogger(__name__)

LEAVE_SECONDS = 30.0  # for Ollama's models, which finish the answers that they are giving
USEFUL_TOKENS = 32_768  # a context that there should be room for


def make_room(settings: Settings, plan: Plan | None) -> dict[str, int]:
    """Have Ollama unload its models, where the settings want it: model -> bytes given back.

    Args:
        plan: of the model that is to be loaded; None: unknown until then.
    """
    if settings.sidecar_frees_ollama == "0":
        return {}
    with httpx.Client(base_url=settings.ollama_base_url, trust_env=False, timeout=5) as ollama:
        try:
            held = models_held(ollama)
            if must_free(settings.sidecar_frees_ollama, plan, sum(held.values())):
                log.info("asking Ollama to unload %s", ", ".join(held))
                free(ollama, list(held))
                return held
        except httpx.HTTPError as error:
            log.info("Ollama was not asked for memory: %s", error)
    return {}


def must_free(switch: Switch, plan: Plan | None, held: int) -> bool:
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
