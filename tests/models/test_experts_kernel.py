"""The experts' kernel, compiled as C++ and run on the CPU, against decompressed weights."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.switch_layers import SwitchGLU

from attention import cpp_kernels
from attention.cpp_kernels import in_cpp  # noqa: F401
from tqstack.attention.kernels import trust
from tqstack.models.layers import experts

pytestmark = pytest.mark.skipif(not cpp_kernels.COMPILER, reason="the C++ dialect needs g++")


def normal(*shape, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(mx.float16)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_every_width_and_group(bits, group_size):
    assert experts._error(bits, group_size, mx.float16) < 5e-4


@pytest.mark.parametrize(
    "counts", [[1], [64, 64], [0, 200, 0, 1], [5, 60, 3, 70, 1, 1], [1] * 70, [0, 0, 7]]
)
@pytest.mark.parametrize("outputs", [24, 128, 200])
def test_any_number_of_rows_for_each_expert(counts, outputs):
    indices = mx.array([e for e, count in enumerate(counts) for _ in range(count)])
    packed = mx.quantize(normal(len(counts), outputs, 128, seed=1), 64, 4)
    x = normal(indices.size, 1, 128)
    got = experts.sorted_products(x, indices, *packed, 64, 4)
    want = x @ mx.dequantize(*packed, 64, 4)[indices].swapaxes(-1, -2)
    assert got.shape == want.shape
    assert mx.abs(got - want).max().item() < 0.02 * mx.abs(want).max().item()


@pytest.mark.parametrize("bias", [False, True])
def test_a_prompts_products_go_through_it_on_cuda(bias, monkeypatch):
    layer = SwitchGLU(64, 128, 8, bias=bias)
    nn.quantize(layer, group_size=64, bits=4)
    layer.set_dtype(mx.float16)
    x, chosen = normal(50, 64), mx.random.randint(0, 8, (50, 2)).astype(mx.uint32)
    want, rows = layer(x, chosen), []
    for module in (experts, trust):
        monkeypatch.setattr(module, "gpu_dialect", lambda: "cuda")
    products = experts.sorted_products
    monkeypatch.setattr(
        experts, "sorted_products", lambda x, *rest: rows.append(len(x)) or products(x, *rest)
    )
    experts.install(layer)
    got = layer(x, chosen)
    assert rows[-3:] == [100] * 3
    assert mx.abs(got - want).max().item() < 0.02 * mx.abs(want).max().item()
