"""A token written into the tails of a batch: in one launch on a GPU, by slices on a CPU."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from tqstack.attention import tail


@pytest.mark.parametrize("at", [[3, 0, 15], [7, 7, 7]])
@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf, 1e6])
def test_one_launch_writes_what_slices_write(at, bad):
    rng = np.random.default_rng(0)

    def random(slots, poison=None):
        x = rng.standard_normal((3, 2, slots, 8)).astype(np.float32)
        if poison is not None:
            x[1, 0, 0, 0] = poison
        return mx.array(x)

    stack, new = (random(16), random(16)), (random(1, bad), random(1))
    got = tail._placed(*stack, *new, tail._slots(16), mx.array(at))
    for one, old, token in zip(got, stack, tail.bounded(*new), strict=True):
        assert np.array_equal(np.array(one), np.array(tail._written(old, token, at)))
