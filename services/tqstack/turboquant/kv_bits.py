"""From the user's cache settings to a codec spec for keys and one for values."""

from __future__ import annotations

import re

VERSIONS = ("turboquant", "affine", "native", "none")
ROTATIONS = {"1": "", "qr": "-qr", "0": "-none"}
CODES = ("lloyd", "trellis")
AFFINE_GROUP = 64
TRELLIS_WINDOW = 8

_WIDTH = r"\d+(?:\.\d+)?"
_PAIR = re.compile(rf"k({_WIDTH})v({_WIDTH})|({_WIDTH})", re.IGNORECASE)


def parse_kv_bits(
    bits: str,
    version: str = "turboquant",
    *,
    group_size: int | None = None,
    rotation: str = "1",
    normalization: str = "1",
    code: str = "lloyd",
) -> tuple[str, str]:
    """TQ_KV_BITS and its companions -> (key spec, value spec) for `make_codec`.

    bits: "4", "3.5", or a pair such as "k4v3".
    version: turboquant, affine or none. `native` is mlx-lm's cache and has no codec: see
        `native_arguments`.
    group_size: coordinates that share a scale; None, for a setting that was left alone, means
        the whole vector (turboquant) or 64 (affine).
    rotation: "1" Hadamard, "qr" dense, "0" none.
    normalization: "1" scales are norm-corrected, "0" they are not (the paper's plain form).
    code: "lloyd", the paper's scalar code, or "trellis", which is nearer to the original at the
        same size and slower to encode: 1 to 4 whole bits, none of the options above.

    ValueError names the setting, its value and what is allowed.
    """
    _one_of("TQ_CACHE_VERSION", version, VERSIONS)
    _one_of("TQ_USE_ROTATION", rotation, ROTATIONS)
    _one_of("TQ_USE_NORMALIZATION", normalization, ("0", "1"))
    _one_of("TQ_KV_CODE", code, CODES)
    if version == "none":
        return "none", "none"
    if version == "native":
        raise ValueError("TQ_CACHE_VERSION=native has no codec; build mlx-lm's quantized cache")
    widths = _widths(bits)
    if version == "affine":
        key, value = (
            f"affine{_whole(width)}-g{group_size or AFFINE_GROUP}{ROTATIONS[rotation]}"
            for width in widths
        )
        return key, value
    if code == "trellis":
        if group_size or rotation != "1" or normalization != "1":
            raise ValueError(
                "TQ_KV_CODE=trellis has one scale per vector and a Hadamard rotation; leave "
                "TQ_KV_GROUP_SIZE, TQ_USE_ROTATION and TQ_USE_NORMALIZATION alone"
            )
        key, value = (f"tcq{_trellis_width(width)}-l{TRELLIS_WINDOW}" for width in widths)
        return key, value
    group = f"-g{group_size}" if group_size else ""
    raw = "" if normalization == "1" else "-raw"
    key, value = (f"tq{width}{group}{ROTATIONS[rotation]}{raw}" for width in widths)
    return key, value


def native_arguments(bits: str, group_size: int | None = None) -> dict[str, int]:
    """TQ_CACHE_VERSION=native: arguments of mlx-lm's `QuantizedKVCache`, which has one width."""
    key, value = _widths(bits)
    if key != value:
        raise ValueError(f"TQ_KV_BITS is {bits!r}; the native cache has one width, such as 4")
    return {"bits": _whole(key), "group_size": group_size or AFFINE_GROUP}


def _widths(bits: str) -> tuple[str, str]:
    match = _PAIR.fullmatch(bits.strip())
    if match is None or not all(1 <= float(width) <= 8 for width in match.groups() if width):
        raise ValueError(
            f"TQ_KV_BITS is {bits!r}; allowed: 1 to 8, a fraction such as 3.5, "
            "or a pair such as k4v3"
        )
    key, value, both = match.groups()
    return f"{float(key or both):g}", f"{float(value or both):g}"


def _whole(width: str) -> int:
    if width not in ("2", "3", "4", "5", "6", "8"):
        raise ValueError(f"TQ_KV_BITS is {width}; mx.quantize takes 2, 3, 4, 5, 6 or 8 bits")
    return int(width)


def _trellis_width(width: str) -> str:
    if width not in ("1", "2", "3", "4"):
        raise ValueError(f"TQ_KV_BITS is {width}; TQ_KV_CODE=trellis takes 1, 2, 3 or 4 bits")
    return width


def _one_of(name: str, value: str, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
