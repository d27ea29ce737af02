"""Making a model's attention go through the compressed cache, and proving that it does.

A model's attention calls `scaled_dot_product_attention` as a global of the module that defines its
class, bound there at import. That very name is replaced, in that very module.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import wraps
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from tqstack.attention.cache import TurboQuantKVCache

NAME = "scaled_dot_product_attention"
MARK = "reads_compressed_caches"


class NotCompressedError(RuntimeError):
    """The model would run, but not through the compressed cache. Never ignored."""


def install(model: nn.Module) -> None:
    """Let every attention of `model` read compressed caches. Other caches are served as before."""
    for module in model.modules():
        scope = getattr(type(module).__call__, "__globals__", {})
        original = scope.get(NAME)
        if original is not None and not hasattr(original, MARK):
            scope[NAME] = _reading_compressed(original)


def _reading_compressed(original):
    @wraps(original)
    def attention(
        queries: mx.array,
        keys: Any,
        values: Any,
        cache: Any = None,
        scale: float = 1.0,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        if isinstance(keys, TurboQuantKVCache):
            return keys.attend(queries, scale=scale, mask=mask, sinks=sinks)
        return original(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)

    setattr(attention, MARK, True)
    return attention


def prove(model: nn.Module, cache: list[Any], tokens: Iterable[int] = (0, 1, 2)) -> list[int]:
    """Run one forward pass and check, layer by layer, that compressed attention really ran.

    Args:
        cache: a fresh cache of `make_turboquant_cache`; it is used up.

    Returns:
        Indices of the entries that were read compressed.

    Raises:
        NotCompressedError: there is no such entry, or one was not written or not read.
    """
    tokens = list(tokens)
    compressed = [i for i, c in enumerate(cache) if isinstance(c, TurboQuantKVCache)]
    if not compressed:
        raise NotCompressedError(
            "the model has no softmax layer with an ordinary KV cache, so nothing can be "
            "compressed; run it with TQ_CACHE_VERSION=none"
        )
    before = [cache[i].reads for i in compressed]
    try:
        mx.eval(model(mx.array([tokens]), cache=cache))
    except (AttributeError, TypeError) as error:
        raise NotCompressedError(
            "the model reads its cache in a way of its own, which compression does not "
            f"support ({error}); run it with TQ_CACHE_VERSION=none"
        ) from error
    for i, reads in zip(compressed, before, strict=True):
        if cache[i].reads != reads + 1 or cache[i].length != len(tokens):
            raise NotCompressedError(
                f"layer {i} did not go through the compressed cache (tokens {cache[i].length} of "
                f"{len(tokens)}, reads {cache[i].reads - reads} of 1); run the model with "
                "TQ_CACHE_VERSION=none"
            )
    return compressed
