"""What a half of a layer ends with, for single tokens: a sum of its results is added to the
residual stream, and the next half's RMSNorm follows. The launch of `residual.h`, and its twin."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from tqstack.attention.kernels.arguments import UNUSED, at_least_8, struct
from tqstack.attention.kernels.program import Program
from tqstack.attention.kernels.trust import check, distance, random, trusted

THREADS = 512  # as in residual.h
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


class Norm(NamedTuple):
    """An RMSNorm: weight (width,) and epsilon."""

    weight: mx.array
    eps: float

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.weight, self.eps)

    def in_float32(self) -> Norm:
        return Norm(self.weight.astype(mx.float32), self.eps)


def add(
    stream: mx.array, terms: mx.array, scores: mx.array | None, norm: Norm | None
) -> tuple[mx.array, mx.array | None]:
    """stream + sum of scores x terms, and its RMSNorm if there is one.

    Args:
        stream: (B, 1, width)
        terms: (B, terms, width) in the stream's type.
        scores: (B, terms) float32; None: one term, as it is.
    """
    variant = terms.shape[1], scores is not None, norm is not None, stream.dtype
    served = norm is None or norm.weight.dtype == stream.dtype
    if served and terms.dtype == stream.dtype and trusted("residual", *variant):
        return added(stream, terms, scores, norm)
    return added_plainly(stream, terms, scores, norm)


def added(
    stream: mx.array, terms: mx.array, scores: mx.array | None, norm: Norm | None
) -> tuple[mx.array, mx.array | None]:
    """`add` by the kernel."""
    width = stream.shape[-1]
    out, normed = RESIDUAL(
        [
            stream,
            terms,
            UNUSED if scores is None else at_least_8(scores),
            stream if norm is None else norm.weight,
            struct(width, 0.0 if norm is None else float(norm.eps)),
        ],
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


def added_plainly(
    stream: mx.array, terms: mx.array, scores: mx.array | None, norm: Norm | None
) -> tuple[mx.array, mx.array | None]:
    """`add` in plain operations."""
    if scores is not None:
        terms = terms.astype(mx.float32) * scores[..., None]
    total = terms.sum(axis=1, keepdims=True).astype(stream.dtype)
    out = stream + total
    return out, None if norm is None else norm(out)


@check("residual")
def _error(terms: int, scored: bool, normed: bool, dtype: mx.Dtype) -> float:
    """Relative distance of sum and norm from the twin, beyond the rounding of the result."""
    width = THREADS + 40
    stream = random(3, 1, width, seed=1).astype(dtype)
    parts = random(3, terms, width, seed=2).astype(dtype)
    scores = mx.abs(random(3, terms, seed=3)) if scored else None
    norm = Norm(random(width, seed=4).astype(dtype), 1e-6) if normed else None
    got = added(stream, parts, scores, norm)
    with mx.stream(mx.cpu):
        exact = None if norm is None else norm.in_float32()
        inputs = stream.astype(mx.float32), parts.astype(mx.float32)
        want = added_plainly(*inputs, scores, exact)
    return beyond_rounding(got, want)


def beyond_rounding(
    got: tuple[mx.array | None, ...], want: tuple[mx.array | None, ...], roundings: int = 2
) -> float:
    """The largest distance of a result from its float32 twin, less what its type rounds away."""
    pairs = [(a, b) for a, b in zip(got, want, strict=True) if a is not None and b is not None]
    errors = [distance(a, b) - roundings * distance(b.astype(a.dtype), b) for a, b in pairs]
    return max(0.0, *errors) if all(e == e for e in errors) else float("nan")
