"""From a matrix to codes: rotated, one least-squares scale per row, and with a Hessian of the
layer's inputs each column's error carried on to those that come after it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from tqstack.weights import rotation, tiles
from tqstack.weights.codes import SIGN, Code
from tqstack.weights.kernels import search
from tqstack.weights.layers import RESIDUAL_SEED
from tqstack.weights.tiles import TILE

THREADS = os.cpu_count() or 1
CHUNK = 1 << 20  # weights that a thread codes at a time
BLOCK = 1 << 24  # weights that are in float32 at a time
DAMPING = 0.2  # of the Hessian's mean diagonal: inputs that the calibration text did not show
_SCALE_MAX = 65504.0  # largest finite float16


@dataclass(frozen=True)
class Matrix:
    """A coded matrix, and what it decodes to.

    Attributes:
        weight: (N / 16, K / 16, words) uint32
        scales: (N,) float16
        decoded: (N, K) float32, rotated
    """

    weight: np.ndarray
    scales: np.ndarray
    decoded: np.ndarray


@dataclass(frozen=True)
class Calibration:
    """What a text tells about a layer's inputs, made once for all of its experts.

    Attributes:
        hessian: (K, K) float32, the mean of x x^T over rotated inputs x.
        feedback: (K, K), see `_feedback`.
    """

    hessian: np.ndarray
    feedback: np.ndarray

    @classmethod
    def of(cls, hessian: np.ndarray, seed: int = 0) -> Calibration:
        """From the mean over inputs as they are."""
        turned = _rotated_hessian(hessian, seed)
        return cls(turned, _feedback(turned))


def encode(
    matrix: mx.array,
    code: Code,
    seed: int = 0,
    *,
    calibration: Calibration | None = None,
    residual: bool = False,
    advance: Callable[[int], None] = lambda weights: None,
) -> dict[str, mx.array]:
    """The planes of a matrix (N, K) of any float type, by the names of a layer's parameters.

    Args:
        calibration: of the layer's inputs; with it the layer's outputs are kept instead of its
            weights (LDLQ: Chee et al., QuIP, arXiv 2307.13304).
        residual: code the signs of what is missed as well.
        advance: told how many weights were coded.
    """
    rows = max(TILE, BLOCK // matrix.shape[1] // TILE * TILE)
    parts = [
        _encode(matrix[start : start + rows], code, seed, calibration, residual, advance)
        for start in range(0, len(matrix), rows)
    ]
    return {name: mx.array(np.concatenate([part[name] for part in parts])) for name in parts[0]}


def stacked(experts: Sequence[Mapping[str, mx.array]]) -> dict[str, mx.array]:
    """The planes of a mixture's matrices, each with an axis of experts in front."""
    return {name: mx.stack([planes[name] for planes in experts]) for name in experts[0]}


def _encode(
    matrix: mx.array,
    code: Code,
    seed: int,
    calibration: Calibration | None,
    residual: bool,
    advance: Callable[[int], None],
) -> dict[str, np.ndarray]:
    """The planes of some rows."""
    rotated = np.array(rotation.rotate(matrix, seed))
    if calibration is None:
        coded = _by_rows(rotated, code, advance)
    else:
        coded = _by_columns(rotated, code, calibration, advance)
    planes = {"weight": coded.weight, "scales": coded.scales}
    if residual:
        missed = rotation.unrotate(mx.array(rotated - coded.decoded), seed)
        signs = _by_rows(np.array(rotation.rotate(missed, RESIDUAL_SEED)), SIGN, lambda _: None)
        planes |= {"residual.weight": signs.weight, "residual.scales": signs.scales}
    return planes


