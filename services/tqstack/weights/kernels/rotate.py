"""The rotation of a layer's inputs as one launch of `rotate.h`."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from pathlib import Path

import mlx.core as mx

from tqstack.attention.kernels.arguments import integers
from tqstack.attention.kernels.program import Program
from tqstack.attention.kernels.trust import check, distance, random, trusted
from tqstack.weights.kernels import twins
from tqstack.weights.kernels.twins import SCALE_PLACE, Rotated
from tqstack.weights.rotation import block_size, rotate, signs

FOLDER = Path(__file__).parent
HEADERS = ("hadamard.h", FOLDER / "inputs.h", FOLDER / "rotate.h")
LARGEST = 1 << 14  # block


def _program(body: str, *inputs: str) -> Program:
    return Program(
        name=body,
        headers=HEADERS,
        call=f"""
SHARED_ARRAY float memory[Rotation<M, P, TEAM, TEAMS>::SHARED_WORDS];
{body}<M, P, TEAM, TEAMS>({", ".join(inputs)}, signs, (IN(RotateCall))call, halves, memory, tid,
                          block.x, block.y);""",
        inputs=(*inputs, "signs", "call"),
        outputs=("halves",),
    )


ROTATE = _program("rotate", "x")
ACTIVATED = _program("rotate_activated", "x")
ANSWERS = _program("rotate_answers", "x", "gates")


def rotated(x: mx.array, seed: int = 0) -> Rotated:
    """(..., K) of any float type, for all layers whose inputs these are. K has a Hadamard block."""
    if x.size and _serves("as they are", x.shape[-1], x.dtype):
        return _launch(ROTATE, [x], x.shape, seed)
    return twins.halved(rotate(x, seed), x.dtype)


def rotated_activations(both: mx.array, seed: int = 0) -> Rotated:
    """(B, 2 n, 1, K), gates of n MLPs and then what these are for -> (B, n, 1, K): silu(gate) up,
    rotated."""
    B, double, _, width = both.shape
    if both.size and _serves("activated", width, both.dtype):
        group = double // 2
        return _launch(ACTIVATED, [both], (B, group, 1, width), seed, group)
    return twins.halved(rotate(twins.activated(both), seed), both.dtype)


def rotated_answers(answers: mx.array, gates: mx.array, stride: int, seed: int = 0) -> Rotated:
    """Attention's answers (B, heads, 1, D) times the sigmoid of their gates -> (B, 1, heads D).

    gates: (B, width), in which each head's are the last D of `stride`.
    """
    B, heads, _, D = answers.shape
    shape = (B, 1, heads * D)
    if answers.dtype == gates.dtype and _serves("answers", heads * D, answers.dtype):
        sizes = 0, D, stride, gates.shape[-1]
        return _launch(ANSWERS, [answers, gates], shape, seed, *sizes)
    return twins.halved(rotate(twins.gated(answers, gates, stride), seed), answers.dtype)


def _serves(kind: str, width: int, dtype: mx.Dtype) -> bool:
    block = block_size(width)
    return bool(block) and block <= LARGEST and trusted("rotation", block, kind, dtype)


def _launch(
    program: Program, inputs: list[mx.array], shape: tuple[int, ...], seed: int, *sizes: int
) -> Rotated:
    width, rows = shape[-1], prod(shape[:-1])
    template, blocks, threads = division(width)
    call = integers(width // (template["M"] * template["P"]), *sizes)
    (halves,) = program(
        [*inputs, signs(width, seed), call],
        template=template,
        blocks=(blocks, rows, 1),
        threads=threads,
        outputs=[((*shape[:-1], width + SCALE_PLACE), mx.float16)],
    )
    return Rotated(halves, inputs[0].dtype)


@lru_cache(maxsize=16)
def division(width: int, most: int = 512) -> tuple[dict[str, int], int, int]:
    """Constants of rotate.h for rows of so many values, and a row's blocks of so many threads, at
    most `most` where it is a matter of choice."""
    M, P, team = _team(block_size(width) or 0)
    blocks = width // (M * P)
    teams = min(max(1, most // team), max(1, 8192 // (M * P)), blocks)
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
def _error(block: int, kind: str, dtype: mx.Dtype) -> float:
    """Of several blocks, with an outlier. Halves are rounded, which both do."""
    width = block * (1 if block >= 4096 else 3)
    if kind == "activated":
        both = random(2, 6, 1, width, seed=block).astype(dtype)
        got, exact = _launch(ACTIVATED, [both], (2, 3, 1, width), 0, 3), twins.activated(both)
    elif kind == "answers":
        D = block // 2
        answers = random(3, width // D, 1, D, seed=block).astype(dtype)
        gates = random(3, width // D * (2 * D) + 24, seed=1).astype(dtype)
        sizes = 0, D, 2 * D, gates.shape[-1]
        got = _launch(ANSWERS, [answers, gates], (3, 1, width), 0, *sizes)
        exact = twins.gated(answers, gates, 2 * D)
    else:
        x = random(3, width, seed=block)
        x[1] *= 1e-3
        x[2, 5] = 3e4
        exact = x.astype(dtype)
        got = _launch(ROTATE, [exact], exact.shape, 0)
    rows = twins.restored(got).reshape(-1, width)
    with mx.stream(mx.cpu):
        want = rotate(exact).reshape(-1, width)
    return max(distance(a, b) for a, b in zip(rows, want, strict=True))
