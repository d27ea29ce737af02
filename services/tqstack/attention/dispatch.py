"""Making models' attention go through the compressed cache, and proving that it does.

A model's attention calls `scaled_dot_product_attention` as a global of the module that defines its
class, bound there at import. That name is replaced in every loaded module that holds it.
"""

from __future__ import annotations

import sys
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


def prove(model: nn.Module, cache: list[Any]) -> list[int]:
    """Read a prompt and make a token, and check, layer by layer, that compressed attention ran.

    The prompt is long enough that its last tokens see packed blocks and exact ones.

    Args:
        cache: a fresh cache of `make_turboquant_cache`; it is used up.

    Returns:
        Indices of the entries that were read compressed.

    Raises:
        NotCompressedError: there is no such entry, or one was not written or not read.
    """
    compressed = [i for i, c in enumerate(cache) if isinstance(c, TurboQuantKVCache)]
    if not compressed:
        raise NotCompressedError(
            "the model has no softmax layer with an ordinary KV cache, so nothing can be "
            "compressed; run it with TQ_CACHE_VERSION=none"
        )
    first = cache[compressed[0]]
    reads, draft = dict.fromkeys(compressed, 0), getattr(model, "draft", None)
    prompt = first.exact_tokens + 2 * first.pool.block_tokens + 1
    for step, tokens in enumerate((prompt, 1), 1):
        try:
            mx.eval(model(mx.zeros((1, tokens), mx.int32), cache=cache))
            if draft is not None:  # what a head keeps is read when it drafts
                mx.eval(draft(mx.zeros(1, mx.int32), cache, 1, [1]))
        except (AttributeError, TypeError) as error:
            raise NotCompressedError(
                "the model reads its cache in a way of its own, which compression does not "
                f"support ({error}); run it with TQ_CACHE_VERSION=none"
            ) from error
        for i in compressed:
            stored, wanted = cache[i].size(), prompt + step - 1
            # Later layers may read this one's cache, too: at least once is what can be asked.
            unread, reads[i] = cache[i].reads == reads[i], cache[i].reads
            if unread or stored != wanted or not cache[i].packed[0]:
                raise NotCompressedError(
                    f"layer {i} did not go through the compressed cache (tokens {stored} of "
                    f"{wanted}, read {reads[i]} times in {step} passes); run the model with "
                    "TQ_CACHE_VERSION=none"
                )
    return compressed
