"""The weights of a model's multi-token prediction, which mlx-lm drops when it loads a checkpoint.

They go along in a file of their own, under the checkpoint's names. Of those that mlx-lm reads,
`model*.safetensors`, some of its families take `mtp.` weights for a sign of a raw checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from tqstack.weights.codes import Code
from tqstack.weights.encode import stacked
from tqstack.weights.recipe import reason_to_keep
from tqstack.weights.shards import write_whole

FILE = "mtp.safetensors"
Encode = Callable[[mx.array, Code], dict[str, mx.array]]


def carry(source: Path, destination: Path, code: Code, encode: Encode) -> None:
    """Write what a folder has of such weights: matrices as codes (`weight` and `scales`, an axis of
    experts in front where there is one), the rest as it is.

    Raises:
        DiskFullError
    """
    files: list[Any] = [mx.load(str(file)) for file in sorted(source.glob("*.safetensors"))]
    found = {name: x for held in files for name, x in held.items() if "mtp." in name}
    if not found or (destination / FILE).exists():
        return
    carried: dict[str, mx.array] = {}
    for name, weight in found.items():
        path = name.removesuffix(".weight")
        plain = weight.ndim > 1 and mx.issubdtype(weight.dtype, mx.floating)
        if not plain or f"{path}.scales" in found or reason_to_keep(path, weight.shape):
            carried[name] = weight
            continue
        mixture = weight.ndim > 2
        coded = [encode(matrix, code) for matrix in (weight if mixture else [weight])]
        planes = stacked(coded) if mixture else coded[0]
        carried |= {f"{path}.{name}": plane for name, plane in planes.items()}
    about = {"format": "mlx", "window": str(code.window), "bits": str(code.bits)}
    write_whole(
        destination / FILE, lambda path: mx.save_safetensors(str(path), carried, metadata=about)
    )
