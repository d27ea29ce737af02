"""Tiles, streams and codes of weights."""

from __future__ import annotations

import hashlib

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tqstack.weights import rotation, tiles
from tqstack.weights.codes import BITS, NAMES, SIGN, make_code
from tqstack.weights.encode import Calibration, encode
from tqstack.weights.layers import RESIDUAL_SEED

CODES = [(name, bits) for name in NAMES for bits in BITS]
# Squared errors of unit-variance weights: the limit 4^-bits, and what each code may reach.
OVER_LIMIT = {"lloyd": {2: 1.95, 3: 2.3, 4: 2.55}, "trellis": {2: 1.18, 3: 1.24, 4: 1.29}}


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def decoded(planes: dict[str, mx.array], code, seed: int = 0) -> np.ndarray:
    levels = code.decode(planes["weight"]) * planes["scales"].astype(mx.float32)[:, None]
    return np.array(rotation.unrotate(levels, seed))


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Relative, of a row in the mean."""
    return float(np.mean(np.square(found - wanted).sum(1) / np.square(wanted).sum(1)))


def test_lane_l_owns_the_values_of_a_matrix_products_left_factor():
    """Rows l / 4 and l / 4 + 8, columns 2 (l % 4) and 2 (l % 4) + 8, and their neighbours."""
    tile = np.arange(256).reshape(16, 16)
    of_lane = tiles.to_tiles(tile)[0, 0].reshape(32, 8)
    for lane in (0, 1, 5, 31):
        row, column = lane // 4, 2 * (lane % 4)
        expected = [
            tile[r, c + e] for c in (column, column + 8) for r in (row, row + 8) for e in (0, 1)
        ]
        assert of_lane[lane].tolist() == expected


def test_tiles_of_a_matrix_give_the_matrix():
    matrix = gaussian(48, 80)
    assert np.array_equal(tiles.from_tiles(tiles.to_tiles(matrix)), matrix)
    assert np.array_equal(np.array(tiles.from_tiles(mx.array(tiles.to_tiles(matrix)))), matrix)


@given(seed=st.integers(0, 2**32 - 1), case=st.sampled_from([*CODES, ("sign", 1)]))
@settings(deadline=None, max_examples=20)
def test_each_weight_decodes_from_its_window_of_the_circular_stream(seed, case):
    code = SIGN if case[0] == "sign" else make_code(*case)
    words = np.random.default_rng(seed).integers(0, 2**32, (3, code.words), dtype=np.uint32)
    circle = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    where = (np.arange(256)[:, None] * code.bits + np.arange(code.window)) % (256 * code.bits)
    expected = (circle[:, where].astype(int) << np.arange(code.window)).sum(-1)
    found = tiles.windows(mx.array(words), code.bits, code.window)
    assert np.array_equal(np.array(found), expected)


@pytest.mark.parametrize(("name", "bits"), CODES)
def test_codes_decode_to_the_levels_that_they_were_chosen_for(name, bits):
    code = make_code(name, bits)
    values = gaussian(40, 256, seed=bits)
    codes, levels = code.encode(values)
    words = mx.array(tiles.packed(codes, bits))
    found = mx.array(code.levels)[tiles.windows(words, bits, code.window)]
    assert np.array_equal(np.array(found), levels)


@pytest.mark.parametrize(("name", "bits"), CODES)
def test_the_squared_error_is_near_the_limit_of_its_rate(name, bits):
    matrix = gaussian(256, 512, seed=1) * np.exp(gaussian(256, 1, seed=2))
    code = make_code(name, bits)
    found = decoded(encode(mx.array(matrix), code), code)
    assert 1 < error(found, matrix) * 4**bits < OVER_LIMIT[name][bits]


def test_outliers_of_a_row_cost_no_more_than_others():
    """Rotated, they are spread over a block; as they are, they would take the row's scale."""
    matrix = gaussian(64, 1024, seed=3)
    plain = error(decoded(encode(mx.array(matrix), code := make_code("trellis", 3)), code), matrix)
    matrix[:, [5, 700]] *= 40
    found = error(decoded(encode(mx.array(matrix), code), code), matrix)
    assert found < 1.15 * plain


def test_a_residuals_signs_more_than_halve_the_squared_error():
    matrix, code = gaussian(64, 512, seed=4), make_code("lloyd", 3)
    planes = encode(mx.array(matrix), code, residual=True)
    found = decoded(planes, code)
    signs = {name: planes[f"residual.{name}"] for name in ("weight", "scales")}
    assert error(found + decoded(signs, SIGN, RESIDUAL_SEED), matrix) < 0.5 * error(found, matrix)


def test_a_hessian_keeps_the_outputs_of_inputs_like_its_own():
    rng = np.random.default_rng(5)
    inputs = gaussian(2000, 256, seed=6) @ (
        gaussian(256, 256, seed=7) * np.exp(-np.arange(256) / 40)[:, None]
    ).astype(np.float32)
    matrix, code = rng.standard_normal((64, 256)).astype(np.float32), make_code("trellis", 2)
    hessian = inputs.T @ inputs / len(inputs)

    def missed(planes):
        return np.square(inputs @ (decoded(planes, code) - matrix).T).mean()

    plain, calibrated = (
        encode(mx.array(matrix), code),
        encode(mx.array(matrix), code, calibration=Calibration.of(hessian)),
    )
    assert missed(calibrated) < 0.6 * missed(plain)


def test_rows_of_zeros_and_huge_rows_stay_finite():
    matrix = gaussian(32, 64, seed=8)
    matrix[3], matrix[7] = 0, matrix[7] * 1e9
    found = decoded(encode(mx.array(matrix), code := make_code("trellis", 4)), code)
    assert np.isfinite(found).all() and not found[3].any()


@pytest.mark.parametrize(
    ("width", "block"),
    [
        (64, 64),
        (384, 384),
        (2880, 192),
        (5120, 1024),
        (17408, 1024),
        (2048, 2048),
        (48, None),
        (100, None),
    ],
)
def test_blocks_are_the_largest_hadamard_sizes_that_divide_a_width(width, block):
    assert rotation.block_size(width) == block


@pytest.mark.parametrize("width", [64, 384, 2880])
def test_a_rotation_keeps_inner_products_and_is_undone(width):
    x, y = mx.array(gaussian(3, width)), mx.array(gaussian(3, width, seed=1))
    rotated = rotation.rotate(x) @ rotation.rotate(y).T
    assert mx.allclose(rotated, x @ y.T, atol=1e-3)
    assert mx.allclose(rotation.unrotate(rotation.rotate(x, 3), 3), x, atol=1e-5)


def test_signs_are_the_same_for_ever():
    """Stored models depend on them."""
    first = "".join("+" if sign > 0 else "-" for sign in rotation.signs(32).tolist())
    assert first == "-++-+++-+-+-----+-+----+--++---+"
    assert not mx.array_equal(rotation.signs(64), rotation.signs(64, seed=1))


@pytest.mark.parametrize(
    ("bits", "digest"), [(2, "d6e0c1c2736ceae1"), (3, "f98866d1119db9d6"), (4, "de2504de660145de")]
)
def test_levels_of_the_trellis_are_the_same_for_ever(bits, digest):
    """Stored models depend on them."""
    levels = make_code("trellis", bits).levels.astype(np.float16)
    assert hashlib.sha256(levels.tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize(("name", "bits"), [("trellis", 5), ("best", 3), ("lloyd", 1)])
def test_a_code_that_does_not_exist_is_refused_with_those_that_do(name, bits):
    with pytest.raises(ValueError, match=r"trellis or lloyd|2, 3, 4"):
        make_code(name, bits)
