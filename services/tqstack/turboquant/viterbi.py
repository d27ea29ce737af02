"""Tail-biting Viterbi search over the bit-shift trellis of trellis.py, many vectors at once.

A state is an L-bit window; stepping to the next value drops its k lowest bits and takes in k new
ones at the top. The 2^k predecessors of a state therefore share all but their lowest bits, and one
step is an addition followed by a minimum over 2^k neighbours: 3 * 2^L operations, not 2^(L+k).

Compiled by numba for this processor: 0.15 s per million values on one core at L = 10.
"""

from __future__ import annotations

import numpy as np
from numba import njit

LANES = 64  # vectors that are searched side by side: vector instructions, within the L2 cache
_SEAM = 32  # values on each side of the seam in the first pass; more change nothing
_FORBIDDEN = np.float32(1e9)
# No fused multiply-add: what is compared on the way back must be what was computed on the way.
_compiled = njit(cache=True, nogil=True, fastmath={"nnan", "nsz"})


def tail_biting_path(x: np.ndarray, codebook: np.ndarray, bits: int) -> np.ndarray:
    """States whose levels are near x, the last of which leads back to the first.

    x: (n, vectors) float32. codebook: (2^L,) float32, the level of each state.
    Returns (n, vectors) uint16. Releases the interpreter's lock.

    Two passes, as in QTIP (Tseng et al., arXiv 2406.11235): the best path across the seam, free
    at both ends, fixes the L - k bits that the last state hands to the first; then the whole
    vector, with those bits given. The optimum over all of them gains under 1 %.
    """
    seam = min(_SEAM, len(x) // 2)
    across = np.concatenate([x[-seam:], x[:seam]])
    shared = best_path(across, codebook, bits)[seam] % (len(codebook) >> bits)
    return best_path(x, codebook, bits, shared)


def best_path(
    x: np.ndarray, codebook: np.ndarray, bits: int, shared: np.ndarray | None = None
) -> np.ndarray:
    """The path of least squared error: (n, vectors) -> (n, vectors) uint16 states.

    shared: (vectors,) the bits that the first state must start with and the last must end with.
    """
    n, vectors = x.shape
    given = np.full(vectors, -1) if shared is None else shared
    path = np.empty((n, vectors), np.uint16)
    reached = np.empty((n + 1, len(codebook) >> bits, min(LANES, vectors)), np.float32)
    levels = codebook.astype(np.float32)
    for start in range(0, vectors, LANES):
        lanes = slice(start, start + LANES)
        values, ends = np.ascontiguousarray(x[:, lanes], np.float32), given[lanes].astype(np.int64)
        costs = reached[:, :, : len(ends)]
        costs[0] = 0
        if shared is not None:
            costs[0] = np.where(np.arange(costs.shape[1])[:, None] == ends, 0, _FORBIDDEN)
        _forward(
            values, levels**2, 2 * levels, bits, np.ascontiguousarray(costs), ends, path[:, lanes]
        )
    return path


@_compiled
def _forward(x, square, twice, bits, reached, ends, path):  # pragma: no cover
    """Fills path (n, lanes). reached (n + 1, groups, lanes): the least cost of leaving value i - 1
    by each group, states that differ in their lowest k bits only; x^2 left out of all costs."""
    n, lanes = x.shape
    branches, groups = 1 << bits, len(square) >> bits
    for i in range(n):
        for group in range(groups):
            out, first = reached[i + 1, group], group * branches
            for branch in range(branches):
                state = first + branch
                entered, c, t = reached[i, state % groups], square[state], twice[state]
                if branch == 0:
                    for lane in range(lanes):
                        out[lane] = entered[lane] + (c - t * x[i, lane])
                else:
                    for lane in range(lanes):
                        out[lane] = min(out[lane], entered[lane] + (c - t * x[i, lane]))
    for lane in range(lanes):
        group = ends[lane]
        if group < 0:
            group = np.argmin(reached[n, :, lane])
        for i in range(n - 1, -1, -1):
            best, chosen = np.inf, 0
            for state in range(group * branches, (group + 1) * branches):
                cost = reached[i, state % groups, lane] + (
                    square[state] - twice[state] * x[i, lane]
                )
                if cost < best:
                    best, chosen = cost, state
            path[i, lane] = chosen
            group = chosen % groups
