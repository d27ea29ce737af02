"""What a loaded model really takes: the proof of compression, and the plan by a probe."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, KVCache, QuantizedKVCache, RotatingKVCache

from tqstack.attention.cache import TurboQuantKVCache
from tqstack.attention.dispatch import prove
from tqstack.models.cache_spec import CacheSpec
from tqstack.models.geometry import Kind
from tqstack.models.plan import (
    SLACK,
    Machine,
    Plan,
    draft_bytes,
    logits_bytes,
    prefill_workspace,
)
from tqstack.models.spec import ModelSpec
from tqstack.settings import SettingsError

PROBE_TOKENS = 256  # a step by which mlx-lm's cache grows, so that the probe holds no slack
GROWING = (KVCache, TurboQuantKVCache, QuantizedKVCache)


def layer_kinds(cache: list[Any]) -> tuple[Kind, ...]:
    """What each entry of a model's cache keeps of the past."""
    kinds: list[Kind] = [_kind(entry) for entry in cache]
    return tuple(kinds)


def _kind(entry: Any) -> Kind:
    if isinstance(entry, GROWING):
        return "softmax"
    if isinstance(entry, RotatingKVCache):
        return "window"
    return "recurrent" if isinstance(entry, ArraysCache) else "other"


def measure(
    spec: ModelSpec, model: nn.Module, cache: CacheSpec, machine: Machine, drafted: int = 1
) -> tuple[Plan, tuple[int, ...]]:
    """(plan, entries that were proven to be compressed) of a loaded model.

    Args:
        drafted: most tokens of a sequence in a step.

    Raises:
        NotCompressedError: a layer does not go through the compressed cache.
        SettingsError: mlx-lm's quantized cache does not serve this model.
    """
    entries = cache.make(model)
    compressed: tuple[int, ...] = ()
    if cache.codecs is not None:
        compressed = tuple(prove(model, entries))
    else:
        _read(model, entries, PROBE_TOKENS, cache)
    softmax = [entry for entry in entries if isinstance(entry, GROWING)]
    others = [entry for entry in entries if not isinstance(entry, GROWING)]
    costs = _compressed(softmax) if compressed else _plain(softmax)
    if spec.geometry is not None:
        workspace = prefill_workspace(
            spec.geometry, machine.prefill_step, machine.value_bytes, drafted
        )
    else:
        workspace = _workspace(spec, model, cache, machine.prefill_step, drafted)
    plan = Plan(
        budget=machine.budget,
        weights=_nbytes(model.parameters()),
        recurrent=sum(map(_fixed_bytes, others)),
        workspace=workspace,
        drafts=draft_bytes(spec.geometry, drafted) if spec.geometry else 0,
        **costs,
    )
    return plan, compressed


def _compressed(entries: list[Any]) -> dict[str, Any]:
    """Costs of the compressed layers of a model, from one sequence's cache."""
    pool = entries[0].pool
    return {
        "per_token": -(-pool.block_bytes // pool.block_tokens),
        "per_token_fp16": sum(entry.nbytes_fp16 // entry.size() for entry in entries),
        "tail": sum(entry.tails.nbytes for entry in entries),
    }


def _plain(entries: list[Any]) -> dict[str, Any]:
    """Costs of mlx-lm's own caches that have read PROBE_TOKENS."""
    each = -(-sum(entry.nbytes for entry in entries) // PROBE_TOKENS)
    values = sum(map(_token_values, entries))
    return {"per_token": each, "per_token_fp16": 2 * values, "padded": True}


def _token_values(entry: Any) -> int:
    """Values of a token's keys and values, quantized or not."""
    total = 0
    for stored in (entry.keys, entry.values):
        if isinstance(entry, QuantizedKVCache):
            scales = stored[1]
            total += scales.shape[1] * scales.shape[-1] * entry.group_size
        else:
            total += stored.shape[1] * stored.shape[-1]
    return total


def _fixed_bytes(entry: Any) -> int:
    """Bytes of an entry that does not grow for ever, once it is full."""
    if isinstance(entry, RotatingKVCache) and entry.keys is not None:
        return entry.nbytes // entry.keys.shape[2] * entry.max_size
    return entry.nbytes


def _workspace(spec: ModelSpec, model: nn.Module, cache: CacheSpec, tokens: int, drawn: int) -> int:
    """Bytes that a step of `tokens` and one that draws `drawn` take beside weights and cache."""
    entries = cache.make(model)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    _read(model, entries, tokens, cache)
    held = mx.get_active_memory() - before
    drawing = logits_bytes(spec.vocabulary, drawn)
    return mx.get_peak_memory() - before - held + drawing + SLACK


def _read(model: nn.Module, entries: list[Any], tokens: int, cache: CacheSpec) -> None:
    """Read a prompt, as the engine does: only the last token's logits are computed."""
    try:
        for count in (tokens - 1, 1):
            out = model(mx.zeros((1, count), mx.int32), cache=entries)
            mx.eval([entry.state for entry in entries])
        mx.eval(out)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        if cache.native is None:
            raise
        raise SettingsError(
            f"TQ_CACHE_VERSION='native': mlx-lm's quantized cache does not serve this model here "
            f"({error}); allowed: turboquant, affine, none"
        ) from error


def _nbytes(tree: Any) -> int:
    return sum(array.nbytes for _, array in tree_flatten(tree))  # pyright: ignore
