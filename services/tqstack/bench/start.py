"""Where the time until the first answer goes: MLX's own part of it, and ours.

Each part is measured once, in one process, in the order in which a server meets them. What is
compiled in one is there for the next, so that plain mlx-lm comes first. Caches of compiled kernels
are as they were found: for a first start empty them (CUDA's are in the folder MLX_PTX_CACHE_DIR,
without it in `kernels-...` of our own cache folder, beside what is remembered of checks).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from tqstack.attention.hybrid import make_turboquant_cache
from tqstack.models.adapt import adapt
from tqstack.turboquant.kv_codecs import Bits, KVCodecs


class Part(NamedTuple):
    name: str
    owner: str  # "mlx" or "tqstack"
    seconds: float


def parts(
    load: Callable[[], nn.Module], bits: KVCodecs | Bits = 4, prompt_tokens: int = 600
) -> Iterator[Part]:
    """Load a model that is not adapted yet, and read a prompt and make tokens, twice each: first as
    mlx-lm does, then with our layers and a compressed cache."""
    model, seconds = _timed(load)
    yield Part("load the model", "mlx", seconds)
    prompt = mx.zeros((1, prompt_tokens), mx.int32)
    yield from _answer(model, lambda: make_prompt_cache(model), prompt, "mlx")
    yield Part("adapt its layers", "tqstack", _timed(lambda: adapt(model))[1])
    yield from _answer(model, lambda: make_turboquant_cache(model, bits), prompt, "tqstack")


def own_seconds(measured: list[Part]) -> float:
    """Our part of a start: adapting, and what the first prompt and token take longer than the
    second ones."""
    own = {part.name: part.seconds for part in measured if part.owner == "tqstack"}
    firsts = own["first prompt"] - own["second prompt"] + own["first token"] - own["second token"]
    return own["adapt its layers"] + max(0.0, firsts)


def _answer(
    model: nn.Module, make_cache: Callable[[], list[Any]], prompt: mx.array, owner: str
) -> Iterator[Part]:
    for nth in ("first", "second"):
        cache = make_cache()
        logits, seconds = _timed(lambda cache=cache: _evaluated(model(prompt, cache=cache)))
        yield Part(f"{nth} prompt", owner, seconds)
        token = logits[:, -1:].argmax(-1)
        _, seconds = _timed(lambda cache=cache, token=token: _evaluated(model(token, cache=cache)))
        yield Part(f"{nth} token", owner, seconds)


def _evaluated(x: mx.array) -> mx.array:
    mx.eval(x)
    return x


def _timed(run: Callable[[], Any]) -> tuple[Any, float]:
    mx.synchronize()
    began = time.perf_counter()
    result = run()
    mx.synchronize()
    return result, time.perf_counter() - began
