"""The gated delta rule as matrix products, for machines without Metal.

mlx-lm runs Gated DeltaNet with a Metal kernel, and everywhere else with a Python loop over tokens.
Here a chunk of C tokens becomes a handful of matrix products (the WY form of Yang et al.,
arXiv 2412.06464), and only one product per chunk is sequential. Per head, with state S (Dv, Dk),

    S_t = g_t S_{t-1} + u_t k_t^T,   u_t = beta_t (v_t - g_t S_{t-1} k_t),   y_t = S_t q_t.

With G_t = g_1 ... g_t inside the chunk, the rows of U solve (I + A) U = beta V - (beta G K) S_0^T,
where A_ti = beta_t (G_t / G_i) <k_t, k_i> for i < t. Everything but S_0 is known for all chunks at
once, and S_0 moves to the next chunk by one product: S_C = S_0 M + N.

CUDA has a kernel for the recurrence itself (`recurrence.py`), which keeps the state in
registers; this form is what the CPU runs, and what the kernel is compared with.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gated_delta as mlx_gated_delta

from tqstack.attention.exponential import exp
from tqstack.attention.kernels.program import gpu_dialect
from tqstack.attention.kernels.trust import check, distance, random, trusted
from tqstack.models.layers import recurrence as kernel

# Tokens whose intermediate matrices exist at once: they take 0.4 GB for 32 heads of 128.
SEGMENT = 2048
# Gates below exp(-18) are 0 to float32 beside 1. Larger sums would cost the small gates' digits.
_LOG_GATE_MIN = -18.0
_FORGOTTEN = 2.0**-58  # of a state: below it nothing is left, and products stay normal numbers


def install(model: nn.Module) -> int:
    """Make a model's Gated DeltaNet layers use `gated_delta_update` of this module.

    Replaces the name in the module that defines the layer's class, where its call looks it up.
    Returns the number of layers served.
    """
    layers = 0
    for module in model.modules():
        call: Any = type(module).__call__
        code = getattr(call, "__code__", None)
        if code is not None and "gated_delta_update" in code.co_names:
            call.__globals__["gated_delta_update"] = gated_delta_update
            layers += 1
    return layers


def gated_delta_update(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    *,
    use_kernel: bool = True,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
) -> tuple[mx.array, mx.array]:
    """Same contract as `mlx_lm.models.gated_delta.gated_delta_update`.

    Args:
        q, k: (B, T, Hk, Dk), normalised by the caller.
        v: (B, T, Hv, Dv), Hv a multiple of Hk.
        a, b: (B, T, Hv), logits of decay and update rate. A gate per channel (4 axes) is left to
            mlx-lm.
        state: (B, Hv, Dv, Dk) float32; zeros if left out.
        mask: (B, T) bool; tokens that are False leave the state alone.

    Returns:
        y (B, T, Hv, Dv) in q's dtype and the new state, float32.
    """
    if a.ndim != 3:
        return mlx_gated_delta.gated_delta_update(
            *(q, k, v, a, b, A_log, dt_bias, state, mask),
            use_kernel=use_kernel,
            lower_bound=lower_bound,
            allow_neg_eigval=allow_neg_eigval,
        )
    plain = lower_bound is None and not allow_neg_eigval
    if plain and use_kernel and kernel.serves(q, v) and _kernel_agrees(q, v, A_log, dt_bias):
        if state is None:
            state = mx.zeros((*v.shape[:1], *v.shape[2:], k.shape[-1]))
        k, v, a, b = (x.astype(q.dtype) for x in (k, v, a, b))
        return kernel.recurrence(q, k, v, a, b, A_log, dt_bias, state.astype(mx.float32), mask)
    rate = mx.exp(A_log.astype(mx.float32))
    if lower_bound is None:
        log_g = -rate * nn.softplus(a + dt_bias)
    else:
        log_g = lower_bound * mx.sigmoid(rate * (a.astype(mx.float32) + dt_bias))
    beta = mx.sigmoid(b).astype(mx.float32)
    if allow_neg_eigval:
        beta = beta * 2.0
    return gated_delta(q, k, v, log_g, beta, state, mask)


def _kernel_agrees(q: mx.array, v: mx.array, *heads: mx.array) -> bool:
    """Whether there is a CUDA kernel here and it gives the numbers of `gated_delta`."""
    types = q.dtype, *(x.dtype for x in heads)
    return gpu_dialect() == "cuda" and trusted("gated delta", q.shape[-1], v.shape[-1], *types)


@check("gated delta")
def _kernel_error(
    Dk: int, Dv: int, dtype: mx.Dtype, rate_dtype: mx.Dtype, bias_dtype: mx.Dtype
) -> float:
    """Relative distance of outputs and state over 40 tokens, beyond the rounding of the former."""
    T, Hk, Hv = 40, 1, 2
    shapes = [(1, T, Hk, Dk)] * 2 + [(1, T, Hv, Dv)] + [(1, T, Hv)] * 2
    q, k, *rest = (random(*shape, seed=i) for i, shape in enumerate(shapes))
    q, k = (x / mx.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    q, k, v, a, b = (x.astype(dtype) for x in (q, k, *rest))
    A_log, dt_bias = mx.array([0.0, 2.0], dtype=rate_dtype), mx.ones(Hv, dtype=bias_dtype)
    state = mx.zeros((1, Hv, Dv, Dk))
    y, last = kernel.recurrence(q, k, v, a, b, A_log, dt_bias, state, None)
    with mx.stream(mx.cpu):
        q, k, v, a, b = (x.astype(mx.float32) for x in (q, k, v, a, b))
        log_g = -mx.exp(A_log.astype(mx.float32)) * nn.softplus(a + dt_bias)
        want, end = gated_delta(q, k, v, log_g, mx.sigmoid(b))
    rounding = distance(want.astype(dtype), want)
    return max(0.0, distance(y, want) - 2 * rounding, distance(last, end))


def gated_delta(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_g: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """The recurrence with gates given: log_g <= 0 and beta, both (B, T, Hv). Else as above."""
    B, T, _, Dk = k.shape
    Hv, Dv = v.shape[-2:]
    state = mx.zeros((B, Hv, Dv, Dk)) if state is None else state.astype(mx.float32)
    log_g = mx.maximum(log_g.astype(mx.float32), _LOG_GATE_MIN)
    if mask is not None:
        log_g, beta = (mx.where(mask[..., None], x, 0.0) for x in (log_g, beta))
    if T == 1:
        return _step(q, k, v, log_g, beta, state)
    parts = []
    for start in range(0, T, SEGMENT):
        at = slice(start, start + SEGMENT)
        y, state = _chunked(q[:, at], k[:, at], v[:, at], log_g[:, at], beta[:, at], state)
        parts.append(y.astype(q.dtype))
    return (parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)), state


def _step(q, k, v, log_g, beta, state) -> tuple[mx.array, mx.array]:
    """One token, reading the state once for both <S, k> and <S, q>."""
    repeats = v.shape[2] // k.shape[2]
    qk = mx.stack([q[:, 0], k[:, 0]], axis=-1).astype(mx.float32)  # (B, Hk, Dk, 2)
    qk = mx.repeat(qk, repeats, axis=1)
    g, beta = mx.exp(log_g[:, 0])[..., None], beta[:, 0, :, None]  # (B, Hv, 1)
    read = (state @ qk) * g[..., None]  # (B, Hv, Dv, 2)
    u = (v[:, 0].astype(mx.float32) - read[..., 1]) * beta  # (B, Hv, Dv)
    y = read[..., 0] + u * (qk[..., 0] * qk[..., 1]).sum(axis=-1, keepdims=True)
    state = state * g[..., None] + u[..., None] * qk[..., None, :, 1]
    return y[:, None].astype(q.dtype), state


def _chunked(q, k, v, log_g, beta, state) -> tuple[mx.array, mx.array]:
    B, T, Hk, Dk = k.shape
    Hv, Dv = v.shape[-2:]
    C = _chunk_size(T, Dk)
    N = -(-T // C)

    def chunks(x):  # (B, T, H, ...) -> (B, H, N, C, ...), float32; padded tokens change nothing
        x = mx.pad(x.astype(mx.float32), [(0, 0), (0, N * C - T)] + [(0, 0)] * (x.ndim - 2))
        return mx.moveaxis(x.reshape(B, N, C, *x.shape[2:]), 3, 1)

    def per_value_head(x):
        return mx.repeat(x, Hv // Hk, axis=1)

    q, k, v, log_g, beta = (chunks(x) for x in (q, k, v, log_g, beta))
    beta = beta[..., None]
    log_G = mx.cumsum(log_g, axis=-1)  # (B, Hv, N, C)
    G = _decay(log_G)[..., None]
    t = mx.arange(C)
    difference = log_G[..., :, None] - log_G[..., None, :]
    decay = _decay(mx.where(t[:, None] >= t, difference, -mx.inf))  # G_t / G_i for i <= t
    k_t = k.swapaxes(-1, -2)
    A = mx.where(t[:, None] > t, per_value_head(k @ k_t) * decay * beta, 0.0)
    scores = per_value_head(q @ k_t) * decay
    q, k = per_value_head(q), per_value_head(k)

    inverse = _unit_lower_inverse(A)  # (B, Hv, N, C, C)
    W = inverse @ (k * (beta * G))  # U = U_0 - W S_0^T
    U_0 = inverse @ (v * beta)
    k_end = k * _decay(log_G[..., -1:] - log_G)[..., None]  # decayed to the chunk's end
    M = G[..., -1:, :] * mx.eye(Dk) - W.swapaxes(-1, -2) @ k_end  # (B, Hv, N, Dk, Dk)
    step = U_0.swapaxes(-1, -2) @ k_end  # (B, Hv, N, Dv, Dk)
    starts = []
    for n in range(N):
        starts.append(state)
        state = mx.addmm(step[:, :, n], state, M[:, :, n])
    S_0 = mx.stack(starts, axis=2).swapaxes(-1, -2)  # (B, Hv, N, Dk, Dv)

    y = (q * G) @ S_0 + scores @ (U_0 - W @ S_0)  # (B, Hv, N, C, Dv)
    return mx.moveaxis(y, 1, 3).reshape(B, N * C, Hv, Dv)[:, :T], state


def _decay(log_gate: mx.array) -> mx.array:
    """e^log_gate, and 0 where nobody could tell: CPUs take 100 times as long for products that
    are too small for a normal float32."""
    return mx.maximum(exp(log_gate) - _FORGOTTEN, 0)


def _chunk_size(T: int, Dk: int) -> int:
    """Measured on two CPU cores: C much below Dk spends its time in M, C above it in `decay`."""
    best = 64 if Dk >= 128 else 32
    return min(best, max(8, 1 << (T - 1).bit_length()))


def _unit_lower_inverse(A: mx.array) -> mx.array:
    """(I + A)^-1 for strictly lower triangular A (..., C, C), C a power of two and at least 4.

    Diagonal blocks of 4 by the (finite) Neumann series, then twice as large blocks from pairs:
    [[P, 0], [L, R]]^-1 = [[P^-1, 0], [-R^-1 L P^-1, R^-1]]. A Neumann series of the whole matrix
    would be simpler, but repeated tokens (k_t = k_i) make its powers grow to 1e18.
    """
    C, size = A.shape[-1], 4

    def blocks(row: int, column: int, stride: int) -> mx.array:  # (..., C / stride, size, size)
        starts = range(0, C, stride)
        return mx.stack(
            [A[..., i + row : i + row + size, i + column : i + column + size] for i in starts],
            axis=-3,
        )

    diagonal, eye = blocks(0, 0, size), mx.eye(size)
    inverse = (eye - diagonal) @ (eye + diagonal @ diagonal)
    while size < C:
        top, bottom = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = -(bottom @ (blocks(size, 0, 2 * size) @ top))
        upper = mx.concatenate([top, mx.zeros_like(top)], axis=-1)
        lower = mx.concatenate([corner, bottom], axis=-1)
        inverse = mx.concatenate([upper, lower], axis=-2)
        size *= 2
    return inverse[..., 0, :, :]
