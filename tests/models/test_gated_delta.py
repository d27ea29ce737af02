"""The matrix-product form of the gated delta rule against mlx-lm's token-by-token recurrence."""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models import gated_delta as reference
from mlx_lm.models import qwen3_5, qwen3_next

from tqstack.models.layers import gated_delta as gd

TOLERANCE = 1e-4


def inputs(B, T, Hk=2, Hv=4, Dk=32, Dv=16, seed=0, strongest=1.0):
    """Unit keys, scaled queries, log-gates in [-strongest, 0], a state that is not zero."""
    keys = iter(mx.random.split(mx.random.key(seed), 6))
    q, k = (mx.random.normal((B, T, Hk, Dk), key=next(keys)) for _ in range(2))
    q, k = reference.normalize_qk(q, k, inv_scale=Dk**-0.5, eps=1e-6)
    v = mx.random.normal((B, T, Hv, Dv), key=next(keys))
    log_g = -strongest * mx.random.uniform(shape=(B, T, Hv), key=next(keys))
    beta = mx.random.uniform(shape=(B, T, Hv), key=next(keys))
    state = mx.random.normal((B, Hv, Dv, Dk), key=next(keys))
    return q, k, v, log_g, beta, state


def recurrence(q, k, v, log_g, beta, state, mask=None):
    return reference.gated_delta_ops(q, k, v, mx.exp(log_g), beta, state, mask)


def error(got, want):
    return mx.abs(got - want).max().item()


@pytest.mark.parametrize("Dk", [32, 128])  # both chunk lengths
@pytest.mark.parametrize("T", [1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65, 130])
def test_same_outputs_and_state_as_the_recurrence_at_every_chunk_boundary(T, Dk):
    data = inputs(2, T, Dk=Dk)
    y, state = gd.gated_delta(*data)
    y_want, state_want = recurrence(*data)
    assert error(y, y_want) < TOLERANCE
    assert error(state, state_want) < TOLERANCE


@given(
    cuts=st.lists(st.integers(1, 99), min_size=1, max_size=4, unique=True),
    seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=15, deadline=None)
def test_a_prompt_in_pieces_ends_in_the_same_state_as_in_one(cuts, seed):
    *tokens, state = inputs(1, 100, seed=seed)
    y_whole, state_whole = gd.gated_delta(*tokens, state)
    ys, edges = [], [0, *sorted(cuts), 100]
    for start, stop in pairwise(edges):
        y, state = gd.gated_delta(*(x[:, start:stop] for x in tokens), state)
        ys.append(y)
    assert error(mx.concatenate(ys, axis=1), y_whole) < TOLERANCE
    assert error(state, state_whole) < TOLERANCE


def test_segments_bound_memory_and_change_nothing(monkeypatch):
    data = inputs(1, 150)
    monkeypatch.setattr(gd, "SEGMENT", 64)
    y, state = gd.gated_delta(*data)
    y_want, state_want = recurrence(*data)
    assert error(y, y_want) < TOLERANCE
    assert error(state, state_want) < TOLERANCE


@pytest.mark.parametrize("T", [1, 40])
def test_masked_tokens_leave_the_state_alone(T):
    data = inputs(3, T)
    mask = mx.random.uniform(shape=(3, T)) > 0.4
    y, state = gd.gated_delta(*data, mask=mask)
    y_want, state_want = recurrence(*data, mask=mask)
    assert error(mx.where(mask[..., None, None], y - y_want, 0.0), mx.array(0.0)) < TOLERANCE
    assert error(state, state_want) < TOLERANCE
    _, untouched = gd.gated_delta(*data, mask=mx.zeros((3, T), dtype=mx.bool_))
    assert error(untouched, data[-1]) == 0.0


