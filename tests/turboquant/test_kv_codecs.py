"""What people write about keys and values, and the codecs that they mean."""

from __future__ import annotations

import pytest

from tqstack.turboquant import UNCOMPRESSED, KVCodecs


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
    codecs = KVCodecs.from_settings(**arguments)
    assert (codecs.keys, codecs.values) == specs
    assert tuple(codec.spec for codec in codecs.codecs(128, 128)) == specs


@pytest.mark.parametrize(
    ("bits", "name"),
    [
        (4, "tq4"),
        (3.5, "tq3.5"),
        ("3", "tq3"),
        ("k4v3", "tq4/tq3"),
        ("K4v4", "tq4"),
        ("tcq3-l8", "tcq3-l8"),
        ("tq4/none", "tq4/none"),
        ("tq2/tq2", "tq2"),
    ],
)
def test_bits_can_be_numbers_pairs_and_codecs_by_name(bits, name):
    codecs = KVCodecs.parse(bits)
    assert str(codecs) == codecs.name == name
    assert KVCodecs.parse(name) == KVCodecs.parse(codecs) == codecs


def test_codecs_are_made_once_for_each_size():
    keys, values = KVCodecs.parse("k4v3").codecs(64, 128)
    assert (keys.dim, values.dim) == (64, 128)
    assert KVCodecs.parse("tq4").codecs(64, 64) == (keys, keys)
    with pytest.raises(ValueError, match="head_dim is 12"):
        UNCOMPRESSED.codecs(64, 12)


@pytest.mark.parametrize("bits", [0, 9, 8.5, "12", "k4", "k4v", "k4v9", "4 3"])
def test_widths_out_of_range_are_refused(bits):
    with pytest.raises(ValueError, match=rf"TQ_KV_BITS is .*{bits}.*allowed: 1 to 8"):
        KVCodecs.parse(bits)


@pytest.mark.parametrize("bits", ["", "v4", "four", "-4", "tq", "tq4/", "tq4/3", "tq4/tq3/tq2"])
def test_unknown_codecs_are_refused(bits):
    with pytest.raises(ValueError, match=r"codec spec .* is unknown"):
        KVCodecs.parse(bits)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("TQ_KV_BITS", {"bits": "four"}),
        ("TQ_CACHE_VERSION", {"version": "fp8"}),
        ("TQ_KV_CODE", {"code": "huffman"}),
        ("TQ_USE_ROTATION", {"rotation": "yes"}),
        ("TQ_USE_NORMALIZATION", {"normalization": "2"}),
    ],
)
def test_unknown_choices_are_refused_by_name(name, argument):
    with pytest.raises(ValueError, match=f"{name} is .*allowed: "):
        KVCodecs.from_settings(**{"bits": "4", **argument})


@pytest.mark.parametrize("bits", ["3.5", "7", "1"])
def test_affine_takes_the_widths_of_mlx(bits):
    with pytest.raises(ValueError, match=r"TQ_KV_BITS is .*2, 3, 4, 5, 6 or 8"):
        KVCodecs.from_settings(bits, "affine")


@pytest.mark.parametrize("bits", ["3.5", "k8v4"])
def test_the_trellis_takes_its_widths(bits):
    with pytest.raises(ValueError, match=r"TQ_KV_BITS is .*takes 1, 2, 3 or 4"):
        KVCodecs.from_settings(bits, code="trellis")


@pytest.mark.parametrize("option", [{"group_size": 64}, {"rotation": "qr"}, {"normalization": "0"}])
def test_the_trellis_has_no_options(option):
    with pytest.raises(ValueError, match="TQ_KV_CODE=trellis has one scale"):
        KVCodecs.from_settings("4", code="trellis", **option)


def test_the_native_cache_has_no_codec():
    with pytest.raises(ValueError, match="native has no codec"):
        KVCodecs.from_settings("4", "native")
