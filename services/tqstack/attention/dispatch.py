"""Making models' attention go through the compressed cache, and proving that it does.

A model's attention calls `scaled_dot_product_attention` as a global of the module that defines its
class, bound there at import. That name is replaced in every loaded module that holds it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import base

from tqstack.attention.cache import TurboQuantKVCache

NAME = "scaled_dot_product_attention"
_plain = base.scaled_dot_product_attention


class NotCompressedError(RuntimeError):
    """The model would run, but not through the compressed cache. Never ignored."""


def install() -> None:
    """Let every model that is loaded read compressed caches. Other caches are served as before."""
    for module in list(sys.modules.values()):
        scope = getattr(module, "__dict__", {})
        if scope.get(NAME) is _plain:
            scope[NAME] = attention


def attention(
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: Any = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """`mlx_lm.models.base.scaled_dot_product_attention`, and compressed caches too."""
    if isinstance(keys, TurboQuantKVCache):
        return keys.attend(queries, scale=scale, mask=mask, sinks=sinks)
    return _plain(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)


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
