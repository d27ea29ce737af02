"""Decode attention straight from packed blocks and an exact tail: the launches of `attend.h`,
`exact.h` and `merge.h`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from tqstack.attention.kernels.program import Program
from tqstack.turboquant.lloyd import LloydCodec
from tqstack.turboquant.rotation import RandomHadamard
from tqstack.turboquant.trellis import TrellisCodec

if TYPE_CHECKING:
    from tqstack.attention.blocks import Stored

ScalarCodec = LloydCodec | TrellisCodec  # a plane of codes, a plane of scales

MAX_QUERY_TOKENS = 8
# As in stored.h, attend.h, exact.h and merge.h: query rows and threads of a block, threads of one
# that merges, keys of a tail per block, and keys of a warp's step.
COLUMNS, THREADS, MERGERS, EXACT_KEYS, TILE = 8, 128, 512, 32, 16
# Two blocks for each of 132 multiprocessors; each has at least a step for every warp.
BLOCKS, KEYS_PER_BLOCK = 264, 64

_SHARED_HEADERS = ("hadamard.h", "stored.h")


@cache
def attend_program(slabs: int) -> Program:
    """The splits of so many slabs, up to 16: Metal passes 31 arrays. Blocks of exact keys come
    first: they are short, and others follow them."""
    names = tuple(f"slab_{i}" for i in range(slabs))
    pointers = ", ".join(f"(IN(word)){name}" for name in names)
    return Program(
        name=f"attend_{slabs}",
        headers=(*_SHARED_HEADERS, "lookup.h", "attend.h", "exact.h"),
        call=f"""
