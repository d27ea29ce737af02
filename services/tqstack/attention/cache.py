"""The compressed KV cache of one softmax layer: packed blocks in a pool, and an exact tail.

Which keys a query sees exactly depends on positions alone: those of its own block of 128 positions
and of the `exact_tokens` before it. Everything older is packed. So numbers do not depend on how a
prompt was cut into chunks, on what was shared, or on who is in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_cache
from mlx_lm.models.base import create_causal_mask

from tqstack.attention import saved
from tqstack.attention.blocks import BLOCK_TOKENS, BlockLayout, Stored, first_exact
from tqstack.attention.kernels.choose import attention
from tqstack.attention.pool import Pool, PoolError
from tqstack.attention.table import Table
from tqstack.attention.tail import REVOCABLE, Tails, bounded, tail_slots
from tqstack.turboquant.kv_codecs import Bits, KVCodecs


class TurboQuantKVCache(mlx_cache._BaseCache):
    """Keys and values of one softmax layer: of one sequence, or of a batch of sequences.

    It stands where mlx-lm has `KVCache` (`offset` an int) and, once merged, where it has
    `BatchKVCache` (`offset` an array). Sequences of a batch have lengths of their own and are not
    padded. Only `attend` reads it.

    Args:
        codecs: of keys and values: 4, 3.5, "k4v3", or codecs by name (`KVCodecs.parse`).
        exact_tokens: tokens before a query's own block that it sees exactly, whole blocks; 0: every
            token is coded when it comes.
        table: the sequence's blocks, shared with the caches of the other layers; None: this layer
            has a pool of its own.
        layer: which of the pool's layers this is.
    """

    def __init__(
        self,
        codecs: KVCodecs | Bits = 4,
        exact_tokens: int = BLOCK_TOKENS,
        table: Table | None = None,
        layer: int = 0,
    ):
        self.codecs = KVCodecs.parse(codecs)
        table = table or Table(Pool(1))
        if exact_tokens % table.pool.block_tokens or exact_tokens < 0:
            raise ValueError(
                f"exact_tokens is {exact_tokens}; allowed: whole blocks of "
                f"{table.pool.block_tokens}, or 0"
            )
        self.exact_tokens, self.layer = exact_tokens, layer
        self.tables = [table]
        self.lengths = [0]  # tokens of each sequence
        self.packed = [0]  # blocks of each sequence that are packed in this layer
        self.tails = Tails.empty(1, self._slots)
        self.is_batch = False
        self.reads = 0  # calls of `attend`: the proof that the compressed path runs
        self._reading: Stored | None = None  # what the last tokens' queries see
        self._to_come: list[int] | None = None  # tokens of right-padded prompts still to come

    # -- appending ---------------------------------------------------------------------------

    @property
    def pool(self) -> Pool:
        return self.tables[0].pool

    @property
    def layout(self) -> BlockLayout | None:
        return self.pool.layouts[self.layer]

    @property
    def _slots(self) -> int:
        return tail_slots(self.exact_tokens, self.pool.block_tokens)

    @property
    def offset(self) -> int | mx.array:
        """Position of the next token: an int, or one per sequence (B,) in a batch."""
        return mx.array(self.lengths) if self.is_batch else self.lengths[0]

    def update_and_fetch(self, keys: mx.array, values: mx.array):
        """Append (B, KV heads, L, head_dim) keys and values, and pack the blocks that are full.

        Returns the cache itself in place of both: there is no decompressed copy to hand out, and
        only `attend` can read it.

        Raises:
            ValueError: head_dim or heads are not those that are stored.
            PoolFullError: the pool has a limit, and nobody called `reserve`; nothing has changed.
        """
        layout = self._declared(keys, values)
        counts, before = self._counts(keys.shape[2]), self.lengths
        self._reserve(counts)
        if self._to_come is not None:
            self._to_come = [left - n for left, n in zip(self._to_come, counts, strict=True)]
        if not self.exact_tokens:
            keys, values = layout.coded(*bounded(keys, values))
        self.tails.drop_before([self._exact_from(length) for length in before])
        self.tails.append(keys, values, before, counts)
        self.lengths = [length + count for length, count in zip(before, counts, strict=True)]
        self._pack(layout)
        self._reading = self._stored(layout, counts)
        if keys.shape[2] > REVOCABLE:
            # Left are what a later token sees, and what it would see if some were taken back.
            ends = zip(before, self.lengths, strict=True)
            kept = [self._exact_from(max(old, new - REVOCABLE)) for old, new in ends]
            self.tails = self.tails.copy()
            self.tails.drop_before(kept)
        return self, self

    def reserve(self, tokens: int) -> None:
        """Take the blocks that `tokens` more tokens of each sequence will need, so that no forward
        pass can fail for want of them.

        Raises:
            PoolFullError: there is no room; nothing that is stored has changed.
        """
        self._reserve([tokens] * len(self.lengths))

    def _reserve(self, counts: Sequence[int]) -> None:
        for table, length, count in zip(self.tables, self.lengths, counts, strict=True):
            table.reserve(self._full_blocks(length + count))

    def settle(self) -> list[mx.array]:
        """What must be computed for all that was stored to be held, and nothing else: once it is,
        what the last tokens' queries read is gone."""
        self._reading = None
        return [*self.tails.held(), *self.pool.slabs(self.layer)]

    def keys_and_values(self):
        """For layers that read another layer's cache; the same promise as `update_and_fetch`."""
        return self, self

    def _declared(self, keys: mx.array, values: mx.array) -> BlockLayout:
        """The layout of these keys and values, known to the pool."""
        codecs = self.codecs.codecs(keys.shape[-1], values.shape[-1])
        return self._declare(BlockLayout(*codecs, keys.shape[1], self.pool.block_tokens))

    def _declare(self, layout: BlockLayout) -> BlockLayout:
        """The pool's own layout, equal to this one.

        Raises:
            ValueError: this cache stores something else.
        """
        try:
            return self.pool.declare(self.layer, layout)
        except PoolError as error:
            raise ValueError(f"this does not belong in this cache: {error}") from None

    def _counts(self, L: int) -> list[int]:
        """How many of L new columns are tokens of each sequence; the others are padding."""
        if self._to_come is None:
            return [L] * len(self.lengths)
        return [min(L, left) for left in self._to_come]

    def _exact_from(self, position: int) -> int:
        """The first position that a query at `position` sees exactly."""
        return max(0, first_exact(position, self.pool.block_tokens, self.exact_tokens))

    def _full_blocks(self, length: int) -> int:
        """Blocks that the token behind `length` others sees packed."""
        return self._exact_from(length) // self.pool.block_tokens

    def _pack(self, layout: BlockLayout) -> None:
        block = layout.block_tokens
        for i, (length, first) in enumerate(zip(self.lengths, self.packed, strict=True)):
            stop = self._full_blocks(length)
            if stop > first:
                start, part = self.tails.starts[i], self.tails.part(i)
                assert part is not None
                full = slice(first * block - start, stop * block - start)
                rows = layout.pack(part[0][:, :, full], part[1][:, :, full])
                ids = self.tables[i].to_write(self.layer, first, stop)
                self.pool.write(self.layer, ids, rows)
                self.packed[i] = stop

    def _stored(self, layout: BlockLayout, counts: Sequence[int]) -> Stored:
        tail_keys, tail_values = self.tails.arrays()
        return Stored(
            layout,
            self.pool.slabs(self.layer),
            tuple(table.ids for table in self.tables),
            tail_keys,
            tail_values,
            tuple(self.tails.starts),
            tuple(self.lengths),
            tuple(counts),
            self.exact_tokens,
        )

    # -- reading -----------------------------------------------------------------------------

    def attend(
        self,
        queries: mx.array,
        scale: float,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Attention of the last L tokens over everything stored.

        Args:
            queries: (B, query heads, L, head_dim), not rotated.
            scale: factor of the scores.
            mask: None, "causal", or an array, bool or additive, that broadcasts to
                (B, query heads, L, positions).
            sinks: (query heads,) logits of the attention sinks.

        Returns:
            (B, query heads, L, value head_dim) in the queries' dtype; zeros where a right-padded
            prompt has no token.
        """
        assert self._reading is not None, "nothing has been stored since the cache was changed"
        self.reads += 1
        return attention(queries, self._reading, scale=scale, mask=mask, sinks=sinks)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None):
        """mlx-lm's mask for N new tokens; its last axis are positions. "causal" is never spelled
        out as an array by itself."""
        if not return_array and window_size is None:
            return None if N == 1 else "causal"
        if not self.is_batch:
            return create_causal_mask(N, self.lengths[0], window_size=window_size)
        positions = mx.arange(max(self.lengths) + N)
        queries = (mx.array(self.lengths)[:, None] + mx.arange(N))[:, None, :, None]
        mask = positions <= queries  # (B, 1, N, positions)
        return mask if window_size is None else mask & (positions > queries - window_size)

    # -- what every cache of mlx-lm has ------------------------------------------------------

    def size(self) -> int:
        return max(self.lengths)

    def empty(self) -> bool:
        return self.layout is None or not any(self.lengths)

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        """Take the last n tokens of each sequence away. Down to where the tail begins nothing is
        lost; further back packed values stand in for the exact ones."""
        n = min(n, max(self.lengths))
        self.keep([max(0, length - n) for length in self.lengths])
        return n

    def keep(self, lengths: Sequence[int]) -> None:
        """Of sequence i only the first lengths[i] tokens stay."""
        for i, length in enumerate(lengths):
            self._trim_to(i, length)
        self._reading = None

    def _trim_to(self, i: int, length: int) -> None:
        block, layout = self.pool.block_tokens, self.layout
        blocks, rest = divmod(length, block)
        if blocks < self.packed[i] or length < self.tails.starts[i]:
            if length < self.tails.starts[i]:
                stand_in = None
                if rest and layout is not None:
                    stand_in = self._decoded(layout, i, blocks, rest)
                self.tails = self.tails.replaced(i, blocks * block, stand_in)
            self.packed[i] = min(blocks, self.packed[i])
            self.tables[i].cut(self.layer, self.packed[i])
        self.lengths = [*self.lengths[:i], length, *self.lengths[i + 1 :]]

    def _decoded(self, layout: BlockLayout, i: int, block: int, count: int):
        """(1, KV heads, count, head_dim) keys and values of a packed block's first tokens."""
        part = self.tails.part(i)
        assert part is not None
        rows = self.pool.read(self.layer, self.tables[i].ids[block : block + 1])
        keys, values = (
            tuple(plane[:, :, :count] for plane in planes) for planes in layout.planes(rows)
        )
        return layout.decoded(keys, values, part[0].dtype, part[1].dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of this layer's packed blocks and exact tails. A block that sequences share counts
        in each; what the pool holds in all is `pool.nbytes`."""
        layout, reading = self.layout, self._reading
        blocks = 0 if layout is None else sum(self.packed) * layout.nbytes
        exact = self.tails.held()
        if reading is not None and not isinstance(reading.tail_keys, mx.array):
            exact += [*reading.tail_keys, *reading.tail_values]  # a prompt's chunk, or the same
        return blocks + sum({id(x): x.nbytes for x in exact}.values())

    @property
    def nbytes_fp16(self) -> int:
        """What the stored tokens would take in an ordinary cache of 16 bits."""
        layout = self.layout
        if layout is None:
            return 0
        values = layout.key_codec.dim + layout.value_codec.dim
        return 2 * sum(self.lengths) * layout.kv_heads * values

    # -- saving and copying ------------------------------------------------------------------

    @property
    def state(self):
        """All that is stored (`saved.py`), as views: evaluating it copies nothing."""
        self._reading = None
        return saved.state_of(self)

    @state.setter
    def state(self, state) -> None:
        saved.restore(self, state)

    def _like(self, tables: list[Table], rows: Sequence[int]) -> TurboQuantKVCache:
        """These sequences of this cache, with tables of their own."""
        cache = TurboQuantKVCache(self.codecs, self.exact_tokens, tables[0], self.layer)
        cache.tables = tables
        cache.lengths = [self.lengths[i] for i in rows]
        cache.packed = [self.packed[i] for i in rows]
        cache.tails = self.tails.select(rows)
        return cache

    def _forked(self, rows: Sequence[int]) -> TurboQuantKVCache:
        tables = [self.tables[i].fork(self.layer, self.packed[i]) for i in rows]
        return self._like(tables, rows)

    def __deepcopy__(self, memo: Any) -> TurboQuantKVCache:
        """A fork: the same tokens, sharing all blocks."""
        cache = self._forked(range(len(self.lengths)))
        cache.is_batch, cache.reads = self.is_batch, self.reads
        cache._to_come = self._to_come and list(self._to_come)
        return cache

    # -- batches -----------------------------------------------------------------------------

    @classmethod
    def merge(cls, caches: list[TurboQuantKVCache]) -> TurboQuantKVCache:
        """Several single sequences as one batch. Nothing is copied; the blocks are shared."""
        batch = caches[0]._forked([0])
        batch.is_batch = True
        for cache in caches[1:]:
            batch.extend(cache)
        return batch

    def extract(self, index: int) -> TurboQuantKVCache:
        """One sequence of the batch; it shares its blocks with it."""
        return self._forked([index])

    def filter(self, batch_indices: Sequence[int]) -> None:
        """Keep only these sequences."""
        rows = [int(i) for i in batch_indices]
        self.tables = [self.tables[i] for i in rows]
        self.lengths = [self.lengths[i] for i in rows]
        self.packed = [self.packed[i] for i in rows]
        self.tails = self.tails.select(rows)
        self._to_come = self._to_come and [self._to_come[i] for i in rows]
        self._reading = None

    def extend(self, other: TurboQuantKVCache) -> None:
        """Take in the sequences of another cache of this layer.

        Raises:
            ValueError: its codecs, heads or head_dim are others.
        """
        if (other.codecs, other.exact_tokens) != (self.codecs, self.exact_tokens):
            raise ValueError(
                f"a cache of {other.codecs} with {other.exact_tokens} exact tokens cannot join one "
                f"of {self.codecs} with {self.exact_tokens}"
            )
        if other.layout is not None:
            self._declare(other.layout)
        for table, count in zip(other.tables, other.packed, strict=True):
            if table.pool is self.pool:
                self.tables.append(table.fork(self.layer, count))
            else:  # from a file, say
                self.tables.append(table.copy_to(self.pool, self.layer, count))
        self.lengths = [*self.lengths, *other.lengths]
        self.packed = [*self.packed, *other.packed]
        self.tails = self.tails.joined(other.tails)
        self._reading = None

    def prepare(self, *, left_padding=None, lengths=None, right_padding=None) -> None:
        """Announce right-padded prompts: of the columns to come, lengths[i] are tokens."""
        if left_padding is not None and max(left_padding) > 0:
            raise ValueError("sequences have lengths of their own here: pad prompts on the right")
        if lengths is not None and right_padding is not None and max(right_padding) > 0:
            self._to_come = [int(n) for n in lengths]

    def finalize(self) -> None:
        """The right-padded prompts have been read."""
        self._to_come = None


# mlx-lm's load_prompt_cache looks classes up by name in its own module.
mlx_cache.TurboQuantKVCache = TurboQuantKVCache  # pyright: ignore[reportAttributeAccessIssue]
