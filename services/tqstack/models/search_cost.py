"""What the trellis code's search would cost on this machine, measured on the loaded model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from tqstack.attention.blocks import BLOCK_TOKENS, BlockLayout
from tqstack.attention.cache import TurboQuantKVCache
from tqstack.attention.kernels.encoding import encode_pair
from tqstack.attention.kernels.program import gpu_dialect
from tqstack.attention.kernels.trust import trusted
from tqstack.attention.timing import median_seconds
from tqstack.turboquant.kv_codecs import KVCodecs

AFFORDABLE = 0.03  # of the time of prefill and of decode
TRIALS = 3
DECODED = 8  # tokens that are timed together


def affords(
    trellis: KVCodecs, model: nn.Module, new_cache: Callable[[], list[Any]], prompt_tokens: int
) -> bool:
    """Whether searching codes takes less than AFFORDABLE of a prompt's and of an answer's time.

    Without a GPU it never does (0.08 ms a vector on a core: half as much again as all the rest of
    a prompt).

    Args:
        new_cache: makes a cache of the model with a scalar code, which the search is beside.
        prompt_tokens: of a prefill step.
    """
    if gpu_dialect() is None:
        return False
    cache = new_cache()
    mx.eval(model(mx.zeros((1, BLOCK_TOKENS), mx.int32), cache=cache))
    layouts = Counter(c.layout for c in cache if isinstance(c, TurboQuantKVCache) and c.layout)
    codecs = {old: trellis.codecs(old.key_codec.dim, old.value_codec.dim) for old in layouts}
    if not all(trusted("search", codec) for pair in codecs.values() for codec in pair):
        return False

    def read() -> Any:
        fresh = new_cache()
        out = model(mx.zeros((1, prompt_tokens), mx.int32), cache=fresh)[:, -1:]
        return out, [entry.state for entry in fresh]

    def write() -> Any:
        for _ in range(DECODED):
            mx.eval(model(mx.zeros((1, 1), mx.int32), cache=cache))

    def search(tokens: int) -> float:
        """Seconds in all layers; equal ones are measured once."""
        return sum(n * _search(old, codecs[old], tokens) for old, n in layouts.items())

    prompt, token = _seconds(read), _seconds(write) / DECODED
    of_prompt, of_block = search(prompt_tokens), search(BLOCK_TOKENS)
    return max(of_prompt / prompt, of_block / (BLOCK_TOKENS * token)) < AFFORDABLE


def _search(layout: BlockLayout, codecs: tuple[Any, Any], tokens: int) -> float:
    """Seconds by which these codecs encode one layer's tokens more slowly than the layout's."""
    blocks = max(1, tokens // BLOCK_TOKENS)
    keys, values = (
        mx.random.normal((blocks, layout.kv_heads, BLOCK_TOKENS, codec.dim)) for codec in codecs
    )
    mx.eval(keys, values)
    new, old = (
        _seconds(lambda pair=pair: encode_pair(keys, values, *pair))
        for pair in (codecs, (layout.key_codec, layout.value_codec))
    )
    return new - old


def _seconds(run: Callable[[], Any]) -> float:
    return median_seconds(run, TRIALS, warm_up=1)
