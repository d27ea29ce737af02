"""Errors of the codecs against the paper's figures (Zandieh et al., arXiv 2504.19874)."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from tqstack.turboquant import make_codec, outlier_spec

PAPER_MSE = {1: 0.3634, 2: 0.1175, 3: 0.0345, 4: 0.0095}


def unit_vectors(count: int, dim: int, seed: int) -> mx.array:
    x = np.random.default_rng(seed).standard_normal((count, dim))
    return mx.array((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32))


def squared_error(spec: str, x: mx.array) -> float:
    codec = make_codec(spec, x.shape[-1])
    error = codec.decode(codec.encode(x)) - codec.rotate(x)
    return (mx.square(error).sum() / mx.square(x).sum()).item()


@pytest.mark.parametrize("rotation", ["", "-qr"])
@pytest.mark.parametrize("bits", PAPER_MSE)
def test_distortion_is_that_of_the_paper(bits, rotation):
    error = squared_error(f"tq{bits}{rotation}-raw", unit_vectors(8000, 256, seed=bits))
    assert error == pytest.approx(PAPER_MSE[bits], rel=0.01)


@pytest.mark.parametrize("dim", [64, 80, 112, 576])
@pytest.mark.parametrize("spec", ["tq4", "tq3"])
def test_distortion_holds_for_the_worst_inputs_of_every_dimension(spec, dim):
    """Vectors of one entry or of few steps, which a rotation that mixes badly would not spread."""
    one_hot = mx.eye(dim)
    stripes = mx.where((mx.arange(dim) // mx.arange(1, 9)[:, None]) % 2, 1.0, -1.0)
    error = squared_error(spec, mx.concatenate([one_hot, stripes / dim**0.5]))
    assert error < PAPER_MSE[int(spec[2])] * 1.3


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_corrected_scales_keep_the_norm(bits):
    x = unit_vectors(500, 256, seed=3) * 7.5
    codec = make_codec(f"tq{bits}", 256)
    norms = mx.linalg.norm(codec.decode(codec.encode(x)), axis=-1)
    np.testing.assert_allclose(np.array(norms), 7.5, rtol=6e-4)  # float16 rounding


def test_half_a_bit_lands_between_its_neighbours():
    x = unit_vectors(2000, 128, seed=4)
    low, half, high = (squared_error(spec, x) for spec in ("tq3", "tq3.5", "tq4"))
    assert half == pytest.approx((low + high) / 2, rel=0.02)


def test_outlier_channels_get_the_extra_bit_where_it_counts():
    energy = np.where(np.arange(128) % 4 == 0, 100.0, 1.0)
    x = unit_vectors(2000, 128, seed=5) * mx.array(np.sqrt(energy).astype(np.float32))
    assert squared_error(outlier_spec(2.25, energy), x) < 0.5 * squared_error("tq2.25", x)


def product_errors(bits: int, close: bool) -> np.ndarray:
    """(seeds, pairs) errors of estimated inner products of unit vectors, independent or close."""
    errors = []
    for seed in range(24):
        codec = make_codec(f"prod{bits}-s{seed}", 256)
        keys, queries = unit_vectors(800, 256, 100 + seed), unit_vectors(800, 256, 200 + seed)
        if close:
            queries = (queries + keys) / mx.linalg.norm(queries + keys, axis=-1, keepdims=True)
        estimate = (codec.rotate(queries) * codec.decode(codec.encode(keys))).sum(-1)
        errors.append(np.array(estimate - (queries * keys).sum(-1)))
    return np.stack(errors)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_algorithm_2_is_unbiased(bits):
    """To three standard errors, and for close pairs, whose product a biased code shrinks."""
    means = product_errors(bits, close=True).mean(axis=1)
    assert abs(means.mean()) < 3 * means.std(ddof=1) / len(means) ** 0.5


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_algorithm_2_has_the_variance_of_the_paper(bits):
    residual = {0: 1.0, **PAPER_MSE}[bits - 1]
    variance = product_errors(bits, close=False).var()
    assert variance == pytest.approx(np.pi / 2 * residual / 256, rel=0.05)
