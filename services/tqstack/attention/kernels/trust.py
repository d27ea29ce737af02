"""Which kernels may be used on this machine: those that agreed with their twins here.

The first use of a variant of a kernel (its codecs, the model's type, masks, sinks) compares it with
plain operations on random numbers. One that does not compile, or disagrees, is switched off with a
warning, and `tqstack doctor` says why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from tqstack.attention.kernels.program import backend, fault

TOLERANCE = 1e-3  # relative error of an output against the twin
_checks: dict[str, Callable[..., float]] = {}
_found: dict[tuple[str, tuple[Any, ...]], str | None] = {}


def check(kernel: str) -> Callable[[Callable[..., float]], Callable[..., float]]:
    """Declares how a variant of a kernel is compared with its twin: a relative error."""

    def declare(error: Callable[..., float]) -> Callable[..., float]:
        _checks[kernel] = error
        return error

    return declare


def trusted(kernel: str, *variant: Any) -> bool:
    """Whether this machine has a GPU on which this variant of a kernel agrees with its twin."""
    return backend() is not None and disagreement(kernel, *variant) is None


def disagreement(kernel: str, *variant: Any) -> str | None:
    """Why the kernel must not be used so, or None. Needs a GPU."""
    if (kernel, variant) not in _found:
        name = f"{kernel} kernel ({described(variant)})"
        _found[kernel, variant] = fault(name, lambda: _checks[kernel](*variant), TOLERANCE)
    return _found[kernel, variant]


def report() -> dict[str, str | None]:
    """All variants that were compared, each with why it is switched off, or None where it runs."""
    return {f"{kernel}, {described(variant)}": why for (kernel, variant), why in _found.items()}


def described(variant: tuple[Any, ...]) -> str:
    return ", ".join(str(getattr(part, "spec", part)) for part in variant if part is not None)


def random(*shape: int, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def distance(got: mx.array, want: mx.array) -> float:
    """Relative to the norm of `want`."""
    got, want = got.astype(mx.float32), want.astype(mx.float32)
    return (mx.linalg.norm(got - want) / mx.linalg.norm(want)).item()  # pyright: ignore
