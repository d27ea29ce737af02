"""Which kernels may be used on this machine: those that agreed with their twins here.

The first use of a variant of a kernel (its codecs, the model's type, masks, sinks) compares it with
plain operations on random numbers. One that does not compile, or disagrees, is switched off with a
warning, and `tqstack doctor` says why. What agreed is remembered from start to start, for this
machine, this MLX and these sources; what did not is tried again.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from tqstack.attention.kernels.program import fault, gpu_dialect
from tqstack.machine import cache_folder

TOLERANCE = 1e-3  # relative error of an output against the twin
# Folders of kernels and their twins.
SOURCES = {"kernels", "layers", "attention", "turboquant", "weights"}
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
    return gpu_dialect() is not None and disagreement(kernel, *variant) is None


def disagreement(kernel: str, *variant: Any) -> str | None:
    """Why the kernel must not be used so, or None. Needs a GPU."""
    if (kernel, variant) not in _found:
        name = f"{kernel} kernel ({described(variant)})"
        if _remembered(name):
            _found[kernel, variant] = None
        else:
            _found[kernel, variant] = fault(name, lambda: _checks[kernel](*variant), TOLERANCE)
            if _found[kernel, variant] is None:
                _remember(name)
    return _found[kernel, variant]


def forget() -> None:
    """Compare everything anew: `tqstack doctor`."""
    _found.clear()
    _memory().unlink(missing_ok=True)


def _memory() -> Path:
    """What agreed on this machine: a line for each variant, of names with `_machine`'s digest."""
    return cache_folder() / "trusted-kernels.txt"


@cache
def _machine() -> str:
    """A digest of all that decides whether a kernel agrees: device, system, MLX, our sources."""
    digest = hashlib.sha256(f"{version('mlx')} {mx.device_info()} {platform.platform()}".encode())
    for path in sorted(Path(__file__).parents[2].rglob("*")):
        if path.suffix == ".h" or (path.suffix == ".py" and path.parent.name in SOURCES):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def _remembered(name: str) -> bool:
    try:
        return f"{_machine()} {name}" in _memory().read_text().splitlines()
    except OSError:
        return False


def _remember(name: str) -> None:
    try:
        _memory().parent.mkdir(parents=True, exist_ok=True)
        with _memory().open("a") as file:  # one short write: others may append beside
            file.write(f"{_machine()} {name}\n")
    except OSError:
        pass  # then the next start compares again


def report() -> dict[str, str | None]:
    """All variants that were compared, each with why it is switched off, or None where it runs."""
    return {f"{kernel}, {described(variant)}": why for (kernel, variant), why in _found.items()}


def described(variant: tuple[Any, ...]) -> str:
    return ", ".join(str(getattr(part, "spec", part)) for part in variant if part is not None)


def random(*shape: int, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed), stream=mx.cpu)


def distance(got: mx.array, want: mx.array) -> float:
    """Relative to the norm of `want`. On the CPU, where nothing is compiled."""
    with mx.stream(mx.cpu):
        got, want = got.astype(mx.float32), want.astype(mx.float32)
        return (mx.linalg.norm(got - want) / mx.linalg.norm(want)).item()  # pyright: ignore


def beyond_rounding(
    got: tuple[mx.array | None, ...], want: tuple[mx.array | None, ...], roundings: int = 2
) -> float:
    """The largest distance of a result from its float32 twin, less what its type rounds away."""
    pairs = [(a, b) for a, b in zip(got, want, strict=True) if a is not None and b is not None]
    errors = [distance(a, b) - roundings * distance(b.astype(a.dtype), b) for a, b in pairs]
    return max(0.0, *errors) if all(e == e for e in errors) else float("nan")
