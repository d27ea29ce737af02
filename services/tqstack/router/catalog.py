"""The list of models: every backend's own, and the names that force one of them. From memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tqstack.openai_api.errors import ApiError
from tqstack.router.backends.backend import Backend


def list_models(backends: Mapping[str, Backend]) -> list[dict[str, Any]]:
    """Entries for `/v1/models`: `auto` first, then every name plain and with its prefix."""
    plain: dict[str, dict[str, Any]] = {}
    forced = []
    for backend in backends.values():
        holds = backend.view().models
        for entry in backend.models:
            if length := holds.get(entry["id"]):
                entry = {**entry, "context_length": length}
            plain.setdefault(entry["id"], {**_OWN, **entry, "backend": backend.name})
            name = backend.definition.prefix + entry["id"]
            forced.append({**_OWN, **entry, "id": name, "name": name, "backend": backend.name})
    auto = {**_OWN, "id": "auto", "name": "auto (by prompt length)", "owned_by": "tqstack"}
    return [auto, *plain.values(), *forced]


_OWN = {"object": "model", "created": 0, "owned_by": "library"}


def find_model(backends: Mapping[str, Backend], name: str) -> dict[str, Any]:
    """One entry.

    Raises:
        ApiError: 404, if nobody has this model.
    """
    for entry in list_models(backends):
        if entry["id"] == name:
            return entry
    message = f"there is no model {name!r}; `GET /v1/models` lists those that there are"
    raise ApiError(404, message, param="model", code="model_not_found")
