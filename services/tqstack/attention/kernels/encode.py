"""New keys and values into packed planes with one launch of `encode.h`."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import mlx.core as mx

from tqstack.attention.kernels.arguments import UNUSED, at_least_8, hadamard_signs
from tqstack.attention.kernels.program import Program
from tqstack.turboquant.lloyd import LloydCodec
from tqstack.turboquant.rotation import Identity

WARPS = 4  # vectors per block, as in encode.h

ENCODE = Program(
    name="encode",
    headers=("hadamard.h", "encode.h"),
    call="""
constexpr int KEY_WORDS = Encode<DK, KB>::SHARED_WORDS, VALUE_WORDS = Encode<DV, VB>::SHARED_WORDS;
SHARED_ARRAY word memory[KEY_WORDS > VALUE_WORDS ? KEY_WORDS : VALUE_WORDS];
if (block.y == 0)
  encode<DK, KB, KG, KR, KC>(keys, key_signs, key_levels, count[0], (OUT(byte))key_codes,
                             key_scales, memory, tid, block.x);
else
  encode<DV, VB, VG, VR, VC>(values, value_signs, value_levels, count[0], (OUT(byte))value_codes,
                             value_scales, memory, tid, block.x);""",
    inputs=("keys", "values", "key_signs", "value_signs", "key_levels", "value_levels", "count"),
    outputs=("key_codes", "key_scales", "value_codes", "value_scales"),
)


@lru_cache(maxsize=64)
def serves(*codecs: object) -> bool:
    """Whether the kernel can write these codecs: whole bits, no rotation or one Hadamard block,
    and groups of whole warps."""
    return all(
        isinstance(codec, LloydCodec)
        and codec.bits % 1 == 0
        and codec.group % 32 == 0
        and (isinstance(codec.rotation, Identity) or hadamard_signs(codec) is not None)
        for codec in codecs
    )


def encode(
    keys: mx.array, values: mx.array, key_codec: LloydCodec, value_codec: LloydCodec
) -> tuple[tuple[mx.array, ...], tuple[mx.array, ...]]:
    """`key_codec.encode(keys), value_codec.encode(values)` of (B, KV heads, L, head_dim) arrays.

    A value within rounding of a boundary between two codes may get either.
    """
    return _launch(key_codec, value_codec, keys.shape[2] == 1)(keys, values)


@lru_cache(maxsize=64)
def _launch(
    key_codec: LloydCodec, value_codec: LloydCodec, single_token: bool
) -> Callable[..., tuple[Any, Any]]:
    """A step that is compiled for single tokens, as in `decode.py`."""
    template, signs, levels = {}, [], []
    for name, codec in (("K", key_codec), ("V", value_codec)):
        own = hadamard_signs(codec)
        signs.append(UNUSED if own is None else own)
        levels.append(_levels(codec))
        template |= {
            f"D{name}": codec.dim,
            f"{name}B": int(codec.bits),
            f"{name}G": codec.dim // codec.group,
            f"{name}R": own is not None,
            f"{name}C": codec.corrected,
        }
    planes = [*key_codec.plane_shapes(), *value_codec.plane_shapes()]

    def launch(keys: mx.array, values: mx.array):
        count = keys.size // keys.shape[-1]
        out = ENCODE(
            [keys, values, *signs, *levels, mx.array([count] * 8, dtype=mx.int32)],
            template=template,
            blocks=(-(-count // WARPS), 2, 1),
            threads=32 * WARPS,
            outputs=[((*keys.shape[:3], width), dtype) for width, dtype in planes],
        )
        return tuple(out[:2]), tuple(out[2:])

    return mx.compile(launch) if single_token else launch


@lru_cache(maxsize=16)
def _levels(codec: LloydCodec) -> mx.array:
    return at_least_8(mx.array(codec.codes[0].codebook))
