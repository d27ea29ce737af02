"""The kernels' own source, compiled as C++ and run on the CPU, against plain operations."""

from __future__ import annotations

import re
from functools import partial

import mlx.core as mx
import pytest
from mlx_lm.models import gated_delta as reference

from attention import cpp_kernels
from tqstack.attention import gated_delta as gd
from tqstack.attention.kernels import choose, decode, encode, recurrence
from tqstack.attention.kernels.program import FOLDER, Program
from tqstack.attention.tiled import tiled_attention
from tqstack.turboquant.codec import make_codec
from tqstack.turboquant.packing import unpack

pytestmark = pytest.mark.skipif(not cpp_kernels.COMPILER, reason="the C++ dialect needs g++")

TOLERANCE = 5e-4  # half of what is promised of the GPU, where products round the same way


@pytest.fixture(autouse=True)
def in_cpp(request, monkeypatch):
    """Programs run in C++, with the matrix fragments of CUDA, or of Metal where a test asks."""
    run = partial(cpp_kernels.run, metal_layout=getattr(request, "param", "") == "metal layout")
    monkeypatch.setattr(Program, "__call__", lambda self, inputs, **how: run(self, inputs, **how))
    mx.disable_compile()  # the C++ programs want real arrays, not traces
    yield
    mx.enable_compile()


both_layouts = pytest.mark.parametrize("in_cpp", ["cuda layout", "metal layout"], indirect=True)


def normal(*shape, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed))


def distance(got, want):
    return (mx.linalg.norm(got - want) / mx.maximum(mx.linalg.norm(want), 1e-9)).item()


def case(
    key_spec="tq4", value_spec="tq4", dim=64, keys=100, B=1, kv_heads=1, repeats=8, L=1, **more
):
    """(arguments, options) of an attention; one call's shapes."""
    key_codec, value_codec = make_codec(key_spec, dim), make_codec(value_spec, dim)
    capacity = keys + 13
    planes = (
        key_codec.encode(normal(B, kv_heads, capacity, dim, seed=1)),
        value_codec.encode(1e-3 * normal(B, kv_heads, capacity, dim, seed=2)),
    )
    queries = 3 * normal(B, kv_heads * repeats, L, dim, seed=3)
    options = {"length": keys, "scale": dim**-0.5, "mask": "causal" if L > 1 else None}
    return (queries, *planes, key_codec, value_codec), options | more


def check(arguments, options):
    got = decode.decode_attention(*arguments, **options)
    want = tiled_attention(*arguments, **options)
    assert got.shape == want.shape and got.dtype == want.dtype
    assert distance(got, want) < TOLERANCE
    return got


@both_layouts
@pytest.mark.parametrize("dim", [64, 80, 96, 112, 128, 192, 256])
def test_every_head_size(dim):
    check(*case(dim=dim, keys=33))


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
    check(*case(key_spec, value_spec, keys=40))


@pytest.mark.parametrize("keys", [1, 15, 16, 17, 63, 65, 129])
def test_any_number_of_keys(keys):
    check(*case(keys=keys))


def test_no_key_gives_zeros():
    arguments, options = case(keys=8)
    assert not mx.any(decode.decode_attention(*arguments, **(options | {"length": 0})))


@both_layouts
@pytest.mark.parametrize("repeats, L", [(1, 1), (3, 1), (8, 2), (5, 3), (1, 8), (16, 1)])
def test_query_heads_and_tokens_fill_blocks_in_any_number(repeats, L):
    check(*case(repeats=repeats, L=L, kv_heads=2, keys=20))


def test_left_padding_and_a_sequence_that_is_all_padding():
    got = check(*case(B=3, keys=90, padding=[0, 33, 90]))
    assert not mx.any(got[2])


@pytest.mark.parametrize("window", [1, 20, 500])
def test_sliding_window(window):
    arguments, options = case(keys=90, L=3)
    rows, columns = mx.arange(87, 90)[:, None], mx.arange(90)
    seen = (columns <= rows) & (columns > rows - window)
    got = decode.decode_attention(*arguments, **options, window=window)
    assert distance(got, tiled_attention(*arguments, **(options | {"mask": seen}))) < TOLERANCE


