"""The recurrence's kernel, compiled as C++ and run on the CPU, against mlx-lm's operations."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm.models import gated_delta as reference

from attention import cpp_kernels
from attention.cpp_kernels import in_cpp  # noqa: F401
from tqstack.attention.kernels import trust
from tqstack.models.layers import gated_delta as gd
from tqstack.models.layers import recurrence

pytestmark = pytest.mark.skipif(not cpp_kernels.COMPILER, reason="the C++ dialect needs g++")


def normal(*shape, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed))


@pytest.mark.parametrize("Dk, Dv, masked", [(64, 24, False), (128, 16, True)])
def test_the_recurrence_of_the_gated_delta_rule(Dk, Dv, masked):
    B, T, Hk, Hv = 2, 37, 1, 2
    q, k = (normal(B, T, Hk, Dk, seed=s) * Dk**-0.5 for s in (1, 2))
    v, a, b = normal(B, T, Hv, Dv, seed=3), normal(B, T, Hv, seed=4), normal(B, T, Hv, seed=5)
    A_log, dt_bias, state = mx.log(mx.array([1.0, 9.0])), mx.ones(2), normal(B, Hv, Dv, Dk, seed=6)
    mask = normal(B, T, seed=7) > 0 if masked else None
    y, new_state = recurrence.recurrence(q, k, v, a, b, A_log, dt_bias, state, mask)
    y_want, state_want = reference.gated_delta_update(q, k, v, a, b, A_log, dt_bias, state, mask)
    if mask is not None:
        y, y_want = (mx.where(mask[..., None, None], x, 0) for x in (y, y_want))
    assert mx.abs(y - y_want).max().item() < 1e-5
    assert mx.abs(new_state - state_want).max().item() < 1e-5


@pytest.fixture
def on_cuda(monkeypatch):
    trust.forget()
    for module in (gd, trust):
        monkeypatch.setattr(module, "gpu_dialect", lambda: "cuda")
    yield
    trust.forget()


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_the_recurrence_serves_layers_on_cuda_unless_it_is_wrong(
    factor, on_cuda, monkeypatch, caplog
):
    right, calls = recurrence.recurrence, []

    def counted(*arguments):
        calls.append(1)
        y, state = right(*arguments)
        return factor * y, state

    monkeypatch.setattr(recurrence, "recurrence", counted)
    q, k = (normal(1, 5, 1, 64, seed=s) * 0.125 for s in (1, 2))
    v, a, b = normal(1, 5, 1, 8, seed=3), normal(1, 5, 1, seed=4), normal(1, 5, 1, seed=5)
    y, _ = gd.gated_delta_update(q, k, v, a, b, mx.zeros(1), mx.ones(1))
    assert len(calls) == (2 if factor == 1 else 1)  # the first is the comparison
    assert ("gated delta kernel (64, 8" in caplog.text) == (factor != 1)
    want, _ = reference.gated_delta_update(q, k, v, a, b, mx.zeros(1), mx.ones(1))
    assert mx.abs(y - want).max().item() < 1e-5
