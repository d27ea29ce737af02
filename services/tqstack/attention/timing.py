"""How long evaluated work takes, on whatever device MLX computes on."""

from __future__ import annotations

import time
from collections.abc import Callable

import mlx.core as mx


def median_seconds(run: Callable[[], object], trials: int, warm_up: int) -> float:
    """Median of `trials` evaluated runs (the upper one of two), after some to warm up."""
    times = []
    for _ in range(warm_up + trials):
        mx.synchronize()
        start = time.perf_counter()
        mx.eval(run())
        mx.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[warm_up:])[trials // 2]
