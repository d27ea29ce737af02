"""The kernels of compressed weights, as C++ and run on the CPU, against plain operations."""

from __future__ import annotations

import mlx.core as mx
import pytest

from attention import cpp_kernels
from attention.cpp_kernels import both_layouts, in_cpp  # noqa: F401
from tqstack.attention.kernels import trust
from tqstack.attention.kernels.trust import distance
from tqstack.weights.codes import make_code
from tqstack.weights.kernels import products, rotate, rows, twins

pytestmark = pytest.mark.skipif(not cpp_kernels.COMPILER, reason="the C++ dialect needs g++")
CODES = [make_code(name, bits) for name in ("trellis", "lloyd") for bits in (2, 3, 4)]
every_code = pytest.mark.parametrize("code", CODES, ids=str)
TRELLIS = make_code("trellis", 3)


@pytest.fixture
def on_cuda(monkeypatch):
    """Kernels are chosen as with a GPU of that kind."""
    for module in (products, trust):
        monkeypatch.setattr(module, "gpu_dialect", lambda: "cuda")


def inputs(*shape, seed=1):
    return rotate.rotated(trust.random(*shape, seed=seed).astype(mx.float16))


@pytest.mark.parametrize("block", [64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384])
def test_rotation_by_every_power_of_two(block):
    assert rotate._error(block, "as they are", mx.float16) < 5e-4


@pytest.mark.parametrize("block", [96, 192, 384, 768, 1536, 3072, 6144, 12288])
def test_rotation_by_every_twelve_times_a_power_of_two(block):
    assert rotate._error(block, "as they are", mx.float16) < 5e-4


@pytest.mark.parametrize("kind", ["activated", "answers"])
@pytest.mark.parametrize("block", [64, 192, 2048, 12288])
def test_rotation_of_gated_values(block, kind):
    assert rotate._error(block, kind, mx.float16) < 5e-4


def test_halves_of_any_size_of_inputs_keep_their_digits(on_cuda):
    x = mx.array([[0.0], [1e-15], [1.0], [1e15]]) * trust.random(4, 384, seed=0)
    x[2, 7] = 1e4
    got = twins.restored(rotate.rotated(x))
    want = rotate.rotate(x)
    assert mx.array_equal(got[0], mx.zeros(384))
    assert all(distance(a, b) < 5e-4 for a, b in zip(got[1:], want[1:], strict=True))


@every_code
@pytest.mark.parametrize("fragments", [1, 2, 4, None])
@both_layouts
def test_products_of_every_code(code, fragments):
    assert products._product_error(code, fragments, mx.float16) < 5e-4


@every_code
@pytest.mark.parametrize("kind", ["pairs", "sorted"])
@both_layouts
def test_experts_of_every_code(code, kind):
    assert products._expert_error(code, kind, mx.float16) < 5e-4


@pytest.mark.parametrize("count", [1, 3, 8, 9, 16, 17, 64, 130])
def test_any_number_of_rows(count, on_cuda):
    x, packed = inputs(count, 384), twins.random_weights((3,), 384, TRELLIS)
    got = products.product(x, *packed, TRELLIS)
    assert got.shape == (count, 48)
    assert distance(got, twins.product(x, *packed, TRELLIS)) < 5e-4


@pytest.mark.parametrize("outputs, width", [(16, 64), (48, 2880), (8208, 96), (528, 640)])
@pytest.mark.parametrize("count", [2, 70])
def test_any_shape_that_has_tiles(outputs, width, count, on_cuda):
    x, packed = inputs(count, width), twins.random_weights((outputs // 16,), width, TRELLIS)
    got = products.product(x, *packed, TRELLIS)
    assert distance(got, twins.product(x, *packed, TRELLIS)) < 5e-4


@pytest.mark.parametrize("shared", [True, False])
def test_experts_of_few_tokens(shared, on_cuda):
    packed = twins.random_weights((7, 3), 640, TRELLIS)
    indices = mx.array([[6, 0, 3], [0, 1, 2], [5, 5, 4], [1, 2, 6]])
    x = inputs(4, 1 if shared else 3, 1, 640)
    got = products.expert_product(x, indices, *packed, TRELLIS)
    assert got.shape == (4, 3, 1, 48)
    assert distance(got, twins.expert_product(x, *packed, TRELLIS, indices)) < 5e-4


@pytest.mark.parametrize(
    "counts", [[1], [64, 64], [0, 200, 0, 1], [5, 60, 3, 70, 1, 1], [1] * 70, [0, 0, 7]]
)
def test_any_number_of_rows_for_each_expert(counts, on_cuda):
    packed = twins.random_weights((len(counts), 5), 192, TRELLIS)
    indices = mx.array([e for e, count in enumerate(counts) for _ in range(count)])
    x = inputs(indices.size, 1, 192)
    got = products.expert_product(x, indices, *packed, TRELLIS, sorted_indices=True)
    assert got.shape == (indices.size, 1, 80)
    assert distance(got, twins.expert_product(x, *packed, TRELLIS, indices)) < 5e-4


@every_code
@pytest.mark.parametrize("block", [64, 192, 2048])
def test_rows_as_they_were_before_the_rotation(code, block):
    assert rows._error(code, block, mx.float16) < 5e-4
