"""The codecs of keys and values, from the ways in which people name them."""

from __future__ import annotations

from tqstack.turboquant.kv_bits import parse_kv_bits

Bits = int | float | str


def codec_specs(bits: Bits) -> tuple[str, str]:
    """(key spec, value spec) of `4`, `3.5`, `"k4v3"`, a spec such as `"tq4"` or `"tcq3-l8"`, or a
    pair of specs such as `"tq4/tq3"`.

    Raises:
        ValueError: the number of bits is not possible. A spec is checked when it is used.
    """
    text = bits if isinstance(bits, str) else f"{bits:g}"
    keys, slash, values = text.partition("/")
    if slash:
        return keys, values
    if text[:1].isdigit() or text[:1].lower() == "k":
        return parse_kv_bits(text)
    return text, text