def _by_rows(rotated: np.ndarray, code: Code, advance: Callable[[int], None]) -> Matrix:
    """Every tile by itself."""
    N, K = rotated.shape
    size = _size(rotated)
    levels = np.empty_like(rotated)
    words = np.empty((N // TILE, K // TILE, code.words), np.uint32)
    chunk = max(TILE, CHUNK // K // TILE * TILE)
    parts = [slice(start, min(start + chunk, N)) for start in range(0, N, chunk)]

    def streams(rows: slice) -> np.ndarray:
        return tiles.to_tiles(rotated[rows] / size[rows]).reshape(-1, tiles.VALUES)

    def keep(rows: slice, coded: tuple[np.ndarray, np.ndarray]) -> None:
        shape = (-1, K // TILE, tiles.VALUES)
        codes, found = (part.reshape(shape) for part in coded)
        words[rows.start // TILE : rows.stop // TILE] = tiles.packed(codes, code.bits)
        levels[rows] = tiles.from_tiles(found)
        advance((rows.stop - rows.start) * K)

    with ThreadPoolExecutor(THREADS) as pool:
        if search.serves(code):  # one thread speaks to the GPU
            work = [
                pool.submit(lambda rows, s: keep(rows, code.of_states(s)), rows, found)
                for rows in parts
                for found in (search.states(code, streams(rows)),)
            ]
        else:
            work = [pool.submit(lambda r: keep(r, code.encode(streams(r))), r) for r in parts]
        for part in work:
            part.result()
    return _scaled(rotated, levels, words, None)


def _by_columns(
    rotated: np.ndarray,
    code: Code,
    calibration: Calibration,
    advance: Callable[[int], None],
) -> Matrix:
    """Tiles from the first inputs to the last; what was missed so far moves what is coded next."""
    N, K = rotated.shape
    size = _size(rotated)
    levels, missed = np.empty_like(rotated), np.empty_like(rotated)
    words = np.empty((N // TILE, K // TILE, code.words), np.uint32)
    on_gpu = search.serves(code)
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, K, TILE):
            own = slice(start, start + TILE)
            aimed = rotated[:, own] + missed[:, :start] @ calibration.feedback[:start, own]
            streams = tiles.to_tiles(aimed / size).reshape(-1, tiles.VALUES)
            if on_gpu:
                codes, reached = code.of_states(search.states(code, streams))
            else:
                parts = np.array_split(streams, max(1, min(THREADS, len(streams) // 64)))
                found = zip(*pool.map(code.encode, parts), strict=True)
                codes, reached = map(np.concatenate, found)
            words[:, start // TILE] = tiles.packed(codes, code.bits)
            levels[:, own] = tiles.from_tiles(reached[:, None])
            missed[:, own] = rotated[:, own] - levels[:, own] * size
            advance(N * TILE)
    return _scaled(rotated, levels, words, calibration.hessian)


def _scaled(
    rotated: np.ndarray, levels: np.ndarray, words: np.ndarray, hessian: np.ndarray | None
) -> Matrix:
    """With the scale of each row that leaves the least squared error, of weights or of outputs."""
    weighted = levels if hessian is None else levels @ hessian
    square = (weighted * levels).sum(1)
    scales = (weighted * rotated).sum(1) / np.where(square > 0, square, 1)
    scales = np.clip(scales, -_SCALE_MAX, _SCALE_MAX).astype(np.float16)
    decoded = levels * scales.astype(np.float32)[:, None]
    return Matrix(words, scales, decoded)


def _size(rotated: np.ndarray) -> np.ndarray:
    """(N, 1) root mean square of each row; 1 of a row of zeros."""
    size = np.sqrt(np.square(rotated).mean(1, keepdims=True))
    return np.where(size > 0, size, 1)


def _feedback(hessian: np.ndarray) -> np.ndarray:
    """(K, K): how much of an error at input i is made good at input j of a later tile.

    H = (A + 1) D (A + 1)^T with A above its diagonal blocks and D in blocks of a tile: a Cholesky
    factor from the last input to the first, freed of its own diagonal blocks.
    """
    K = len(hessian)
    damped = hessian + DAMPING * np.trace(hessian) / K * np.eye(K, dtype=hessian.dtype)
    upper = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    for start in range(0, K, TILE):
        own = slice(start, start + TILE)
        upper[:, own] = upper[:, own] @ np.linalg.inv(upper[own, own])
    return upper


def _rotated_hessian(hessian: np.ndarray, seed: int) -> np.ndarray:
    once = rotation.rotate(mx.array(hessian), seed)
    return np.array(rotation.rotate(once.T, seed))
