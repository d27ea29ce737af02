"""Promises that every codec keeps."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tqstack.turboquant import make_codec, outlier_spec

DIMS = (64, 80, 96, 112, 128, 192, 256, 576)
PLAIN = tuple(f"tq{bits}" for bits in range(1, 9))
VARIANTS = ("none", "tq4-g16", "tq3-qr", "tq4-none", "tq4-raw", "tq2-s3", "tq3-g16-qr-raw-s9")
VARIANTS += ("tq3.5", "tq2.5-outliers", "prod1", "prod3", "prod4-s2", "tcq4-l8", "tcq2-l8-s5")
VARIANTS += ("affine4-g64", "affine3-g32-qr")


def spec_for(name: str, dim: int) -> str | None:
    """The spec itself, with outlier channels filled in; None where the dimension cannot have it."""
    if name == "tq2.5-outliers":
        return outlier_spec(2.5, np.arange(dim) % 2)
    if name.startswith("affine"):
        return name if dim % int(name.split("-g")[1].split("-")[0]) == 0 else None
    return name


CASES = [(spec, dim) for name in PLAIN + VARIANTS for dim in DIMS if (spec := spec_for(name, dim))]
SPECS_64 = [spec for spec, dim in CASES if dim == 64]


def vectors(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def same_planes(a, b) -> bool:
    return all(mx.array_equal(x, y) for x, y in zip(a, b, strict=True))


@settings(deadline=None, max_examples=60)
@given(
    case=st.sampled_from(CASES),
    lead=st.lists(st.integers(0, 3), max_size=3),
    dtype=st.sampled_from((mx.float32, mx.float16, mx.bfloat16)),
)
def test_planes_have_the_promised_shapes_and_bytes(case, lead, dtype):
    spec, dim = case
    codec = make_codec(spec, dim)
    planes = codec.encode(vectors(*lead, dim).astype(dtype))
    promised = [((*lead, width), kind) for width, kind in codec.plane_shapes()]
    assert [(plane.shape, plane.dtype) for plane in planes] == promised
    stored = sum(width * kind.size for width, kind in codec.plane_shapes())
    assert stored * 8 == pytest.approx(dim * codec.bits_per_value)
    decoded = codec.decode(planes, dtype)
    assert (decoded.shape, decoded.dtype) == ((*lead, dim), dtype)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_stored_bytes_are_exactly_the_codes_and_a_half_precision_scale(bits, dim):
    planes = make_codec(f"tq{bits}", dim).encode(vectors(5, dim))
    assert sum(plane.nbytes for plane in planes) == 5 * (-(-dim * bits // 8) + 2)


@pytest.mark.parametrize(("spec", "dim"), [case for case in CASES if case[1] in (64, 112, 256)])
def test_the_spec_makes_an_equal_codec(spec, dim):
    x = vectors(4, dim)
    codec = make_codec(spec, dim)
    again = make_codec(codec.spec, dim)
    assert codec.spec == again.spec == spec
    assert same_planes(codec.encode(x), again.encode(x))
    assert mx.array_equal(codec.decode(codec.encode(x)), again.decode(again.encode(x)))


@pytest.mark.parametrize(
    ("spec", "dim"),
    [case for case in CASES if case[0] not in PLAIN[1:] and not case[0].startswith("tcq")],
)
def test_rotation_keeps_inner_products_and_unrotate_inverts_it(spec, dim):
    codec = make_codec(spec, dim)
    matrix = np.array(codec.rotate(mx.eye(dim)))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(dim), atol=5e-6)
    x = vectors(3, dim)
    np.testing.assert_allclose(np.array(codec.unrotate(codec.rotate(x))), np.array(x), atol=1e-5)


@pytest.mark.parametrize("dim", DIMS)
def test_scores_and_outputs_come_out_in_the_rotated_domain(dim):
    codec = make_codec("tq8", dim)
    q, k = vectors(7, dim, seed=1), vectors(9, dim, seed=2)
    decoded = codec.decode(codec.encode(k))
    np.testing.assert_allclose(
        np.array(codec.rotate(q) @ decoded.T), np.array(q @ k.T), atol=0.035 * dim**0.5
    )
    error = mx.linalg.norm(codec.unrotate(decoded) - k) / mx.linalg.norm(k)
    assert error.item() < 0.01


@pytest.mark.parametrize("spec", SPECS_64)
def test_each_vector_is_coded_by_itself(spec):
    codec = make_codec(spec, 64)
    x = vectors(2, 3, 5, 64)
    whole = codec.encode(x)
    for plane, one in zip(whole, codec.encode(x[1:2, 2:, 4:]), strict=True):
        assert mx.array_equal(plane[1:2, 2:, 4:], one)


@pytest.mark.parametrize("spec", SPECS_64)
def test_bad_vectors_are_stored_as_zeros_and_spoil_no_other(spec):
    codec = make_codec(spec, 64)
    x = np.array(vectors(6, 64))
    x[1, 3], x[2, 5], x[3, 7] = np.nan, np.inf, -np.inf
    x[4] = 0.0
    planes = codec.encode(mx.array(x))
    decoded = np.array(codec.decode(planes))
    assert np.all(decoded[1:5] == 0.0)
    for row in (0, 5):
        assert same_planes([p[row] for p in planes], codec.encode(mx.array(x[row])))
        assert np.linalg.norm(decoded[row]) > 1.0


@pytest.mark.parametrize("spec", SPECS_64)
@pytest.mark.parametrize("size", (1e38, 1e30, 1e6, 1e-6, 1e-30, 1e-42))
def test_huge_vectors_saturate_and_tiny_ones_vanish(spec, size):
    codec = make_codec(spec, 64)
    decoded = codec.decode(codec.encode(vectors(3, 64) * size))
    assert mx.isfinite(decoded).all().item()
    assert (mx.abs(decoded).max().item() > 2e3) == (size >= 1e6)


@pytest.mark.parametrize("spec", ("tq0", "tq9", "tq12"))
def test_bits_out_of_range_are_refused(spec):
    with pytest.raises(ValueError, match=r"bits is \d+.*1 to 8"):
        make_codec(spec, 64)


@pytest.mark.parametrize("dim", (0, -8, 20, 63))
def test_head_dims_that_nothing_supports_are_refused(dim):
    with pytest.raises(ValueError, match=f"head_dim is {dim}.*multiples of 8"):
        make_codec("tq4", dim)


@pytest.mark.parametrize("spec", ("", "tq", "fp8", "tq4-g", "tq4-dct", "tq4 "))
def test_unknown_specs_are_refused_with_examples(spec):
    with pytest.raises(ValueError, match=r"codec spec .* unknown; examples: tq4"):
        make_codec(spec, 64)


@pytest.mark.parametrize("group", (4, 24, 512))
def test_groups_that_do_not_divide_head_dim_are_refused(group):
    with pytest.raises(ValueError, match=f"group is {group}.*divide head_dim 256"):
        make_codec(f"tq4-g{group}", 256)
