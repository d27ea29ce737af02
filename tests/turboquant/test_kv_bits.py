from __future__ import annotations

import pytest

from tqstack.turboquant import make_codec, native_arguments, parse_kv_bits


@pytest.mark.parametrize(
    ("arguments", "specs"),
    [
        ({"bits": "4"}, ("tq4", "tq4")),
        ({"bits": "k4v3"}, ("tq4", "tq3")),
        ({"bits": "K3.5V2"}, ("tq3.5", "tq2")),
        ({"bits": " 3.50 "}, ("tq3.5", "tq3.5")),
        ({"bits": "4", "group_size": 64}, ("tq4-g64", "tq4-g64")),
        ({"bits": "4", "rotation": "qr"}, ("tq4-qr", "tq4-qr")),
        ({"bits": "4", "rotation": "0", "normalization": "0"}, ("tq4-none-raw", "tq4-none-raw")),
        ({"bits": "k8v4", "version": "affine"}, ("affine8-g64", "affine4-g64")),
        ({"bits": "4", "version": "affine", "group_size": 32}, ("affine4-g32", "affine4-g32")),
        ({"bits": "k4v3", "code": "trellis"}, ("tcq4-l8", "tcq3-l8")),
        ({"bits": "4", "version": "none"}, ("none", "none")),
    ],
)
def test_settings_name_the_codecs_that_they_mean(arguments, specs):
    assert parse_kv_bits(**arguments) == specs
    assert tuple(make_codec(spec, 128).spec for spec in specs) == specs


@pytest.mark.parametrize("bits", ["", "0", "9", "8.5", "k4", "v4", "k4v9", "four", "4 3", "-4"])
def test_widths_out_of_range_are_refused(bits):
    with pytest.raises(ValueError, match=r"TQ_KV_BITS is .*allowed: 1 to 8"):
        parse_kv_bits(bits)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("TQ_CACHE_VERSION", {"version": "fp8"}),
        ("TQ_KV_CODE", {"code": "huffman"}),
        ("TQ_USE_ROTATION", {"rotation": "yes"}),
        ("TQ_USE_NORMALIZATION", {"normalization": "2"}),
    ],
)
def test_unknown_choices_are_refused_by_name(name, argument):
    with pytest.raises(ValueError, match=f"{name} is .*allowed: "):
        parse_kv_bits("4", **argument)


@pytest.mark.parametrize("bits", ["3.5", "7", "1"])
def test_affine_takes_the_widths_of_mlx(bits):
    with pytest.raises(ValueError, match=r"TQ_KV_BITS is .*2, 3, 4, 5, 6 or 8"):
        parse_kv_bits(bits, "affine")


@pytest.mark.parametrize("bits", ["3.5", "k8v4"])
def test_the_trellis_takes_its_widths(bits):
    with pytest.raises(ValueError, match=r"TQ_KV_BITS is .*takes 1, 2, 3 or 4"):
        parse_kv_bits(bits, code="trellis")


@pytest.mark.parametrize("option", [{"group_size": 64}, {"rotation": "qr"}, {"normalization": "0"}])
def test_the_trellis_has_no_options(option):
    with pytest.raises(ValueError, match="TQ_KV_CODE=trellis has one scale"):
        parse_kv_bits("4", code="trellis", **option)


def test_the_native_cache_has_one_width_and_no_codec():
    assert native_arguments("4") == {"bits": 4, "group_size": 64}
    assert native_arguments("8", 32) == {"bits": 8, "group_size": 32}
    with pytest.raises(ValueError, match=r"k4v3.*one width"):
        native_arguments("k4v3")
    with pytest.raises(ValueError, match="native has no codec"):
        parse_kv_bits("4", "native")
