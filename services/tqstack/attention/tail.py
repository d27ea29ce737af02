"""The exact tails of a batch: each sequence's newest keys and values as the model made them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial

import mlx.core as mx

from tqstack.attention.kernels.program import gpu_dialect

# Tokens that can be taken back without a loss: drafts that a verification may reject.
REVOCABLE = 8

Pair = tuple[mx.array, mx.array]


def tail_slots(exact_tokens: int, block_tokens: int) -> int:
    """Most tokens of a tail while tokens are generated."""
    return exact_tokens + block_tokens + REVOCABLE


class Tails:
    """Keys and values of each sequence from position starts[i] on.

    They are pairs of arrays (1, KV heads, slots, head_dim), one for each sequence while prompts are
    read and batches change (joining and leaving copy nothing then), and stacked in one array
    (B, KV heads, slots, head_dim) of a fixed number of slots while tokens are generated. What
    stands behind a sequence's length is finite and has no meaning. Arrays are never written in
    place: forks share them.
    """

    def __init__(self, starts: Sequence[int], parts: Sequence[Pair | None], slots: int):
        self.starts = list(starts)
        self.slots = slots
        self._parts: list[Pair | None] = list(parts)
        self._stack: Pair | None = None

    @classmethod
    def empty(cls, sequences: int, slots: int) -> Tails:
        return cls([0] * sequences, [None] * sequences, slots)

    def part(self, i: int) -> Pair | None:
        """(1, KV heads, slots, head_dim) keys and values of a sequence; None: none yet."""
        if self._stack is None:
            return self._parts[i]
        keys, values = self._stack
        return keys[i : i + 1], values[i : i + 1]

    def arrays(self) -> tuple[Sequence[mx.array] | mx.array, Sequence[mx.array] | mx.array]:
        """Keys and values, stacked or one by one, as they are."""
        if self._stack is not None:
            return self._stack
        parts = [part for part in self._parts if part is not None]
        assert len(parts) == len(self._parts), "nothing has been stored yet"
        return [keys for keys, _ in parts], [values for _, values in parts]

    def held(self) -> list[mx.array]:
        """All arrays, as they are."""
        pairs = [self._stack] if self._stack is not None else self._parts
        return [x for pair in pairs if pair is not None for x in pair]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.held())

    def copy(self) -> Tails:
        """The same arrays; what is done to one does not show in the other."""
        tails = Tails(self.starts, self._parts, self.slots)
        tails._stack = self._stack
        return tails

    def select(self, rows: Sequence[int]) -> Tails:
        """These sequences, in this order, with what they hold themselves."""
        if self._stack is None:
            parts = [self._parts[i] for i in rows]
        else:  # taken, not sliced: a view would keep the whole stack
            keys, values = self._stack
            parts = [(_row(keys, i), _row(values, i)) for i in rows]
        return Tails([self.starts[i] for i in rows], parts, self.slots)

    def joined(self, other: Tails) -> Tails:
        """The sequences of both."""
        parts = [tails.part(i) for tails in (self, other) for i in range(len(tails.starts))]
        return Tails([*self.starts, *other.starts], parts, self.slots)

    def replaced(self, i: int, start: int, pair: Pair | None) -> Tails:
        """The same with other keys and values of sequence i."""
        parts = [self.part(j) for j in range(len(self.starts))]
        parts[i] = pair
        starts = [*self.starts[:i], start, *self.starts[i + 1 :]]
        return Tails(starts, parts, self.slots)

    # -- what comes and goes -----------------------------------------------------------------

    def drop_before(self, positions: Sequence[int]) -> None:
        """Forget what lies before these positions, one for each sequence."""
        shifts = [max(0, to - start) for to, start in zip(positions, self.starts, strict=True)]
        if not any(shifts):
            return
        self.starts = [start + shift for start, shift in zip(self.starts, shifts, strict=True)]
        if self._stack is not None:
            index = mx.arange(self.slots) + mx.array(shifts)[:, None]
            index = mx.minimum(index, self.slots - 1)[:, None, :, None]
            keys, values = (mx.take_along_axis(x, index, axis=2) for x in self._stack)
            self._stack = keys, values
            return
        self._parts = [
            part and (_behind(part[0], shift), _behind(part[1], shift)) if shift else part
            for part, shift in zip(self._parts, shifts, strict=True)
        ]

    def append(
        self, keys: mx.array, values: mx.array, lengths: Sequence[int], counts: Sequence[int]
    ) -> None:
        """Put the first counts[i] of L tokens behind sequence i, which has lengths[i].

        keys, values: (B, KV heads, L, head_dim).
        """
        at = [length - start for length, start in zip(lengths, self.starts, strict=True)]
        if keys.shape[2] <= REVOCABLE:
            self._write(self._stacked(keys, values, at), keys, values, at)
            return
        keys, values = bounded(keys, values)
        parts: list[Pair | None] = []
        for i, (used, count) in enumerate(zip(at, counts, strict=True)):
            old, new = self.part(i), (keys[i : i + 1, :, :count], values[i : i + 1, :, :count])
            if old is not None:
                new = (
                    mx.concatenate([old[0][:, :, :used], new[0]], axis=2),
                    mx.concatenate([old[1][:, :, :used], new[1]], axis=2),
                )
            parts.append(new)
        self._parts, self._stack = parts, None

    def _write(self, stack: Pair, keys: mx.array, values: mx.array, at: list[int]) -> None:
        self._parts = []
        if keys.shape[2] == 1 and gpu_dialect() is not None:
            self._stack = _placed(*stack, keys, values, _slots(self.slots), mx.array(at))
            return
        keys, values = bounded(keys, values)
        self._stack = _written(stack[0], keys, at), _written(stack[1], values, at)

    def _stacked(self, keys: mx.array, values: mx.array, used: Sequence[int]) -> Pair:
        """The stack, made of the sequences' own arrays if there is none yet."""
        if self._stack is not None:
            return self._stack
        stacks = []
        for j, like in enumerate((keys, values)):
            rows = []
            for part, count in zip(self._parts, used, strict=True):
                _, heads, _, dim = like.shape
                row = mx.zeros((1, heads, 0, dim), like.dtype) if part is None else part[j]
                row = row[:, :, :count]
                rows.append(mx.pad(row, [(0, 0), (0, 0), (0, self.slots - count), (0, 0)]))
            stacks.append(mx.concatenate(rows))
        return stacks[0], stacks[1]


