"""The memory plan of a model from its files, before it is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqstack.attention.blocks import BLOCK_TOKENS
from tqstack.attention.hybrid import layer_codecs
from tqstack.attention.tail import tail_slots
from tqstack.settings import Settings
from tqstack.sidecar.geometry import Geometry, read_geometry, weight_bytes
from tqstack.sidecar.memory import Machine, MemoryPlan, geometric_plan
from tqstack.sidecar.model import ModelNotFoundError, resolve
from tqstack.sidecar.runtime import cache_codecs, this_machine
from tqstack.sidecar.safetensors import model_tensors
from tqstack.turboquant.codec import Codec


@dataclass(frozen=True)
class Planned:
    """A model that has not been loaded: its geometry, and what it will need."""

    id: str
    geometry: Geometry
    plan: MemoryPlan

    def describe(self) -> dict[str, Any]:
        """The same facts as `Runtime.describe`, but what only a loaded model can prove."""
        softmax = self.geometry.softmax_layers
        return {
            "id": self.id,
            "architecture": self.geometry.architecture,
            "context_length": self.geometry.context_length,
            "layers": len(self.geometry.layers),
            "softmax_layers": list(softmax),
            "recurrent_layers": self.geometry.layers.count("recurrent"),
        }


def plan_model(
    settings: Settings, name: str | None = None, machine: Machine | None = None
) -> Planned:
    """Plan SIDECAR_MODEL, or the model `name`, with the cache that the settings ask for.

    Args:
        machine: what it is planned for; None: this one.

    Raises:
        ModelNotFoundError, BrokenFileError, UnknownGeometryError, SettingsError: it cannot be
            planned; the message says why and what to do.
    """
    model_id, folder = model_folder(name or settings.model_name)
    config = json.loads((folder / "config.json").read_text())
    machine = machine or this_machine()
    weights = weight_bytes(model_tensors(folder), config, machine.expands_weights)
    return plan_config(settings, model_id, config, weights, machine)


def plan_config(
    settings: Settings, model_id: str, config: dict[str, Any], weights: int, machine: Machine
) -> Planned:
    """Plan a model of this config, whose weights take so many bytes once loaded."""
    geometry = read_geometry(config)
    stored = vector_bytes(settings, geometry, machine)
    tail = tail_slots(settings.tq_exact_tokens, BLOCK_TOKENS) if cache_codecs(settings) else 0
    plan = geometric_plan(geometry, stored, weights, machine, tail)
    return Planned(model_id, geometry, plan)


def model_folder(name: str) -> tuple[str, Path]:
    """(id, folder) of a model that is on this machine.

    Raises:
        ModelNotFoundError: it is not, or not wholly.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    from tqstack.sidecar import hub

    model_id, path = resolve(name)
    if Path(path).is_dir():
        return model_id, Path(path)
    try:
        return model_id, hub.snapshot(path)
    except LocalEntryNotFoundError:
        raise ModelNotFoundError(
            f"{name} is not on this machine; download it: tqstack model download {name}"
        ) from None


def vector_bytes(settings: Settings, geometry: Geometry, machine: Machine) -> list[int]:
    """Bytes of a stored key and value together, of each softmax layer."""
    count, codecs = len(geometry.softmax_layers), cache_codecs(settings)
    if codecs is None:
        return [2 * geometry.head_dim * machine.value_bytes] * count
    return [
        sum(map(codec_bytes, pair.codecs(geometry.head_dim, geometry.head_dim)))
        for pair in layer_codecs(count, codecs, settings.tq_boundary_layers)
    ]


def codec_bytes(codec: Codec) -> int:
    """Bytes of one stored vector."""
    return sum(width * dtype.size for width, dtype in codec.plane_shapes())
