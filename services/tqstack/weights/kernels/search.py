"""The trellis search of tiles on a GPU: the launch of `viterbi.h`."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from tqstack.attention.kernels.program import Program
from tqstack.attention.kernels.trust import check, distance, random, trusted
from tqstack.weights.codes import Code
from tqstack.weights.tiles import VALUES

SEARCH = Program(
    name="tile_search",
    headers=("viterbi.h",),
    call="""
typedef Trellis<BITS, WINDOW> T;
SHARED_ARRAY float costs[T::COSTS];
SHARED_ARRAY float reached[T::GROUPS];
SHARED_ARRAY unsigned char backs[VALUES / T::PER_BYTE * T::GROUPS];
SHARED_ARRAY unsigned short path[VALUES];
tile_states<VALUES, BITS, WINDOW>(
    x, codebook, states, costs, reached, backs, path, tid, block.x);""",
    inputs=("x", "codebook"),
    outputs=("states",),
)


def serves(code: Code) -> bool:
    """Whether this machine searches for such codes on a GPU."""
    return not code.scalar and trusted("tile search", code)


def states(code: Code, values: np.ndarray) -> np.ndarray:
    """(count, 256) float32 of unit variance -> (count, 256) states of the trellis."""
    (found,) = SEARCH(
        [mx.array(values), mx.array(code.levels)],
        template={"VALUES": VALUES, "BITS": code.bits, "WINDOW": code.window},
        blocks=(len(values), 1, 1),
        threads=1 << code.window,
        outputs=[(values.shape, mx.uint32)],
    )
    return np.array(found)


@check("tile search")
def _error(code: Code) -> float:
    """How much farther from the values the kernel's levels are than the twin's, or nearer."""
    values = np.array(random(64, VALUES, seed=code.bits))
    x = mx.array(values)
    got, want = code.levels[states(code, values)], code.encode(values)[1]
    return distance(mx.array(got), x) - distance(mx.array(want), x)
