"""Which experts a single token goes to: the launch of `routing.h`, and its twin."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from tqstack.attention.kernels.program import Program
from tqstack.attention.kernels.trust import check, distance, random, trusted

MOST_CHOSEN, MOST_EXPERTS = 31, 1024  # a lane each, with the shared one; registers of a warp
_FOLDER = Path(__file__).parent
ROUTE = Program(
    name="route",
    headers=(_FOLDER / "sums.h", _FOLDER / "routing.h"),
    call="route<EXPERTS, CHOSEN, NORMALISED>(logits, gates_and_ups, downs, scores, tid, block.x);",
    inputs=("logits",),
    outputs=("gates_and_ups", "downs", "scores"),
)

Routes = tuple[mx.array, mx.array, mx.array]


def route(logits: mx.array, chosen: int, normalised: bool) -> Routes:
    """The best experts of each token, and behind them the shared one.

    Args:
        logits: (B, experts + 1), the last one of the shared expert's gate.
        chosen: experts of a token, without the shared one.
        normalised: whether their scores add up to 1.

    Returns:
        (B, 2 (chosen + 1)) of gate matrices, then of up matrices in a stack of both; (B,
        chosen + 1) of down matrices, all uint32; (B, chosen + 1) scores in float32.
    """
    experts = logits.shape[-1] - 1
    serves = chosen <= min(MOST_CHOSEN, experts) and experts <= MOST_EXPERTS
    if serves and trusted("route", experts, chosen, normalised, logits.dtype):
        return routed(logits, chosen, normalised)
    return routed_plainly(logits, chosen, normalised)


def routed(logits: mx.array, chosen: int, normalised: bool) -> Routes:
    """`route` by the kernel."""
    rows, count = logits.shape
    everyone = chosen + 1
    gates_and_ups, downs, scores = ROUTE(
        [logits],
        template={"EXPERTS": count - 1, "CHOSEN": chosen, "NORMALISED": normalised},
        blocks=(rows, 1, 1),
        threads=32,
        outputs=[
            ((rows, 2 * everyone), mx.uint32),
            ((rows, everyone), mx.uint32),
            ((rows, everyone), mx.float32),
        ],
    )
    return gates_and_ups, downs, scores


def routed_plainly(logits: mx.array, chosen: int, normalised: bool) -> Routes:
    """`route` in plain operations."""
    experts = logits.shape[-1] - 1
    logits = logits.astype(mx.float32)
    gates = mx.softmax(logits[:, :experts], axis=-1)
    best = mx.argpartition(gates, kth=-chosen, axis=-1)[:, -chosen:]
    scores = mx.take_along_axis(gates, best, axis=-1)
    if normalised:
        scores = scores / scores.sum(axis=-1, keepdims=True)
    shared = mx.full((len(logits), 1), experts, dtype=mx.uint32)
    downs = mx.concatenate([best.astype(mx.uint32), shared], axis=-1)
    scores = mx.concatenate([scores, mx.sigmoid(logits[:, experts:])], axis=-1)
    return mx.concatenate([downs, downs + (experts + 1)], axis=-1), downs, scores


@check("route")
def _error(experts: int, chosen: int, normalised: bool, dtype: mx.Dtype) -> float:
    """Relative distance of what all experts' scores are in the end; 1 where indices disagree."""
    rows = 5
    order = mx.argsort(random(rows, experts + 1, seed=1), axis=-1)  # no two logits are the same
    logits = (order * (8 / experts) - 4).astype(dtype)
    logits[1] = logits[1] / 16  # also where scores are nearly equal
    got = routed(logits, chosen, normalised)
    with mx.stream(mx.cpu):
        want = routed_plainly(logits, chosen, normalised)
        firsts, downs, _ = got
        same = mx.array_equal(firsts, mx.concatenate([downs, downs + (experts + 1)], axis=-1))
        spread = [_by_expert(*routes[1:], experts + 1) for routes in (got, want)]
    return distance(*spread) if same.item() else 1.0


def _by_expert(downs: mx.array, scores: mx.array, experts: int) -> mx.array:
    """(B, experts), 0 for those that are not chosen."""
    at = downs[..., None] == mx.arange(experts)
    return (at * scores[..., None]).sum(axis=1)
