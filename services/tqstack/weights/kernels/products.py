"""Products with compressed weights: the launches of `products.h` and `prompts.h`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from tqstack.attention.kernels.arguments import at_least_8, integers
from tqstack.attention.kernels.program import Program, gpu_dialect
from tqstack.attention.kernels.trust import beyond_rounding, check, random, trusted
from tqstack.weights.codes import Code
from tqstack.weights.kernels import twins
from tqstack.weights.kernels.rotate import rotated
from tqstack.weights.kernels.twins import Rotated
from tqstack.weights.tiles import TILE

FOLDER = Path(__file__).parent
HEADERS = ("lookup.h", FOLDER / "inputs.h", FOLDER / "tiles.h", FOLDER / "products.h")
FEW = 32  # rows that go through products.h
STAGES = 3
UNIT = 32  # inputs, as in inputs.h
NO_EXPERTS = mx.array([0] * 8, dtype=mx.uint32)


@cache
def _few(shared_words: int) -> Program:
    return Program(
        name=f"product_{shared_words}",
        headers=HEADERS,
        call="""
typedef Product<BITS, WINDOW, FRAGMENTS, WARPS, BATCH> P;
SHARED_MEMORY(memory, P::SHARED_WORDS);
product<BITS, WINDOW, FRAGMENTS, WARPS, BATCH, EVEN, EXPERTS>(
    x, weight, scales, levels, indices, (IN(ProductCall))call, y, memory, tid, block.x);""",
        inputs=("x", "weight", "scales", "levels", "indices", "call"),
        outputs=("y",),
        shared_words=shared_words,
    )


@cache
def _many(shared_words: int) -> Program:
    return Program(
        name=f"prompt_{shared_words}",
        headers=(*HEADERS, FOLDER / "prompts.h"),
        call="""
typedef Prompt<BITS, WINDOW, FRAGMENTS, WARPS, TILES, STAGES> P;
SHARED_MEMORY(memory, P::SHARED_WORDS);
prompt<BITS, WINDOW, FRAGMENTS, WARPS, TILES, STAGES, EXPERTS>(
    x, weight, scales, levels, indices, (IN(ProductCall))call, y, memory, tid, block.x,
    block.y);""",
        inputs=("x", "weight", "scales", "levels", "indices", "call"),
        outputs=("y",),
        shared_words=shared_words,
    )


def product(
    x: mx.array | Rotated, weight: mx.array, scales: mx.array, code: Code, seed: int = 0
) -> mx.array:
    """(..., K) -> (..., N): inputs, or what `rotated` made of them, times the weights' transpose.

    weight: (N/16, K/16, words) tiles. scales: (N,) float16.
    """
    x = x if isinstance(x, Rotated) else rotated(x, seed)
    rows = x.rows
    fragments = _fragments(rows) if rows <= FEW else None
    if not rows or not trusted("compressed product", code, fragments, x.dtype):
        return twins.product(x, weight, scales, code)
    return (_launch_few if fragments else _launch_many)(x, weight, scales, code)


def expert_product(
    x: mx.array | Rotated,
    indices: mx.array,
    weight: mx.array,
    scales: mx.array,
    code: Code,
    seed: int = 0,
    sorted_indices: bool = False,
) -> mx.array:
    """(..., 1 or k, 1, K) and (..., k) experts -> (..., k, 1, N), as mlx-lm calls SwitchLinear.

    weight: (experts, N/16, K/16, words). scales: (experts, N). sorted_indices: there are many,
    in ascending order, and each has its own row of inputs.
    """
    x = x if isinstance(x, Rotated) else rotated(x, seed)
    kind = "sorted" if sorted_indices else "pairs"
    if not indices.size or not trusted("compressed experts", code, kind, x.dtype):
        return twins.expert_product(x, weight, scales, code, indices)
    launch = _launch_many if sorted_indices else _launch_few
    y = launch(x, weight, scales, code, indices.astype(mx.uint32))
    return y.reshape(*indices.shape, 1, weight.shape[-3] * TILE)


def _launch_few(
    x: Rotated,
    weight: mx.array,
    scales: mx.array,
    code: Code,
    indices: mx.array | None = None,
) -> mx.array:
    *_, tall, wide, _ = weight.shape
    rows = indices.size if indices is not None else x.rows
    fragments = _fragments(1 if indices is not None else rows)
    warps, blocks = _machine()
    batch = max(1, 4 // fragments)
    tiles = tall * (rows if indices is not None else 1)
    units = wide * TILE // UNIT
    along = _division(tiles, -(-units // batch), warps, blocks)
    blocks = min(blocks, -(-tiles * along // warps))
    shared = rows // x.rows if indices is not None else 0
    call = integers(rows, wide * TILE, tall * TILE, blocks, along, shared)
    (y,) = _few(_table_words(code) + 2 * warps * fragments * 128)(
        [*_inputs(x, weight, scales, code, indices), call],
        template={
            "BITS": code.bits,
            "WINDOW": code.window,
            "FRAGMENTS": fragments,
            "WARPS": warps,
            "BATCH": batch,
            "EVEN": units % (batch * along) == 0,
            "EXPERTS": indices is not None,
        },
        blocks=(blocks, 1, 1),
        threads=32 * warps,
        outputs=[((*_shape(x, indices), tall * TILE), x.dtype)],
    )
    return y


def _launch_many(
    x: Rotated,
    weight: mx.array,
    scales: mx.array,
    code: Code,
    indices: mx.array | None = None,
) -> mx.array:
    *_, tall, wide, _ = weight.shape
    rows = x.rows
    fragments, warps, tiles = _prompt_block(rows, tall)
    columns = -(-tall // (warps * tiles))
    call = integers(rows, wide * TILE, tall * TILE, 0, 0, 0)
    words = _table_words(code) + STAGES * fragments * 8 * UNIT // 2 + fragments * 8
    (y,) = _many(words)(
        [*_inputs(x, weight, scales, code, indices), call],
        template={
            "BITS": code.bits,
            "WINDOW": code.window,
            "FRAGMENTS": fragments,
            "WARPS": warps,
            "TILES": tiles,
            "STAGES": STAGES,
            "EXPERTS": indices is not None,
        },
        blocks=(columns, -(-rows // (8 * fragments)), 1),
        threads=32 * warps,
        outputs=[((*_shape(x, indices), tall * TILE), x.dtype)],
    )
    return y


def _inputs(
    x: Rotated, weight: mx.array, scales: mx.array, code: Code, indices: mx.array | None
) -> list[mx.array]:
    """Of a launch."""
    experts = NO_EXPERTS if indices is None else indices.reshape(-1)
    if experts.size < 8:  # Metal passes fewer in another address space
        experts = mx.concatenate([experts, NO_EXPERTS])
    return [x.halves, weight, scales, _table(code), experts]


def _shape(x: Rotated, indices: mx.array | None) -> tuple[int, ...]:
    return x.halves.shape[:-1] if indices is None else indices.shape


def _fragments(rows: int) -> int:
    """Of 8 rows, a power of two of them."""
    return 1 << max(0, -(-rows // 8) - 1).bit_length()


def _machine() -> tuple[int, int]:
    """Warps of a block of threads, and blocks, for few rows. On CUDA a table takes most of a
    multiprocessor's shared memory, so each has one block that stays."""
    return (16, 132) if gpu_dialect() == "cuda" else (8, 256)


