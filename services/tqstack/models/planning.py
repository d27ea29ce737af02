"""The memory plan of a model from its files, before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqstack.attention.dispatch import NotCompressedError
from tqstack.models.cache_spec import CacheSpec, read_cache_spec
from tqstack.models.device import this_machine
from tqstack.models.drafts import MOST
from tqstack.models.families import read_geometry
from tqstack.models.families.gated_delta import TYPES as WITH_HEAD
from tqstack.models.families.mla import caches_latents
from tqstack.models.plan import Machine, Plan, geometric_plan
from tqstack.models.safetensors import Tensor, head_tensors, model_tensors
from tqstack.models.spec import ModelSpec, read_spec
from tqstack.models.weight_bits import expanded_bytes
from tqstack.settings import Settings

# Parts of a checkpoint that mlx-lm drops: the vision tower and multi-token prediction.
NOT_LOADED = ("vision_tower", "model.visual", "visual.", "mtp.")


@dataclass(frozen=True)
class ModelFacts:
    """What is told about a model, loaded or not.

    Attributes:
        plan: None: it is made when the model is loaded and measured.
        compressed_layers: those that were proven to be.
    """

    spec: ModelSpec
    cache: CacheSpec
    plan: Plan | None
    compressed_layers: tuple[int, ...]

    @property
    def id(self) -> str:
        return self.spec.id

    @property
    def context_length(self) -> int:
        return self.spec.context_length

    @property
    def codec(self) -> str:
        return self.cache.name

    def describe(self) -> dict[str, Any]:
        """What `/health` tells about the model."""
        about = self.spec.describe(self.compressed_layers)
        if self.cache.native:
            about["note"] = "mlx-lm's quantized cache cannot be batched: one request at a time"
        return about


def read_facts(settings: Settings) -> ModelFacts:
    """What is told of SIDECAR_MODEL from its files.

    Raises:
        ModelNotFoundError, BrokenFileError, NotCompressedError, SettingsError: it cannot be served;
            the message says why and what to do.
    """
    spec, cache = read_spec(settings.model_name), read_cache_spec(settings)
    check_cache(spec, cache)
    return ModelFacts(spec, cache, plan_spec(settings, spec) if spec.geometry else None, ())


def check_cache(spec: ModelSpec, cache: CacheSpec) -> None:
    """
    Raises:
        NotCompressedError: the model caches no keys and values.
        SettingsError: mlx-lm's quantized cache cannot store vectors of their sizes.
    """
    if (cache.codecs or cache.native) and caches_latents(spec.config):
        raise NotCompressedError(
            f"{spec.id} caches latents and not keys and values (kv_lora_rank in its config), so "
            "there is nothing to compress; run it with TQ_CACHE_VERSION=none"
        )
    if spec.geometry is not None:
        cache.token_bytes(spec.geometry.softmax, value_bytes=2)


def plan_spec(
    settings: Settings,
    spec: ModelSpec,
    machine: Machine | None = None,
    weights: int | None = None,
) -> Plan:
    """The plan of a model with the cache that the settings ask for.

    Args:
        machine: what it is planned for; None: this one, with what SIDECAR_MEMORY_MB leaves of it.
        weights: bytes of the weights once loaded; None: as its files tell.

    Raises:
        BrokenFileError, UnknownGeometryError, SettingsError: it cannot be planned; the message says
            why and what to do.
    """
    machine = machine or this_machine(settings.sidecar_memory_mb)
    geometry = spec.geometry or read_geometry(spec.config)  # which raises
    cache = read_cache_spec(settings)
    head = head_of(settings, spec, cache)
    if weights is None:
        tensors = model_tensors(Path(spec.path))
        weights = weight_bytes(tensors, spec.config, machine.expands_weights)
        weights += _nbytes(head, spec.config, machine.expands_weights)
    geometry = geometry.with_head if head else geometry
    stored = cache.token_bytes(geometry.softmax, machine.value_bytes)
    drafted = drafted_tokens(settings, cache)
    return geometric_plan(geometry, stored, weights, machine, cache.tail_tokens, drafted)


def drafted_tokens(settings: Settings, cache: CacheSpec) -> int:
    """Most tokens of a sequence in a step."""
    return 1 + MOST if settings.sidecar_speculation != "0" and cache.codecs else 1


def head_of(settings: Settings, spec: ModelSpec, cache: CacheSpec) -> dict[str, Tensor]:
    """The tensors of the model's multi-token prediction, if it is used; empty: it is not."""
    wanted = settings.sidecar_speculation == "mtp" and spec.path
    # Boundary layers are counted from the cache's last entry, which would be the head's.
    possible = cache.codecs and not cache.boundary_layers
    if not wanted or not possible or spec.config.get("model_type") not in WITH_HEAD:
        return {}
    return head_tensors(Path(spec.path))


def weight_bytes(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], as_float32: bool = False
) -> int:
    """Bytes of the weights once loaded.

    Args:
        as_float32: as on the CPU, where quantized matrices are expanded and all becomes float32.
    """
    loaded = {n: t for n, t in tensors.items() if not any(part in n for part in NOT_LOADED)}
    return _nbytes(loaded, config, as_float32)


def _nbytes(tensors: Mapping[str, Tensor], config: Mapping[str, Any], as_float32: bool) -> int:
    if as_float32:
        return expanded_bytes(tensors, config.get("quantization") or {})
    return sum(tensor.nbytes for tensor in tensors.values())
