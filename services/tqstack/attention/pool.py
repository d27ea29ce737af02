"""The pool: every packed block of a model's compressed layers, counted by who holds it.

One block id means the same tokens in every layer. A block is written once, when its tokens are
packed, and never again while anybody holds it: sharing a prefix is counting, and nothing is copied.
Memory comes in a few large slabs, so growing copies nothing either.

MLX writes into an array in place only while nothing else holds it; otherwise it copies all of it.
So a write waits for the reads in flight (servers make the next token while the last is computed).
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence

import mlx.core as mx

from tqstack.attention.blocks import BLOCK_TOKENS, ROW_BITS, BlockLayout, gather, pieces, runs

FIRST_SLAB = 16  # blocks
# Kernels take every slab as an argument, and Metal allows 31. Slabs grow by half of what there is,
# the last ones twofold: 3.8 million tokens.
MAX_SLABS, LATE_SLAB = 16, 12


class PoolError(RuntimeError):
    """The pool cannot do what was asked; nothing has changed."""


class PoolFullError(PoolError):
    """No room for more blocks: free sequences, or wait until others end.

    Attributes:
        needed, available: blocks.
    """

    def __init__(self, needed: int, available: int, limit: int | None):
        self.needed, self.available, self.limit = needed, available, limit
        most = "its slabs are used up" if limit is None else f"its limit is {limit:,} bytes"
        super().__init__(
            f"the cache's pool is full: {needed} more blocks are needed, {available} can be had, "
            f"and {most}; end or shorten other sequences first"
        )


class UnknownBlockError(PoolError):
    """A block that is not in use: freed already, or never there."""

    def __init__(self, block: int):
        super().__init__(f"block {block} is not in use: it was freed, or never there")


class Pool:
    """Blocks of packed tokens in all compressed layers of a model.

    Args:
        layers: compressed layers.
        limit: bytes that all slabs together may take; None: no limit.
        block_tokens: tokens of a block.
    """

    def __init__(self, layers: int, limit: int | None = None, block_tokens: int = BLOCK_TOKENS):
        self.limit, self.block_tokens = limit, block_tokens
        self.layouts: list[BlockLayout | None] = [None] * layers
        self._slabs: list[list[mx.array]] = [[] for _ in range(layers)]
        self._lent: set[int] = set()  # layers that may be being read
        self._sizes: list[int] = []  # blocks of each slab
        self._free: list[int] = []  # a heap: neighbours stay together
        self._holders: dict[int, int] = {}

    # -- books -------------------------------------------------------------------------------

    @property
    def layers(self) -> int:
        return len(self.layouts)

    @property
    def capacity(self) -> int:
        """Blocks that there is memory for now."""
        return sum(self._sizes)

    @property
    def blocks_used(self) -> int:
        return len(self._holders)

    @property
    def blocks_free(self) -> int:
        return len(self._free)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block in all layers. A layer that has stored nothing yet counts as the
        largest of the others."""
        known = [layout.nbytes for layout in self.layouts if layout is not None]
        return sum(known) + (self.layers - len(known)) * max(known, default=0)

    @property
    def nbytes(self) -> int:
        """Bytes held, free blocks included."""
        return sum(slab.nbytes for slabs in self._slabs for slab in slabs)

    def holders(self, block: int) -> int:
        return self._holders.get(block, 0)

    def check_integrity(self) -> None:
        """AssertionError if a block is lost, or both free and in use."""
        blocks = [s << ROW_BITS | row for s, size in enumerate(self._sizes) for row in range(size)]
        assert sorted((*self._free, *self._holders)) == blocks
        assert all(count > 0 for count in self._holders.values())
        for layout, slabs in zip(self.layouts, self._slabs, strict=True):
            wanted = [] if layout is None else [(size, layout.words) for size in self._sizes]
            assert [slab.shape for slab in slabs] == wanted

    # -- taking and giving -------------------------------------------------------------------

    def declare(self, layer: int, layout: BlockLayout) -> BlockLayout:
        """Tell what a layer's blocks look like, before its first one is written.

        Returns:
            The layout as it was told first, one object for all sequences.

        Raises:
            PoolError: the layer stores something else already.
        """
        stored = self.layouts[layer]
        if stored is not None and stored == layout:
            return stored
        if stored is not None:
            raise PoolError(f"layer {layer} of this pool stores {stored.spec}, not {layout.spec}")
        self.layouts[layer] = layout
        self._slabs[layer] = [_empty(size, layout) for size in self._sizes]
        return layout

    def allocate(self, count: int) -> list[int]:
        """Take blocks, each held once.

        Raises:
            PoolFullError: there are not so many within the limit.
        """
        self.ensure(count)
        taken = [heapq.heappop(self._free) for _ in range(count)]
        self._holders.update(dict.fromkeys(taken, 1))
        return taken

    def retain(self, blocks: Sequence[int]) -> None:
        """Hold blocks once more."""
        self._check(blocks)
        for block in blocks:
            self._holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Hold blocks once less; what nobody holds is free."""
        for block, times in Counter(blocks).items():
            if self.holders(block) < times:
                raise UnknownBlockError(block)
        for block in blocks:
            self._holders[block] -= 1
            if not self._holders[block]:
                del self._holders[block]
                heapq.heappush(self._free, block)

    def ensure(self, count: int) -> None:
        """Have so many free blocks, for what is promised to others.

        Raises:
            PoolFullError: there are not so many within the limit.
        """
        if count > len(self._free):
            self._grow(count - len(self._free))

    def shrink(self, kept: int = 0) -> int:
        """Give back the last slabs, those that hold nothing, as long as `kept` blocks stay free.

        Returns:
            Bytes that were given back.
        """
        before = self.nbytes
        while self._sizes and len(self._free) - self._sizes[-1] >= kept:
            first = len(self._sizes) - 1 << ROW_BITS
            if any(block >= first for block in self._holders):
                break
            self._free = [block for block in self._free if block < first]
            heapq.heapify(self._free)
            self._sizes.pop()
            for slabs in self._slabs:
                if slabs:
                    slabs.pop()
        return before - self.nbytes

    def without(self, gone: Mapping[int, int]) -> tuple[int, int]:
        """What would be left if blocks were held so many times less: (blocks in use, blocks that
        there would be memory for, after `shrink`)."""
        stay = [block for block, count in self._holders.items() if count > gone.get(block, 0)]
        slabs = max((block >> ROW_BITS for block in stay), default=-1) + 1
        return len(stay), sum(self._sizes[:slabs])

    def _grow(self, missing: int) -> None:
        late = len(self._sizes) >= LATE_SLAB
        wanted = max(FIRST_SLAB, self.capacity if late else self.capacity // 2)
        size = max(missing, wanted)
        if self.limit is not None and self.block_bytes:
            room = (self.limit - self.nbytes) // self.block_bytes
            # Of the room that is left, others may want some: no more than half beyond the need.
            size = min(max(missing, min(wanted, (missing + room) // 2)), room)
        if size < missing or len(self._sizes) == MAX_SLABS:
            available = len(self._free) + (max(0, size) if len(self._sizes) < MAX_SLABS else 0)
            raise PoolFullError(missing + len(self._free), available, self.limit)
        slab = len(self._sizes)
        self._sizes.append(size)
        for row in range(size):
            heapq.heappush(self._free, slab << ROW_BITS | row)
        for layout, slabs in zip(self.layouts, self._slabs, strict=True):
            if layout is not None:
                slabs.append(_empty(size, layout))

    # -- content -----------------------------------------------------------------------------

    def slabs(self, layer: int) -> tuple[mx.array, ...]:
        """(blocks, words) uint32 each: what kernels read."""
        self._lent.add(layer)
        return tuple(self._slabs[layer])

    def read(self, layer: int, blocks: Sequence[int]) -> mx.array:
        """(len(blocks), words) rows of a layer."""
        self._check(blocks)
        return gather(self.slabs(layer), blocks)

    def views(self, layer: int, blocks: Sequence[int]) -> list[mx.array]:
        """The same as views (blocks, words) of the slabs, which copy nothing."""
        self._check(blocks)
        return pieces(self.slabs(layer), blocks)

    def write(self, layer: int, blocks: Sequence[int], rows: mx.array) -> None:
        """Fill blocks of a layer with packed rows (len(blocks), words), in place: what still reads
        this layer is waited for. One wait serves all layers of a chunk or a token."""
        self._check(blocks)
        if layer in self._lent:
            mx.synchronize()
            self._lent.clear()
        at = 0
        for slab, first, stop in runs(blocks):
            self._slabs[layer][slab][first:stop] = rows[at : at + stop - first]
            at += stop - first

    def replace(self, block: int) -> int:
        """A block of one's own with the same content in all layers, for one that others hold.

        Raises:
            PoolFullError
        """
        (own,) = self.allocate(1)
        for layer, layout in enumerate(self.layouts):
            if layout is not None:
                self.write(layer, [own], self.read(layer, [block]))
        self.release([block])
        return own

    def _check(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            if block not in self._holders:
                raise UnknownBlockError(block)


def _empty(blocks: int, layout: BlockLayout) -> mx.array:
    return mx.zeros((blocks, layout.words), dtype=mx.uint32)
