"""What weights take in a model's files, and once loaded: told by the files' headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

from tqstack.models.safetensors import Tensor
from tqstack.weights.tiles import VALUES

Layers = dict[str, dict[str, Tensor]]


class Stored(NamedTuple):
    """Weights of linear layers and the bytes that they take, scales included."""

    weights: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.weights if self.weights else 0.0


def stored(tensors: Mapping[str, Tensor], quantization: Mapping[str, Any]) -> Stored:
    """The coded layers of a model; where none is coded, all of its matrices.

    Layers that a conversion leaves as they are (routers, and what has no fitting width) do not
    count beside coded ones: the figure is that of the code.

    Args:
        tensors: by name, as in the model's files.
        quantization: of its config; empty: none.
    """
    coded = [
        Stored(weights, sum(tensor.nbytes for part, tensor in parts.items() if part != "bias"))
        for path, parts in _by_layer(tensors).items()
        if (weights := _coded_weights(path, parts, quantization))
    ]
    found = coded or [
        Stored(tensor.size, tensor.nbytes)
        for name, tensor in tensors.items()
        if len(tensor.shape) > 1 and "conv" not in name
    ]
    return Stored(sum(x.weights for x in found), sum(x.nbytes for x in found))


def expanded_bytes(tensors: Mapping[str, Tensor], quantization: Mapping[str, Any]) -> int:
    """Bytes of a model whose coded matrices are expanded and whose weights are all float32."""
    values = 0
    for path, parts in _by_layer(tensors).items():
        if weights := _coded_weights(path, parts, quantization):
            values += weights + (parts["bias"].size if "bias" in parts else 0)
        else:
            values += sum(tensor.size for tensor in parts.values())
    return 4 * values


def _by_layer(tensors: Mapping[str, Tensor]) -> Layers:
    """Tensors by their layer's path and then their own name in it; a sign residual's are of the
    layer that has it."""
    layers: Layers = {}
    for name, tensor in tensors.items():
        path, _, part = name.replace(".residual.", ".residual-").rpartition(".")
        layers.setdefault(path, {})[part] = tensor
    return layers


def _coded_weights(path: str, parts: Mapping[str, Tensor], quantization: Mapping[str, Any]) -> int:
    """Weights of a layer that is coded; 0: it is not."""
    packed, scales = parts.get("weight"), parts.get("scales")
    if packed is None or scales is None or packed.dtype != "U32":
        return 0
    if "signs" in parts:  # turboquant-mlx: a sign for each input, scales (..., outputs, groups)
        return prod(scales.shape[:-1]) * parts["signs"].size
    if len(scales.shape) < len(packed.shape):  # ours: tiles, and a scale per row
        return VALUES * prod(packed.shape[:-1])
    own = quantization.get(path)
    group = (own if isinstance(own, Mapping) else quantization).get("group_size", 64)
    return scales.size * group
