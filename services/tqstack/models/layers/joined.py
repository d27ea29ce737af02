"""Matrices that read the same input as one: a product of them is one launch instead of several.

They are put behind each other once, when a model is loaded. What the layers held before become
views of that, so that nothing is kept twice and the layers' own code goes on as it was. Linear
layers of other classes are left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from tqstack.models.layers.experts import Experts

_PLANES = ("weight", "scales", "biases")
_LINEAR = (nn.QuantizedLinear, nn.Linear)
_EXPERTS = (QuantizedSwitchLinear, Experts)


@dataclass(frozen=True)
class Joined:
    """Matrices behind each other: (outputs, ...), or of experts (matrices, outputs, ...).

    planes: weight, and of quantized ones scales and biases.
    """

    planes: tuple[mx.array, ...]
    group_size: int = 0
    bits: int = 0

    def __call__(self, x: mx.array) -> mx.array:
        """(..., inputs) -> (..., outputs of all)"""
        if not self.bits:
            return x @ self.planes[0].T
        weight, scales, biases = self.planes
        return mx.quantized_matmul(
            x, weight, scales, biases, group_size=self.group_size, bits=self.bits
        )


def join(parts: Sequence[nn.Module]) -> Joined | None:
    """Linear layers of one kind and quantization, without a bias; None: they are not alike."""
    if not alike(parts) or type(parts[0]) not in _LINEAR:
        return None
    return _joined(parts, [_planes(part) for part in parts])


def stack(parts: Sequence[nn.Module]) -> Joined | None:
    """Quantized experts and linear layers of the same sizes, a matrix each; None: not alike."""
    if not alike(parts) or not any(type(part) in _EXPERTS for part in parts):
        return None
    planes = [_planes(part) for part in parts]
    stacked = [
        tuple(x if type(part) in _EXPERTS else x[None] for x in own)
        for part, own in zip(parts, planes, strict=True)
    ]
    if len({own[0].shape[1:] for own in stacked}) > 1:
        return None
    return _joined(parts, stacked)


def alike(parts: Sequence[nn.Module]) -> bool:
    """Whether these are layers of the known classes whose planes may follow each other."""
    return len({_kind(part) for part in parts}) == 1 and _kind(parts[0]) is not None


def _kind(part: Any) -> tuple[Any, ...] | None:
    quantized = type(part) in (nn.QuantizedLinear, *_EXPERTS)
    if "bias" in part or not (quantized or type(part) is nn.Linear):
        return None
    if not quantized:
        weight: mx.array = part["weight"]
        return nn.Linear, weight.dtype, weight.shape[-1]
    if part.mode != "affine":
        return None
    scales: mx.array = part["scales"]
    return part.group_size, part.bits, scales.dtype, scales.shape[-1]


def _planes(part: Any) -> tuple[mx.array, ...]:
    return tuple(part[name] for name in _PLANES if name in part)


def _joined(parts: Sequence[Any], planes: Sequence[tuple[mx.array, ...]]) -> Joined:
    """The planes behind each other; the parts get views of them."""
    whole = tuple(mx.concatenate(list(own)) for own in zip(*planes, strict=True))
    mx.eval(whole)
    at = 0
    for part, own in zip(parts, planes, strict=True):
        for name, plane in zip(_PLANES, whole, strict=False):
            view = plane[at : at + len(own[0])]
            part[name] = view.reshape(part[name].shape)
            mx.eval(part[name])  # now, or the old one would be kept until it is used
        at += len(own[0])
    group_size, bits = (getattr(parts[0], name, 0) for name in ("group_size", "bits"))
    return Joined(whole, group_size, bits)
