"""How fast prompts are read and answers written, and what the caches hold meanwhile.

Backends and contexts take turns, so that whatever else the machine does hits all of them;
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

from tqstack.bench.backends import MakeCache

FILL_STEP = 16_384  # tokens of made-up context that are stored at once


@dataclass(frozen=True)
class Row:
    """Medians for one backend at one context. Tokens per second, seconds, bytes."""

    backend: str
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


@dataclass(frozen=True)
class Workload:
    """`context` tokens are in the cache already; then a prompt is read and an answer written."""

    context: int
    prompt_tokens: int
    generation_tokens: int
    prefill_step: int = 2048


def runnable(
    model: nn.Module, make_caches: dict[str, MakeCache], tokens: np.ndarray
) -> tuple[dict[str, MakeCache], dict[str, str]]:
    """The backends that run on this machine, and of the others why not. Compiles kernels."""
    able, unable = {}, {}
    for name, make_cache in make_caches.items():
        try:
            run(model, make_cache, Workload(0, 64, 4), tokens)
        except (RuntimeError, ValueError) as error:
            unable[name] = str(error)
        else:
            able[name] = make_cache
    return able, unable


def measure(
    model: nn.Module,
    make_caches: dict[str, MakeCache],
    workloads: list[Workload],
    tokens: np.ndarray,
    trials: int,
) -> Iterator[Row | None]:
    """Run everything; yields None after each single run (for a progress bar), then the rows."""
    runs: dict[tuple[str, Workload], list[dict[str, float]]] = {}
    for _ in range(trials):
        for workload in workloads:
            for name, make_cache in make_caches.items():
                result = run(model, make_cache, workload, tokens)
                runs.setdefault((name, workload), []).append(result)
                yield None
    for (name, work), results in runs.items():
        middle = {key: median(result[key] for result in results) for key in results[0]}
        whole = {key: int(value) for key, value in middle.items() if key.endswith("bytes")}
        speeds = {key: round(v, 3) for key, v in middle.items() if not key.endswith("bytes")}
        yield Row(name, work.context, work.prompt_tokens, work.generation_tokens, **speeds, **whole)


def run(
    model: nn.Module, make_cache: MakeCache, work: Workload, tokens: np.ndarray
) -> dict[str, float]:
    """One prompt and its answer."""
    cache = make_cache()
    prompt = mx.array(np.resize(tokens, work.prompt_tokens).astype(np.int32))[None]
    if work.context:
        fill(model, cache, work.context)
    mx.synchronize()
    mx.clear_cache()
    held_before = mx.get_active_memory() - sum(cache_bytes(cache))
    mx.reset_peak_memory()
    start = time.perf_counter()
    # As servers do it: of a prompt, only the last token's logits are computed.
    for at in range(0, work.prompt_tokens - 1, work.prefill_step):
        stop = min(at + work.prefill_step, work.prompt_tokens - 1)
        model(prompt[:, at:stop], cache=cache)
        mx.eval([c.state for c in cache])
    token = model(prompt[:, -1:], cache=cache)[:, -1:].argmax(-1)
    mx.eval(token)
    mx.synchronize()
    middle = time.perf_counter()
    peak = mx.get_peak_memory()
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
        "prefill_tps": work.prompt_tokens / (middle - start),
        "decode_tps": 1 / median(steps),
        "wall_seconds": end - start,
        "kv_bytes": kv,
        "recurrent_bytes": recurrent,
        "peak_bytes": peak,
        "workspace_bytes": max(0, peak - held_before - kv - recurrent),
    }


def fill(model: nn.Module, cache: list[Any], context: int) -> None:
    """Put `context` made-up tokens into the cache: random keys and values of unit variance.

    The recurrent state comes from a short real prompt; its size does not depend on the length.
    """
    mx.eval(model(mx.zeros((1, 8), mx.int32), cache=cache))
    layers: Any = model.layers
    for layer, entry in zip(layers, cache, strict=True):
        if not hasattr(entry, "update_and_fetch"):
            continue
        attention = layer.self_attn
        shape = (1, attention.num_key_value_heads, 0, attention.head_dim)
        dtype = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
        while entry.offset < context:
            count = min(FILL_STEP, context - entry.offset)
            size = (*shape[:2], count, shape[3])
            entry.update_and_fetch(
                mx.random.normal(size).astype(dtype), mx.random.normal(size).astype(dtype)
            )
            mx.eval(entry.state)


def cache_bytes(cache: list[Any]) -> tuple[int, int]:
    """(keys and values, recurrent state), as really held."""
    filled = [c for c in cache if not c.empty()]
    kv = sum(c.nbytes for c in filled if hasattr(c, "update_and_fetch"))
    return kv, sum(c.nbytes for c in filled) - kv


def as_json(rows: list[Row], about: dict[str, Any]) -> dict[str, Any]:
    return {**about, "rows": [asdict(row) for row in rows]}
