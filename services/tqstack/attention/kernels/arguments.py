"""What kernels are given beside keys, values and queries: constants of codecs, look-up tables,
tables of blocks, and what changes from call to call (`stored.h`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from tqstack.attention.sequences import Mask, four_axes
from tqstack.turboquant.codec import Codec
from tqstack.turboquant.kernel_layout import KernelLayout
from tqstack.turboquant.rotation import RandomHadamard

if TYPE_CHECKING:
    from tqstack.attention.blocks import Stored


def serves(*codecs: Codec) -> bool:
    """Whether kernels can read these codecs."""
    return all(codec.kernel_layout is not None for codec in codecs)


def constants(key_codec: Codec, value_codec: Codec) -> dict[str, int | bool]:
    """What `attend` is compiled for."""
    key, value = layout_of(key_codec), layout_of(value_codec)
    return {
        "DK": key_codec.dim,
        "DV": value_codec.dim,
        **{"KB": key.bits, "KW": key.window, "KG": key_codec.dim // key.group},
        **{"VB": value.bits, "VW": value.window, "VG": value_codec.dim // value.group},
        "ONE_TABLE": key == value,
    }


def layout_of(codec: Codec) -> KernelLayout:
    """Of a codec that `serves` let pass."""
    assert codec.kernel_layout is not None
    return codec.kernel_layout


@lru_cache(maxsize=16)
def hadamard_signs(codec: Codec) -> mx.array | None:
    """The random signs (dim,) of a rotation that the kernels do themselves: one Hadamard block."""
    rotation, dim = layout_of(codec).rotation, codec.dim
    if not isinstance(rotation, RandomHadamard) or dim < 32 or dim & (dim - 1):
        return None
    return rotation.signs.reshape(-1)


# Metal passes inputs of fewer than 8 entries in another address space. Not `mx.zeros`, which would
# still be to be computed: compiled steps may not capture that.
UNUSED = mx.array([0.0] * 8)
NO_SLAB = mx.array([0] * 8, dtype=mx.uint32)


def at_least_8(x: mx.array) -> mx.array:
    flat = x.reshape(-1)
    return flat if x.size >= 8 else mx.concatenate([flat, mx.zeros(8 - x.size, dtype=x.dtype)])


class SameObject:
    """A tuple as a key of a cache that looks at its identity: comparing thousands of ids takes
    longer than a launch."""

    def __init__(self, ids: tuple[int, ...]):
        self.ids = ids

    def __hash__(self) -> int:
        return id(self.ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SameObject) and self.ids is other.ids


@lru_cache(maxsize=16)
def table_of_blocks(*tables: SameObject) -> mx.array:
    """(B, capacity) ids, a power of two of them: a shape that lasts is a trace that lasts."""
    capacity = max(8, power_of_two(max(len(table.ids) for table in tables)))
    ids = np.zeros((len(tables), capacity), dtype=np.int32)
    for row, table in zip(ids, tables, strict=True):
        row[: len(table.ids)] = table.ids
    return mx.array(ids)


def slab_arguments(slabs: int) -> int:
    """Slabs that a program takes, some of them twice: few programs to compile."""
    return power_of_two(max(1, slabs))


def slabs_of(stored: Stored) -> tuple[mx.array, ...]:
    """As many as a program takes."""
    slabs = stored.slabs or (NO_SLAB,)
    return slabs + (slabs[-1],) * (slab_arguments(len(slabs)) - len(slabs))


def power_of_two(n: int) -> int:
    """The next one, n or more."""
    return 1 << max(0, n - 1).bit_length()


@lru_cache(maxsize=64)
def extents_of(starts: Sequence[int], lengths: Sequence[int]) -> mx.array:
    """`struct Extent` of every sequence."""
    pairs = list(zip(starts, lengths, strict=True))
    return at_least_8(mx.array(pairs, dtype=mx.int32))


@lru_cache(maxsize=64)
def integers(*numbers: int) -> mx.array:
    """A struct of them, as a kernel's input: a constant, also in compiled steps."""
    return mx.array([*map(int, numbers), *[0] * (8 - len(numbers))], dtype=mx.int32)


@lru_cache(maxsize=64, typed=True)
def struct(*numbers: int | float) -> mx.array:
    """A struct of 32-bit integers and floats, as a kernel's input: a constant, too."""
    words = [np.array(n, np.float32 if isinstance(n, float) else np.int32) for n in numbers]
    words += [np.array(0, np.int32)] * (8 - len(numbers))
    return mx.array(np.array([word.view(np.int32) for word in words]))


def call_for(
    queries: mx.array, stored: Stored, sizes: Sequence[int], mask: Mask, window: int, scale: float
) -> mx.array:
    """`struct Call` of an attention; sizes: its `capacity` to `share`."""
    B, heads, L, _ = queries.shape
    kv_heads = stored.layout.kv_heads
    return _call(
        *(B, kv_heads, *sizes, heads // kv_heads * L, L, stored.exact_tokens),
        *(int(isinstance(mask, str)), window, *strides_of(array_mask(mask))),
        scale=float(scale),
    )


@lru_cache(maxsize=64)
def _call(*integers: int, scale: float) -> mx.array:
    """The layers of a model share it."""
    bits = np.array([scale], dtype=np.float32).view(np.int32)
    return mx.array(np.concatenate([np.array(integers, dtype=np.int32), bits]))


def array_mask(mask: Mask) -> mx.array | None:
    """A mask that is an array, bool or float32, with four axes."""
    if not isinstance(mask, mx.array):
        return None
    mask = four_axes(mask)
    return mask if mask.dtype == mx.bool_ else mask.astype(mx.float32)


def or_unused(x: mx.array | None) -> mx.array:
    """As a kernel's input."""
    return UNUSED if x is None else at_least_8(x)


def strides_of(mask: mx.array | None) -> list[int]:
    """In entries; 0 for axes that broadcast."""
    if mask is None:
        return [0] * 4
    strides, step = [], 1
    for size in reversed(mask.shape):
        strides.insert(0, step if size > 1 else 0)
        step *= size
    return strides


@lru_cache(maxsize=16)
def code_table(codec: Codec) -> mx.array:
    """Halves that a field of the codes stands for, as words: two codes up to 4 bits, else, and
    for the windows of a trellis, the same value twice."""
    layout = layout_of(codec)
    words = layout.levels.astype(np.float16).view(np.uint16).astype(np.uint32)
    if layout.window or layout.bits > 4:
        return mx.array(words | (words << 16))
    return mx.array(np.tile(words, len(words)) | (np.repeat(words, len(words)) << 16))
