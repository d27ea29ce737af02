"""Expert layers that say which of their inputs each expert reads.

Left to itself, `mx.gather_qmm` makes that index anew for each of 120 calls a token, and on CUDA
copies it too: two more launches beside the one that does the work.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import QuantizedSwitchLinear


class IndexedExperts(QuantizedSwitchLinear):
    """`QuantizedSwitchLinear` with the index of its inputs remembered from call to call."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """(..., 1, inputs) and (..., k) experts -> (..., k, 1, outputs)"""
        if sorted_indices:  # a prompt: mlx-lm sorted the tokens by expert
            return super().__call__(x, indices, sorted_indices)
        y = mx.gather_qmm(
            x,
            self["weight"],
            self["scales"],
            self.get("biases"),
            lhs_indices=_inputs(x.shape[:-2], indices.shape),
            rhs_indices=indices,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )
        return y + self["bias"][indices][..., None, :] if "bias" in self else y


def install(model: nn.Module) -> int:
    """Turn a model's quantized experts into `IndexedExperts`; returns how many layers."""
    found = [
        module
        for module in model.modules()
        if type(module) is QuantizedSwitchLinear and module.global_scale is None
    ]
    for module in found:
        module.__class__ = IndexedExperts
    return len(found)


@lru_cache(maxsize=256)
def _inputs(batch: tuple[int, ...], experts: tuple[int, ...]) -> mx.array:
    """Which of the inputs (*batch,) each entry of `experts` reads."""
    index = np.arange(np.prod(batch, dtype=int), dtype=np.uint32).reshape(batch)
    return mx.array(np.ascontiguousarray(np.broadcast_to(index, experts)))