typedef Attend<DK, DV, KB, VB, KW, VW, KG, VG, ONE_TABLE> A;
constexpr int EXACT_WORDS = EXACT_KEYS * COLUMNS;
SHARED_ARRAY word memory[A::SHARED_WORDS > EXACT_WORDS ? A::SHARED_WORDS : EXACT_WORDS];
IN(Call) own = (IN(Call))call;
const int tiles = (own->rows + COLUMNS - 1) / COLUMNS;
const int head = block.x / tiles, tile = block.x % tiles, split = block.y;
const size_t part = size_t(block.x) * (own->exact_splits + own->splits) + split;
OUT(float) own_parts = parts + part * COLUMNS * DV;
OUT(float) own_stats = stats + part * COLUMNS * 2;
if (split < own->exact_splits) {{
  attend_exact<DK, DV, BLOCK, MASKED>(
      queries, tail_keys, tail_values, mask, (IN(Extent))extents, own, own_parts, own_stats,
      (SHARED(float))memory, tid, split, tile, head);
}} else {{
  const Slabs<{slabs}> slabs = {{{{{pointers}}}}};
  attend<DK, DV, KB, VB, KW, VW, KG, VG, ONE_TABLE, ROTATE, MASKED, BLOCK>(
      slabs, table, key_table, value_table, packed_queries, signs, mask, (IN(Extent))extents, own,
      own_parts, own_stats, memory, tid, split - own->exact_splits, tile, head);
}}""",
        inputs=(
            *(*names, "table", "extents", "tail_keys", "tail_values", "key_table", "value_table"),
            *("queries", "packed_queries", "signs", "mask", "call"),
        ),
        outputs=("parts", "stats"),
    )


MERGE = Program(
    name="merge",
    headers=(*_SHARED_HEADERS, "merge.h"),
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
    stored: Stored,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    window: int = 0,
) -> mx.array:
    """`tiled_attention` for up to `MAX_QUERY_TOKENS` query tokens of every sequence, as a kernel.

    Takes the same arguments, with stacked tails, and `window`: how many tokens up to and including
    its own a query sees; 0 for all.
    """
    B, heads, L, _ = queries.shape
    layout = stored.layout
    rows = heads // layout.kv_heads * L
    slots = stored.tail_keys.shape[2]  # pyright: ignore[reportAttributeAccessIssue]
    exact_splits = -(-slots // EXACT_KEYS)
    packed = tuple(
        max(0, stored.packed_limit(i, length - 1) - _first_tile(length, L, window))
        for i, length in enumerate(stored.lengths)
    )
    share, splits = _division(packed, layout.kv_heads * -(-rows // COLUMNS), exact_splits)
    slabs = stored.slabs or (NO_SLAB,)
    slabs += (slabs[-1],) * (slab_arguments(len(slabs)) - len(slabs))
    table = _table_of_blocks(*map(_SameObject, stored.tables))
    array_mask = None if mask is None or isinstance(mask, str) else _four_axes(mask)
    call = _call(
        *(B, layout.kv_heads, table.shape[1], slots, exact_splits, splits, share, rows, L),
        *(stored.exact_tokens, int(isinstance(mask, str)), window, *_strides(array_mask)),
        scale=float(scale),
    )
    variant = (array_mask is not None, sinks is not None, exact_splits + splits)
    launch = _launch(layout.key_codec, layout.value_codec, layout.block_tokens, *variant)
    return launch(
        queries,
        slabs,
        (table, _extents(stored.starts, stored.lengths), stored.tail_keys, stored.tail_values),
        call,
        UNUSED if array_mask is None else at_least_8(array_mask),
        UNUSED if sinks is None else at_least_8(sinks.astype(mx.float32)),
    )


@lru_cache(maxsize=256)
def _launch(
    key_codec: ScalarCodec,
    value_codec: ScalarCodec,
    block_tokens: int,
    masked: bool,
    with_sinks: bool,
    splits: int,
) -> Callable[..., mx.array]:
    """Both kernels as one compiled step: MLX writes out a kernel's source at every launch from
    Python, which takes longer than a short context needs on the GPU."""
    key_signs, value_signs = hadamard_signs(key_codec), hadamard_signs(value_codec)
    tables = _code_table(key_codec), _code_table(value_codec)
    fixed = {
        **constants(key_codec, value_codec),
        "ROTATE": key_signs is not None,
        "MASKED": masked,
        "BLOCK": block_tokens,
    }
    dim = value_codec.dim

    def launch(queries, slabs, sequences, call, mask, sinks) -> mx.array:
        B, heads, L, _ = queries.shape
        kv_heads = sequences[2].shape[1]
        rows = heads // kv_heads * L
        groups = B * kv_heads * -(-rows // COLUMNS)
        parts, stats = attend_program(len(slabs))(
            [
                *(*slabs, *sequences, *tables, queries),
                queries if key_signs is not None else key_codec.rotate(queries),
                UNUSED if key_signs is None else key_signs,
                *(mask, call),
            ],
            template=fixed,
            blocks=(groups, splits, 1),
            threads=THREADS,
            outputs=[
                ((groups, splits, COLUMNS, dim), mx.float32),
                ((groups, splits, 2, COLUMNS), mx.float32),
            ],
        )
        shape = (B, heads, L, dim)
        (out,) = MERGE(
            [parts, stats, sinks, UNUSED if value_signs is None else value_signs, call],
            template={"DV": dim, "SINKS": with_sinks, "ROTATE": value_signs is not None},
            blocks=(rows, B * kv_heads, 1),
            threads=MERGERS,
            outputs=[((2, *shape), mx.float32) if value_signs is None else (shape, queries.dtype)],
        )
        if value_signs is not None:
            return out
        exact, packed = out
        return (exact + value_codec.unrotate(packed)).astype(queries.dtype)

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


# Metal passes inputs of fewer than 8 entries in another address space. Not `mx.zeros`, which would
# still be to be computed: compiled steps may not capture that.
UNUSED = mx.array([0.0] * 8)
NO_SLAB = mx.array([0] * 8, dtype=mx.uint32)


def at_least_8(x: mx.array) -> mx.array:
    flat = x.reshape(-1)
    return flat if x.size >= 8 else mx.concatenate([flat, mx.zeros(8 - x.size, dtype=x.dtype)])


class _SameObject:
    """A tuple as a key of a cache that looks at its identity: comparing thousands of ids takes
    longer than a launch."""

    def __init__(self, ids: tuple[int, ...]):
        self.ids = ids

    def __hash__(self) -> int:
        return id(self.ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _SameObject) and self.ids is other.ids


@lru_cache(maxsize=16)
def _table_of_blocks(*tables: _SameObject) -> mx.array:
    """(B, capacity) ids, a power of two of them: a shape that lasts is a trace that lasts."""
    capacity = max(8, _power_of_two(max(len(table.ids) for table in tables)))
    ids = np.zeros((len(tables), capacity), dtype=np.int32)
    for row, table in zip(ids, tables, strict=True):
        row[: len(table.ids)] = table.ids
    return mx.array(ids)


def slab_arguments(slabs: int) -> int:
    """Slabs that a program takes, some of them twice: few programs to compile."""
    return _power_of_two(max(1, slabs))


def _power_of_two(n: int) -> int:
    """The next one, n or more."""
    return 1 << max(0, n - 1).bit_length()


@lru_cache(maxsize=64)
def _extents(starts: Sequence[int], lengths: Sequence[int]) -> mx.array:
    """`struct Extent` of every sequence."""
    pairs = list(zip(starts, lengths, strict=True))
    return at_least_8(mx.array(pairs, dtype=mx.int32))


def _first_tile(length: int, query_tokens: int, window: int) -> int:
    """Where the tiles begin that a sequence's queries see."""
    first = max(0, length - query_tokens - window + 1) if window else 0
    return first // TILE * TILE


@lru_cache(maxsize=64)
def _division(packed: tuple[int, ...], repeats: int, exact_splits: int) -> tuple[int, int]:
    """(keys per block, blocks per sequence), for at most BLOCKS blocks with work where that is
    possible: they run side by side, and one more would wait for the first of them to end.

    packed: keys of each sequence. repeats: blocks that read the same keys. exact_splits: blocks of
    each sequence's tail; they have places of their own unless they are many, which is when each is
    short beside the others.
    """
    exact = len(packed) * repeats * exact_splits
    places = BLOCKS - exact if 8 * exact <= BLOCKS else BLOCKS
    share = max(KEYS_PER_BLOCK, -(-sum(packed) * repeats // places))
    share = -(-share // TILE) * TILE
    if len(packed) * repeats <= places:
        while sum(-(-n // share) for n in packed) * repeats > places:
            share += TILE
    return share, -(-max(packed) // share)


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
def _code_table(codec: ScalarCodec) -> mx.array:
    """Halves that a field of the codes stands for, as words: two codes up to 4 bits, else, and
    for the windows of a trellis, the same value twice."""
    trellis = isinstance(codec, TrellisCodec)
    levels = codec.codebook if trellis else codec.codes[0].codebook
    words = levels.astype(np.float16).view(np.uint16).astype(np.uint32)
    if trellis or codec.bits > 4:
        return mx.array(words | (words << 16))
    return mx.array(np.tile(words, len(words)) | (np.repeat(words, len(words)) << 16))
