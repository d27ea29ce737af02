"""The codecs of keys and values, parsed once from what people write."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

from tqstack.kv_bits import parse_widths

from .affine import BITS as AFFINE_BITS
from .codec import Codec, codec_maker, make_codec

VERSIONS = ("turboquant", "affine", "native", "none")
ROTATIONS = {"1": "", "qr": "-qr", "0": "-none"}
CODES = ("lloyd", "trellis")
AFFINE_GROUP = 64
TRELLIS_WINDOW = 8

Bits = int | float | str

# One codec (its tables and rotation) serves every layer with the same spec and head size.
_codec = lru_cache(maxsize=None)(make_codec)


@dataclass(frozen=True)
class KVCodecs:
    """Specs of the codec of keys and of the codec of values (`make_codec`).

    Raises:
        ValueError: a spec of no known form. Whether it goes with a head size, `codecs` tells.
    """

    keys: str
    values: str

    def __post_init__(self) -> None:
        codec_maker(self.keys)
        codec_maker(self.values)

    @classmethod
    def parse(cls, bits: KVCodecs | Bits) -> KVCodecs:
        """Those of 4, 3.5, "k4v3", of a spec such as "tq4" or "tcq3-l8", or of a pair "tq4/tq3".

        What is parsed already is returned as it is.

        Raises:
            ValueError: an impossible number of bits, or an unknown spec.
        """
        if isinstance(bits, KVCodecs):
            return bits
        text = bits if isinstance(bits, str) else f"{bits:g}"
        keys, slash, values = text.partition("/")
        if slash:
            return cls(keys, values)
        if text[:1].isdigit() or text[:1].lower() == "k":
            return cls.from_settings(text)
        return cls(text, text)

    @classmethod
    def from_settings(
        cls,
        bits: str,
        version: str = "turboquant",
        *,
        group_size: int | None = None,
        rotation: str = "1",
        normalization: str = "1",
        code: str = "lloyd",
    ) -> KVCodecs:
        """Those of TQ_KV_BITS and its companions.

        Args:
            bits: "4", "3.5", or a pair such as "k4v3".
            version: turboquant, affine or none. `native` is mlx-lm's cache and has no codec.
            group_size: coordinates that share a scale; None, for a setting that was left alone,
                means the whole vector (turboquant) or 64 (affine).
            rotation: "1" Hadamard, "qr" dense, "0" none.
            normalization: "1" scales are norm-corrected, "0" they are not (the paper's plain form).
            code: "lloyd", the paper's scalar code, or "trellis", which is nearer to the original
                at the same size and slower to encode: 1 to 4 whole bits, none of the options above.

        Raises:
            ValueError: names the setting, its value and what is allowed.
        """
        _one_of("TQ_CACHE_VERSION", version, VERSIONS)
        _one_of("TQ_USE_ROTATION", rotation, ROTATIONS)
        _one_of("TQ_USE_NORMALIZATION", normalization, ("0", "1"))
        _one_of("TQ_KV_CODE", code, CODES)
        if version == "none":
            return UNCOMPRESSED
        if version == "native":
            raise ValueError("TQ_CACHE_VERSION=native has no codec; build mlx-lm's quantized cache")
        group = group_size or (AFFINE_GROUP if version == "affine" else None)
        options = (f"-g{group}" if group else "") + ROTATIONS[rotation]
        if version == "affine":
            return cls(*(f"affine{_affine_width(width)}{options}" for width in _widths(bits)))
        raw = "" if normalization == "1" else "-raw"
        if code == "lloyd":
            return cls(*(f"tq{width}{options}{raw}" for width in _widths(bits)))
        if options or raw:
            raise ValueError(
                "TQ_KV_CODE=trellis has one scale per vector and a Hadamard rotation; leave "
                "TQ_KV_GROUP_SIZE, TQ_USE_ROTATION and TQ_USE_NORMALIZATION alone"
            )
        return cls(*(f"tcq{_trellis_width(width)}-l{TRELLIS_WINDOW}" for width in _widths(bits)))

    @property
    def name(self) -> str:
        """How people write it: "tq4", or "tq4/tq3"; `parse` reads it."""
        return self.keys if self.keys == self.values else f"{self.keys}/{self.values}"

    def __str__(self) -> str:
        return self.name

    def codecs(self, key_dim: int, value_dim: int) -> tuple[Codec, Codec]:
        """The codecs for vectors of these sizes: one object for each spec and size in a process.

        Raises:
            ValueError: a codec does not go with its size.
        """
        return _codec(self.keys, key_dim), _codec(self.values, value_dim)


UNCOMPRESSED = KVCodecs("none", "none")


def _widths(bits: str) -> tuple[str, str]:
    try:
        return parse_widths(bits)
    except ValueError as error:
        raise ValueError(f"TQ_KV_BITS is {bits!r}; {error}") from None


def _affine_width(width: str) -> str:
    if width not in map(str, AFFINE_BITS):
        raise ValueError(f"TQ_KV_BITS is {width}; mx.quantize takes 2, 3, 4, 5, 6 or 8 bits")
    return width


def _trellis_width(width: str) -> str:
    if width not in ("1", "2", "3", "4"):
        raise ValueError(f"TQ_KV_BITS is {width}; TQ_KV_CODE=trellis takes 1, 2, 3 or 4 bits")
    return width


def _one_of(name: str, value: str, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