@pytest.mark.parametrize("strongest", [30.0, 1000.0])
def test_decay_down_to_zero_neither_overflows_nor_costs_digits(strongest):
    q, k, v, log_g, beta, state = inputs(1, 96, strongest=strongest)
    # Gates that close for a while, then stay wide open: small differences of large sums.
    log_g = mx.where(mx.arange(96)[:, None] % 64 < 32, log_g, -0.001)
    y, state_got = gd.gated_delta(q, k, v, log_g, beta, state)
    y_want, state_want = recurrence(q, k, v, log_g, beta, state)
    assert error(y, y_want) < TOLERANCE
    assert error(state_got, state_want) < TOLERANCE


# 2: models that allow negative eigenvalues. The matrix of 64 such tokens is worse conditioned.
@pytest.mark.parametrize(("rate", "tolerance"), [(1.0, TOLERANCE), (2.0, 20 * TOLERANCE)])
def test_one_token_repeated_does_not_blow_up_the_triangular_inverse(rate, tolerance):
    q, k, v, log_g, beta, state = inputs(1, 128, Dk=128)
    q, k = (mx.broadcast_to(x[:, :1], x.shape) for x in (q, k))
    data = q, k, v, log_g * 0.001, mx.full(beta.shape, rate), state
    y, state = gd.gated_delta(*data)
    y_want, state_want = recurrence(*data)
    scale = mx.abs(state_want).max().item()
    assert error(y, y_want) < tolerance * max(1.0, scale)
    assert error(state, state_want) < tolerance * max(1.0, scale)


@pytest.mark.parametrize("options", [{}, {"lower_bound": -5.0}, {"allow_neg_eigval": True}])
def test_update_has_the_contract_of_mlx_lm(options):
    q, k, v, a, b, _ = inputs(1, 20)
    A_log, dt_bias = mx.log(mx.arange(1.0, 5.0)), mx.ones(4)
    y, state = gd.gated_delta_update(q, k, v, a, b, A_log, dt_bias, **options)
    y_want, state_want = reference.gated_delta_update(q, k, v, a, b, A_log, dt_bias, **options)
    assert error(y, y_want) < TOLERANCE
    assert error(state, state_want) < TOLERANCE


def test_a_gate_per_channel_is_left_to_mlx_lm():
    q, k, v, _, b, _ = inputs(1, 3, Hk=4)
    a = mx.random.normal((1, 3, 4, 32))
    got = gd.gated_delta_update(q, k, v, a, b, mx.zeros((4, 1)), mx.zeros(()))
    want = reference.gated_delta_update(q, k, v, a, b, mx.zeros((4, 1)), mx.zeros(()))
    assert error(got[0], want[0]) == 0.0


def test_half_precision_in_half_precision_out_with_a_float32_state():
    data = inputs(1, 40)
    y, state = gd.gated_delta(*(x.astype(mx.bfloat16) for x in data[:3]), *data[3:])
    y_want, _ = recurrence(*data)
    assert (y.dtype, state.dtype) == (mx.bfloat16, mx.float32)
    assert error(y, y_want) < 0.03


def small_model():
    args = qwen3_5.TextModelArgs(
        model_type="qwen3_5",
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=32,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    )
    return qwen3_5.TextModel(args)


@pytest.mark.skipif(mx.metal.is_available(), reason="on Metal mlx-lm's own kernels stay")
def test_install_serves_every_recurrent_layer_and_leaves_the_logits_alone(monkeypatch):
    for module in (qwen3_5, qwen3_next):  # undo what install does to them
        monkeypatch.setattr(module, "gated_delta_update", reference.gated_delta_update)
    mx.random.seed(0)
    model, tokens = small_model(), mx.array([[1, 2, 3, 4, 5, 6, 7, 8, 9]])
    want = model(tokens)
    assert gd.install(model) == 3  # of 4 layers, the last is softmax
    assert qwen3_5.gated_delta_update is gd.gated_delta_update
    assert error(model(tokens), want) < TOLERANCE
    assert gd.install(model) == 3


def test_install_finds_nothing_in_a_model_without_recurrent_layers():
    assert gd.install(nn.Linear(4, 4)) == 0
