"""A loaded model with everything that the engine decides by: codec, limits, memory plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from tqstack.attention.cache import TurboQuantKVCache
from tqstack.attention.dispatch import prove
from tqstack.attention.hybrid import make_turboquant_cache
from tqstack.machine import machine_memory
from tqstack.settings import Settings, SettingsError
from tqstack.sidecar.geometry import UnknownGeometryError, read_geometry
from tqstack.sidecar.memory import Machine, MemoryPlan, prefill_workspace
from tqstack.sidecar.model import LoadedModel, load_model
from tqstack.sidecar.search_cost import affords
from tqstack.turboquant.kv_codecs import UNCOMPRESSED, KVCodecs

PROBE_TOKENS = 256  # a step by which mlx-lm's cache grows, so that the probe holds no slack
CPU_SHARE = 0.8  # of the memory, for the sidecar: the rest is for the system and other programs


@dataclass(frozen=True)
class Runtime:
    """What the engine runs. `new_cache` makes the cache of one sequence."""

    loaded: LoadedModel
    codecs: KVCodecs | None  # None: mlx-lm's own cache
    boundary_layers: int
    exact_tokens: int  # newest tokens that stay exact, beside a query's own block
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
        if self.codecs is None:
            return make_prompt_cache(self.model)
        return make_turboquant_cache(
            self.model, self.codecs, self.boundary_layers, exact_tokens=self.exact_tokens
        )

    @property
    def codec(self) -> str:
        return codec_name(self.codecs)

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


def codec_name(codecs: KVCodecs | None) -> str:
    """How people name what the cache stores."""
    return (codecs or UNCOMPRESSED).name


def cache_codecs(settings: Settings, code: str | None = None) -> KVCodecs | None:
    """Codecs that the settings ask for; None: mlx-lm's own cache.

    Args:
        code: "lloyd" or "trellis", where TQ_KV_CODE leaves it open; None: lloyd.

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
        return KVCodecs.from_settings(
            settings.tq_kv_bits,
            settings.tq_cache_version,
            group_size=None if group == "auto" else group,
            rotation=settings.tq_use_rotation,
            normalization=settings.tq_use_normalization,
            code=(code or "lloyd") if settings.tq_kv_code == "auto" else settings.tq_kv_code,
        )
    except ValueError as error:
        raise SettingsError(str(error)) from None


def load_runtime(settings: Settings) -> Runtime:
    """Load the model, prove that its cache is compressed, and measure what that cache holds.

    Raises:
        ModelNotFoundError, NotCompressedError, SettingsError: the sidecar cannot serve; the message
            says why and what to do.
    """
    codecs = cache_codecs(settings)
    loaded, machine = load_model(settings.model_name), this_machine()
    runtime = Runtime(
        loaded=loaded,
        codecs=codecs,
        boundary_layers=settings.tq_boundary_layers,
        exact_tokens=settings.tq_exact_tokens,
        plan=MemoryPlan(machine.budget, _nbytes(loaded.model.parameters()), 0, 0, 0, 0),
        prefill_step=machine.prefill_step,
        batch_size=settings.sidecar_max_batch,
        default_max_tokens=settings.sidecar_max_tokens,
        prefix_cache_bytes=settings.sidecar_prefix_cache_mb << 20,
        compressed_layers=(),
    )
    return _measured(replace(runtime, codecs=_closest(settings, runtime)))


def _closest(settings: Settings, runtime: Runtime) -> KVCodecs | None:
    """TQ_KV_CODE=auto: the trellis code where its search is affordable here."""
    if settings.tq_kv_code != "auto" or settings.tq_cache_version != "turboquant":
        return runtime.codecs
    try:
        trellis = cache_codecs(settings, "trellis")
    except SettingsError:  # its options, or bits, are another code's
        return runtime.codecs
    assert trellis is not None
    affordable = affords(trellis, runtime.model, runtime.new_cache, runtime.prefill_step)
    return trellis if affordable else runtime.codecs


def _measured(runtime: Runtime) -> Runtime:
    """The runtime with the costs that a probe through the real cache shows."""
    cache = runtime.new_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    if runtime.codecs is None:
        mx.eval(runtime.model(mx.zeros((1, PROBE_TOKENS), mx.int32), cache=cache))
        compressed: list[int] = []
    else:
        compressed = prove(runtime.model, cache)
    probe = mx.get_peak_memory() - before
    softmax = [cache[i] for i in runtime.loaded.softmax_layers]
    others = [entry for i, entry in enumerate(cache) if i not in runtime.loaded.softmax_layers]
    tokens = softmax[0].size() if softmax else PROBE_TOKENS
    plan = replace(
        runtime.plan,
        **(_compressed(softmax) if compressed else _plain(softmax, tokens)),
        recurrent=sum(entry.nbytes for entry in others),
        workspace=_workspace(runtime, probe, tokens),
    )
    return replace(runtime, plan=plan, compressed_layers=tuple(compressed))


def _compressed(entries: list[TurboQuantKVCache]) -> dict[str, Any]:
    """Costs of the softmax layers of a model, from one sequence's cache."""
    pool = entries[0].pool
    return {
        "per_token": -(-pool.block_bytes // pool.block_tokens),
        "per_token_fp16": sum(entry.nbytes_fp16 // entry.size() for entry in entries),
        "tail": sum(entry.tails.nbytes for entry in entries),
    }


def _plain(entries: list[Any], tokens: int) -> dict[str, Any]:
    each = -(-sum(entry.nbytes for entry in entries) // tokens)
    return {"per_token": each, "per_token_fp16": each, "padded": True}


def _nbytes(tree: Any) -> int:
    return sum(array.nbytes for _, array in tree_flatten(tree))  # pyright: ignore


def _workspace(runtime: Runtime, probe: int, tokens: int) -> int:
    """Bytes of a prefill step; for a model without a formula, those of the probe, scaled."""
    try:
        geometry = read_geometry(runtime.loaded.config)
    except UnknownGeometryError:
        return probe * runtime.prefill_step // tokens
    return prefill_workspace(geometry, this_machine())


def this_machine() -> Machine:
    """What MLX computes on here. The budget is the GPU's working set, or a share of the memory."""
    info, on_cpu = mx.device_info(), mx.default_device() == mx.cpu
    limit = info.get("max_recommended_working_set_size") or info.get("total_memory")
    return Machine(
        budget=int(limit) if limit else int(machine_memory() * CPU_SHARE),
        # A step delays every other stream: on the CPU, keep it near a second.
        prefill_step=512 if on_cpu else 2048,
        value_bytes=4 if on_cpu else 2,
    )