@pytest.mark.parametrize("shape", [(30,), (2, 30), (2, 1, 1, 30), (1, 8, 2, 30)])
def test_array_masks_broadcast_bool_or_additive(shape):
    arguments, options = case(keys=30, L=2, B=2)
    noise = normal(*shape, seed=9)
    check(arguments, options | {"mask": noise > 0})
    check(arguments, options | {"mask": noise.astype(mx.float16)})
    check(arguments, options | {"mask": mx.where(noise > 0, noise, -mx.inf)})


def test_a_mask_that_hides_everything_gives_zeros():
    arguments, options = case(keys=5)
    hidden = options | {"mask": mx.zeros((1, 5), dtype=mx.bool_)}
    assert not mx.any(decode.decode_attention(*arguments, **hidden))


def test_sinks_take_part_in_the_softmax():
    check(*case(keys=40, L=2, sinks=2 * normal(8, seed=5)))


def test_splits_merge_into_the_same_answer(monkeypatch):
    arguments, options = case(keys=60)
    whole = check(arguments, options)
    monkeypatch.setattr(decode, "KEYS_PER_BLOCK", 16)
    assert distance(check(arguments, options), whole) < TOLERANCE


def test_half_precision_queries_give_half_precision_answers():
    (queries, *rest), options = case(keys=40)
    got = decode.decode_attention(queries.astype(mx.float16), *rest, **options)
    assert got.dtype == mx.float16
    assert distance(got, tiled_attention(queries, *rest, **options)) < 2e-3


@pytest.mark.parametrize("dim", [128, 192, 256])
def test_trellis_codes_of_longer_vectors(dim):
    check(*case("tcq3-l8", "tcq4-l8", dim=dim, keys=33))


def test_bodies_use_no_word_that_metal_reserves():
    reserved = r"\b(thread|device|constant|threadgroup|half|kernel|vertex|fragment|uniform)\b"
    bodies = [path for path in FOLDER.glob("*.h") if not path.name.startswith("dialect_")]
    assert bodies
    for path in bodies:
        code = re.sub(r"//.*", "", path.read_text())
        assert not re.search(reserved, code), path.name


def test_the_kernel_declines_codecs_it_cannot_read():
    whole = make_codec("tq4", 64)
    for other in ("tq3.5", "none"):
        assert not decode.serves(make_codec(other, 64), whole)
        assert not encode.serves(whole, make_codec(other, 64))


@pytest.mark.parametrize(
    "key_spec, value_spec, dim",
    [
        *(("tq4", "tq3", 256), ("tq8-g64", "tq5-raw", 128), ("tq7", "tq2-none", 64)),
        *(("tq1", "tq6-g32", 64), ("tq4", "tq4", 32)),
    ],
)
def test_encoding_gives_the_codes_and_scales_of_the_codec(key_spec, value_spec, dim):
    codecs = make_codec(key_spec, dim), make_codec(value_spec, dim)
    assert encode.serves(*codecs)
    size = mx.exp(5 * normal(2, 3, 5, 1, seed=4))
    arrays = size * normal(2, 3, 5, dim, seed=5), normal(2, 3, 5, dim, seed=6).astype(mx.float16)
    for codec, x, planes in zip(codecs, arrays, encode.encode(*arrays, *codecs), strict=True):
        want = codec.encode(x)
        codes, codes_want = (unpack(p[0], int(codec.bits), dim) for p in (planes, want))
        differ = codes != codes_want
        assert mx.mean(differ).item() < 5e-3  # values next to a boundary
        assert mx.allclose(planes[1], want[1], rtol=2e-3).item()


def test_vectors_that_cannot_be_stored_become_zeros():
    codec = make_codec("tq4", 64)
    x = normal(1, 1, 5, 64)
    x[0, 0, 0, 3], x[0, 0, 1, 3], x[0, 0, 2, 3] = float("nan"), float("inf"), -float("inf")
    x[0, 0, 3] = 0
    (_, scales), _ = encode.encode(x, x, codec, codec)
    assert scales.reshape(-1)[:4].tolist() == [0, 0, 0, 0]
    assert mx.allclose(scales, codec.encode(x)[1], rtol=2e-3).item()


