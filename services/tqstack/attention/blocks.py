"""Blocks of packed tokens: how one lies in memory, and what a layer's attention reads of them.

A block holds the packed keys and values of `block_tokens` consecutive tokens of one layer as a row
of 32-bit words: the planes of the keys, then those of the values, each (KV heads, tokens, width).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import mlx.core as mx

from tqstack.attention.kernels.encoding import encode_pair
from tqstack.turboquant.codec import Codec

BLOCK_TOKENS = 128  # measured beside 64 and 256: docs/kernels.md
# A block's id: which slab it lies in, and its row there.
ROW_BITS = 24

Planes = tuple[mx.array, ...]


def first_exact(position: Any, block_tokens: int, exact_tokens: int) -> Any:
    """The first position that a query at `position` sees exactly, or below 0: all. An int, or an
    array of them."""
    return position // block_tokens * block_tokens - exact_tokens


@dataclass(frozen=True)
class BlockLayout:
    """Where a layer's keys and values are in a block's row."""

    key_codec: Codec
    value_codec: Codec
    kv_heads: int
    block_tokens: int = BLOCK_TOKENS

    @cached_property
    def plane_shapes(self) -> tuple[tuple[int, mx.Dtype], ...]:
        """(width, dtype) of the keys' planes, then of the values'."""
        return *self.key_codec.plane_shapes(), *self.value_codec.plane_shapes()

    @cached_property
    def plane_words(self) -> tuple[int, ...]:
        """32-bit words of each of these planes in a block."""
        tokens = self.kv_heads * self.block_tokens
        return tuple(tokens * width * dtype.size // 4 for width, dtype in self.plane_shapes)

    @cached_property
    def words(self) -> int:
        return sum(self.plane_words)

    @property
    def nbytes(self) -> int:
        """Bytes of a block."""
        return 4 * self.words

    @property
    def spec(self) -> str:
        """In words: heads, codecs and sizes."""
        keys, values = self.key_codec, self.value_codec
        return (
            f"{self.kv_heads} heads, keys {keys.dim} {keys.spec}, values {values.dim} {values.spec}"
        )

    def pack(self, keys: mx.array, values: mx.array) -> mx.array:
        """(1, KV heads, blocks * block_tokens, head_dim) keys and values -> (blocks, words)."""
        keys, values = (self._in_blocks(x) for x in (keys, values))
        planes = encode_pair(keys, values, self.key_codec, self.value_codec)
        flat = [p.reshape(p.shape[0], -1).view(mx.uint32) for p in (*planes[0], *planes[1])]
        return mx.concatenate(flat, axis=-1)

    def _in_blocks(self, x: mx.array) -> mx.array:
        """(1, KV heads, T, d) -> (T / block_tokens, KV heads, block_tokens, d)"""
        x = x[0].reshape(self.kv_heads, -1, self.block_tokens, x.shape[-1])
        return mx.contiguous(x.swapaxes(0, 1))

    def coded(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keys and values as their codes give them back; coding those again changes nothing."""
        planes = encode_pair(keys, values, self.key_codec, self.value_codec)
        return self.decoded(*planes, keys.dtype, values.dtype)

    def decoded(
        self, keys: Planes, values: Planes, key_dtype: mx.Dtype, value_dtype: mx.Dtype
    ) -> tuple[mx.array, mx.array]:
        """Planes of keys and of values -> what they stand for (..., head_dim), rotated back."""
        key, value = self.key_codec, self.value_codec
        return (
            key.unrotate(key.decode(keys)).astype(key_dtype),
            value.unrotate(value.decode(values)).astype(value_dtype),
        )

    def planes(self, rows: mx.array) -> tuple[Planes, Planes]:
        """(blocks, words) -> the planes of keys and of values, each (1, KV heads, T, width)."""
        count, start, planes = rows.shape[0], 0, []
        for words, (width, dtype) in zip(self.plane_words, self.plane_shapes, strict=True):
            plane = mx.contiguous(rows[:, start : start + words]).view(dtype)
            plane = plane.reshape(count, self.kv_heads, self.block_tokens, width).swapaxes(0, 1)
            planes.append(plane.reshape(1, self.kv_heads, count * self.block_tokens, width))
            start += words
        keys = len(self.key_codec.plane_shapes())
        return tuple(planes[:keys]), tuple(planes[keys:])


@dataclass(frozen=True)
class Stored:
    """What one layer's attention reads, for sequences of their own lengths.

    A query at position p sees the tokens from `packed_limit(i, p)` on exactly, in the tail, and
    all before packed, in blocks: its own block of positions and `exact_tokens` before it are exact.

    Attributes:
        slabs: (blocks, words) uint32 each; rows of blocks, of many sequences.
        tables: of each sequence the ids of its packed blocks: slab << ROW_BITS | row.
        tail_keys, tail_values: of each sequence (1, KV heads, slots, head_dim), or one array of all
            (B, KV heads, slots, head_dim): slot s holds position starts[i] + s, where it is below
            lengths[i]; behind it anything finite.
        lengths: tokens of each sequence, those that the queries belong to included.
        counts: of those, how many have a query now: the first counts[i] columns of row i.
    """

    layout: BlockLayout
    slabs: tuple[mx.array, ...]
    tables: tuple[tuple[int, ...], ...]
    tail_keys: Sequence[mx.array] | mx.array
    tail_values: Sequence[mx.array] | mx.array
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    counts: tuple[int, ...]
    exact_tokens: int = BLOCK_TOKENS

    def packed_limit(self, i: int, position: int) -> int:
        """The first position that a query of sequence i at `position` sees exactly."""
        first = first_exact(position, self.layout.block_tokens, self.exact_tokens)
        return max(first, self.starts[i])

    def tail(self, i: int) -> tuple[mx.array, mx.array]:
        """(1, KV heads, slots, head_dim) exact keys and values of sequence i."""
        if isinstance(self.tail_keys, mx.array):
            return self.tail_keys[i : i + 1], self.tail_values[i : i + 1]  # pyright: ignore
        return self.tail_keys[i], self.tail_values[i]

    def alone(self, i: int) -> Stored:
        """Sequence i by itself."""
        keys, values = self.tail(i)
        return replace(
            self,
            tables=(self.tables[i],),
            tail_keys=keys,
            tail_values=values,
            starts=(self.starts[i],),
            lengths=(self.lengths[i],),
            counts=(self.counts[i],),
        )

    def rows(self, i: int, first: int, stop: int) -> mx.array:
        """(blocks, words): blocks `first` to `stop` of sequence i."""
        return gather(self.slabs, self.tables[i][first:stop])


def gather(slabs: Sequence[mx.array], ids: Sequence[int]) -> mx.array:
    """(len(ids), words): these rows; neighbours in one piece."""
    found = pieces(slabs, ids)
    return found[0] if len(found) == 1 else mx.concatenate(found)


def pieces(slabs: Sequence[mx.array], ids: Sequence[int]) -> list[mx.array]:
    """The rows as views (blocks, words), as few as there are runs of neighbours."""
    return [slabs[slab][first:stop] for slab, first, stop in runs(ids)]


def runs(ids: Sequence[int]) -> list[tuple[int, int, int]]:
    """(slab, first row, row after the last) of neighbouring blocks, in order."""
    found: list[tuple[int, int, int]] = []
    for block in ids:
        slab, row = block >> ROW_BITS, block & ((1 << ROW_BITS) - 1)
        if found and found[-1][0] == slab and found[-1][2] == row:
            found[-1] = (slab, found[-1][1], row + 1)
        else:
            found.append((slab, row, row + 1))
    return found
