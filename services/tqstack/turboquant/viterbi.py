"""Tail-biting Viterbi search over the bit-shift trellis of trellis.py, many vectors at once.

A state is an L-bit window; stepping to the next value drops its k lowest bits and takes in k new
ones at the top. The 2^k predecessors of a state therefore share all but their lowest bits, and one
step is a minimum over 2^k neighbours followed by an addition: 3 * 2^L operations, not 2^(L+k).
"""

from __future__ import annotations

import numpy as np

_SEAM = 32  # values on each side of the seam in the first pass; more change nothing
_FORBIDDEN = np.float32(1e9)


def tail_biting_path(x: np.ndarray, codebook: np.ndarray, bits: int) -> np.ndarray:
    """States whose levels are near x, the last of which leads back to the first.

    x: (n, vectors) float32. codebook: (2^L,) float32, the level of each state.
    Returns (n, vectors) intp.

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
    """The path of least squared error: (n, vectors) -> (n, vectors) states.

    shared: (vectors,) the bits that the first state must start with and the last must end with.

    Instead of back-pointers each step's minima are kept, and the way back looks only at the 2^k
    predecessors of the one state that it is in.
    """
    n, vectors = x.shape
    states, branches = len(codebook), 1 << bits
    groups = states // branches  # states that differ in their lowest k bits only
    # (x - c)^2 without x^2, as a product: [-2c, c^2] @ [x, 1]
    metric = np.stack([-2 * codebook, codebook**2], axis=1)
    points = np.ones((n, 2, vectors), np.float32)
    points[:, 0] = x
    cost = np.empty((states, vectors), np.float32)
    by_group, by_branch = cost.reshape(groups, branches, -1), cost.reshape(branches, groups, -1)
    reached = np.zeros((n, groups, vectors), np.float32)  # least cost of entering each group
    if shared is not None:
        reached[0] = np.where(np.arange(groups)[:, None] == shared, 0, _FORBIDDEN)
    for i in range(n):
        if i:
            by_group.min(axis=1, out=reached[i])
        np.matmul(metric, points[i], out=cost)
        by_branch += reached[i]
    if shared is not None:
        by_group += np.where(np.arange(groups)[:, None] == shared, 0, _FORBIDDEN)[:, None]

    path = np.empty((n, vectors), np.intp)
    path[-1] = cost.argmin(axis=0)
    lane, low_bits = np.arange(vectors), np.arange(branches)[:, None]
    for i in range(n - 2, -1, -1):
        before = path[i + 1] % groups * branches + low_bits  # (2^k, vectors) predecessors
        total = metric[before, 0] * x[i] + metric[before, 1] + reached[i][before % groups, lane]
        path[i] = before[total.argmin(axis=0), lane]
    return path
