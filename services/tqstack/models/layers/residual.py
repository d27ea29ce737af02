"""What a half of a layer ends with, for single tokens: a sum of its results is added to the
residual stream, and the next half's RMSNorm follows. The launch of `residual.h`, and its twin."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from tqstack.attention.kernels.arguments import UNUSED, at_least_8, struct
from tqstack.attention.kernels.program import Program
from tqstack.attention.kernels.trust import beyond_rounding, check, distance, random, trusted
from tqstack.weights.kernels import twins
from tqstack.weights.kernels.rotate import HEADERS, LARGEST, division, rotated
from tqstack.weights.kernels.twins import SCALE_PLACE, Rotated
from tqstack.weights.rotation import block_size, rotate, signs

THREADS = 512  # as in residual.h
MOST_THREADS = 1024  # that hold a row which is rotated
_FOLDER = Path(__file__).parent
RESIDUAL = Program(
    name="residual",
    headers=(_FOLDER / "sums.h", _FOLDER / "residual.h"),
    call="""
SHARED_ARRAY float memory[RESIDUAL_THREADS / 32];
residual<TERMS, SCORED, NORMED>(stream, terms, scores, weight, (IN(ResidualCall))call, sum, normed,
                                memory, tid, block.x);""",
    inputs=("stream", "terms", "scores", "weight", "call"),
    outputs=("sum", "normed"),
)
ROTATED_RESIDUAL = Program(
    name="rotated_residual",
    headers=(*HEADERS, _FOLDER / "residual.h", _FOLDER / "residual_rotated.h"),
    call="""
