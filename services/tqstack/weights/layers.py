"""Layers whose weights are codes: linear layers, a mixture's experts, embeddings.

A layer's parameters are `weight` (..., N / 16, K / 16, words) uint32 and `scales` (..., N) float16,
and those of a sign residual under `residual` where it has one. W = scale * level in the rotated
coordinates of `rotation.py`; nothing of it is ever kept decoded.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import SwitchLinear

from tqstack.weights import rotation
from tqstack.weights.codes import SIGN, Code
from tqstack.weights.kernels import products, rows
from tqstack.weights.tiles import TILE

RESIDUAL_SEED = 1 << 32  # of the rotation in which signs are taken: never that of the codes


class Coded(nn.Module):
    """Matrices (*leading, N, K) as codes; what the layers below have in common."""

    def __init__(self, leading: tuple[int, ...], outputs: int, inputs: int, code: Code, seed: int):
        super().__init__()
        self.outputs, self.inputs = outputs, inputs
        self.code, self.seed = code, seed
        tiles = (outputs // TILE, inputs // TILE)
        self.weight = mx.zeros((*leading, *tiles, code.words), dtype=mx.uint32)
        self.scales = mx.zeros((*leading, outputs), dtype=mx.float16)
        self.freeze()

    def dense(self) -> mx.array:
        """(*leading, N, K) float32: the weights as they count, not rotated."""
        levels = self.code.decode(self["weight"]) * self["scales"].astype(mx.float32)[..., None]
        return rotation.unrotate(levels, self.seed)


class Residual(Coded):
    """What the codes miss, as signs in a rotation of its own: TurboQuant's Algorithm 2."""

    def __init__(self, leading: tuple[int, ...], outputs: int, inputs: int):
        super().__init__(leading, outputs, inputs, SIGN, RESIDUAL_SEED)


class CompressedLinear(Coded):
    """`nn.Linear` with coded weights."""

    def __init__(self, inputs: int, outputs: int, code: Code, seed=0, residual=False, bias=False):
        super().__init__((), outputs, inputs, code, seed)
        if bias:
            self.bias = mx.zeros((outputs,))
        if residual:
            self.residual = Residual((), outputs, inputs)

    def __call__(self, x: mx.array) -> mx.array:
        """(..., K) -> (..., N)"""
        y = product(self, x)
        return y + self["bias"] if "bias" in self else y


class CompressedEmbedding(Coded):
    """`nn.Embedding` with coded vectors; also the output head where a model ties them."""

    def __init__(self, count: int, dims: int, code: Code, seed=0, residual=False):
        super().__init__((), count, dims, code, seed)
        self.dtype = mx.float32  # of what it gives: that of the model's other weights
        if residual:
            self.residual = Residual((), count, dims)

    def __call__(self, ids: mx.array) -> mx.array:
        """(...) -> (..., dims)"""
        found = rows.rows(ids, self["weight"], self["scales"], self.code, self.seed)
        if "residual" in self:
            found = found + rows.rows(
                ids, self["residual"]["weight"], self["residual"]["scales"], SIGN, RESIDUAL_SEED
            )
        return found.astype(self.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """(..., dims) -> (..., count)"""
        return product(self, x)


class CompressedSwitchLinear(Coded):
    """`SwitchLinear` with coded experts."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        experts: int,
        code: Code,
        seed=0,
        residual=False,
        bias=False,
    ):
        super().__init__((experts,), outputs, inputs, code, seed)
        if bias:
            self.bias = mx.zeros((experts, outputs))
        if residual:
            self.residual = Residual((experts,), outputs, inputs)

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """(..., 1, K) and (..., k) experts -> (..., k, 1, N); as mlx-lm calls `SwitchLinear`."""
        y = _expert_product(self, x, indices, sorted_indices)
        if "residual" in self:
            y = y + _expert_product(self["residual"], x, indices, sorted_indices)
        return y + self["bias"][indices][..., None, :] if "bias" in self else y


def product(layer: Coded, x: mx.array) -> mx.array:
    """(..., K) -> (..., N), residual included."""
    y = _product(layer, x)
    return y + _product(layer["residual"], x) if "residual" in layer else y


def _product(layer: Coded, x: mx.array) -> mx.array:
    return products.product(x, layer["weight"], layer["scales"], layer.code, layer.seed)


def _expert_product(layer: Coded, x: mx.array, indices: mx.array, ordered: bool) -> mx.array:
    return products.expert_product(
        x, indices, layer["weight"], layer["scales"], layer.code, layer.seed, ordered
    )


def expand(model: nn.Module) -> None:
    """Turn all coded layers into plain ones of float32 weights, in place: for a CPU."""
    layers = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, Coded)]
    for path, layer in layers:
        if not isinstance(layer, Residual):
            model.update_modules(tree_unflatten([(path, plain(layer))]))


def plain(layer: Coded) -> nn.Module:
    """The layer that has this one's weights in float32."""
    weight = layer.dense()
    if "residual" in layer:
        weight = weight + layer["residual"].dense()
    mx.eval(weight)
    if isinstance(layer, CompressedEmbedding):
        dense: nn.Module = nn.Embedding(1, 1)
    elif isinstance(layer, CompressedSwitchLinear):
        dense = SwitchLinear(1, 1, 1, bias=False)
    else:
        dense = nn.Linear(1, 1, bias=False)
    dense.weight = weight
    if "bias" in layer:
        dense.bias = layer["bias"]
    return dense
