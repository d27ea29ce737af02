"""Products in parts and gates: what a CPU has in place of MLX's own."""

from __future__ import annotations

import sys

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import activations as plain
from mlx_lm.models import step3p5

from tqstack.models.layers import activations, products

pytestmark = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="what a CPU has")


def test_gates_are_those_of_mlx_lm():
    for shape in ((1, 1, 24), (2, 300, 64)):  # below and above where vector code begins
        gate, x = (3 * mx.random.normal(shape, key=mx.random.key(i)) for i in (0, 1))
        assert mx.allclose(activations.silu(gate), gate * mx.sigmoid(gate), rtol=1e-5, atol=1e-6)
        assert mx.allclose(activations.swiglu(gate, x), plain.swiglu(gate, x), rtol=1e-5, atol=1e-6)
        half = x.astype(mx.bfloat16)
        got, want = (f.precise_swiglu(half, gate, x) for f in (activations, plain))
        assert got.dtype == mx.bfloat16 and mx.allclose(got, want, rtol=1e-2, atol=1e-6)


class Gate(nn.Module):
    def __call__(self, x):
        return nn.silu(x)


def test_gates_of_a_model_are_replaced_and_those_of_others_stay():
    gate, x = (mx.random.normal((2, 300, 64), key=mx.random.key(i)) for i in (0, 1))
    layer, library = Gate(), sys.modules["mlx.nn"]
    silu = library.silu
    assert activations.install(layer) == 1
    assert mx.array_equal(layer(gate), activations.silu(gate))
    assert library.silu is silu
    # Compiled for any shape: it could not have our silu.
    want = mx.minimum(silu(gate), 3.0) * mx.clip(x, -3.0, 3.0)
    assert mx.allclose(step3p5.clamped_swiglu(x, gate, mx.array(3.0)), want, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 8, 9])
def test_a_product_in_parts_is_the_product(rows, bias, monkeypatch):
    monkeypatch.setattr(products, "parts", lambda *_: 4)
    linear = nn.Linear(24, 32, bias=bias)
    x = mx.random.normal((rows, 1, 24))
    want = linear(x)
    assert products.install(linear) == 1
    assert linear(x).shape == want.shape and mx.allclose(linear(x), want, atol=1e-6)


def test_an_output_head_in_parts_is_the_head(monkeypatch):
    monkeypatch.setattr(products, "parts", lambda *_: 8)
    embedding = nn.Embedding(64, 24)
    x = mx.random.normal((2, 2, 24))
    want, looked_up = embedding.as_linear(x), embedding(mx.array([3, 5]))
    assert products.install(embedding) == 1
    assert mx.allclose(embedding.as_linear(x), want, atol=1e-6)
    assert mx.array_equal(embedding(mx.array([3, 5])), looked_up)


def test_a_product_is_divided_only_where_that_was_faster(monkeypatch):
    products.parts.cache_clear()
    for whole, divided, faster in ((2.0, 1.0, True), (1.0, 1.0, False)):
        times = [whole, divided] * 5
        monkeypatch.setattr(products, "_seconds", lambda _, times=times: times.pop(0))
        count = products.parts(4, 1024, 384, mx.float32)
        assert (count > 1) == faster and 1024 % count == 0
        products.parts.cache_clear()
    assert products.parts(1, 8, 8, mx.float32) == 1  # small already
    assert products.parts(4, 1024, 384, mx.bfloat16) == 1
