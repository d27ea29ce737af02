"""What is read of a model that is converted: its layers' matrices in 16 or 32 bits, whatever they
are stored in."""

from __future__ import annotations

import platform
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

DTYPES = (mx.bfloat16, mx.float16, mx.float32)


def parameters(module: nn.Module) -> list[tuple[str, mx.array]]:
    """By name, in the order of the module's definition."""
    named: Any = tree_flatten(module.parameters())
    return named


def dtype_of(model: nn.Module) -> mx.Dtype:
    """Of the model's activations: what most of its plain weights have."""
    counts = dict.fromkeys(DTYPES, 0)
    for _, weight in parameters(model):
        if weight.dtype in counts:
            counts[weight.dtype] += weight.size
    return max(counts, key=lambda dtype: counts[dtype])


def matrices(layer: nn.Module) -> Iterator[mx.array]:
    """A layer's matrix, or those of its experts one by one, in 16 or 32 bits."""
    if not is_mixture(layer):
        yield plain(layer, slice(None))
        return
    for expert in range(layer["weight"].shape[0]):
        yield plain(layer, expert)


def plain(layer: Any, part: Any) -> mx.array:
    weight = layer["weight"][part]
    if not hasattr(layer, "bits"):
        return weight
    biases = layer.get("biases")
    return mx.dequantize(
        weight,
        layer["scales"][part],
        None if biases is None else biases[part],
        layer.group_size,
        layer.bits,
        layer.mode,
    )


def is_mixture(layer: nn.Module) -> bool:
    return isinstance(layer, (SwitchLinear, QuantizedSwitchLinear))


def nbytes(layer: nn.Module) -> int:
    return sum(weight.nbytes for _, weight in parameters(layer))


def peak_memory() -> int:
    """Bytes that this process held at most; what MLX has on a GPU of its own comes on top."""
    if platform.system() == "Linux":  # its ru_maxrss begins with what the parent process held
        status = Path("/proc/self/status").read_text()
        resident = int(status.split("VmHWM:")[1].split()[0]) * 1024
    else:
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(resident, mx.get_peak_memory())
