"""A loaded model with everything that the engine decides by: codec, limits, memory plan."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from tqstack.attention.dispatch import prove
from tqstack.attention.hybrid import make_turboquant_cache
from tqstack.settings import Settings, SettingsError
from tqstack.sidecar.memory import MIB, MemoryPlan
from tqstack.sidecar.model import LoadedModel, load_model
from tqstack.turboquant.kv_bits import parse_kv_bits

PROBE_TOKENS = 256  # one block of the cache, so that the probe holds no slack


@dataclass(frozen=True)
class Runtime:
    """What the engine runs. `new_cache` makes the cache of one sequence."""

    loaded: LoadedModel
    specs: tuple[str, str] | None  # codecs of keys and values; None: mlx-lm's own cache
    boundary_layers: int
    plan: MemoryPlan
    prefill_step: int
    batch_size: int
    default_max_tokens: int
    prefix_cache_bytes: int
    compressed_layers: tuple[int, ...]

    @property
    def id(self) -> str:
        return self.loaded.id

    @property
    def model(self) -> nn.Module:
        return self.loaded.model

    @property
    def tokenizer(self) -> TokenizerWrapper:
        return self.loaded.tokenizer

    @property
    def end_tokens(self) -> list[int]:
        return sorted(self.tokenizer.eos_token_ids)

    def new_cache(self) -> list[Any]:
        if self.specs is None:
            return make_prompt_cache(self.model)
        return make_turboquant_cache(self.model, "/".join(self.specs), self.boundary_layers)

    @property
    def codec(self) -> str:
        if self.specs is None:
            return "none"
        keys, values = self.specs
        return keys if keys == values else f"{keys}/{values}"

    def describe(self) -> dict[str, Any]:
        """What `/health` tells about the model."""
        loaded = self.loaded
        return {
            "id": loaded.id,
            "architecture": loaded.architecture,
            "context_length": loaded.context_length,
            "layers": loaded.layers,
            "softmax_layers": list(loaded.softmax_layers),
            "recurrent_layers": loaded.layers - len(loaded.softmax_layers),
            "compressed_layers": list(self.compressed_layers),
        }


def cache_specs(settings: Settings) -> tuple[str, str] | None:
    """Codecs that the settings ask for.

    Raises:
        SettingsError: mlx-lm's quantized cache is asked for; it cannot serve several requests.
    """
    if settings.tq_cache_version == "none":
        return None
    if settings.tq_cache_version == "native":
        raise SettingsError(
            "TQ_CACHE_VERSION='native': mlx-lm's quantized cache cannot serve requests together; "
            "allowed for the sidecar: turboquant, affine, none"
        )
    group = settings.tq_kv_group_size
    try:
        return parse_kv_bits(
            settings.tq_kv_bits,
            settings.tq_cache_version,
            group_size=None if group == "auto" else group,
            rotation=settings.tq_use_rotation,
            normalization=settings.tq_use_normalization,
            code=settings.tq_kv_code,
        )
    except ValueError as error:
        raise SettingsError(str(error)) from None


def load_runtime(settings: Settings) -> Runtime:
    """Load the model, prove that its cache is compressed, and measure what that cache holds.

    Raises:
        ModelNotFoundError, NotCompressedError, SettingsError: the sidecar cannot serve; the message
            says why and what to do.
    """
    specs = cache_specs(settings)
    loaded = load_model(settings.model_name)
    runtime = Runtime(
        loaded=loaded,
        specs=specs,
        boundary_layers=settings.tq_boundary_layers,
        plan=MemoryPlan(_budget(), _nbytes(loaded.model.parameters()), 0, 0, 0, 0),
        # A step delays every other stream: on the CPU, keep it near a second.
        prefill_step=512 if mx.default_device() == mx.cpu else 2048,
        batch_size=settings.sidecar_max_batch,
        default_max_tokens=settings.sidecar_max_tokens,
        prefix_cache_bytes=settings.sidecar_prefix_cache_mb << 20,
        compressed_layers=(),
    )
    return _measured(runtime)


def _measured(runtime: Runtime) -> Runtime:
    """The runtime with the costs that a probe through the real cache shows."""
    cache, tokens = runtime.new_cache(), [0] * PROBE_TOKENS
    if runtime.specs is None:
        runtime.model(mx.array([tokens]), cache=cache)
        compressed: list[int] = []
    else:
        compressed = prove(runtime.model, cache, tokens)
    softmax = [cache[i] for i in runtime.loaded.softmax_layers]
    held = sum(entry.nbytes for entry in softmax)
    plain = sum(getattr(entry, "nbytes_fp16", entry.nbytes) for entry in softmax)
    others = [entry for i, entry in enumerate(cache) if i not in runtime.loaded.softmax_layers]
    step, width = runtime.prefill_step, runtime.loaded.widest_activation
    plan = replace(
        runtime.plan,
        per_token=-(-held // PROBE_TOKENS),
        per_token_fp16=-(-plain // PROBE_TOKENS),
        recurrent=sum(entry.nbytes for entry in others),
        # Activations of one prefill step and the tiles of its attention, with room to spare.
        workspace=4 * step * width * 4 + 256 * MIB,
    )
    return replace(runtime, plan=plan, compressed_layers=tuple(compressed))


def _nbytes(tree: Any) -> int:
    return sum(array.nbytes for _, array in tree_flatten(tree))  # pyright: ignore


def _budget() -> int:
    """Bytes that the sidecar may use: the GPU's working set, or four fifths of the memory."""
    info = mx.device_info()
    limit = info.get("max_recommended_working_set_size") or info.get("total_memory")
    if limit:
        return int(limit)
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 0.8)
