"""Products with panels and gates: what a CPU has in place of MLX's own."""

from __future__ import annotations

import sys

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
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


@pytest.fixture
def paying(monkeypatch):
    """Panels, whatever this machine's BLAS thinks of them."""
    monkeypatch.setattr(products, "pays", lambda: True)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 8, 500])
@pytest.mark.parametrize("outputs", [128, 96, 24])
def test_a_product_with_panels_is_the_product(paying, outputs, rows, bias):
    linear = nn.Linear(72, outputs, bias=bias)
    x, weight = mx.random.normal((rows, 1, 72)), linear.weight
    want = linear(x)
    assert products.install(linear) == (outputs % 16 == 0)
    assert linear(x).shape == want.shape and mx.allclose(linear(x), want, atol=1e-6)
    assert mx.array_equal(linear.weight, weight)
    assert sum(w.nbytes for _, w in tree_flatten(linear.parameters())) == 4 * (
        weight.size + outputs * bias
    )


@pytest.mark.parametrize("rows", [15, 16, 100, products.PIECED, products.PIECED + 1])
def test_rows_in_pieces_and_rows_with_the_whole_matrix_are_the_product(paying, rows):
    linear, x = nn.Linear(1024, 128, bias=False), mx.random.normal((1, rows, 1024))
    assert products.SMALL // (1024 * 64) == 15
    want = linear(x)
    assert products.install(linear) == 1
    assert linear(x).shape == want.shape and mx.allclose(linear(x), want, atol=1e-5)


def test_an_output_head_in_panels_is_the_head_and_looks_tokens_up(paying):
    embedding, tokens = nn.Embedding(128, 24), mx.array([[3, 5], [127, 64]])
    x = mx.random.normal((2, 2, 24))
    want, looked_up = embedding.as_linear(x), embedding(tokens)
    assert products.install(embedding) == 1
    assert mx.allclose(embedding.as_linear(x), want, atol=1e-6)
    assert mx.array_equal(embedding(tokens), looked_up)


def test_an_embedding_beside_a_head_stays(paying):
    model = nn.Module()
    model.embed_tokens, model.lm_head = nn.Embedding(128, 24), nn.Linear(24, 128, bias=False)
    assert products.install(model) == 1 and type(model.embed_tokens) is nn.Embedding


def test_matrices_are_put_in_panels_only_where_that_was_faster(monkeypatch):
    for whole, panels, faster in ((2.0, 1.0, True), (1.0, 0.9, False)):
        products.pays.cache_clear()
        times = [whole, panels] * products.TRIALS
        monkeypatch.setattr(products, "_seconds", lambda _, times=times: times.pop(0))
        assert products.pays() == faster
        assert products.install(nn.Linear(64, 64)) == faster
    products.pays.cache_clear()
    assert products.width_of(mx.zeros((64, 8), mx.bfloat16)) is None
    assert products.width_of(mx.zeros((64, 100_000))) is None  # no panel is small enough
