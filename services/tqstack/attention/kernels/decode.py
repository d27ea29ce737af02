"""Decode attention straight from packed codes: the launches of `attend.h` and `merge.h`."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import mlx.core as mx
import numpy as np

from tqstack.attention.kernels.program import Program
from tqstack.turboquant.lloyd import LloydCodec
from tqstack.turboquant.rotation import RandomHadamard
from tqstack.turboquant.trellis import TrellisCodec

ScalarCodec = LloydCodec | TrellisCodec  # a plane of codes, a plane of scales

MAX_QUERY_TOKENS = 8
# As in attend.h and merge.h: query rows and threads of a block, and of one that merges.
COLUMNS, THREADS, MERGERS = 8, 128, 512
# Two blocks for each of 132 multiprocessors; each has at least a step for every warp.
BLOCKS, KEYS_PER_BLOCK, KEYS_PER_STEP = 264, 64, 16

_HEADERS = ("hadamard.h", "lookup.h", "attend.h", "merge.h")
ATTEND = Program(
    name="attend",
    headers=_HEADERS[:3],
    call="""
SHARED_ARRAY word memory[Attend<DK, DV, KB, VB, KW, VW, KG, VG, ONE_TABLE>::SHARED_WORDS];
attend<DK, DV, KB, VB, KW, VW, KG, VG, ONE_TABLE, ROTATE, MASKED>(
    (IN(word))keys, key_scales, (IN(word))values, value_scales, key_table, value_table,
    queries, signs, mask, starts, (IN(Call))call, parts, stats, memory,
    tid, block.x, block.y, block.z);""",
    inputs=(
        *("keys", "key_scales", "values", "value_scales", "key_table", "value_table"),
        *("queries", "signs", "mask", "starts", "call"),
    ),
    outputs=("parts", "stats"),
)
MERGE = Program(
    name="merge",
    headers=_HEADERS,
    call="""
