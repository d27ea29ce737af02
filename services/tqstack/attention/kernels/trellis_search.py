"""The trellis code's search on a GPU: the launch of `viterbi.h`."""

from __future__ import annotations

from functools import lru_cache, partial

import mlx.core as mx

from tqstack.attention.kernels.program import Program
from tqstack.turboquant.trellis import TrellisCodec

VITERBI = Program(
    name="viterbi",
    headers=("viterbi.h",),
    call="""
typedef Trellis<BITS, WINDOW> T;
SHARED_ARRAY float costs[T::COSTS];
SHARED_ARRAY float reached[T::GROUPS];
SHARED_ARRAY unsigned char backs[(DIM + T::PER_BYTE - 1) / T::PER_BYTE * T::GROUPS];
SHARED_ARRAY unsigned short path[DIM];
viterbi<DIM, BITS, WINDOW>(
    x, codebook, codes, reaches, costs, reached, backs, path, tid, block.x);""",
    inputs=("x", "codebook"),
    outputs=("codes", "reaches"),
)


def encode(codec: TrellisCodec, x: mx.array) -> tuple[mx.array, mx.array]:
    """`codec.encode(x)`, with the search on the GPU."""
    return codec.encode(x, partial(_search, codec))


def _search(codec: TrellisCodec, y: mx.array) -> tuple[mx.array, mx.array]:
    """`TrellisCodec.search`: (vectors, d) -> codes (vectors, d) uint32, their reach (vectors,)."""
    codes, reaches = VITERBI(
        [y, _levels(codec)],
        template={"DIM": codec.dim, "BITS": codec.bits, "WINDOW": codec.window},
        blocks=(y.shape[0], 1, 1),
        threads=1 << codec.window,
        outputs=[(y.shape, mx.uint32), (y.shape[:1], mx.float32)],
    )
    return codes, reaches


@lru_cache(maxsize=16)
def _levels(codec: TrellisCodec) -> mx.array:
    return mx.array(codec.codebook)
