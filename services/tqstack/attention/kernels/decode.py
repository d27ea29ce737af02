"""Decode attention straight from packed blocks and an exact tail: the launches of `attend.h`,
`exact.h` and `merge.h`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import mlx.core as mx

from tqstack.attention.kernels.arguments import (
    UNUSED,
    SameObject,
    array_mask,
    call_for,
    code_table,
    constants,
    extents_of,
    hadamard_signs,
    or_unused,
    slabs_of,
    table_of_blocks,
)
from tqstack.attention.kernels.program import Program
from tqstack.turboquant.codec import Codec

if TYPE_CHECKING:
    from tqstack.attention.blocks import Stored

MAX_QUERY_TOKENS = 8
# As in stored.h, attend.h, exact.h and merge.h: query rows and threads of a block, threads of one
# that merges, keys of a tail per block, and keys of a warp's step.
COLUMNS, THREADS, MERGERS, EXACT_KEYS, TILE = 8, 128, 512, 32, 16
FEW = 32  # splits that a warp per row merges
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
SHARED_ARRAY float memory[Merge<DV, MERGERS>::SHARED_WORDS];
merge<DV, MERGERS, SINKS, ROTATE>(
    parts, stats, sinks, signs, (IN(Call))call, out, memory, tid, block.x, block.y);""",
    inputs=("parts", "stats", "sinks", "signs", "call"),
    outputs=("out",),
)


MERGE_FEW = Program(
    name="merge_few",
    headers=(*_SHARED_HEADERS, "merge.h"),
    call="""
merge_few<DV, SINKS, ROTATE>(
    parts, stats, sinks, signs, (IN(Call))call, out, tid, block.x, block.y);""",
    inputs=MERGE.inputs,
    outputs=MERGE.outputs,
)


def merged(
    parts: mx.array,
    stats: mx.array,
    call: mx.array,
    queries: mx.array,
    codec: Codec,
    signs: mx.array | None,
    kv_heads: int,
    sinks: mx.array,
    with_sinks: bool,
) -> mx.array:
    """The sums of all splits as an answer like the queries. parts: (groups of COLUMNS rows, splits,
    COLUMNS, d); codec, signs: of the values; sinks: (query heads,) or more in float32."""
    B, heads, L, _ = queries.shape
    shape = (B, heads, L, codec.dim)
    rows, few = heads // kv_heads * L, parts.shape[1] <= FEW
    variant = {"DV": codec.dim, "SINKS": with_sinks, "ROTATE": signs is not None}
    (out,) = (MERGE_FEW if few else MERGE)(
        [parts, stats, sinks, UNUSED if signs is None else signs, call],
        template=variant if few else {**variant, "MERGERS": MERGERS},
        blocks=(-(-rows * 32 // THREADS) if few else rows, B * kv_heads, 1),
        threads=THREADS if few else MERGERS,
        outputs=[((2, *shape), mx.float32) if signs is None else (shape, queries.dtype)],
    )
    if signs is not None:
        return out
    exact, packed = out
    return (exact + codec.unrotate(packed)).astype(queries.dtype)


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
    _, heads, L, _ = queries.shape
    layout = stored.layout
    rows = heads // layout.kv_heads * L
    slots = stored.tail_keys.shape[2]  # pyright: ignore[reportAttributeAccessIssue]
    exact_splits = -(-slots // EXACT_KEYS)
    packed = tuple(
        max(0, stored.packed_limit(i, length - 1) - _first_tile(length, L, window))
        for i, length in enumerate(stored.lengths)
    )
    share, splits = _division(packed, layout.kv_heads * -(-rows // COLUMNS), exact_splits)
    table = table_of_blocks(*map(SameObject, stored.tables))
    sizes = (table.shape[1], slots, exact_splits, splits, share)
    variant = (isinstance(mask, mx.array), sinks is not None, exact_splits + splits)
    launch = _launch(layout.key_codec, layout.value_codec, layout.block_tokens, *variant)
    return launch(
        queries,
        slabs_of(stored),
        (table, extents_of(stored.starts, stored.lengths), stored.tail_keys, stored.tail_values),
        call_for(queries, stored, sizes, mask, window, scale),
        or_unused(array_mask(mask)),
        or_unused(sinks if sinks is None else sinks.astype(mx.float32)),
    )


@lru_cache(maxsize=256)
def _launch(
    key_codec: Codec,
    value_codec: Codec,
    block_tokens: int,
    masked: bool,
    with_sinks: bool,
    splits: int,
) -> Callable[..., mx.array]:
    """Both kernels as one compiled step: MLX writes out a kernel's source at every launch from
    Python, which takes longer than a short context needs on the GPU."""
    key_signs, value_signs = hadamard_signs(key_codec), hadamard_signs(value_codec)
    tables = code_table(key_codec), code_table(value_codec)
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
        value = value_codec, value_signs
        return merged(parts, stats, call, queries, *value, kv_heads, sinks, with_sinks)

    # A mask is longer at every token: there would be a trace for each.
    return launch if masked else mx.compile(launch)


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
