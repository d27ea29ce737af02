"""Tail-biting Viterbi search over the bit-shift trellis of trellis.py, many vectors at once.

A state is an L-bit window; stepping to the next value drops its k lowest bits and takes in k new
ones at the top. The 2^k predecessors of a state therefore share all but their lowest bits, and one
step is an addition followed by a minimum over 2^k neighbours: 3 * 2^L operations, not 2^(L+k).
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

    The branch that each minimum came from rides in the lowest k bits of its cost, 20 bits down,
    so that one pass over the costs yields both.
    """
    n, vectors = x.shape
    states, branches = len(codebook), 1 << bits
    groups = states // branches  # states that differ in their lowest k bits only
    # (x - c)^2 as a product: [c^2, -2c, 1] @ [1, x, x^2]
    metric = np.stack([codebook**2, -2 * codebook, np.ones_like(codebook)], axis=1)
    powers = np.stack([np.ones_like(x), x, x**2], axis=1)  # (n, 3, vectors)
    cost = np.empty((states, vectors), np.float32)
    by_group, by_branch = cost.reshape(groups, branches, -1), cost.reshape(branches, groups, -1)
    marked = by_group.view(np.int32)
    branch = np.arange(branches, dtype=np.int32)[:, None]
    closed = 0.0  # cost of each group at the ends: nothing, or too much
    if shared is not None:
        closed = np.where(np.arange(groups)[:, None] == shared, 0, _FORBIDDEN)
    reached = np.empty((n, groups, vectors), np.float32)  # least cost of leaving by each group
    for i in range(n):
        np.matmul(metric, powers[i], out=cost)
        by_branch += reached[i - 1] if i else closed
        marked &= -branches
        marked |= branch
        by_group.min(axis=1, out=reached[i])

    came_from = reached.view(np.int32) & (branches - 1)
    path, lane = np.empty((n, vectors), np.intp), np.arange(vectors)
    group = (reached[-1] + closed).argmin(axis=0)
    for i in range(n - 1, -1, -1):
        path[i] = group * branches + came_from[i, group, lane]
        group = path[i] % groups
    return path
