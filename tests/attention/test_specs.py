from __future__ import annotations

import pytest

from tqstack.attention.specs import codec_specs


@pytest.mark.parametrize(
    "bits, specs",
    [
        (4, ("tq4", "tq4")),
        (3.5, ("tq3.5", "tq3.5")),
        ("3", ("tq3", "tq3")),
        ("k4v3", ("tq4", "tq3")),
        ("tcq3-l8", ("tcq3-l8", "tcq3-l8")),
        ("tq4/none", ("tq4", "none")),
    ],
)
def test_bits_can_be_numbers_pairs_and_codecs(bits, specs):
    assert codec_specs(bits) == specs


@pytest.mark.parametrize("bits", [0, 9, "12", "k4", "k4v"])
def test_impossible_bits_are_an_error_that_tells_the_value(bits):
    with pytest.raises(ValueError, match=str(bits)):
        codec_specs(bits)
