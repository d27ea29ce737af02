"""A few tokens of a Gated DeltaNet layer, of which the last may be taken back.

Verifying drafts feeds some tokens of each sequence at once, and only then is known how many of them
stay. A recurrent state has no history to cut. So the state before stays as it is, and beside it
what those tokens would change: with u_t and k_t as in `gated_delta.py` and c tokens accepted,

    S_c = G_c (S_0 + sum over t <= c of u_t k_t^T / G_t),

one small product however many they are. The other ways cost more: the state after each token takes
memory for as many states, and running accepted tokens again reads all matrices again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3_5, qwen3_next
from mlx_lm.models.cache import ArraysCache
from mlx_lm.models.gated_delta import normalize_qk

MOST_TOKENS = 8  # at once
LAYERS = (qwen3_5.GatedDeltaNet, qwen3_next.Qwen3NextGatedDeltaNet)
_LOG_GATE_MIN = -18.0  # as in gated_delta.py


class Revocable:
    """What a recurrent layer gets in place of its cache while drafts are verified.

    Attributes:
        behind: what the layer leaves: the entry's arrays behind the counts[i] >= 1 tokens of
            sequence i that stay, (B,) int32.
    """

    lengths = None
    behind: Callable[[mx.array], Sequence[mx.array]]

    def __init__(self, entry: ArraysCache):
        self.entry = entry

    @property
    def past(self) -> tuple[mx.array, mx.array]:
        """What the convolution still needs of tokens before, and the state behind them."""
        past, state = self.entry.cache
        assert past is not None and state is not None, "drafts come behind a prompt"
        return past, state

    def make_mask(self, N: int) -> None:
        return None

    def accept(self, counts: mx.array) -> None:
        """Of sequence i the first counts[i] tokens stay."""
        self.entry.cache = list(self.behind(counts))
        del self.behind


def several(
    mixer: Any, x: mx.array, past: mx.array, state: mx.array
) -> tuple[mx.array, tuple[mx.array, ...]]:
    """The layer's answer to a few tokens, and what `accepted` needs.

    Args:
        x: (B, L, width)
        past: (B, taps - 1, channels), inputs of the convolution.
        state: (B, value heads, Dv, Dk) float32.
    """
    B, L, _ = x.shape
    mixed, z, b, a = _projected(mixer, x)
    window = mx.concatenate([past, mixed], axis=1)
    ends = [mixer.key_dim, 2 * mixer.key_dim]
    q, k, v = mx.split(nn.silu(mixer.conv1d(window)), ends, axis=-1)
    q, k = (part.reshape(B, L, mixer.num_k_heads, mixer.head_k_dim) for part in (q, k))
    q, k = normalize_qk(q, k, inv_scale=mixer.head_k_dim**-0.5, eps=1e-6)
    v = v.reshape(B, L, mixer.num_v_heads, mixer.head_v_dim)
    rate = mx.exp(mixer.A_log.astype(mx.float32))
    log_g = -rate * nn.softplus((a + mixer.dt_bias).astype(mx.float32))
    y, held = _recurrence(q, k, v, log_g, mx.sigmoid(b), state)
    out = mixer.out_proj(mixer.norm(y.astype(x.dtype), z).reshape(B, L, -1))
    if (group := getattr(mixer, "sharding_group", None)) is not None:
        out = mx.distributed.all_sum(out, group=group)
    return out, (window, *held)


def _projected(mixer: Any, x: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """(B, L, channels) for the convolution, the output gate (B, L, heads, Dv), both gates' logits
    (B, L, heads)."""
    B, L, _ = x.shape
    if isinstance(mixer, qwen3_next.Qwen3NextGatedDeltaNet):
        parts = mixer.in_proj_qkvz(x), mixer.in_proj_ba(x)
        q, k, v, z, b, a = mixer.fix_query_key_value_ordering(*parts)
        mixed = mx.concatenate([part.reshape(B, L, -1) for part in (q, k, v)], axis=-1)
        return mixed, z, b, a
    z = mixer.in_proj_z(x).reshape(B, L, mixer.num_v_heads, mixer.head_v_dim)
    return mixer.in_proj_qkv(x), z, mixer.in_proj_b(x), mixer.in_proj_a(x)


def _recurrence(q, k, v, log_g, beta, state) -> tuple[mx.array, tuple[mx.array, ...]]:
    """(B, L, heads, d) each, gates (B, L, Hv) -> y (B, L, Hv, Dv), and u, k (B, Hv, L, d) and the
    sums of log_g (B, Hv, L)."""
    L, repeats = q.shape[1], v.shape[2] // k.shape[2]
    q, k, v = (x.astype(mx.float32).swapaxes(1, 2) for x in (q, k, v))
    q, k = (mx.repeat(x, repeats, axis=1) for x in (q, k))
    log_G = mx.cumsum(mx.maximum(log_g, _LOG_GATE_MIN), axis=1).swapaxes(1, 2)
    G, beta = mx.exp(log_G)[..., None], beta.astype(mx.float32).swapaxes(1, 2)[..., None]
    t = mx.arange(L)
    behind = t[:, None] >= t
    difference = log_G[..., :, None] - log_G[..., None, :]
    decay = mx.exp(mx.where(behind, difference, -mx.inf))  # G_t / G_i for i <= t
    read = mx.concatenate([k, q], axis=2)  # the state is read once for both
    recalled, pairs = read @ state.swapaxes(-1, -2), read @ k.swapaxes(-1, -2)
    A = mx.where(t[:, None] > t, pairs[..., :L, :] * decay * beta, 0.0)
    u = _inverse(A) @ (beta * (v - G * recalled[..., :L, :]))
    y = G * recalled[..., L:, :] + (pairs[..., L:, :] * decay) @ u
    return y.swapaxes(1, 2), (u, k, log_G)


def _inverse(A: mx.array) -> mx.array:
    """(I + A)^-1 of a strictly lower triangular A of at most 8 rows: its 8th power is 0."""
    L, eye = A.shape[-1], mx.eye(A.shape[-1])
    inverse, power = eye - A, A
    for _ in range((L - 1).bit_length() - 1):
        power = power @ power
        inverse = inverse + inverse @ power
    return inverse


@mx.compile
def accepted(
    state: mx.array, window: mx.array, u: mx.array, k: mx.array, log_G: mx.array, counts: mx.array
) -> tuple[mx.array, mx.array]:
    """What the convolution still needs and the state, behind counts[i] tokens of sequence i."""
    L = k.shape[2]
    at = counts[:, None] + mx.arange(window.shape[1] - L)
    past = mx.take_along_axis(window, at[..., None], axis=1)
    last = mx.take_along_axis(log_G, counts[:, None, None] - 1, axis=2)  # (B, Hv, 1)
    stays = mx.arange(L) < counts[:, None, None]
    share = mx.exp(mx.where(stays, last - log_G, -mx.inf))[..., None]  # G_c / G_t
    return past, mx.exp(last)[..., None] * state + (u * share).swapaxes(-1, -2) @ k
