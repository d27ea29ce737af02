from __future__ import annotations

import numpy as np
import pytest

from tqstack.turboquant.codebook import boundaries, lloyd_max

# Max, "Quantizing for minimum distortion" (1960), table I: outputs for the standard normal.
MAX_1960 = {
    1: [0.7980],
    2: [0.4528, 1.510],
    3: [0.2451, 0.7560, 1.344, 2.152],
    4: [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733],
}


@pytest.mark.parametrize("bits", MAX_1960)
def test_gaussian_codebooks_are_those_of_max(bits):
    positive = lloyd_max(bits)[1 << (bits - 1) :]
    np.testing.assert_allclose(positive, MAX_1960[bits], rtol=1e-3)


@pytest.mark.parametrize("dim", [8, 64, 256, None])
@pytest.mark.parametrize("bits", range(1, 9))
def test_each_level_is_the_mean_of_its_cell(bits, dim):
    rng = np.random.default_rng(bits)
    if dim is None:
        samples = rng.standard_normal(400_000)
    else:
        vectors = rng.standard_normal((400_000 // dim, dim))
        samples = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).ravel() * dim**0.5
    levels = lloyd_max(bits, dim)
    cells = np.searchsorted(boundaries(levels), samples)
    count = np.bincount(cells, minlength=1 << bits)
    mean = np.bincount(cells, samples, minlength=1 << bits) / np.maximum(count, 1)
    width = np.gradient(levels)
    frequent = count > 200
    assert frequent.sum() >= (1 << bits) * 0.8
    deviation = np.abs(mean - levels)[frequent] / (width / np.sqrt(np.maximum(count, 1)))[frequent]
    assert deviation.max() < 4.5


def test_the_codebook_tends_to_the_gaussian_one():
    gaps = [np.abs(lloyd_max(4, dim) - lloyd_max(4)).max() for dim in (16, 64, 256, 4096)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 2e-3


@pytest.mark.parametrize("bits", [0, 9])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits is {bits}"):
        lloyd_max(bits)
