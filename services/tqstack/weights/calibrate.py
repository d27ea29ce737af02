"""Hessians of layers' inputs: a text goes through the model, one block after the other.

Only the block that the text is in is in memory, and its Hessians are used before the next one's
are made. Blocks are found by `model.layers`, so that a model of any family has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from mlx.utils import tree_map
from mlx_lm.utils import dequantize_model

from tqstack.attention.kernels.program import gpu_dialect
from tqstack.weights.recipe import layers_of

Hessians = Mapping[str, np.ndarray]
OnBlock = Callable[[Hessians], None]
Call = Callable[..., Any]


class _Inputs:
    """Sums of x x^T by layer. Layers that share an input share its sum."""

    def __init__(self) -> None:
        self.sums: dict[str, mx.array] = {}
        self.last: tuple[mx.array, mx.array] | None = None

    def add(self, path: str, x: mx.array) -> None:
        if self.last is None or self.last[0] is not x:
            rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
            self.last = x, rows.T @ rows / rows.shape[0]
        self.sums[path] = self.last[1]

    def take(self) -> Hessians:
        mx.eval(self.sums)
        taken = {path: np.array(total) for path, total in self.sums.items()}
        self.sums, self.last = {}, None
        return taken


def run(source: Path, tokens: mx.array, on_block: OnBlock) -> None:
    """Send tokens (sequences, length) through the model of a folder.

    Args:
        on_block: called after each block with the Hessians of its layers by path, and at the end
            with those of the rest, such as the head.
    """
    model = _lazily(source)
    inputs = _Inputs()
    layers: Any = model.layers
    blocks = {id(block) for block in layers}
    for path, layer in layers_of(model).items():
        method = "as_linear" if hasattr(layer, "as_linear") else "__call__"  # an embedding as head
        _replace(layer, method, _told(inputs, path))
    for module in model.modules():
        if id(module) in blocks:
            _replace(module, "__call__", _stopped(inputs, on_block))
    model(tokens)  # its logits are never computed, only what led to them
    on_block(inputs.take())


def _lazily(source: Path) -> nn.Module:
    """The model, whose weights are read when they are used; in float32 on a CPU, which multiplies
    others many times more slowly."""
    model = mlx_lm.load(str(source), lazy=True)[0]
    if gpu_dialect() is None:
        dequantize_model(model)
        model.set_dtype(mx.float32)
    return model


def _told(inputs: _Inputs, path: str) -> Call:
    def call(original: Call, layer: nn.Module, x: mx.array, *args: Any, **options: Any) -> Any:
        inputs.add(path, x)
        return original(layer, x, *args, **options)

    return call


def _stopped(inputs: _Inputs, on_block: OnBlock) -> Call:
    def call(original: Call, block: nn.Module, *args: Any, **options: Any) -> Any:
        result = original(block, *args, **options)
        mx.eval(result)
        block.update(tree_map(lambda _: mx.zeros(()), block.parameters()))
        on_block(inputs.take())
        mx.clear_cache()
        return result

    return call


def _replace(module: nn.Module, method: str, call: Call) -> None:
    """Give one module a class of its own whose method is `call`."""
    plain = type(module)
    original = getattr(plain, method)

    def replaced(self: nn.Module, *args: Any, **options: Any) -> Any:
        return call(original, self, *args, **options)

    module.__class__ = type(plain.__name__, (plain,), {method: replaced})
