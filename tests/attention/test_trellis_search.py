"""The body of the GPU's trellis search, compiled as C++, against the search in numpy."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from attention import cpp_kernels
from tqstack.attention.kernels import encoding, trellis_search
from tqstack.attention.kernels.program import Program
from tqstack.attention.kernels.trust import TOLERANCE
from tqstack.turboquant import make_codec

pytestmark = pytest.mark.skipif(not cpp_kernels.COMPILER, reason="the C++ dialect needs g++")


@pytest.fixture(autouse=True)
def in_cpp(monkeypatch):
    monkeypatch.setattr(Program, "__call__", cpp_kernels.run)


def vectors(*shape: int, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


@pytest.mark.parametrize(("bits", "dim"), [(4, 64), (3, 64), (2, 64), (1, 64), (4, 24), (3, 80)])
def test_the_kernel_finds_the_codes_that_the_cpu_finds(bits, dim):
    codec = make_codec(f"tcq{bits}-l8", dim)
    x = vectors(2, 3, dim, seed=bits)
    stream, scales = trellis_search.encode(codec, x)
    expected_stream, expected_scales = codec.encode(x)
    assert mx.array_equal(stream, expected_stream)
    np.testing.assert_allclose(np.array(scales), np.array(expected_scales), rtol=1e-3)


def test_zeros_and_bad_vectors_come_out_as_zeros():
    codec = make_codec("tcq2-l8", 64)
    x = np.array(vectors(3, 64, seed=5))
    x[0], x[1, 7] = 0, np.nan
    decoded = np.array(codec.decode(trellis_search.encode(codec, mx.array(x))))
    assert not decoded[:2].any() and decoded[2].any()


def test_a_wrong_search_is_noticed(monkeypatch):
    codec = make_codec("tcq4-l8", 64)
    assert abs(encoding._search_error(codec)) < TOLERANCE
    right = trellis_search._search

    def wrong(codec, y):
        codes, reach = right(codec, y)
        return codes ^ 1, reach

    monkeypatch.setattr(trellis_search, "_search", wrong)
    assert encoding._search_error(codec) > TOLERANCE
