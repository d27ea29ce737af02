"""Chosen rows of compressed weights, such as tokens' embeddings, by one launch of `rows.h`."""

from __future__ import annotations

import mlx.core as mx

from tqstack.attention.kernels.arguments import UNUSED, at_least_8, integers
from tqstack.attention.kernels.program import Program
from tqstack.attention.kernels.trust import beyond_rounding, check, trusted
from tqstack.weights.codes import Code
from tqstack.weights.kernels import twins
from tqstack.weights.kernels.rotate import FOLDER, HEADERS, LARGEST, division
from tqstack.weights.rotation import block_size, signs
from tqstack.weights.tiles import TILE

ROWS = Program(
    name="rows",
    headers=(*HEADERS, FOLDER / "rows.h"),
    call="""
SHARED_ARRAY float memory[Rotation<M, P, TEAM, TEAMS>::SHARED_WORDS];
decoded_rows<BITS, WINDOW, M, P, TEAM, TEAMS>(
    ids, weight, scales, codebook, signs, (IN(RowsCall))call, y, memory, tid, block.x, block.y);""",
    inputs=("ids", "weight", "scales", "codebook", "signs", "call"),
    outputs=("y",),
)


def rows(
    ids: mx.array,
    weight: mx.array,
    scales: mx.array,
    code: Code,
    seed: int = 0,
    dtype: mx.Dtype = mx.float32,
) -> mx.array:
    """(...) -> (..., K): rows of the weights as they count, not rotated.

    weight: (N/16, K/16, words) tiles. scales: (N,) float16.
    """
    block = block_size(weight.shape[-2] * TILE) or 0
    if not ids.size or block > LARGEST or not trusted("compressed rows", code, block, dtype):
        return twins.rows(ids, weight, scales, code, seed).astype(dtype)
    return _launch(ids, weight, scales, code, seed, dtype)


def _launch(
    ids: mx.array, weight: mx.array, scales: mx.array, code: Code, seed: int, dtype: mx.Dtype
) -> mx.array:
    tall, wide, _ = weight.shape
    width = wide * TILE
    template, blocks, threads = division(width)
    flat = ids.reshape(-1).astype(mx.uint32)
    if flat.size < 8:  # Metal passes fewer in another address space
        flat = mx.concatenate([flat, UNUSED.astype(mx.uint32)])
    call = integers(width // (template["M"] * template["P"]), tall * TILE)
    (y,) = ROWS(
        [flat, weight, scales, at_least_8(code.codebook), signs(width, seed), call],
        template={"BITS": code.bits, "WINDOW": code.window, **template},
        blocks=(blocks, ids.size, 1),
        threads=threads,
        outputs=[((*ids.shape, width), dtype)],
    )
    return y


@check("compressed rows")
def _error(code: Code, block: int, dtype: mx.Dtype) -> float:
    """Beyond the rounding of the result."""
    packed = twins.random_weights((3,), block * (1 if block >= 2048 else 3), code)
    ids = mx.array([[0, 21, 47], [3, 3, 8]])
    got = _launch(ids, *packed, code, 0, dtype)
    with mx.stream(mx.cpu):
        want = twins.rows(ids, *packed, code, 0)
    return beyond_rounding((got,), (want,))
