"""The kernels' own source, compiled as C++ and run on the CPU, against plain operations."""

from __future__ import annotations

import re

import mlx.core as mx
import pytest

from attention import cpp_kernels
from attention.cpp_kernels import in_cpp  # noqa: F401
from tqstack.attention.blocks import BlockLayout, Stored
from tqstack.attention.kernels import arguments, choose, decode, encode, trust
from tqstack.attention.kernels.encoding import encode_pair
from tqstack.attention.kernels.program import FOLDER, fault
from tqstack.attention.tiled import tiled_attention
from tqstack.turboquant.codec import make_codec
from tqstack.turboquant.packing import unpack

pytestmark = pytest.mark.skipif(not cpp_kernels.COMPILER, reason="the C++ dialect needs g++")

TOLERANCE = 5e-4  # half of what is promised of the GPU, where products round the same way


def normal(*shape, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed))


def distance(got, want):
    return (mx.linalg.norm(got - want) / mx.maximum(mx.linalg.norm(want), 1e-9)).item()


def test_bodies_use_no_word_that_metal_reserves():
    reserved = r"\b(thread|device|constant|threadgroup|half|kernel|vertex|fragment|uniform)\b"
    bodies = FOLDER.parents[1].rglob("*.h")  # of the whole package
    bodies = [path for path in bodies if not path.name.startswith("dialect_")]
    assert bodies
    for path in bodies:
        code = re.sub(r"//.*", "", path.read_text())
        assert not re.search(reserved, code), path.name


def test_the_kernel_declines_codecs_it_cannot_read():
    whole = make_codec("tq4", 64)
    for other in ("tq3.5", "none"):
        assert not arguments.serves(make_codec(other, 64), whole)
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


@pytest.fixture
def on_gpu(monkeypatch):
    """As if there were a GPU about whose kernels nothing is known yet."""
    monkeypatch.setattr(trust, "_found", {})
    monkeypatch.setattr(trust, "gpu_dialect", lambda: "cuda")


def short_queries():
    """(queries, stored, options) of an attention over a block and a tail."""
    codec = make_codec("tq4", 64)
    layout = BlockLayout(codec, codec, 1)
    keys, values = normal(1, 1, 300, 64, seed=1), normal(1, 1, 300, 64, seed=2)
    slab = layout.pack(keys[:, :, :128], values[:, :, :128])
    tails = keys[:, :, 128:], values[:, :, 128:]
    stored = Stored(layout, (slab,), ((0,),), *tails, starts=(128,), lengths=(300,), counts=(2,))
    return normal(1, 8, 2, 64, seed=3), stored, {"scale": 0.125, "mask": "causal"}


def test_a_kernel_that_agrees_is_used(on_gpu):
    codec = make_codec("tq4", 64)
    assert trust.trusted("encode", codec, codec, mx.float32)
    queries, stored, options = short_queries()
    got = choose.attention(queries, stored, **options)
    assert distance(got, decode.decode_attention(queries, stored, **options)) == 0
    assert 0 < distance(got, tiled_attention(queries, stored, **options)) < TOLERANCE
    assert set(trust.report().values()) == {None}


@pytest.mark.parametrize("slabs", [1, 2, 4])
@pytest.mark.parametrize("several, masked, sinks", [(False, None, False), (True, True, True)])
def test_the_check_compares_just_what_runs(slabs, several, masked, sinks, monkeypatch):
    codec = make_codec("tq3", 64)
    variant = BlockLayout(codec, codec, 2), slabs, 4, *2 * (mx.float16,), several, masked, sinks
    assert choose._decode_error(*variant) < trust.TOLERANCE
    right = decode.decode_attention
    monkeypatch.setattr(decode, "decode_attention", lambda *a, **k: 1.01 * right(*a, **k))
    assert choose._decode_error(*variant) > trust.TOLERANCE


def test_a_kernel_that_disagrees_is_switched_off_with_a_warning(on_gpu, monkeypatch, caplog):
    right = decode.decode_attention
    monkeypatch.setattr(decode, "decode_attention", lambda *a, **k: 1.01 * right(*a, **k))
    queries, stored, options = short_queries()
    got = choose.attention(queries, stored, **options)
    assert distance(got, tiled_attention(queries, stored, **options)) == 0
    assert "is wrong by 1.0e-02" in caplog.text and "tq4" in caplog.text
    (reason,) = [why for name, why in trust.report().items() if name.startswith("decode")]
    assert reason == "is wrong by 1.0e-02, allowed 1e-03"


def test_a_kernel_that_does_not_compile_is_switched_off(on_gpu, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(encode, "encode", broken)
    codec = make_codec("tq4", 64)
    keys = normal(1, 1, 3, 64)
    planes, _ = encode_pair(keys, keys, codec, codec)
    assert distance(codec.decode(planes), codec.decode(codec.encode(keys))) == 0
    assert "does not run: no compiler" in caplog.text


def test_what_agreed_is_not_compared_again_at_the_next_start(on_gpu, monkeypatch, caplog):
    codec, other = make_codec("tq4", 64), make_codec("tq3", 64)
    right, compared = trust._checks["encode"], []
    check = lambda *variant: compared.append(variant) or right(*variant)  # noqa: E731
    monkeypatch.setitem(trust._checks, "encode", check)

    def start():
        trust._found.clear()
        compared.clear()
        return trust.trusted("encode", codec, codec, mx.float32)

    assert start() and compared
    assert start() and not compared
    assert trust.trusted("encode", other, other, mx.float32) and compared
    monkeypatch.setattr(trust, "_machine", lambda: "another machine, or other sources")
    assert start() and compared
    trust.forget()
    monkeypatch.setitem(trust._checks, "encode", lambda *_: 1.0)
    assert not start() and not start()
    assert caplog.text.count("is wrong by") == 2
    trust.forget()


def test_without_a_gpu_no_kernel_is_trusted(monkeypatch):
    monkeypatch.setattr(trust, "gpu_dialect", lambda: None)
    codec = make_codec("tq4", 64)
    assert not trust.trusted("encode", codec, codec, mx.float32)


def test_a_result_that_is_no_number_does_not_agree():
    right = mx.ones((4, 4))
    error = trust.beyond_rounding((right * float("nan"),), (right,))
    assert fault("kernel", lambda: error, trust.TOLERANCE)
    assert trust.beyond_rounding((right,), (right,)) == 0
