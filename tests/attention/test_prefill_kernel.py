"""The prefill kernels' own source, compiled as C++ and run on the CPU, against float64."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import mlx.core as mx
import pytest

from attention import cpp_kernels
from attention import test_decode_kernel as decode_kernel
from attention.cpp_kernels import both_layouts, in_cpp  # noqa: F401
from attention.test_decode_kernel import TOLERANCE, case, distance, normal, reference
from tqstack.attention.kernels import prefill
from tqstack.attention.tiled import tiled_attention

pytestmark = pytest.mark.skipif(not cpp_kernels.COMPILER, reason="the C++ dialect needs g++")


@pytest.fixture(autouse=True)
def rows_of_metal(request, monkeypatch):
    """Its blocks of threads have half the rows."""
    parameters = getattr(request.node, "callspec", None)
    if parameters and parameters.params.get("in_cpp") == "metal layout":
        monkeypatch.setattr(prefill, "rows_of_block", lambda: 32)


check = partial(decode_kernel.check, attend=prefill.prefill_attention)


@both_layouts
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_every_head_size(dim):
    check(*case(dim=dim, lengths=(260,), L=9, repeats=4))


@pytest.mark.parametrize(
    "key_spec, value_spec",
    [
        *((f"tq{b}", f"tq{b}") for b in (2, 3, 5, 8)),
        *(("tq4", "tq3"), ("tq8", "tq4"), ("tq4-g32", "tq4-g32"), ("tq3", "tq4-g16")),
        *(("tq4-qr", "tq4"), ("tq4-none", "tq4-qr")),
        *(("tcq4-l8", "tcq3-l8"), ("tq4", "tcq2-l8"), ("tcq1-l8", "tq3")),
    ],
)
def test_every_width_group_and_rotation_of_keys_and_values(key_spec, value_spec):
    check(*case(key_spec, value_spec, lengths=(200,), L=10, repeats=2))


@both_layouts
@pytest.mark.parametrize("repeats, L", [(1, 1), (3, 7), (8, 9), (1, 70), (2, 140)])
def test_query_heads_and_tokens_fill_blocks_in_any_number(repeats, L):
    check(*case(repeats=repeats, L=L, kv_heads=2, lengths=(333,)))


@pytest.mark.parametrize("exact", [0, 64, 128])
@pytest.mark.parametrize("length", [66, 192, 199, 320])
def test_tokens_on_both_sides_of_a_blocks_edge_have_limits_of_their_own(length, exact):
    check(*case(lengths=(length,), L=66, repeats=2, exact=exact))


@pytest.mark.parametrize("mask", ["causal", None])
def test_a_prompt_without_a_packed_block(mask):
    check(*case(lengths=(70,), L=70, repeats=2, exact=128, first_slot=0, mask=mask))


@both_layouts
def test_sequences_of_very_different_lengths_in_several_slabs():
    check(*case(lengths=(700, 20, 130), L=12, slabs=3, kv_heads=2, repeats=2))


@pytest.mark.parametrize("window", [1, 20, 70, 100, 500])
def test_sliding_window(window):
    check(*case(lengths=(350, 300), L=30, repeats=2, window=window))


@pytest.mark.parametrize("shape", [(210,), (2, 200), (2, 1, 1, 210), (1, 8, 10, 200)])
def test_array_masks_broadcast_bool_or_additive(shape):
    shape = tuple(10 if n == 2 and i == len(shape) - 2 else n for i, n in enumerate(shape))
    queries, stored, options = case(lengths=(200, 150), L=10)
    noise = normal(*shape, seed=9)
    check(queries, stored, options | {"mask": noise > 0})
    check(queries, stored, options | {"mask": noise.astype(mx.float16)})
    check(queries, stored, options | {"mask": mx.where(noise > 0, noise, -mx.inf)})


def test_a_mask_that_hides_everything_gives_zeros():
    queries, stored, options = case(L=9)
    hidden = options | {"mask": mx.zeros((1, 150), dtype=mx.bool_)}
    assert not mx.any(prefill.prefill_attention(queries, stored, **hidden))


@pytest.mark.parametrize("value_spec", ["tq4", "tq4-none"])
def test_sinks_take_part_in_the_softmax(value_spec):
    check(*case("tq4", value_spec, L=9, sinks=2 * normal(8, seed=5)))


@both_layouts
@pytest.mark.parametrize("repeats", [1, 8])
def test_spans_and_splits_of_any_size_give_the_same_answer(repeats, monkeypatch):
    monkeypatch.setattr(prefill, "KEYS_PER_BLOCK", 64)
    monkeypatch.setattr(prefill, "_division", prefill._division.__wrapped__)
    queries, stored, options = case(lengths=(900, 500), L=20, repeats=repeats)
    whole = check(queries, stored, options)
    monkeypatch.setattr(prefill, "SPAN_BYTES", 2 * 2 * (64 + 64) * 192)
    assert distance(check(queries, stored, options), whole) < 1e-4  # rounded beside other maxima
    check(queries, stored, options | {"window": 300})


@pytest.mark.parametrize("blocks", [1, 132, 264])
@pytest.mark.parametrize("tokens", [0, 128, 5000, 32768])
def test_few_rows_share_out_the_keys(tokens, blocks):
    share, splits = prefill._division(tokens, blocks)
    assert share % prefill.KEYS == 0 and share * splits >= tokens > share * (splits - 1) - 1
    assert splits * blocks <= 2 * prefill.BLOCKS


def test_padding_of_shorter_prompts_gets_zeros():
    queries, stored, options = case(lengths=(300, 200), L=40, repeats=2)
    ragged = replace(stored, counts=(40, 13), lengths=(300, 173))
    got = prefill.prefill_attention(queries, ragged, **options)
    assert distance(got, tiled_attention(queries, ragged, **options)) < TOLERANCE
    assert not mx.any(got[1, :, 13:])


@pytest.mark.parametrize("query_type", [mx.float16, mx.float32])
@pytest.mark.parametrize("tail_type", [mx.float16, mx.float32])
def test_queries_and_tails_of_any_type_and_unit(query_type, tail_type):
    queries, stored, options = case(dtype=tail_type, L=9)
    for factor in (1e-3, 20.0):
        scaled = (queries * factor).astype(query_type)
        got = prefill.prefill_attention(scaled, stored, **options)
        want = reference(scaled, stored, **options)
        assert got.dtype == query_type
        assert distance(got, want) < 1e-3


def test_the_plain_twin_agrees():
    queries, stored, options = case("tq4", "tq3", lengths=(199, 120), L=31, slabs=2, kv_heads=2)
    got = prefill.prefill_attention(queries, stored, **options)
    assert distance(got, tiled_attention(queries, stored, **options)) < TOLERANCE
