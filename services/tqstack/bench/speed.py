"""How fast prompts are read and answers written, and what the caches hold meanwhile.

Caches and contexts take turns, so that whatever else the machine does hits all of them;
medians over the trials are reported. On a shared machine only ratios within one run mean anything.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tqstack.bench.caches import CachedModel, MakeCache
from tqstack.bench.operations import decode_operations

FILL_STEP = 16_384  # tokens of made-up context that are stored at once


@dataclass(frozen=True)
class Row:
    """Medians for one cache at one context. Tokens per second, seconds, bytes.

    `decode_tps` counts steps of the whole batch: each makes one token of every sequence, so that
    the batch gets `batch` times as many tokens. Bytes are those of all sequences.
    """

    backend: str
    batch: int
    context: int
    prompt_tokens: int
    generation_tokens: int
    prefill_tps: float
    decode_tps: float
    wall_seconds: float
    kv_bytes: int
    recurrent_bytes: int
    peak_bytes: int
    workspace_bytes: int  # peak above weights and caches
    decode_operations: int  # of a step: a count repeats where times do not


@dataclass(frozen=True)
class Workload:
    """`context` tokens are in the cache already; then a prompt is read and an answer written.

    `batch` sequences do so: their prompts are read one after the other, their answers written
    together.
    """

    context: int
    prompt_tokens: int
    generation_tokens: int
    prefill_step: int = 2048
    batch: int = 1


def runnable(
    models: dict[str, CachedModel], tokens: np.ndarray, batch: int = 1
) -> tuple[dict[str, CachedModel], dict[str, str]]:
    """Those that run on this machine, and of the others why not. Compiles kernels."""
    able, unable = {}, {}
    for name, cached in models.items():
        try:
            run(*cached, Workload(0, 64, 4, batch=batch), tokens)
        except (RuntimeError, ValueError) as error:
            unable[name] = str(error)
        else:
            able[name] = cached
    return able, unable


def measure(
    models: dict[str, CachedModel], workloads: list[Workload], tokens: np.ndarray, trials: int
) -> Iterator[Row | None]:
    """Run everything; yields None after each single run (for a progress bar), then the rows."""
    runs: dict[tuple[str, Workload], list[dict[str, float]]] = {}
    for _ in range(trials):
        for workload in workloads:
            for name, cached in models.items():
                result = run(*cached, workload, tokens)
                runs.setdefault((name, workload), []).append(result)
                yield None
    for (name, work), results in runs.items():
        middle = {key: median(result[key] for result in results) for key in results[0]}
        counts = {key for key in middle if key.endswith(("bytes", "operations"))}
        whole = {key: int(middle[key]) for key in counts}
        speeds = {key: round(v, 3) for key, v in middle.items() if key not in counts}
        sizes = (work.batch, work.context, work.prompt_tokens, work.generation_tokens)
        yield Row(name, *sizes, **speeds, **whole)


def run(
    model: nn.Module, make_cache: MakeCache, work: Workload, tokens: np.ndarray
) -> dict[str, float]:
    """The prompts and their answers.

    Raises:
        ValueError: sequences of this cache cannot be decoded together.
    """
    caches = [make_cache() for _ in range(work.batch)]
    prompt = mx.array(np.resize(tokens, work.prompt_tokens).astype(np.int32))[None]
    if work.context:
        for cache in caches:
            fill(model, cache, work.context, work.prompt_tokens + work.generation_tokens)
    mx.synchronize()
    mx.clear_cache()
    held_before = mx.get_active_memory() - sum(sum(cache_bytes(cache)) for cache in caches)
    mx.reset_peak_memory()
    start = time.perf_counter()
    token = mx.concatenate([_read(model, cache, prompt, work.prefill_step) for cache in caches])
    mx.synchronize()
    middle = time.perf_counter()
    peak = mx.get_peak_memory()
    cache = caches[0] if work.batch == 1 else merged(caches)
    del caches
    steps = []
    for _ in range(work.generation_tokens):
        began, last = time.perf_counter(), token
        token = model(token, cache=cache)[:, -1:].argmax(-1)
        mx.async_eval(token)
        mx.eval(last)  # one token ahead, as mlx-lm generates
        steps.append(time.perf_counter() - began)
    mx.eval(token)
    end = time.perf_counter()
    kv, recurrent = cache_bytes(cache)
    return {
        "prefill_tps": work.batch * work.prompt_tokens / (middle - start),
        "decode_tps": 1 / median(steps),
        "wall_seconds": end - start,
        "kv_bytes": kv,
        "recurrent_bytes": recurrent,
        "peak_bytes": peak,
        "workspace_bytes": max(0, peak - held_before - kv - recurrent),
        "decode_operations": sum(decode_operations(model, cache, token).values()),
    }


def _read(model: nn.Module, cache: list[Any], prompt: mx.array, step: int) -> mx.array:
    """Read a prompt (1, L) as servers do: only the last token's logits. Returns a token (1, 1)."""
    last = prompt.shape[1] - 1
    for at in range(0, last, step):
        model(prompt[:, at : min(at + step, last)], cache=cache)
        mx.eval([c.state for c in cache])
    token = model(prompt[:, -1:], cache=cache)[:, -1:].argmax(-1)
    mx.eval(token)
    return token


def merged(caches: list[list[Any]]) -> list[Any]:
    """Caches of single sequences as one of a batch. The single ones are emptied on the way, so that
    only one layer is held twice.

    Raises:
        ValueError: a kind of cache cannot hold several sequences.
    """
    batch = []
    for i, entry in enumerate(caches[0]):
        kind = type(entry)
        if not hasattr(kind, "merge"):
            raise ValueError(f"{kind.__name__} of mlx-lm cannot hold several sequences")
        batch.append(kind.merge([cache[i] for cache in caches]))
        mx.eval(batch[-1].state)
        for cache in caches:
            cache[i] = None
    return batch


def fill(model: nn.Module, cache: list[Any], context: int, to_come: int = 0) -> None:
    """Put `context` made-up tokens into the cache: random keys and values of unit variance.

    `to_come`: tokens that will follow; a cache that can makes room for them, as in serving.

    The recurrent state comes from a short real prompt; its size does not depend on the length.
    """
    mx.eval(model(mx.zeros((1, 8), mx.int32), cache=cache))
    layers: Any = model.layers
    for layer, entry in zip(layers, cache, strict=True):
        if not hasattr(entry, "update_and_fetch"):
            continue
        if hasattr(entry, "reserve"):
            entry.reserve(context + to_come)
        attention = layer.self_attn
        heads = getattr(attention, "num_key_value_heads", None) or attention.n_kv_heads
        D = getattr(attention, "head_dim", None) or attention.k_norm.weight.size
        size = (1, heads, min(FILL_STEP, context), D)
        dtype = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
        # Made once: what the numbers are does not matter, and fresh ones for each piece take time.
        keys, values = (mx.random.normal(size).astype(dtype) for _ in range(2))
        while entry.offset < context:
            count = min(FILL_STEP, context - entry.offset)
            entry.update_and_fetch(keys[:, :, :count], values[:, :, :count])
            mx.eval(entry.state)


def cache_bytes(cache: list[Any]) -> tuple[int, int]:
    """(keys and values, recurrent state), as really held."""
    filled = [c for c in cache if not c.empty()]
    kv = sum(c.nbytes for c in filled if hasattr(c, "update_and_fetch"))
    return kv, sum(c.nbytes for c in filled) - kv


def as_json(rows: list[Row], about: dict[str, Any]) -> dict[str, Any]:
    return {**about, "rows": [asdict(row) for row in rows]}
