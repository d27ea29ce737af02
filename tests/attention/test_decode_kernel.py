"""The decode kernel's own source, compiled as C++ and run on the CPU, against float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest

from attention import cpp_kernels
from attention.cpp_kernels import both_layouts, in_cpp  # noqa: F401
from tqstack.attention.blocks import ROW_BITS, BlockLayout, Stored
from tqstack.attention.kernels import arguments, decode
from tqstack.attention.kernels.program import Program
from tqstack.attention.tiled import tiled_attention
from tqstack.turboquant.codec import make_codec

pytestmark = pytest.mark.skipif(not cpp_kernels.COMPILER, reason="the C++ dialect needs g++")

TOLERANCE = 5e-4  # half of what is promised of the GPU, where products round the same way


def normal(*shape, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed))


def distance(got, want):
    got, want = np.array(got.astype(mx.float32), np.float64), np.array(want, np.float64)
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-9)


def case(
    key_spec="tq4",
    value_spec="tq4",
    dim=64,
    lengths=(150,),
    kv_heads=1,
    repeats=8,
    L=1,
    exact=64,
    block=64,
    slabs=1,
    first_slot=None,
    dtype=mx.float32,
    **options,
):
    """(queries, stored, options) of a call. Blocks are at shuffled ids; other rows, and slots
    without a token, are NaN. first_slot: where tails begin, instead of where they have to."""
    layout = BlockLayout(make_codec(key_spec, dim), make_codec(value_spec, dim), kv_heads, block)
    first_limits, limits = (
        [max(0, (n - tokens) // block * block - exact) for n in lengths] for tokens in (L, 1)
    )
    starts = first_limits if first_slot is None else [first_slot] * len(lengths)
    counts = [-(-max(pair) // block) for pair in zip(limits, starts, strict=True)]
    rows, tables = {}, shuffled_tables(counts, slabs)
    slots = max(exact + block + 8, *(n - start for n, start in zip(lengths, starts, strict=True)))
    tails = np.full((2, len(lengths), kv_heads, slots, dim), np.nan, np.float32)
    for i, (n, start) in enumerate(zip(lengths, starts, strict=True)):
        keys = normal(1, kv_heads, n, dim, seed=10 + i)
        values = 1e-3 * normal(1, kv_heads, n, dim, seed=20 + i)
        if counts[i]:
            packed = layout.pack(*(x[:, :, : counts[i] * block] for x in (keys, values)))
            for number, words in zip(tables[i], np.array(packed), strict=True):
                rows[number] = words
        for tail, x in zip(tails, (keys, values), strict=True):
            tail[i, :, : n - start] = x[0, :, start:]
    size = max((number & 0xFFFF for number in rows), default=0) + 2
    memory = np.full((slabs, size, layout.words), 0xFFFFFFFF, np.uint32)
    for number, words in rows.items():
        memory[number >> ROW_BITS, number & 0xFFFF] = words
    stored = Stored(
        layout,
        slabs=tuple(mx.array(slab) for slab in memory),
        tables=tuple(map(tuple, tables)),
        tail_keys=mx.array(tails[0]).astype(dtype),
        tail_values=mx.array(tails[1]).astype(dtype),
        starts=tuple(starts),
        lengths=tuple(lengths),
        counts=(L,) * len(lengths),
        exact_tokens=exact,
    )
    queries = 3 * normal(len(lengths), kv_heads * repeats, L, dim, seed=3)
    return queries, stored, {"scale": dim**-0.5, "mask": "causal" if L > 1 else None} | options


def shuffled_tables(counts, slabs):
    """The ids of each sequence's blocks, in no order over some slabs."""
    numbers = np.random.default_rng(0).permutation(sum(counts)).tolist()
    ids = [number % slabs << ROW_BITS | number // slabs + 1 for number in numbers]
    return [ids[a:b] for a, b in pairwise(np.cumsum([0, *counts]))]


def reference(queries, stored, *, scale, mask=None, sinks=None, window=0):
    """The softmax of every query by itself, over decompressed and exact keys, in float64."""
    layout, (B, heads, L, _) = stored.layout, queries.shape
    out = np.zeros((B, heads, L, layout.value_codec.dim))
    full = None
    if isinstance(mask, mx.array):
        full = mask.reshape(*([1] * (4 - mask.ndim)), *mask.shape)
        full = mx.broadcast_to(full, (B, heads, L, full.shape[-1]))
        full = mx.where(full, 0.0, -mx.inf) if full.dtype == mx.bool_ else full
        full = np.array(full.astype(mx.float32), np.float64)
    for i, length in enumerate(stored.lengths):
        packed, exact = every_key(stored, i), [np.array(x[0], np.float64) for x in stored.tail(i)]
        for head, t in np.ndindex(heads, L):
            own, at = head // (heads // layout.kv_heads), length - L + t
            limit = stored.packed_limit(i, at)
            stop = min(length, at + 1) if isinstance(mask, str) else length
            x = np.arange(max(0, at - window + 1) if window else 0, stop)
            k, v = (
                np.concatenate([p[own][x[x < limit]], e[own][x[x >= limit] - stored.starts[i]]])
                for p, e in zip(packed, exact, strict=True)
            )
            score = k @ np.array(queries[i, head, t], np.float64) * scale
            score = score if full is None else score + full[i, head, t, x]
            peak = np.max(score, initial=-1e30)
            weight = np.exp(score - peak)
            total = weight.sum() + (0 if sinks is None else np.exp(sinks[head].item() - peak))
            out[i, head, t] = weight @ v / max(total, 1e-30)
    return out


def every_key(stored, i):
    """Decompressed keys and values of a sequence's blocks, rotated back: (KV heads, T, d)."""
    layout = stored.layout
    codecs = layout.key_codec, layout.value_codec
    if not stored.tables[i]:
        return [np.zeros((layout.kv_heads, 0, codec.dim)) for codec in codecs]
    planes = layout.planes(stored.rows(i, 0, len(stored.tables[i])))
    decoded = (c.unrotate(c.decode(p))[0] for c, p in zip(codecs, planes, strict=True))
    return [np.array(x, np.float64) for x in decoded]


def check(queries, stored, options, attend=decode.decode_attention):
    got = attend(queries, stored, **options)
    want = reference(queries, stored, **options)
    assert got.shape == want.shape and got.dtype == queries.dtype
    assert distance(got, want) < TOLERANCE
    return got


@both_layouts
@pytest.mark.parametrize("dim", [64, 80, 96, 112, 128, 192, 256])
def test_every_head_size(dim):
    check(*case(dim=dim))


@pytest.mark.parametrize("dim", [128, 192, 256])
def test_trellis_codes_of_longer_vectors(dim):
    check(*case("tcq3-l8", "tcq4-l8", dim=dim))


@pytest.mark.parametrize(
    "key_spec, value_spec",
    [
        *((f"tq{b}", f"tq{b}") for b in (2, 3, 5, 6, 7, 8)),
        *(("tq4", "tq3"), ("tq3", "tq4"), ("tq8", "tq4"), ("tq1", "tq5")),
        *(("tq4-g32", "tq4-g32"), ("tq4-g16", "tq6"), ("tq3", "tq4-g32")),
        *(("tq4-qr", "tq4"), ("tq4", "tq4-none"), ("tq4-none", "tq4-qr")),
        *((f"tcq{b}-l8", f"tcq{b}-l8") for b in (1, 2, 3, 4)),
        *(("tcq4-l8", "tcq3-l8"), ("tq4", "tcq2-l8"), ("tcq3-l8", "tq3")),
    ],
)
def test_every_width_group_and_rotation_of_keys_and_values(key_spec, value_spec):
    check(*case(key_spec, value_spec))


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("exact_blocks", [0, 1, 2])
def test_any_number_of_packed_blocks_and_exact_tokens(block, exact_blocks):
    exact = exact_blocks * block
    for length in (1, exact + 1, exact + block, exact + 2 * block - 1, exact + 2 * block + 1):
        check(*case(lengths=(length,), block=block, exact=exact))


@pytest.mark.parametrize("length", [1, 31, 32, 33, 127, 128, 160, 263])
def test_tails_without_a_packed_block(length):
    check(*case(lengths=(length,), block=128, exact=128, first_slot=0))


def test_no_key_gives_zeros():
    queries, stored, options = case(lengths=(1,))
    stored = replace(stored, lengths=(0,))
    assert not mx.any(decode.decode_attention(queries, stored, **options))


def test_packed_blocks_alone_where_the_mask_hides_the_tail():
    queries, stored, options = case()
    check(queries, stored, options | {"mask": mx.arange(150) < 40})


@both_layouts
@pytest.mark.parametrize("repeats, L", [(1, 1), (3, 1), (8, 2), (5, 3), (1, 8), (16, 1)])
def test_query_heads_and_tokens_fill_blocks_in_any_number(repeats, L):
    check(*case(repeats=repeats, L=L, kv_heads=2))


@pytest.mark.parametrize("length", range(192, 200))
def test_tokens_on_both_sides_of_a_blocks_edge_have_limits_of_their_own(length):
    check(*case(lengths=(length,), L=8, repeats=2))
    check(*case(lengths=(length,), L=8, repeats=2, exact=0, mask=None))


@pytest.mark.parametrize("first_slot", [0, 128])
def test_a_tail_that_begins_earlier_or_later_than_the_exact_tokens(first_slot):
    check(*case(first_slot=first_slot, L=3))


@pytest.mark.parametrize("slabs", [1, 2, 3])
def test_blocks_lie_anywhere_in_several_slabs(slabs):
    check(*case(lengths=(400, 330), slabs=slabs, kv_heads=2))


def test_sequences_of_very_different_lengths():
    check(*case(lengths=(700, 3, 70, 129), L=2, slabs=2))


def test_ids_of_high_slabs_and_rows():
    queries, stored, options = case(lengths=(300,))
    empty = mx.zeros((1, stored.layout.words), dtype=mx.uint32)
    tables = tuple(tuple(15 << ROW_BITS | n for n in table) for table in stored.tables)
    moved = replace(stored, slabs=(*[empty] * 15, stored.slabs[0]), tables=tables)
    got = check(queries, moved, options)
    assert distance(got, decode.decode_attention(queries, stored, **options)) == 0


@pytest.mark.parametrize("window", [1, 20, 70, 100, 500])
def test_sliding_window(window):
    check(*case(lengths=(150, 200), L=3, window=window))


@pytest.mark.parametrize("shape", [(210,), (2, 200), (2, 1, 1, 210), (1, 8, 2, 200)])
def test_array_masks_broadcast_bool_or_additive(shape):
    queries, stored, options = case(lengths=(200, 150), L=2)
    noise = normal(*shape, seed=9)
    check(queries, stored, options | {"mask": noise > 0})
    check(queries, stored, options | {"mask": noise.astype(mx.float16)})
    check(queries, stored, options | {"mask": mx.where(noise > 0, noise, -mx.inf)})


def test_a_mask_that_hides_everything_gives_zeros():
    queries, stored, options = case()
    hidden = options | {"mask": mx.zeros((1, 150), dtype=mx.bool_)}
    assert not mx.any(decode.decode_attention(queries, stored, **hidden))


@pytest.mark.parametrize("value_spec", ["tq4", "tq4-none"])
def test_sinks_take_part_in_the_softmax(value_spec):
    check(*case("tq4", value_spec, L=2, sinks=2 * normal(8, seed=5)))


@pytest.mark.parametrize("keys", [16, 320, 2000])
@pytest.mark.parametrize("slabs", [1, 3])
def test_splits_of_any_size_merge_into_the_same_answer(keys, slabs, monkeypatch):
    monkeypatch.setattr(decode, "KEYS_PER_BLOCK", keys)
    monkeypatch.setattr(decode, "_division", decode._division.__wrapped__)
    check(*case(lengths=(1100, 210), slabs=slabs))
    check(*case("tcq2-l8", "tq3", lengths=(700,), slabs=slabs, block=128, exact=128, window=500))


@pytest.mark.parametrize("query_type", [mx.float16, mx.float32])
@pytest.mark.parametrize("tail_type", [mx.float16, mx.float32])
@pytest.mark.parametrize("specs", [("tq4", "tq4"), ("tq4-qr", "tq4-none")])
def test_queries_and_tails_of_any_type(query_type, tail_type, specs):
    queries, stored, options = case(*specs, dtype=tail_type)
    queries = queries.astype(query_type)
    got = decode.decode_attention(queries, stored, **options)
    assert got.dtype == query_type
    assert distance(got, reference(queries, stored, **options)) < 1e-3


def test_exact_keys_are_exact():
    queries, stored, options = case(lengths=(120,), block=128, exact=128)
    got = decode.decode_attention(queries, stored, **options)
    assert distance(got, reference(queries, stored, **options)) < 1e-6


def test_the_plain_twin_agrees():
    queries, stored, options = case("tq4", "tq3", lengths=(199, 70), L=8, slabs=2, kv_heads=2)
    got = decode.decode_attention(queries, stored, **options)
    # Kernels do not read what stands behind a sequence; the twin does, and gives it no weight.
    tails = (mx.nan_to_num(x, nan=1e4) for x in (stored.tail_keys, stored.tail_values))
    stored = replace(stored, **dict(zip(("tail_keys", "tail_values"), tails, strict=True)))
    assert distance(got, tiled_attention(queries, stored, **options)) < TOLERANCE


def test_a_table_is_made_once_while_it_stays_the_same():
    table, longer = tuple(range(8)), tuple(range(9))
    first, again, other = (
        arguments.table_of_blocks(arguments.SameObject(ids)) for ids in (table, table, longer)
    )
    assert again is first and first.shape == (1, 8)
    assert other.shape == (1, 16) and other[0, :9].tolist() == list(longer)


@pytest.mark.parametrize("spec", ["tq4", "tq4-qr"])
def test_both_launches_can_be_traced_as_one_step(spec, monkeypatch):
    def filled(self, inputs, *, outputs, **how):
        return [inputs[-1].sum().astype(dtype) * mx.ones(shape, dtype) for shape, dtype in outputs]

    queries, stored, options = case(spec, spec)
    monkeypatch.setattr(Program, "__call__", filled)
    mx.enable_compile()
    mx.eval(decode.decode_attention(queries, stored, **options))


@pytest.mark.parametrize("lengths", [(131072,), (131072,) * 8, (100,), (0, 0), (128, 131072)])
@pytest.mark.parametrize("repeats", [1, 2, 8, 64])
def test_the_work_is_divided_among_blocks_that_run_side_by_side(lengths, repeats):
    share, splits = decode._division(lengths, repeats, 9)
    blocks = sum(-(-n // share) for n in lengths) * repeats
    assert share % decode.TILE == 0 and share * splits >= max(lengths)
    assert blocks <= max(decode.BLOCKS, len(lengths) * repeats)
    assert splits + 9 <= decode.MERGERS