def _prompt_block(rows: int, tall: int) -> tuple[int, int, int]:
    """Fragments, warps, and tiles of outputs of a warp."""
    if gpu_dialect() != "cuda":
        return 8, 4, 1
    return (16, 8, 2) if tall * rows >= 16 * 128 * 132 else (16, 8, 1)


@lru_cache(maxsize=64)
def _division(tiles: int, batches: int, warps: int, blocks: int) -> int:
    """How many warps divide a tile's batches among them, so that the last one ends soonest."""

    def duration(along: int) -> int:
        return -(-tiles * along // (warps * blocks)) * -(-batches // along)

    return min((2**i for i in range(warps.bit_length())), key=duration)


@lru_cache(maxsize=16)
def _table(code: Code) -> mx.array:
    """As `lookup.h` takes it: pairs of a scalar code's levels, else the same level twice."""
    words = code.levels.astype(np.float16).view(np.uint16).astype(np.uint32)
    if code.scalar:
        words = np.tile(words, len(words)) | (np.repeat(words, len(words)) << 16)
    else:
        words |= words << 16
    return at_least_8(mx.array(words))


def _table_words(code: Code) -> int:
    """Of shared memory, as `LARGE_TABLE` bounds them; on CUDA."""
    return 32 << (2 * code.bits if code.scalar else code.window)


@check("compressed product")
def _product_error(code: Code, fragments: int | None, dtype: mx.Dtype) -> float:
    """Of several tiles and units, beyond the rounding of the result."""
    rows = 8 * fragments - 1 if fragments else 150
    x = rotated(random(rows, 192, seed=rows).astype(dtype))
    packed = twins.random_weights((5,), 192, code)
    launch = _launch_few if fragments else _launch_many
    return _beyond_rounding(launch(x, *packed, code), twins.product, x, *packed, code)


@check("compressed experts")
def _expert_error(code: Code, kind: str, dtype: mx.Dtype) -> float:
    packed = twins.random_weights((6, 5), 192, code)
    if kind == "pairs":
        indices = mx.array([[3, 0, 5], [1, 3, 2]], dtype=mx.uint32)
        x, launch = random(2, 1, 1, 192, seed=1), _launch_few
    else:
        indices = mx.array([0] * 3 + [1] * 100 + [3] * 9 + [5] * 40, dtype=mx.uint32)
        x, launch = random(indices.size, 1, 192, seed=1), _launch_many
    x = rotated(x.astype(dtype))
    got = launch(x, *packed, code, indices)[..., None, :]
    return _beyond_rounding(got, twins.expert_product, x, *packed, code, indices)


def _beyond_rounding(got: mx.array, twin: Callable[..., mx.array], x: Rotated, *rest: Any) -> float:
    with mx.stream(mx.cpu):
        want = twin(x._replace(dtype=mx.float32), *rest)
    return beyond_rounding((got,), (want,))
