"""Attention by kernels or by plain operations: kernels serve what they can read, where they agreed
with their twins on this machine (`trust.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from tqstack.attention.blocks import ROW_BITS, BlockLayout, Stored
from tqstack.attention.kernels import decode, prefill
from tqstack.attention.kernels.arguments import serves, slab_arguments
from tqstack.attention.kernels.trust import check, distance, random, trusted
from tqstack.attention.tiled import tiled_attention


def attention(
    queries: mx.array,
    stored: Stored,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """`tiled_attention`, through the kernel for as many query tokens where there is one."""
    run, name = tiled_attention, _kernel(queries, stored)
    if name is not None and trusted(name, *_variant(queries, stored, mask, sinks)):
        run = _KERNELS[name]
    return run(queries, stored, scale=scale, mask=mask, sinks=sinks)


_KERNELS: dict[str, Callable[..., mx.array]] = {
    "decode": decode.decode_attention,
    "prefill": prefill.prefill_attention,
}


def _kernel(queries: mx.array, stored: Stored) -> str | None:
    """The kernel for so many query tokens, if one can read what is stored."""
    L, layout = queries.shape[2], stored.layout
    short = (
        L <= decode.MAX_QUERY_TOKENS
        and isinstance(stored.tail_keys, mx.array)
        and all(count == L for count in stored.counts)
    )
    if short:
        return "decode" if serves(layout.key_codec, layout.value_codec) else None
    return "prefill" if prefill.serves_prompts(layout) else None


def _variant(queries: mx.array, stored: Stored, mask: Any, sinks: Any) -> tuple[Any, ...]:
    """What a kernel is compiled for: layout, slabs, query heads, types, several tokens, mask,
    sinks."""
    masked = None if mask is None or isinstance(mask, str) else mask.dtype == mx.bool_
    types = queries.dtype, stored.tail(0)[0].dtype
    several = queries.shape[2] > 1
    slabs = slab_arguments(len(stored.slabs))
    return stored.layout, slabs, queries.shape[1], *types, several, masked, sinks is not None


@check("decode")
def _decode_error(layout: BlockLayout, *variant: Any) -> float:
    return _error(decode.decode_attention, 3 if variant[4] else 1, layout, *variant)


@check("prefill")
def _prefill_error(layout: BlockLayout, *variant: Any) -> float:
    return _error(prefill.prefill_attention, layout.block_tokens + 9, layout, *variant)


def _error(
    kernel: Callable[..., mx.array],
    tokens: int,
    layout: BlockLayout,
    slabs: int,
    heads: int,
    dtype: mx.Dtype,
    tail_dtype: mx.Dtype,
    several: bool,
    masked: bool | None,
    with_sinks: bool,
) -> float:
    """Relative distance of kernel and twin over two sequences, one with packed blocks and a tail,
    one with a tail alone. The queries of several tokens cross the edge of a block."""
    block = layout.block_tokens
    length = 2 * block + (tokens if tokens > block else block) + 1
    dims = layout.key_codec.dim, layout.value_codec.dim
    keys, values = (
        random(2, layout.kv_heads, length, d, seed=i).astype(tail_dtype) for i, d in enumerate(dims)
    )
    tails = [mx.concatenate([x[:1, :, block:], x[1:, :, :-block]]) for x in (keys, values)]
    stored = Stored(
        layout,
        slabs=(mx.zeros((1, layout.words), mx.uint32),) * (slabs - 1)
        + (layout.pack(keys[:1, :, : 2 * block], values[:1, :, : 2 * block]),),
        tables=(tuple((slabs - 1) << ROW_BITS | row for row in (0, 1)), ()),
        tail_keys=tails[0],
        tail_values=tails[1],
        starts=(block, 0),
        lengths=(length, max(5, tokens)),
        counts=(tokens, tokens),
        exact_tokens=block,
    )
    mask: Any = "causal"
    if masked is not None:
        noise = random(2, 1, tokens, length, seed=3)
        mask = noise > -1 if masked else noise
    options = {
        "scale": dims[0] ** -0.5,
        "mask": mask,
        "sinks": random(heads, seed=4) if with_sinks else None,
    }
    queries = random(2, heads, tokens, dims[0], seed=5).astype(dtype)
    got = kernel(queries, stored, **options)
    with mx.stream(mx.cpu):  # GPUs round the factors of float32 products to 10 bits
        want = tiled_attention(queries.astype(mx.float32), stored, **options)
    # The answer comes back in the model's own type, which may have 8 bits.
    rounding = distance(want.astype(dtype), want)
    return max(0.0, distance(got, want) - 2 * rounding)
