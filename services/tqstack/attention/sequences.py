"""Attention of a batch, a sequence after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import mlx.core as mx

if TYPE_CHECKING:
    from tqstack.attention.blocks import Stored

Mask = mx.array | str | None


def four_axes(mask: mx.array) -> mx.array:
    """(batch, query heads, L, positions), 1 where a mask broadcasts."""
    return mask.reshape(*([1] * (4 - mask.ndim)), *mask.shape)


def one_by_one(
    attend: Callable[[mx.array, Stored, Mask], mx.array],
    queries: mx.array,
    stored: Stored,
    mask: Mask,
) -> mx.array:
    """Args: queries, stored and mask as in `tiled_attention`; attend: of one sequence without
    padding. Padding gets 0."""
    heads, L, outputs = queries.shape[1], queries.shape[2], []
    for i, count in enumerate(stored.counts):
        if not count:
            shape = (1, heads, L, stored.layout.value_codec.dim)
            outputs.append(mx.zeros(shape, queries.dtype))
            continue
        own = mask
        if isinstance(mask, mx.array):
            own = four_axes(mask)
            own = own[i : i + 1] if own.shape[0] > 1 else own
            own = own[:, :, :count] if own.shape[2] > 1 else own
        out = attend(queries[i : i + 1, :, :count], stored.alone(i), own)
        outputs.append(mx.pad(out, [(0, 0), (0, 0), (0, L - count), (0, 0)]) if count < L else out)
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)
