"""What a CPU has in place of MLX's own layers."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm.models import activations as plain

from tqstack.models.layers import activations

pytestmark = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="what a CPU has")


def test_gates_are_those_of_mlx_lm():
    for shape in ((1, 1, 24), (2, 300, 64)):  # below and above where vector code begins
        gate, x = (3 * mx.random.normal(shape, key=mx.random.key(i)) for i in (0, 1))
        assert mx.allclose(activations.silu(gate), gate * mx.sigmoid(gate), rtol=1e-5, atol=1e-6)
        assert mx.allclose(activations.swiglu(gate, x), plain.swiglu(gate, x), rtol=1e-5, atol=1e-6)
        half = x.astype(mx.bfloat16)
        got, want = (f.precise_swiglu(half, gate, x) for f in (activations, plain))
        assert got.dtype == mx.bfloat16 and mx.allclose(got, want, rtol=1e-2, atol=1e-6)