@pytest.mark.parametrize("Dk, Dv, masked", [(64, 24, False), (128, 16, True)])
def test_the_recurrence_of_the_gated_delta_rule(Dk, Dv, masked):
    B, T, Hk, Hv = 2, 37, 1, 2
    q, k = (normal(B, T, Hk, Dk, seed=s) * Dk**-0.5 for s in (1, 2))
    v, a, b = normal(B, T, Hv, Dv, seed=3), normal(B, T, Hv, seed=4), normal(B, T, Hv, seed=5)
    A_log, dt_bias, state = mx.log(mx.array([1.0, 9.0])), mx.ones(2), normal(B, Hv, Dv, Dk, seed=6)
    mask = normal(B, T, seed=7) > 0 if masked else None
    y, new_state = recurrence.recurrence(q, k, v, a, b, A_log, dt_bias, state, mask)
    y_want, state_want = reference.gated_delta_update(q, k, v, a, b, A_log, dt_bias, state, mask)
    if mask is not None:
        y, y_want = (mx.where(mask[..., None, None], x, 0) for x in (y, y_want))
    assert mx.abs(y - y_want).max().item() < 1e-5
    assert mx.abs(new_state - state_want).max().item() < 1e-5


@pytest.fixture
def on_cuda(monkeypatch):
    gd._kernel_agrees.cache_clear()
    monkeypatch.setattr(gd, "backend", lambda: "cuda")
    yield
    gd._kernel_agrees.cache_clear()


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_the_recurrence_serves_layers_on_cuda_unless_it_is_wrong(
    factor, on_cuda, monkeypatch, caplog
):
    right, calls = recurrence.recurrence, []

    def counted(*arguments):
        calls.append(1)
        y, state = right(*arguments)
        return factor * y, state

    monkeypatch.setattr(recurrence, "recurrence", counted)
    q, k = (normal(1, 5, 1, 64, seed=s) * 0.125 for s in (1, 2))
    v, a, b = normal(1, 5, 1, 8, seed=3), normal(1, 5, 1, seed=4), normal(1, 5, 1, seed=5)
    y, _ = gd.gated_delta_update(q, k, v, a, b, mx.zeros(1), mx.ones(1))
    assert len(calls) == (2 if factor == 1 else 1)  # the first is the comparison
    assert ("gated delta kernel is wrong" in caplog.text) == (factor != 1)
    want, _ = reference.gated_delta_update(q, k, v, a, b, mx.zeros(1), mx.ones(1))
    assert mx.abs(y - want).max().item() < 1e-5


@pytest.fixture
def on_gpu(monkeypatch):
    """As if there were a GPU; what was found out about kernels is forgotten on both ends."""
    choose.disagreement.cache_clear()
    monkeypatch.setattr(choose, "backend", lambda: "cuda")
    yield
    choose.disagreement.cache_clear()


def test_a_kernel_that_agrees_is_used(on_gpu):
    codec = make_codec("tq4", 64)
    assert choose.trusted("decode", codec, codec)
    assert choose.trusted("encode", codec, codec)
    arguments, options = case(keys=30)
    assert distance(choose.attention(*arguments, **options), check(arguments, options)) == 0


def test_a_kernel_that_disagrees_is_switched_off_with_a_warning(on_gpu, monkeypatch, caplog):
    right = decode.decode_attention
    monkeypatch.setattr(decode, "decode_attention", lambda *a, **k: 1.01 * right(*a, **k))
    arguments, options = case(keys=30)
    got = choose.attention(*arguments, **options)
    assert distance(got, tiled_attention(*arguments, **options)) == 0
    assert "decode kernel for keys tq4 and values tq4 is wrong by 1.0e-02" in caplog.text
    codecs = arguments[-2:]
    assert choose.report(*codecs) == {
        "encode": None,
        "decode": "is wrong by 1.0e-02, allowed 1e-03",
    }


def test_a_kernel_that_does_not_compile_is_switched_off(on_gpu, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(encode, "encode", broken)
    codec = make_codec("tq4", 64)
    keys = normal(1, 1, 3, 64)
    planes, _ = choose.encode_pair(keys, keys, codec, codec)
    assert distance(codec.decode(planes), codec.decode(codec.encode(keys))) == 0
    assert "does not run: no compiler" in caplog.text


def test_without_a_gpu_no_kernel_is_trusted(monkeypatch):
    monkeypatch.setattr(choose, "backend", lambda: None)
    codec = make_codec("tq4", 64)
    assert not choose.trusted("decode", codec, codec)
    assert choose.report(codec, codec) == {}
