"""The search of tiles on a GPU, compiled as C++, against the search that numba compiles."""

from __future__ import annotations

import numpy as np
import pytest

from attention import cpp_kernels
from tqstack.attention.kernels.program import Program
from tqstack.weights.codes import make_code
from tqstack.weights.kernels import search

pytestmark = pytest.mark.skipif(not cpp_kernels.COMPILER, reason="the C++ dialect needs g++")


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_kernel_finds_the_codes_that_the_cpu_finds(bits, monkeypatch):
    monkeypatch.setattr(Program, "__call__", cpp_kernels.run)
    code = make_code("trellis", bits)
    values = np.random.default_rng(bits).standard_normal((2, 256)).astype(np.float32)
    codes, levels = code.of_states(search.states(code, values))
    wanted, best = code.encode(values)
    missed, least = np.square(levels - values).sum(1), np.square(best - values).sum(1)
    np.testing.assert_allclose(missed, least, rtol=2e-3)  # equal but for ties
    assert (codes == wanted).mean() > 0.9
