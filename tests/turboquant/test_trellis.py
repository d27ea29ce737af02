from __future__ import annotations

from itertools import product

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tqstack.turboquant import make_codec
from tqstack.turboquant.trellis import BITS, WINDOWS, trained_codebook
from tqstack.turboquant.trellis_training import train_codebook
from tqstack.turboquant.viterbi import best_path, tail_biting_path

SPECS = [(bits, window) for bits in BITS for window in WINDOWS]
RATE_DISTORTION = {1: 0.25, 2: 0.0625, 3: 0.015625, 4: 0.00390625}
LLOYD_MAX = {1: 0.3634, 2: 0.1175, 3: 0.0345, 4: 0.0095}


def vectors(count: int, dim: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((count, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def coded(spec: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rotated and decoded vectors."""
    codec = make_codec(spec, x.shape[-1])
    return np.array(codec.rotate(mx.array(x))), np.array(codec.decode(codec.encode(mx.array(x))))


@given(seed=st.integers(0, 2**32 - 1), bits=st.integers(1, 2))
@settings(deadline=None, max_examples=30)
def test_the_path_is_the_best_of_all_paths(seed, bits):
    rng = np.random.default_rng(seed)
    codebook = rng.standard_normal(16).astype(np.float32)
    x = rng.standard_normal((4, 3)).astype(np.float32)
    found = codebook[best_path(x, codebook, bits)]
    errors = []
    for state, *inputs in product(range(16), *[range(1 << bits)] * 3):
        path = [state]
        for new in inputs:
            path.append(path[-1] >> bits | new << (4 - bits))
        errors.append(((x - codebook[path][:, None]) ** 2).sum(0))
    np.testing.assert_allclose(((x - found) ** 2).sum(0), np.min(errors, axis=0), rtol=1e-4)


@given(seed=st.integers(0, 2**32 - 1), case=st.sampled_from(SPECS))
@settings(deadline=None, max_examples=15)
def test_each_state_shifts_into_the_next_and_the_last_into_the_first(seed, case):
    bits, window = case
    x = np.random.default_rng(seed).standard_normal((64, 5)).astype(np.float32)
    path = tail_biting_path(x, trained_codebook(bits, window), bits)
    assert np.array_equal(path >> bits, np.roll(path, -1, axis=0) % (1 << (window - bits)))


@pytest.mark.parametrize("dim", [64, 80, 256])
@pytest.mark.parametrize(("bits", "window"), SPECS)
def test_each_value_decodes_from_its_own_window_of_the_circular_stream(bits, window, dim):
    codec = make_codec(f"tcq{bits}-l{window}", dim)
    planes = stream, scales = codec.encode(mx.array(vectors(6, dim)))
    octets = np.array(stream).view(np.uint8).reshape(6, -1)
    circle = np.unpackbits(octets, axis=-1, bitorder="little")
    where = (np.arange(dim)[:, None] * bits + np.arange(window)) % (dim * bits)
    states = (circle[:, where].astype(int) << np.arange(window)).sum(-1)
    expected = np.array(scales, dtype=np.float32) * trained_codebook(bits, window)[states]
    assert np.array_equal(np.array(codec.decode(planes)), expected)


@pytest.mark.parametrize(("bits", "window"), SPECS)
def test_squared_error_is_far_below_lloyd_max_and_above_the_limit(bits, window):
    """At the best scale for each vector, which leaves 1 - cos^2."""
    x, decoded = coded(f"tcq{bits}-l{window}", vectors(1000, 256, seed=7))
    error = 1 - np.mean((x * decoded).sum(-1) ** 2 / np.square(decoded).sum(-1))
    saved = {1: 0.22, 2: 0.34, 3: 0.38, 4: 0.41}[bits]
    assert RATE_DISTORTION[bits] < error < LLOYD_MAX[bits] * (1 - saved)


@pytest.mark.parametrize(("bits", "window"), SPECS)
def test_decoded_vectors_reach_as_far_along_the_original_as_it_does(bits, window):
    x, decoded = coded(f"tcq{bits}-l{window}", 3.0 * vectors(200, 128, seed=8))
    np.testing.assert_allclose((x * decoded).sum(-1), 9.0, rtol=6e-4)  # float16 rounding


def test_the_mirrored_vector_is_coded_where_that_is_better():
    codec = make_codec("tcq4-l8", 256)
    x = mx.array(vectors(200, 256))
    _, scales = codec.encode(x)
    mirrored = (np.array(scales) < 0).mean()
    assert 0.3 < mirrored < 0.7
    assert mx.array_equal(codec.encode(-x)[1], -scales)


def test_training_lowers_the_error_of_random_levels():
    x = vectors(256, 256, seed=5).T * 16
    before, after = (train_codebook(2, 6, rounds=rounds).astype(np.float32) for rounds in (0, 12))
    errors = [
        np.square(x - levels[tail_biting_path(x, levels, 2)]).mean() for levels in (before, after)
    ]
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [("tcq8-l8", r"bits is 8.*takes"), ("tcq4-l9", r"window is 9.*takes"), ("tcq4", "unknown")],
)
def test_codes_that_do_not_exist_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        make_codec(spec, 256)
