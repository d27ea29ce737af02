"""Quantized experts with fewer launches per token, and on CUDA prompts through a kernel of ours.

Left to itself, `mx.gather_qmm` makes the index of its inputs anew for each of 120 calls a token,
and on CUDA copies it too: two more launches beside the one that does the work. For a prompt it
reads an expert's weights again for every token there (23 ms for a block of 2,048 tokens of
Qwen3.5-35B-A3B on an H100); `experts.h` decodes them once for all of an expert's tokens.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from tqstack.attention.kernels.arguments import integers
from tqstack.attention.kernels.program import Program, gpu_dialect
from tqstack.attention.kernels.trust import beyond_rounding, check, random, trusted

# As in experts.h: rows, outputs and threads of a block, inputs of a step, shared memory.
ROWS, OUTPUTS, THREADS, STEP = 64, 128, 128, 64
BLOCKS = 1024  # of threads, at least, that a GPU should have
EXPERTS = Program(
    name="experts",
    headers=(Path(__file__).with_name("experts.h"),),
    call="""
SHARED_MEMORY(memory, EXPERTS_SHARED_WORDS);
experts<BITS, GROUP>(x, weight, scales, biases, indices, (IN(ExpertsCall))call, y, memory, tid,
                     block.x, block.y, block.z);""",
    inputs=("x", "weight", "scales", "biases", "indices", "call"),
    outputs=("y",),
    shared_words=(ROWS + OUTPUTS) * (STEP + 8) + ROWS,
)


def sorted_products(
    x: mx.array,
    indices: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array,
    group_size: int,
    bits: int,
) -> mx.array:
    """(rows, 1, inputs) and (rows,) experts in ascending order -> (rows, 1, outputs), in 16 bits.

    weight, scales, biases: (experts, outputs, ...) as `mx.quantize` gives them.
    """
    rows, _, inputs = x.shape
    outputs = weight.shape[1]
    columns, tiles = -(-outputs // OUTPUTS), -(-rows // ROWS)
    sharers = max(1, min(BLOCKS // (columns * tiles), ROWS, rows))
    (y,) = EXPERTS(
        [
            x,
            weight,
            scales,
            biases,
            indices.astype(mx.uint32),
            integers(rows, inputs, outputs, sharers),
        ],
        template={"BITS": bits, "GROUP": group_size},
        blocks=(columns, tiles, sharers),
        threads=THREADS,
        outputs=[((rows, 1, outputs), x.dtype)],
    )
    return y


class Experts(QuantizedSwitchLinear):
    """`QuantizedSwitchLinear`, faster. The inputs' index is remembered from call to call."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """(..., 1, inputs) and (..., k) experts -> (..., k, 1, outputs)"""
        if sorted_indices:  # a prompt: mlx-lm sorted the tokens by expert
            if not self._served(x):
                return super().__call__(x, indices, sorted_indices)
            packed = self["weight"], self["scales"], self["biases"]
            y = sorted_products(x, indices, *packed, self.group_size, self.bits)
            return y + self["bias"][indices][:, None] if "bias" in self else y
        y = mx.gather_qmm(
            x,
            self["weight"],
            self["scales"],
            self["biases"],
            lhs_indices=inputs_of(x.shape[:-2], indices.shape),
            rhs_indices=indices,
            group_size=self.group_size,
            bits=self.bits,
        )
        return y + self["bias"][indices][..., None, :] if "bias" in self else y

    def _served(self, x: mx.array) -> bool:
        """Whether a prompt's products go through the kernel: Metal has its own."""
        return (
            gpu_dialect() == "cuda"
            and self.bits in (2, 4, 8)
            and x.shape[-1] % max(STEP, self.group_size) == 0
            and x.dtype == self["scales"].dtype != mx.float32
            and trusted("experts", self.bits, self.group_size, x.dtype)
        )


@check("experts")
def _error(bits: int, group_size: int, dtype: mx.Dtype) -> float:
    """Relative distance from the quantized product, beyond the rounding of its own result."""
    inputs = 2 * max(STEP, group_size)
    weights = random(5, OUTPUTS + 8, inputs, seed=0).astype(dtype)
    packed = mx.quantize(weights, group_size, bits, stream=mx.cpu)
    experts = mx.array([0] * 3 + [1] * 100 + [3] * 9 + [4] * 30)
    x = random(experts.size, 1, inputs, seed=1).astype(dtype)
    got = sorted_products(x, experts, *packed, group_size, bits)
    with mx.stream(mx.cpu):
        codes, scales, biases = packed  # in float32, and rounded once, as in the kernel
        exact = scales.astype(mx.float32), biases.astype(mx.float32)
        weights = mx.dequantize(codes, *exact, group_size, bits).astype(dtype).astype(mx.float32)
        want = x.astype(mx.float32) @ weights[experts].swapaxes(-1, -2)
    return beyond_rounding((got,), (want,))


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
def inputs_of(batch: tuple[int, ...], experts: tuple[int, ...]) -> mx.array:
    """Which of the inputs (*batch,) each entry of `experts` reads."""
    index = np.arange(np.prod(batch, dtype=int), dtype=np.uint32).reshape(batch)
    return mx.array(np.ascontiguousarray(np.broadcast_to(index, experts)))