SHARED_ARRAY float memory[Merge<DV>::SHARED_WORDS];
merge<DV, SINKS, ROTATE>(
    parts, stats, sinks, signs, (IN(Call))call, out, memory, tid, block.x, block.y);""",
    inputs=("parts", "stats", "sinks", "signs", "call"),
    outputs=("out",),
)


@lru_cache(maxsize=64)
def serves(*codecs: object) -> bool:
    """Whether the kernel can read these codecs: one plane of codes of whole bits."""
    return all(
        (isinstance(codec, LloydCodec) and codec.bits % 1 == 0)
        # Lanes read whole bytes of a stream, the last one around its end.
        or (isinstance(codec, TrellisCodec) and codec.dim % 64 == 0)
        for codec in codecs
    )


def decode_attention(
    queries: mx.array,
    keys: tuple[mx.array, ...],
    values: tuple[mx.array, ...],
    key_codec: ScalarCodec,
    value_codec: ScalarCodec,
    *,
    length: int,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    padding: list[int] | None = None,
    window: int = 0,
) -> mx.array:
    """`tiled_attention` for up to `MAX_QUERY_TOKENS` query tokens, as a kernel.

    Takes the same arguments, and `window`: how many tokens up to and including its own a query
    sees; 0 for all.
    """
    B, heads, L, _ = queries.shape
    kv_heads, capacity = keys[0].shape[1:3]
    rows = heads // kv_heads * L
    tiles = -(-rows // COLUMNS)
    starts = tuple(padding or [0] * B)
    share, splits = _division(length, starts, window and window + L - 1, kv_heads * tiles)
    array_mask = None if mask is None or isinstance(mask, str) else _four_axes(mask)
    call = _call(
        *(B, kv_heads, capacity, length, splits, share, rows, L),
        *(int(isinstance(mask, str)), window, *_strides(array_mask)),
        scale=float(scale),
    )
    launch = _launch(key_codec, value_codec, splits, array_mask is not None, sinks is not None)
    return launch(
        queries,
        keys,
        values,
        _starts(starts),
        call,
        UNUSED if array_mask is None else at_least_8(array_mask),
        UNUSED if sinks is None else at_least_8(sinks.astype(mx.float32)),
    )


@lru_cache(maxsize=256)
def _launch(
    key_codec: ScalarCodec, value_codec: ScalarCodec, splits: int, masked: bool, with_sinks: bool
) -> Callable[..., mx.array]:
    """Both kernels as one compiled step: MLX writes out a kernel's source at every launch from
    Python, which takes longer than a short context needs on the GPU."""
    key_signs, value_signs = hadamard_signs(key_codec), hadamard_signs(value_codec)
    tables = _table(key_codec), _table(value_codec)
    fixed = {
        **constants(key_codec, value_codec),
        "ROTATE": key_signs is not None,
        "MASKED": masked,
    }
    rotated, dim = value_signs is None, value_codec.dim

    def launch(queries, keys, values, starts, call, mask, sinks) -> mx.array:
        B, heads, L, _ = queries.shape
        kv_heads = keys[0].shape[1]
        rows = heads // kv_heads * L
        tiles = -(-rows // COLUMNS)
        parts, stats = ATTEND(
            [
                *(*keys, *values, *tables),
                queries if key_signs is not None else key_codec.rotate(queries),
                UNUSED if key_signs is None else key_signs,
                *(mask, starts, call),
            ],
            template=fixed,
            blocks=(splits, tiles, B * kv_heads),
            threads=THREADS,
            outputs=[
                ((B * kv_heads, tiles, splits, COLUMNS, dim), mx.float32),
                ((B * kv_heads, tiles, splits, 2, COLUMNS), mx.float32),
            ],
        )
        (out,) = MERGE(
            [parts, stats, sinks, UNUSED if value_signs is None else value_signs, call],
            template={"DV": dim, "SINKS": with_sinks, "ROTATE": not rotated},
            blocks=(rows, B * kv_heads, 1),
            threads=MERGERS,
            outputs=[((B, heads, L, dim), mx.float32 if rotated else queries.dtype)],
        )
        return value_codec.unrotate(out).astype(queries.dtype) if rotated else out

    # A mask is longer at every token: there would be a trace for each.
    return launch if masked else mx.compile(launch)


def constants(key_codec: ScalarCodec, value_codec: ScalarCodec) -> dict[str, int | bool]:
    """What `attend` is compiled for."""
    key, value = _code(key_codec), _code(value_codec)
    return {
        "DK": key_codec.dim,
        "DV": value_codec.dim,
        **{"KB": key[0], "KW": key[1], "KG": key_codec.dim // key[2]},
        **{"VB": value[0], "VW": value[1], "VG": value_codec.dim // value[2]},
        "ONE_TABLE": key == value,
    }


def _code(codec: ScalarCodec) -> tuple[int, int, int]:
    """(bits, window or 0, values that share a scale); the same code has the same levels."""
    if isinstance(codec, TrellisCodec):
        return codec.bits, codec.window, codec.dim
    return int(codec.bits), 0, codec.group


@lru_cache(maxsize=16)
def hadamard_signs(codec: ScalarCodec) -> mx.array | None:
    """The random signs (dim,) of a rotation that the kernels do themselves: one Hadamard block."""
    rotation, dim = codec.rotation, codec.dim
    if not isinstance(rotation, RandomHadamard) or dim < 32 or dim & (dim - 1):
        return None
    return rotation.signs.reshape(-1)


# Metal passes inputs of fewer than 8 entries in another address space.
UNUSED = mx.zeros(8)


def at_least_8(x: mx.array) -> mx.array:
    flat = x.reshape(-1)
    return flat if x.size >= 8 else mx.concatenate([flat, mx.zeros(8 - x.size, dtype=x.dtype)])


@lru_cache(maxsize=64)
def _starts(starts: tuple[int, ...]) -> mx.array:
    return at_least_8(mx.array(starts, dtype=mx.int32))


@lru_cache(maxsize=64)
def _division(length: int, starts: tuple[int, ...], reach: int, repeats: int) -> tuple[int, int]:
    """(keys per block, blocks per sequence), for at most BLOCKS blocks with work where that is
    possible: they run side by side, and one more would wait for the first of them to end.

    reach: how many of the last keys are read, 0 for all. repeats: blocks that read the same keys.
    """
    lengths = [min(length - start, reach or length) for start in starts]
    share = max(KEYS_PER_BLOCK, -(-sum(lengths) * repeats // BLOCKS))
    share = -(-share // KEYS_PER_STEP) * KEYS_PER_STEP
    if len(lengths) * repeats <= BLOCKS:
        while sum(-(-n // share) for n in lengths) * repeats > BLOCKS:
            share += KEYS_PER_STEP
    return share, max(1, -(-max(lengths) // share))


@lru_cache(maxsize=64)
def _call(*integers: int, scale: float) -> mx.array:
    """`struct Call`; the layers of a model share it."""
    bits = np.array([scale], dtype=np.float32).view(np.int32)
    return mx.array(np.concatenate([np.array(integers, dtype=np.int32), bits]))


def _four_axes(mask: mx.array) -> mx.array:
    mask = mask.reshape(*([1] * (4 - mask.ndim)), *mask.shape)
    return mask if mask.dtype == mx.bool_ else mask.astype(mx.float32)


def _strides(mask: mx.array | None) -> list[int]:
    """In entries; 0 for axes that broadcast."""
    if mask is None:
        return [0] * 4
    strides, step = [], 1
    for size in reversed(mask.shape):
        strides.insert(0, step if size > 1 else 0)
        step *= size
    return strides


@lru_cache(maxsize=16)
def _table(codec: ScalarCodec) -> mx.array:
    """Halves that a field of the codes stands for, as words: two codes up to 4 bits, else, and
    for the windows of a trellis, the same value twice."""
    trellis = isinstance(codec, TrellisCodec)
    levels = codec.codebook if trellis else codec.codes[0].codebook
    words = levels.astype(np.float16).view(np.uint16).astype(np.uint32)
    if trellis or codec.bits > 4:
        return mx.array(words | (words << 16))
    return mx.array(np.tile(words, len(words)) | (np.repeat(words, len(words)) << 16))
