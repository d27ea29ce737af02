"""Matrices that read the same input as one: a product of them is one launch instead of several.

They are put behind each other once, when a model is loaded. What the layers held before become
views of that, so that nothing is kept twice and the layers' own code goes on as it was. Linear
layers of other classes are left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from tqstack.models.layers.experts import Experts, inputs_of
from tqstack.models.layers.residual import Normed
from tqstack.weights.codes import Code
from tqstack.weights.kernels import products
from tqstack.weights.layers import Coded, CompressedLinear, CompressedSwitchLinear

_PLANES = ("weight", "scales", "biases")
_LINEAR = (nn.QuantizedLinear, nn.Linear, CompressedLinear)
_EXPERTS = (QuantizedSwitchLinear, Experts, CompressedSwitchLinear)
_CODED = (CompressedLinear, CompressedSwitchLinear)


@dataclass(frozen=True)
class Joined:
    """Matrices behind each other: (outputs, ...), or of experts (matrices, outputs, ...).

    planes: weight, and of quantized ones scales and biases.
    """

    planes: tuple[mx.array, ...]
    group_size: int = 0
    bits: int = 0
    seed = None  # of a rotation: there is none

    def __call__(self, x: Normed) -> mx.array:
        """(..., inputs) -> (..., outputs of all)"""
        if not self.bits:
            return x.plain @ self.planes[0].T
        weight, scales, biases = self.planes
        return mx.quantized_matmul(
            x.plain, weight, scales, biases, group_size=self.group_size, bits=self.bits
        )

    def chosen(self, x: Normed, indices: mx.array) -> mx.array:
        """(B, 1 or k, 1, inputs) with matrices (B, k) of a stack -> (B, k, 1, outputs)"""
        return mx.gather_qmm(
            x.plain,
            *self.planes,
            lhs_indices=inputs_of(x.plain.shape[:2], indices.shape),
            rhs_indices=indices,
            group_size=self.group_size,
            bits=self.bits,
        )


@dataclass(frozen=True)
class JoinedCodes:
    """The same of coded matrices: (outputs / 16, ...) tiles and (outputs,) scales."""

    planes: tuple[mx.array, ...]
    code: Code
    seed: int

    def __call__(self, x: Normed) -> mx.array:
        weight, scales = self.planes
        return products.product(x.rotated or x.plain, weight, scales, self.code, self.seed)

    def chosen(self, x: Normed, indices: mx.array) -> mx.array:
        (weight, scales), inputs = self.planes, x.rotated or x.plain
        return products.expert_product(inputs, indices, weight, scales, self.code, self.seed)


AnyJoined = Joined | JoinedCodes


@dataclass(frozen=True)
class Projections:
    """All that a half reads its input with: neighbours that are alike are one product."""

    runs: tuple[AnyJoined, ...]

    def __call__(self, x: Normed) -> mx.array:
        """(..., inputs) -> (..., outputs of all)"""
        parts = self.apart(x)
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)

    def apart(self, x: Normed) -> list[mx.array]:
        """(..., inputs) -> (..., outputs) of each product"""
        return [run(x) for run in self.runs]

    @property
    def seed(self) -> int | None:
        """Of the rotation in which coded ones read; None: none is coded."""
        return next((run.seed for run in self.runs if run.seed is not None), None)


def project(parts: Sequence[nn.Module]) -> Projections | None:
    """Linear layers that read the same; None: not all are of known classes, or coded ones of one
    rotation."""
    seeds = {part.seed for part in parts if isinstance(part, Coded)}
    if len(seeds) > 1 or any(_kind(part) is None for part in parts):
        return None
    return Projections(tuple(_run(list(run)) for _, run in groupby(parts, _kind)))


def _run(parts: list[nn.Module]) -> AnyJoined:
    return _joined(parts, [_planes(part) for part in parts])


def join(parts: Sequence[nn.Module]) -> AnyJoined | None:
    """Linear layers of one kind and quantization, without a bias; None: they are not alike."""
    if not alike(parts) or type(parts[0]) not in _LINEAR:
        return None
    return _run(list(parts))


def stack(parts: Sequence[nn.Module]) -> AnyJoined | None:
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
    if "bias" in part or "residual" in part:
        return None
    if type(part) in _CODED:
        return part.code, part.seed, part.inputs
    if type(part) is nn.Linear:
        weight: mx.array = part["weight"]
        return nn.Linear, weight.dtype, weight.shape[-1]
    if type(part) not in (nn.QuantizedLinear, *_EXPERTS) or part.mode != "affine":
        return None
    scales: mx.array = part["scales"]
    return part.group_size, part.bits, scales.dtype, scales.shape[-1]


def _planes(part: Any) -> tuple[mx.array, ...]:
    return tuple(part[name] for name in _PLANES if name in part)


def _joined(parts: Sequence[Any], planes: Sequence[tuple[mx.array, ...]]) -> AnyJoined:
    """The planes behind each other; the parts get views of them."""
    whole = tuple(mx.concatenate(list(own)) for own in zip(*planes, strict=True))
    mx.eval(whole)
    at = [0] * len(whole)
    for part, own in zip(parts, planes, strict=True):
        for i, (name, plane) in enumerate(zip(_PLANES, whole, strict=False)):
            view = plane[at[i] : at[i] + len(own[i])]
            part[name] = view.reshape(part[name].shape)
            mx.eval(part[name])  # now, or the old one would be kept until it is used
            at[i] += len(own[i])
    if isinstance(parts[0], Coded):
        return JoinedCodes(whole, parts[0].code, parts[0].seed)
    group_size, bits = (getattr(parts[0], name, 0) for name in ("group_size", "bits"))
    return Joined(whole, group_size, bits)
