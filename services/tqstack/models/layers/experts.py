"""Quantized experts with fewer launches per token, and on CUDA prompts in grouped products.

Left to itself, `mx.gather_qmm` makes the index of its inputs anew for each of 120 calls a token,
and on CUDA copies it too: two more launches beside the one that does the work. For a prompt it
reads an expert's weights again for every token there (23 ms for a block of 2,048 tokens of
Qwen3.5-35B-A3B on an H200); decompressed, they serve all tokens of an expert at once (12 ms).
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from tqstack.attention.kernels.program import backend

GROUPED_ROWS = 8192  # from here on decompressing the weights pays
PIECE = 128 << 20  # bytes of weights that are decompressed at a time


class Experts(QuantizedSwitchLinear):
    """`QuantizedSwitchLinear`, faster. The inputs' index is remembered from call to call."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """(..., 1, inputs) and (..., k) experts -> (..., k, 1, outputs)"""
        if sorted_indices:  # a prompt: mlx-lm sorted the tokens by expert
            if backend() == "cuda" and indices.size >= GROUPED_ROWS:
                return self.grouped(x, indices)
            return super().__call__(x, indices, sorted_indices)
        y = mx.gather_qmm(
            x,
            self["weight"],
            self["scales"],
            self["biases"],
            lhs_indices=_inputs(x.shape[:-2], indices.shape),
            rhs_indices=indices,
            group_size=self.group_size,
            bits=self.bits,
        )
        return y + self["bias"][indices][..., None, :] if "bias" in self else y

    def grouped(self, x: mx.array, indices: mx.array) -> mx.array:
        """(rows, 1, inputs) and (rows,) experts in ascending order -> (rows, 1, outputs)"""
        packed = [self["weight"], self["scales"], self["biases"]]
        experts, outputs = packed[0].shape[:2]
        pieces = -(-experts * outputs * self.input_dims * x.itemsize // PIECE)
        width = -(-outputs // pieces)
        parts: list[mx.array] = []
        for at in range(0, outputs, width):
            weight = mx.dequantize(
                *(part[:, at : at + width] for part in packed),
                group_size=self.group_size,
                bits=self.bits,
            )
            y = mx.gather_mm(x, weight.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=True)
            mx.eval(y)  # or the next piece's weights would exist before these are gone
            parts.append(y)
        y = mx.concatenate(parts, axis=-1)
        return y + self["bias"][indices][:, None] if "bias" in self else y


def install(model: nn.Module) -> int:
    """Turn a model's quantized experts into `Experts`; returns how many layers."""
    found = [
        module
        for module in model.modules()
        if type(module) is QuantizedSwitchLinear and module.mode == "affine"
    ]
    for module in found:
        module.__class__ = Experts
    return len(found)


@lru_cache(maxsize=256)
def _inputs(batch: tuple[int, ...], experts: tuple[int, ...]) -> mx.array:
    """Which of the inputs (*batch,) each entry of `experts` reads."""
    index = np.arange(np.prod(batch, dtype=int), dtype=np.uint32).reshape(batch)
    return mx.array(np.ascontiguousarray(np.broadcast_to(index, experts)))