def _row(stack: mx.array, i: int) -> mx.array:
    """(1, heads, slots, d) of its own."""
    return mx.take(stack, mx.array([i]), axis=0)


def _behind(x: mx.array, shift: int) -> mx.array:
    """(1, heads, slots - shift, d) of its own: a view would keep a prompt's whole chunk."""
    return mx.take(x, mx.arange(shift, x.shape[2]), axis=2)


@partial(mx.compile, shapeless=True)
def bounded(keys: mx.array, values: mx.array) -> Pair:
    """What codecs can store, so that one broken number does not spoil the others."""
    return _finite(keys), _finite(values)


def _finite(x: mx.array) -> mx.array:
    most = 65504  # of a half
    return mx.where(mx.isfinite(x), mx.clip(x, -most, most), 0).astype(x.dtype)


@mx.compile
def _placed(
    stack_keys: mx.array,
    stack_values: mx.array,
    keys: mx.array,
    values: mx.array,
    slots: mx.array,
    at: mx.array,
) -> Pair:
    """The stacks with one bounded token of each sequence at its slot at[i]. A GPU does in one
    launch what writing takes five for; a CPU would go through all slots for it."""
    here = slots[:, None] == at[:, None, None, None]  # (B, 1, slots, 1)
    return (
        mx.where(here, _finite(keys), stack_keys),
        mx.where(here, _finite(values), stack_values),
    )


@lru_cache
def _slots(count: int) -> mx.array:
    slots = mx.arange(count)
    mx.eval(slots)
    return slots


def _written(stack: mx.array, new: mx.array, at: list[int]) -> mx.array:
    """The stack with (B, KV heads, L, d) at slots at[i] ... of sequence i."""
    written, L = stack[:], new.shape[2]
    if len(set(at)) == 1:
        written[:, :, at[0] : at[0] + L] = new
    else:
        rows = mx.arange(len(at))[:, None]
        slots = mx.array(at)[:, None] + mx.arange(L)
        written[rows, :, slots] = new.swapaxes(1, 2)
    return written
