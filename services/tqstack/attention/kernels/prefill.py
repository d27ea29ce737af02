"""Prefill attention as kernels: packed blocks become halves once, a span at a time, and all query
rows read them there. The launches of `halves.h`, `expand.h`, `flash.h` and `merge.h`."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

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
    integers,
    or_unused,
    serves,
    slabs_of,
    table_of_blocks,
)
from tqstack.attention.kernels.decode import COLUMNS, MERGERS, THREADS, merged
from tqstack.attention.kernels.program import Program, gpu_dialect
from tqstack.attention.sequences import one_by_one

if TYPE_CHECKING:
    from tqstack.attention.blocks import BlockLayout, Stored

KEYS = 64  # of a step of `flash.h` (Metal takes half as many): tails are filled up to them
SPAN_BYTES = 64 << 20  # of halves that exist at a time
BLOCKS = 264  # of threads, that run side by side
KEYS_PER_BLOCK = 256  # at least, where rows are too few to fill a GPU
MAX_DIM = 256  # whose sums fit in the registers of a warp
WARPS = THREADS // 32

_HEADERS = ("hadamard.h", "stored.h")

QUERIES = Program(
    name="query_halves",
    headers=(*_HEADERS, "halves.h"),
    call="""
query_halves<D, ROTATE, LOW>(queries, given, signs, (IN(HalvesCall))call, raw, raw_sizes, rotated,
                             rotated_sizes, tid, block.x);""",
    inputs=("queries", "given", "signs", "call"),
    outputs=("raw", "raw_sizes", "rotated", "rotated_sizes"),
)
TAIL = Program(
    name="tail_halves",
    headers=(*_HEADERS, "halves.h"),
    call="""
tail_halves<DK, DV>(
    tail_keys, tail_values, (IN(HalvesCall))call, keys, values, sizes, tid, block.x);""",
    inputs=("tail_keys", "tail_values", "call"),
    outputs=("keys", "values", "sizes"),
)


@cache
def expand_program(slabs: int) -> Program:
    """Blocks of so many slabs as halves."""
    names = tuple(f"slab_{i}" for i in range(slabs))
    pointers = ", ".join(f"(IN(word)){name}" for name in names)
    return Program(
        name=f"expand_{slabs}",
        headers=("stored.h", "lookup.h", "expand.h"),
        call=f"""
SHARED_ARRAY word memory[Expand<DK, KB, KW, KG, ONE_TABLE>::T::WORDS +
                         (ONE_TABLE ? 0 : Expand<DV, VB, VW, VG, ONE_TABLE>::T::WORDS)];
const Slabs<{slabs}> slabs = {{{{{pointers}}}}};
expand<DK, DV, KB, VB, KW, VW, KG, VG, ONE_TABLE, BLOCK>(
    slabs, table, key_table, value_table, (IN(Span))span, (IN(Call))call, (OUT(word))keys,
    (OUT(word))values, sizes, memory, tid, block.x, block.y);""",
        inputs=(*names, "table", "key_table", "value_table", "span", "call"),
        outputs=("keys", "values", "sizes"),
    )


@cache
def flash_program(shared_words: int) -> Program:
    """Attention over halves. The exact keys, where a launch has them, are its first split."""
    return Program(
        name="flash",
        headers=(*_HEADERS, "flash.h"),
        call="""
