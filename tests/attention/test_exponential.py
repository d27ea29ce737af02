"""The exponential of CPUs."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from tqstack.attention.exponential import SMALL, exp

pytestmark = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="what a CPU has")


@pytest.mark.parametrize("count", [100, 2 * SMALL])
def test_it_is_as_near_to_the_exact_value_as_mlx_is(count):
    x = mx.random.uniform(-30, 30, (count,), key=mx.random.key(0))
    want = np.exp(np.array(x, dtype=np.float64))
    errors = [np.abs(np.array(f(x)) / want - 1).max() for f in (exp, mx.exp)]
    assert errors[0] < 2 * errors[1] < 1e-5


@pytest.mark.parametrize("count", [8, 2 * SMALL])
def test_what_lies_far_below_is_0_and_a_broken_number_stays_broken(count):
    x = mx.concatenate([mx.array([-mx.inf, -1e30, -200.0, mx.nan, 0.0]), mx.zeros(count)])
    got = exp(x)[:5].tolist()
    assert got[:3] == [0, 0, 0] and np.isnan(got[3]) and got[4] == 1


def test_other_types_are_left_to_mlx():
    x = mx.array([1.0, -2.0]).astype(mx.bfloat16)
    assert mx.array_equal(exp(x), mx.exp(x))