SHARED_ARRAY float memory[Rotation<M, P, TEAM, TEAMS>::SHARED_WORDS];
rotated_residual<TERMS, SCORED, M, P, TEAM, TEAMS>(
    stream, terms, scores, weight, signs, (IN(ResidualCall))call, sum, normed, halves, memory, tid,
    block.x);""",
    inputs=("stream", "terms", "scores", "weight", "call", "signs"),
    outputs=("sum", "normed", "halves"),
)


class Normed(NamedTuple):
    """What half a layer reads: as it is, and rotated where its matrices are coded."""

    plain: mx.array
    rotated: Rotated | None = None

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """For compiled functions, which take and return nothing else; `of` is the inverse."""
        return self.plain, *(self.rotated[:1] if self.rotated else ())

    def alone(self) -> Normed:
        """(B, 1, width) as (B, 1, 1, width), as experts read it."""
        more = self.rotated and self.rotated._replace(halves=self.rotated.halves[:, None])
        return Normed(self.plain[:, None], more)

    @classmethod
    def of(cls, plain: mx.array, halves: mx.array | None = None) -> Normed:
        return cls(plain, None if halves is None else Rotated(halves, plain.dtype))


class Norm(NamedTuple):
    """An RMSNorm: weight (width,) and epsilon."""

    weight: mx.array
    eps: float
    seed: int | None = None  # of the rotation in which coded matrices read what is normalised

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.weight, self.eps)

    def read(self, x: mx.array) -> Normed:
        """As the half that follows takes it."""
        return self.rotate(self(x))

    def rotate(self, normed: mx.array) -> Normed:
        return Normed(normed, None if self.seed is None else rotated(normed, self.seed))

    def in_float32(self) -> Norm:
        return self._replace(weight=self.weight.astype(mx.float32))


Sum = tuple[mx.array, mx.array | None]  # and its norm


def add(
    stream: mx.array, terms: mx.array, scores: mx.array | None, norm: Norm | None
) -> tuple[mx.array, Normed | None]:
    """stream + sum of scores x terms, and its RMSNorm if there is one.

    Args:
        stream: (B, 1, width)
        terms: (B, terms, width) in the stream's type.
        scores: (B, terms) float32; None: one term, as it is.
    """
    variant = terms.shape[1], scores is not None
    served = norm is None or norm.weight.dtype == stream.dtype
    served &= terms.dtype == stream.dtype
    if norm is None:
        by_kernel = served and trusted("residual", *variant, False, stream.dtype)
        return (added if by_kernel else added_plainly)(stream, terms, scores, None)[0], None
    width = stream.shape[-1]
    fits = norm.seed is not None and whole_row(width) is not None
    if served and fits and trusted("rotated residual", *variant, width, stream.dtype):
        return added_and_rotated(stream, terms, scores, norm)
    by_kernel = served and trusted("residual", *variant, True, stream.dtype)
    out, normed = (added if by_kernel else added_plainly)(stream, terms, scores, norm)
    assert normed is not None
    return out, norm.rotate(normed)


def added(stream: mx.array, terms: mx.array, scores: mx.array | None, norm: Norm | None) -> Sum:
    """`add` by the kernel."""
    out, normed = RESIDUAL(
        _inputs(stream, terms, scores, norm),
        template={
            "TERMS": terms.shape[1],
            "SCORED": scores is not None,
            "NORMED": norm is not None,
        },
        blocks=(stream.shape[0], 1, 1),
        threads=THREADS,
        outputs=[
            (stream.shape, stream.dtype),
            ((1,) if norm is None else stream.shape, stream.dtype),
        ],
    )
    return out, None if norm is None else normed


def added_and_rotated(
    stream: mx.array, terms: mx.array, scores: mx.array | None, norm: Norm
) -> tuple[mx.array, Normed]:
    """`add` with a rotation behind it, by one kernel."""
    B, _, width = stream.shape
    held = whole_row(width)
    assert held is not None and norm.seed is not None
    template, threads = held
    out, normed, halves = ROTATED_RESIDUAL(
        [*_inputs(stream, terms, scores, norm), signs(width, norm.seed)],
        template={"TERMS": terms.shape[1], "SCORED": scores is not None, **template},
        blocks=(B, 1, 1),
        threads=threads,
        outputs=[
            (stream.shape, stream.dtype),
            (stream.shape, stream.dtype),
            ((B, 1, width + SCALE_PLACE), mx.float16),
        ],
    )
    return out, Normed(normed, Rotated(halves, stream.dtype))


def whole_row(width: int) -> tuple[dict[str, int], int] | None:
    """Constants of rotate.h and the threads of a block that holds a row; None: too wide a row."""
    if not 0 < (block_size(width) or 0) <= LARGEST:
        return None
    template, blocks, threads = division(width, MOST_THREADS)
    return (template, threads) if blocks == 1 else None


def _inputs(
    stream: mx.array, terms: mx.array, scores: mx.array | None, norm: Norm | None
) -> list[mx.array]:
    """Of both kernels."""
    return [
        stream,
        terms,
        UNUSED if scores is None else at_least_8(scores),
        stream if norm is None else norm.weight,
        struct(stream.shape[-1], 0.0 if norm is None else float(norm.eps)),
    ]


def added_plainly(
    stream: mx.array, terms: mx.array, scores: mx.array | None, norm: Norm | None
) -> Sum:
    """`add` in plain operations."""
    if scores is not None:
        terms = terms.astype(mx.float32) * scores[..., None]
    total = terms.sum(axis=1, keepdims=True).astype(stream.dtype)
    out = stream + total
    return out, None if norm is None else norm(out)


@check("residual")
def _error(terms: int, scored: bool, normed: bool, dtype: mx.Dtype) -> float:
    """Relative distance of sum and norm from the twin, beyond the rounding of the result."""
    inputs, want = _example(THREADS + 40, terms, scored, normed, dtype)
    return beyond_rounding(added(*inputs), want)


@check("rotated residual")
def _rotated_error(terms: int, scored: bool, width: int, dtype: mx.Dtype) -> float:
    """As above; of what is rotated also what halves round away."""
    inputs, want = _example(width, terms, scored, True, dtype)
    out, normed = added_and_rotated(*inputs)
    assert normed.rotated is not None
    error = beyond_rounding((out, normed.plain), want)
    with mx.stream(mx.cpu):
        rotation = rotate(normed.plain)
    return max(error, distance(twins.restored(normed.rotated), rotation))


def _example(width: int, terms: int, scored: bool, normed: bool, dtype: mx.Dtype) -> Any:
    """What to add up, and what it should give in float32."""
    stream = random(3, 1, width, seed=1).astype(dtype)
    parts = random(3, terms, width, seed=2).astype(dtype)
    scores = mx.abs(random(3, terms, seed=3)) if scored else None
    norm = Norm(random(width, seed=4).astype(dtype), 1e-6, 0) if normed else None
    with mx.stream(mx.cpu):
        exact = None if norm is None else norm.in_float32()
        inputs = stream.astype(mx.float32), parts.astype(mx.float32)
        want = added_plainly(*inputs, scores, exact)
    return (stream, parts, scores, norm), want