typedef Flash<DK, DV, LOW> F;
SHARED_MEMORY(memory, F::SHARED_WORDS);
IN(Call) own = (IN(Call))call;
IN(Span) now = (IN(Span))span;
const int tiles = (own->rows + F::ROWS - 1) / F::ROWS;
const int head = block.x / tiles, tile = tiles - 1 - block.x % tiles;  // long ones first
const int split = int(block.y) - now->exact, begin = now->first + split * own->share;
const bool exact = split < 0;
Halves halves = {keys, values, sizes, now->first, now->tokens};
if (exact) {
  Halves tail = {tail_keys, tail_values, tail_sizes,
                 ((IN(Extent))extents)[head / own->kv_heads].start, own->slots};
  halves = tail;
}
Sums before = {parts_before, stats_before, split, own->splits};
flash<DK, DV, LOW, MASKED, BLOCK>(
    halves, exact ? queries : rotated, exact ? query_sizes : rotated_sizes, now->padded_rows, mask,
    (IN(Extent))extents, own, exact, exact ? 0 : begin,
    exact ? 1 << 30 : min(begin + own->share, now->first + now->tokens), !exact && now->goes_on,
    before, parts, stats, block.y, own->splits + now->exact, memory, tid, tile, head);""",
        inputs=(
            *("keys", "values", "sizes", "tail_keys", "tail_values", "tail_sizes"),
            *("queries", "query_sizes", "rotated", "rotated_sizes", "extents", "mask"),
            *("parts_before", "stats_before", "call", "span"),
        ),
        outputs=("parts", "stats"),
        shared_words=shared_words,
    )


@lru_cache(maxsize=64)
def serves_prompts(layout: BlockLayout) -> bool:
    """Whether the kernels can read these blocks: as in decoding, and in tiles of 16."""
    codecs: tuple[Any, ...] = layout.key_codec, layout.value_codec
    return (
        serves(*codecs)
        and all(codec.dim % 16 == 0 and codec.dim <= MAX_DIM for codec in codecs)
        and all(getattr(codec, "group", 8) % 8 == 0 for codec in codecs)
        and layout.block_tokens % KEYS == 0
    )


def prefill_attention(
    queries: mx.array,
    stored: Stored,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    window: int = 0,
) -> mx.array:
    """`tiled_attention` for any number of query tokens, as kernels.

    Takes the same arguments, and `window`: how many tokens up to and including its own a query
    sees; 0 for all. Beside the answer there are halves of SPAN_BYTES at a time, or twice as many
    while the next ones are made, and float32 sums of all query rows, twice.
    """
    if any(count != queries.shape[2] for count in stored.counts):
        options = {"scale": scale, "sinks": sinks, "window": window}
        attend = lambda q, alone, own: prefill_attention(q, alone, mask=own, **options)  # noqa: E731
        return one_by_one(attend, queries, stored, mask)
    B, heads, L, _ = queries.shape
    layout = stored.layout
    kv_heads, rows = layout.kv_heads, heads // layout.kv_heads * L
    codecs: tuple[Any, Any] = layout.key_codec, layout.value_codec
    tiles = B * kv_heads * -(-rows // rows_of_block())
    spans = _spans(stored, L, window)
    share, splits = _division(spans[0][1], tiles)
    tail = _tail_halves(stored)
    table = table_of_blocks(*map(SameObject, stored.tables))
    sizes = (table.shape[1], tail[0].shape[1], 1, splits, share)
    call = call_for(queries, stored, sizes, mask, window, scale)
    rows_as_halves, low = _query_halves(queries, kv_heads, codecs[0]), _needs_low(queries)
    same = [
        *(*tail, *rows_as_halves, extents_of(stored.starts, stored.lengths)),
        or_unused(array_mask(mask)),
    ]
    dims = {"DK": codecs[0].dim, "DV": codecs[1].dim}
    constant = {
        **dims,
        "LOW": low,
        "MASKED": isinstance(mask, mx.array),
        "BLOCK": layout.block_tokens,
    }
    program = flash_program(_shared_words(dims["DK"], dims["DV"], low))
    groups, padded = B * kv_heads * -(-rows // COLUMNS), tiles // (B * kv_heads) * rows_of_block()
    sums = [UNUSED, UNUSED]
    for start, tokens in spans:
        goes_on, last = (start, tokens) != spans[0], (start, tokens) == spans[-1]
        span = integers(start, tokens, padded, goes_on, last)
        halves = [_NO_HALVES, _NO_HALVES, UNUSED]
        if tokens:
            after = mx.depends([table], sums) if goes_on else [table]
            halves = _expanded(stored, after[0], span, call, tokens)
        before = sums
        sums = program(
            [*halves, *same, *before, call, span],
            template=constant,
            blocks=(tiles, splits + last, 1),
            threads=THREADS,
            outputs=[
                ((groups, splits + last, COLUMNS, dims["DV"]), mx.float32),
                ((groups, splits + last, 2, COLUMNS), mx.float32),
            ],
        )
        if gpu_dialect() == "cuda" and not last:
            # MLX holds what it has queued: two spans are enough to keep a GPU busy.
            mx.async_eval(sums)
            mx.eval(before)
    given = or_unused(sinks if sinks is None else sinks.astype(mx.float32))
    signs = hadamard_signs(codecs[1])
    parts, stats = sums
    values = codecs[1], signs
    return merged(parts, stats, call, queries, *values, kv_heads, given, sinks is not None)


def rows_of_block() -> int:
    """`Flash::ROWS`: 16 for each warp, or on Metal for two of them."""
    return 32 if gpu_dialect() == "metal" else 64


def _spans(stored: Stored, L: int, window: int) -> list[tuple[int, int]]:
    """(first position, tokens) of the packed tokens of each sequence that are halves at a time;
    once no tokens, where none is packed."""
    layout, block = stored.layout, stored.layout.block_tokens
    stop = max(stored.packed_limit(i, length - 1) for i, length in enumerate(stored.lengths))
    first = min(stored.lengths) - L - window + 1 if window else 0
    first = max(0, first) // block * block
    width = 2 * (layout.key_codec.dim + layout.value_codec.dim)
    most = SPAN_BYTES // (len(stored.lengths) * layout.kv_heads * width)
    most = max(1, most // block) * block
    return [(at, min(most, stop - at)) for at in range(first, stop, most)] or [(first, 0)]


@lru_cache(maxsize=64)
def _division(tokens: int, tiles: int) -> tuple[int, int]:
    """(keys per block, blocks per span and tile of rows): all rows of a long prompt fill a GPU by
    themselves; few rows share out the keys."""
    if not tokens:
        return KEYS, 0
    splits = max(1, min(BLOCKS // tiles, tokens // KEYS_PER_BLOCK, MERGERS - 1))
    share = -(-tokens // (splits * KEYS)) * KEYS
    return share, -(-tokens // share)


_NO_HALVES = mx.array([0.0] * 8, dtype=mx.float16)


def _shared_words(key_dim: int, value_dim: int, low: bool) -> int:
    """`Flash::SHARED_WORDS`, as CUDA stages."""
    key_row, value_row, rows = (key_dim + 8) // 2, (value_dim + 8) // 2, rows_of_block()
    return rows * key_row * (1 + low) + KEYS * (key_row + value_row) + 2 * KEYS * 4


def _query_halves(queries: mx.array, kv_heads: int, codec: Any) -> list[mx.array]:
    """The rows of every KV head, filled up to whole blocks of threads: halves (1, or 2 with the low
    ones, rows, D) and sizes as they are, and the same in the codec's rotation."""
    B, heads, L, D = queries.shape
    vectors = heads // kv_heads * L
    padded = -(-vectors // rows_of_block()) * rows_of_block()
    rows, low, signs = B * kv_heads * padded, _needs_low(queries), hadamard_signs(codec)
    shapes = [((1 + low, rows, D), mx.float16), ((rows,), mx.float32)]
    return QUERIES(
        [
            *(queries, queries if signs is not None else codec.rotate(queries)),
            *(UNUSED if signs is None else signs, integers(vectors, padded, B * kv_heads)),
        ],
        template={"D": D, "ROTATE": signs is not None, "LOW": low},
        blocks=(-(-rows // WARPS), 1, 1),
        threads=THREADS,
        outputs=[*shapes, *shapes],
    )


def _needs_low(queries: mx.array) -> bool:
    """Whether halves lose digits that the queries have: 11 of float32's 24."""
    return queries.dtype == mx.float32


def _tail_halves(stored: Stored) -> list[mx.array]:
    """The exact keys and values as halves (B * KV heads, slots, d), and `SIZES` of each slot; slots
    are filled up to whole steps of keys."""
    keys, values = _stacked(stored)
    B, kv_heads, vectors, _ = keys.shape
    padded, heads = -(-vectors // KEYS) * KEYS, B * kv_heads
    dims = {"DK": keys.shape[-1], "DV": values.shape[-1]}
    return TAIL(
        [keys, values, integers(vectors, padded, heads)],
        template=dims,
        blocks=(-(-heads * padded // WARPS), 1, 1),
        threads=THREADS,
        outputs=[
            *(((heads, padded, dim), mx.float16) for dim in dims.values()),
            ((heads, padded, 4), mx.float32),
        ],
    )


def _stacked(stored: Stored) -> list[mx.array]:
    """(B, KV heads, slots, d) exact keys and values of all sequences."""
    tails = stored.tail_keys, stored.tail_values
    if isinstance(tails[0], mx.array):
        return list(tails)  # pyright: ignore[reportReturnType]
    slots = max(x.shape[2] for x in tails[0])
    return [
        mx.concatenate([mx.pad(x, [(0, 0), (0, 0), (0, slots - x.shape[2]), (0, 0)]) for x in tail])
        if len(tail) > 1
        else tail[0]
        for tail in tails
    ]


def _expanded(
    stored: Stored, table: mx.array, span: mx.array, call: mx.array, tokens: int
) -> list[mx.array]:
    """A span's keys and values as halves (B, KV heads, tokens, d), and `SIZES` of each token."""
    layout, B = stored.layout, len(stored.lengths)
    slabs = slabs_of(stored)
    codecs: tuple[Any, Any] = layout.key_codec, layout.value_codec
    shape = (B, layout.kv_heads, tokens)
    return expand_program(len(slabs))(
        [*slabs, table, *map(code_table, codecs), span, call],
        template={**constants(*codecs), "BLOCK": layout.block_tokens},
        blocks=(tokens // layout.block_tokens, B * layout.kv_heads, 1),
        threads=THREADS,
        outputs=[
            *(((*shape, codec.dim), mx.float16) for codec in codecs),
            ((*shape, 4), mx.float32),
        ],
    )
