"""Gates on a CPU, with an exponential that is vector code there (`tqstack.attention.exponential`):
of 500 tokens MLX's own took a third of the time that the embedded model needs to read them."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from tqstack.attention.exponential import exp


def silu(x: mx.array) -> mx.array:
    """x sigmoid(x)"""
    return _over(x, exp(-x))


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) x"""
    return _gated(gate, x, exp(-gate))


def precise_swiglu(h: mx.array, gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) x in float32, in the type of h."""
    return swiglu(gate.astype(mx.float32), x.astype(mx.float32)).astype(h.dtype)


# What `nn` is to layers that call nn.silu. nn itself stays: functions of mlx-lm that are compiled
# for any shape call its silu, and ours has views, which they cannot have.
_NN: Any = ModuleType("mlx.nn")
_NN.silu, _NN.__getattr__ = silu, partial(getattr, nn)
FASTER = {"swiglu": swiglu, "precise_swiglu": precise_swiglu}


def install(model: nn.Module) -> int:
    """Let a model's layers use these; returns how many do.

    Names are replaced where a layer's call looks them up: in the module that defines its class.
    """
    layers = 0
    for module in model.modules():
        call: Any = type(module).__call__
        names = getattr(getattr(call, "__code__", None), "co_names", ())
        found = [name for name in FASTER if name in names]
        for name in found:
            call.__globals__[name] = FASTER[name]
        if "silu" in names:
            call.__globals__["nn"] = _NN
        layers += bool(found) or "silu" in names
    return layers


@partial(mx.compile, shapeless=True)
def _over(x: mx.array, e: mx.array) -> mx.array:
    return x / (1 + e)


@partial(mx.compile, shapeless=True)
def _gated(gate: mx.array, x: mx.array, e: mx.array) -> mx.array:
    return gate * x / (1 + e)
