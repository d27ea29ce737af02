"""The gated delta rule on CUDA: the launch of `gated_delta.h`."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from tqstack.attention.kernels.arguments import integers
from tqstack.attention.kernels.program import Program

THREADS = 128
LANES = 8  # that share a row of the state; measured

GATED_DELTA = Program(
    name="gated_delta",
    headers=(Path(__file__).with_name("gated_delta.h"),),
    call="""
gated_delta<DK, DV, LANES, MASKED>(
    q, k, v, a, b, log_rate, bias, mask, state, (IN(DeltaCall))call, y, new_state,
    tid, block.x, block.y);""",
    inputs=("q", "k", "v", "a", "b", "log_rate", "bias", "mask", "state", "call"),
    outputs=("y", "new_state"),
)


def serves(q: mx.array, v: mx.array) -> bool:
    """Whether the kernel has lanes for these head sizes: whole 16-byte loads for each."""
    return q.shape[-1] % (8 * LANES) == 0 and q.shape[1] > 0


def recurrence(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    state: mx.array,
    mask: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """Shapes as in `tqstack.models.layers.gated_delta.gated_delta_update`; state float32."""
    B, T, Hk, Dk = k.shape
    Hv, Dv = v.shape[-2:]
    y, new_state = GATED_DELTA(
        [
            q,
            k,
            v,
            a,
            b,
            A_log,
            dt_bias,
            _UNMASKED if mask is None else mask,
            state,
            integers(T, Hk, Hv),
        ],
        template={"DK": Dk, "DV": Dv, "LANES": LANES, "MASKED": mask is not None},
        blocks=(-(-Dv * LANES // THREADS), B * Hv, 1),
        threads=THREADS,
        outputs=[(v.shape, q.dtype), (state.shape, mx.float32)],
    )
    return y, new_state


_UNMASKED = mx.ones(1, dtype=mx.bool_)
