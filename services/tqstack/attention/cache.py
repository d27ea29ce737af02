"""The compressed KV cache: packed planes, appended in place, alone or as a left-padded batch.

A codec turns head_dim values into a tuple of *planes* (packed codes, norms, ...), each an array
with the same leading axes (B, KV heads, tokens). The cache stores planes and never looks into them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_cache
from mlx_lm.models.base import create_causal_mask

from tqstack.attention.kernels.choose import attention, encode_pair
from tqstack.attention.specs import Bits, codec_specs
from tqstack.turboquant.codec import Codec, make_codec

Planes = tuple[mx.array, ...]

# One codec (its tables and rotation) serves every layer with the same specification and head size.
codec_for = lru_cache(maxsize=None)(make_codec)


class TurboQuantKVCache(mlx_cache._BaseCache):
    """Keys and values of one softmax layer, compressed.

    It stands where mlx-lm has `KVCache` (one sequence, `offset` an int) and, once merged, where it
    has `BatchKVCache` (left-padded sequences, `offset` an array). Only `attend` reads it.

    Args:
        bits: of a value: 4, 3.5, "k4v3", or codecs by name (`tqstack.attention.specs`).
    """

    # Tokens by which the planes grow: slack costs little, and growing stays rare.
    step = 256

    def __init__(self, bits: Bits = 4):
        self.key_spec, self.value_spec = codec_specs(bits)
        self.keys: Planes | None = None
        self.values: Planes | None = None
        self.head_dims = (0, 0)
        self.length = 0  # tokens stored, padding included
        self.padding: list[int] | None = None  # left padding of each sequence; None: not a batch
        self.reads = 0  # calls of `attend`: the proof that the compressed path runs
        self._right_padding: list[int] | None = None

    # -- appending ---------------------------------------------------------------------------

    @property
    def offset(self) -> int | mx.array:
        """Position of the next token: an int, or one per sequence (B,) in a batch."""
        if self.padding is None:
            return self.length
        return mx.array([self.length - pad for pad in self.padding])

    def update_and_fetch(self, keys: mx.array, values: mx.array):
        """Compress and append (B, KV heads, L, head_dim) keys and values.

        Returns the cache itself in place of both: there is no decompressed copy to hand out, and
        only `attend` can read it.
        """
        self.head_dims = (keys.shape[-1], values.shape[-1])
        key_planes, value_planes = encode_pair(keys, values, self.key_codec, self.value_codec)
        end = self.length + keys.shape[2]
        self.keys = _append(self.keys, key_planes, self.length, end, self.step)
        self.values = _append(self.values, value_planes, self.length, end, self.step)
        self.length = end
        return self, self

    def keys_and_values(self):
        """For layers that read another layer's cache; the same promise as `update_and_fetch`."""
        return self, self

    @property
    def key_codec(self) -> Codec:
        return codec_for(self.key_spec, self.head_dims[0])

    @property
    def value_codec(self) -> Codec:
        return codec_for(self.value_spec, self.head_dims[1])

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
                (B, query heads, L, tokens). Left padding is masked in any case.
            sinks: (query heads,) logits of the attention sinks.

        Returns:
            (B, query heads, L, value head_dim) in the queries' dtype.
        """
        assert self.keys is not None and self.values is not None, "nothing has been stored yet"
        self.reads += 1
        return attention(
            queries,
            self.keys,
            self.values,
            self.key_codec,
            self.value_codec,
            length=self.length,
            scale=scale,
            mask=mask,
            sinks=sinks,
            padding=self.padding,
        )

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None):
        """mlx-lm's mask for N new tokens; "causal" is never spelled out as an array by itself."""
        if return_array or window_size is not None:
            padding = None if self.padding is None else mx.array(self.padding)
            return create_causal_mask(N, self.length, window_size=window_size, left_padding=padding)
        return None if N == 1 else "causal"

    # -- what every cache of mlx-lm has ------------------------------------------------------

    def size(self) -> int:
        return self.length

    def empty(self) -> bool:
        return self.keys is None

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        n = min(self.length, n)
        self.length -= n
        return n

    @property
    def nbytes(self) -> int:
        """Bytes really held, unused capacity included."""
        return sum(plane.nbytes for plane in (*(self.keys or ()), *(self.values or ())))

    @property
    def nbytes_used(self) -> int:
        """Bytes of the tokens stored, without the unused capacity."""
        planes = (*(self.keys or ()), *(self.values or ()))
        return sum(plane.nbytes // plane.shape[2] * self.length for plane in planes)

    @property
    def nbytes_fp16(self) -> int:
        """What the stored tokens would take in an ordinary cache of 16 bits."""
        if self.keys is None:
            return 0
        batch, heads = self.keys[0].shape[:2]
        return 2 * batch * heads * self.length * sum(self.head_dims)

    @property
    def state(self):
        used = [
            None if planes is None else [plane[:, :, : self.length] for plane in planes]
            for planes in (self.keys, self.values)
        ]
        specs = (self.key_spec, self.value_spec)
        return *used, self.length, self.padding, specs, list(self.head_dims)

    @state.setter
    def state(self, state) -> None:
        keys, values, self.length, padding, specs, head_dims = state
        self.key_spec, self.value_spec = specs
        self.head_dims = (int(head_dims[0]), int(head_dims[1]))
        self.keys = None if keys is None else tuple(keys)
        self.values = None if values is None else tuple(values)
        self.padding = None if padding is None else [int(pad) for pad in padding]
        self.reads, self._right_padding = 0, None

    # -- batches -----------------------------------------------------------------------------

    def _like(self) -> TurboQuantKVCache:
        cache = TurboQuantKVCache(f"{self.key_spec}/{self.value_spec}")
        cache.head_dims = self.head_dims
        return cache

    def _map(self, function) -> None:
        """Apply `function` to every plane."""
        if self.keys is not None and self.values is not None:
            self.keys = tuple(function(plane) for plane in self.keys)
            self.values = tuple(function(plane) for plane in self.values)

    @classmethod
    def merge(cls, caches: list[TurboQuantKVCache]) -> TurboQuantKVCache:
        """Several single sequences as one left-padded batch."""
        length = max(c.length for c in caches)
        batch = next((c for c in caches if not c.empty()), caches[0])._like()
        batch.length = length
        batch.padding = [length - c.length for c in caches]
        filled = [c for c in caches if not c.empty()]
        if filled:
            batch.keys = _stack([c.keys for c in caches], batch.padding, length)
            batch.values = _stack([c.values for c in caches], batch.padding, length)
        return batch

    def extract(self, index: int) -> TurboQuantKVCache:
        """One sequence of the batch, without its padding."""
        assert self.padding is not None, "only a batch can be taken apart"
        start, one = self.padding[index], self._like()
        one.keys, one.values, one.length = self.keys, self.values, self.length - start
        one._map(lambda plane: mx.contiguous(plane[index : index + 1, :, start : self.length]))
        return one

    def filter(self, batch_indices: list[int]) -> None:
        """Keep only these sequences, and drop the padding that all of them share."""
        assert self.padding is not None, "only a batch can be filtered"
        self.padding = [self.padding[i] for i in batch_indices]
        shared = min(self.padding)
        rows = mx.array(batch_indices)
        self._map(lambda plane: plane[rows][:, :, shared:])
        self.padding = [pad - shared for pad in self.padding]
        self.length -= shared

    def extend(self, other: TurboQuantKVCache) -> None:
        """Append the sequences of another batch, both aligned at the end."""
        assert self.padding is not None and other.padding is not None
        length = max(self.length, other.length)
        if not (self.empty() and other.empty()):
            self.head_dims = self.head_dims if not self.empty() else other.head_dims
            parts = (self, other)
            shift = [length - c.length for c in parts]
            rows = [len(c.padding or ()) for c in parts]
            self.keys = _join([c.keys for c in parts], rows, shift, length)
            self.values = _join([c.values for c in parts], rows, shift, length)
        self.padding = [pad + length - c.length for c in (self, other) for pad in c.padding or ()]
        self.length = length

    def prepare(self, *, left_padding=None, lengths=None, right_padding=None) -> None:
        """Announce the padding of the tokens to come."""
        if left_padding is not None:
            if not self.empty():
                raise ValueError("left padding can only be added to an empty cache")
            padding = self.padding or [0] * len(left_padding)
            self.padding = [a + int(b) for a, b in zip(padding, left_padding, strict=True)]
        if right_padding is not None and max(right_padding) > 0:
            self._right_padding = [int(pad) for pad in right_padding]

    def finalize(self) -> None:
        """Turn the right padding of the last prompt into left padding."""
        if self._right_padding is None or self.padding is None:
            return
        shifts = mx.array(self._right_padding)[:, None]
        self._map(lambda plane: mlx_cache.dynamic_roll(plane[:, :, : self.length], shifts, axis=2))
        self.padding = [a + b for a, b in zip(self.padding, self._right_padding, strict=True)]
        self._right_padding = None


# mlx-lm's load_prompt_cache looks classes up by name in its own module.
mlx_cache.TurboQuantKVCache = TurboQuantKVCache  # pyright: ignore[reportAttributeAccessIssue]


def _append(stored: Planes | None, new: Planes, start: int, end: int, step: int) -> Planes:
    """Write `new` at tokens start..end, growing by whole steps."""
    capacity = 0 if stored is None else stored[0].shape[2]
    if end > capacity:
        extra = -(-(end - start) // step) * step
        blocks = [mx.zeros((*p.shape[:2], extra, p.shape[3]), p.dtype) for p in new]
        stored = (
            tuple(blocks)
            if stored is None
            else tuple(
                mx.concatenate([old[:, :, :start], block], axis=2)
                for old, block in zip(stored, blocks, strict=True)
            )
        )
    assert stored is not None
    for plane, fresh in zip(stored, new, strict=True):
        plane[:, :, start:end] = fresh
    return stored


def _stack(parts: list[Planes | None], padding: list[int], length: int) -> Planes:
    """Single sequences into one batch of `length` tokens, each after its padding."""
    return _join(parts, [1] * len(parts), padding, length)


def _join(parts: list[Any], rows: list[int], shifts: list[int], length: int) -> Planes:
    """Concatenate batches along axis 0; part i starts at token shifts[i] and ends at `length`."""
    model = next(planes for planes in parts if planes is not None)
    joined = []
    for i, plane in enumerate(model):
        _, heads, _, width = plane.shape
        pieces = []
        for planes, count, shift in zip(parts, rows, shifts, strict=True):
            if planes is None:
                pieces.append(mx.zeros((count, heads, length, width), plane.dtype))
            else:
                used = planes[i][:, :, : length - shift]
                pieces.append(mx.pad(used, [(0, 0), (0, 0), (shift, 0), (0, 0)]))
        joined.append(mx.concatenate(pieces, axis=0))
    return tuple(joined)
