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
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3_5, qwen3_next
from mlx_lm.models.cache import ArraysCache

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
    qk, v = mx.split(nn.silu(mixer.conv1d(window)), [2 * mixer.key_dim], axis=-1)
    Dk, heads = mixer.head_k_dim, (B, L, mixer.num_k_heads, -1)  # each with its value heads
    qk = mx.fast.rms_norm(qk.reshape(B, L, -1, Dk), None, 1e-6 / Dk)  # of length Dk^0.5
    qk = qk.reshape(B, L, 2, heads[2], Dk).transpose(0, 3, 2, 1, 4).astype(mx.float32)
    read = qk.reshape(B, heads[2], 1, 2 * L, Dk) * Dk**-0.5
    v = v.reshape(*heads, mixer.head_v_dim).transpose(0, 2, 3, 1, 4).astype(mx.float32)
    rate = mx.exp(mixer.A_log.astype(mx.float32))
    log_g = -rate * nn.softplus((a + mixer.dt_bias).astype(mx.float32))
    gates = mx.maximum(log_g, _LOG_GATE_MIN), mx.sigmoid(b).astype(mx.float32)
    log_g, beta = (gate.reshape(heads).transpose(0, 2, 3, 1) for gate in gates)
    y, held = _recurrence(read, v, log_g, beta, state.reshape(B, heads[2], -1, *state.shape[2:]))
    y = (Dk**-0.5 * y).transpose(0, 3, 1, 2, 4).reshape(B, L, -1, mixer.head_v_dim)
    out = mixer.out_proj(mixer.norm(y.astype(x.dtype), z).reshape(B, L, -1))
    if (group := getattr(mixer, "sharding_group", None)) is not None:
        out = mx.distributed.all_sum(out, group=group)
    return out, (window, *held)


def single(
    mixer: Any, x: mx.array, past: mx.array, state: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """The layer's answer to a token (B, 1, width), and what the convolution still needs and the
    state behind it."""
    out, (window, u, k, log_G) = several(mixer, x, past, state)
    new = mx.exp(log_G)[..., None] * _by_key_head(state, u) + u.swapaxes(-1, -2) * k
    return out, window[:, 1:], new.reshape(state.shape)


def _by_key_head(state: mx.array, u: mx.array) -> mx.array:
    """(B, heads, Dv, Dk) -> (B, key heads, value heads of each, Dv, Dk), as `u` has them."""
    return state.reshape(*u.shape[:3], *state.shape[2:])


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


def _recurrence(
    read: mx.array, v: mx.array, log_g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, tuple[mx.array, ...]]:
    """
    Args:
        read: (B, key heads, 1, 2 L, Dk) queries, then keys.
        v: (B, key heads, value heads of each, L, Dv); log_g, beta: the same without Dv.
        state: (B, key heads, value heads of each, Dv, Dk)

    Returns:
        y as v, and u as v, keys as they came, and the sums of log_g.
    """
    L, k = v.shape[3], read[..., v.shape[3] :, :]
    recalled, pairs = read @ state.swapaxes(-1, -2), read @ k.swapaxes(-1, -2)
    log_G = mx.cumsum(log_g, axis=-1) if L > 1 else log_g
    G = mx.exp(log_G)[..., None]
    u = own = beta[..., None] * (v - G * recalled[..., L:, :])
    if L == 1:
        return G * recalled[..., :L, :] + pairs[..., :L, :] * u, (u, k, log_G)
    behind, before = _triangles(L)
    difference = log_G[..., :, None] - log_G[..., None, :]
    decay = mx.exp(mx.where(behind, difference, -mx.inf))  # G_t / G_i for i <= t
    A = mx.where(before, pairs[..., L:, :] * decay * beta[..., None], 0.0)
    for _ in range(L - 1):  # (I + A) u = own: each round makes one token more right
        u = own - A @ u
    return G * recalled[..., :L, :] + (pairs[..., :L, :] * decay) @ u, (u, k, log_G)


@lru_cache
def _triangles(L: int) -> tuple[mx.array, mx.array]:
    """(L, L) whether a column is a token of the row or before, and whether it is before."""
    found = mx.tril(mx.ones((L, L))) > 0, mx.tril(mx.ones((L, L)), -1) > 0
    mx.eval(found)
    return found


@mx.compile
def accepted(
    state: mx.array, window: mx.array, u: mx.array, k: mx.array, log_G: mx.array, counts: mx.array
) -> tuple[mx.array, mx.array]:
    """What the convolution still needs and the state, behind counts[i] tokens of sequence i."""
    L = k.shape[3]
    at = counts[:, None] + mx.arange(window.shape[1] - L)
    past = mx.take_along_axis(window, at[..., None], axis=1)
    last = mx.take_along_axis(log_G, counts[:, None, None, None] - 1, axis=3)  # (B, Hk, Hv / Hk, 1)
    stays = mx.arange(L) < counts[:, None, None, None]
    share = mx.exp(mx.where(stays, last - log_G, -mx.inf))[..., None]  # G_c / G_t
    new = mx.exp(last)[..., None] * _by_key_head(state, u) + (u * share).swapaxes(-1, -2) @ k
    return past, new.reshape(state.shape)
