"""The rotation of a layer's inputs as one launch of `rotate.h`."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import mlx.core as mx

from tqstack.attention.kernels.arguments import integers
from tqstack.attention.kernels.program import Program
from tqstack.attention.kernels.trust import check, distance, random, trusted
from tqstack.weights.kernels import twins
from tqstack.weights.kernels.twins import Rotated
from tqstack.weights.rotation import block_size, rotate, signs

FOLDER = Path(__file__).parent
HEADERS = ("hadamard.h", FOLDER / "inputs.h", FOLDER / "rotate.h")
LARGEST = 1 << 14  # block
ROTATE = Program(
    name="rotate",
    headers=HEADERS,
    call="""
SHARED_ARRAY float memory[Rotation<M, P, TEAM, TEAMS>::SHARED_WORDS];
rotate<M, P, TEAM, TEAMS>(x, signs, (IN(RotateCall))call, halves, scale, memory, tid, block.x,
                          block.y);""",
    inputs=("x", "signs", "call"),
    outputs=("halves", "scale"),
)


def rotated(x: mx.array, seed: int = 0) -> Rotated:
    """(..., K) of any float type, for all layers whose inputs these are. K has a Hadamard block."""
    block = block_size(x.shape[-1])
    if x.size and block and block <= LARGEST and trusted("rotation", block, x.dtype):
        return _launch(x, seed)
    return twins.halved(rotate(x, seed), x.dtype)


def _launch(x: mx.array, seed: int) -> Rotated:
    width = x.shape[-1]
    rows = x.size // width
    template, blocks, threads = division(width)
    halves, scale = ROTATE(
        [x, signs(width, seed), integers(width // (template["M"] * template["P"]))],
        template=template,
        blocks=(blocks, rows, 1),
        threads=threads,
        outputs=[(x.shape, mx.float16), ((max(rows, 8),), mx.float32)],
    )
    return Rotated(halves, scale, x.dtype)


@lru_cache(maxsize=16)
def division(width: int) -> tuple[dict[str, int], int, int]:
    """Constants of rotate.h for rows of so many values, and a row's blocks of so many threads."""
    M, P, team = _team(block_size(width) or 0)
    blocks = width // (M * P)
    teams = min(max(1, 512 // team), max(1, 8192 // (M * P)), blocks)
    teams = -(-teams * team // 32) * 32 // team  # whole warps
    return {"M": M, "P": P, "TEAM": team, "TEAMS": teams}, -(-blocks // teams), team * teams


@lru_cache(maxsize=16)
def _team(block: int) -> tuple[int, int, int]:
    """M, P and the threads that hold a Hadamard block of M * P values: as many as leave each a
    value for every warp to exchange."""
    M = 12 if block % 3 == 0 else 1
    P, team = block // M, 1
    while team < P and 4 * team * team <= (128 * P if M == 12 else 32 * P):
        team *= 2
    return M, P, team


@check("rotation")
def _error(block: int, dtype: mx.Dtype) -> float:
    """Of several blocks, with an outlier. Halves are rounded, which both do."""
    x = random(3, block * (1 if block >= 4096 else 3), seed=block)
    x[1] *= 1e-3
    x[2, 5] = 3e4
    x = x.astype(dtype)
    got = twins.restored(_launch(x, 0))
    with mx.stream(mx.cpu):
        want = rotate(x)
    return max(distance(a, b) for a, b in zip(got, want, strict=True))
