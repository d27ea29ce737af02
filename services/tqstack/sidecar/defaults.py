"""How a model's makers want it to be sampled: its `generation_config.json`, as vLLM reads it."""

from __future__ import annotations

import json
import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

# Name, and the range that makes sense.
_KNOWN: dict[str, tuple[float, float]] = {
    "temperature": (0, 2),
    "top_p": (0, 1),
    "top_k": (0, 1 << 20),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 10),
}


@lru_cache(4)
def sampling_defaults(path: str | None) -> dict[str, Any]:
    """Values for what a request leaves open; empty, if the model's folder has none."""
    file = Path(path or ".") / "generation_config.json"
    if not path or not file.is_file():
        return {}
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(told, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        log.warning("%s cannot be used: %s", file, error)
        return {}
    found = {name: told[name] for name in _KNOWN if _sensible(name, told.get(name))}
    log.info("requests that leave it open are sampled with %s", found)
    return found


def _sensible(name: str, value: Any) -> bool:
    low, high = _KNOWN[name]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and low <= value <= high
