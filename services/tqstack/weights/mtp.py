"""The weights of a model's multi-token prediction, which mlx-lm drops when it loads a checkpoint.

They go along in a file of their own, under the checkpoint's names. Of those that mlx-lm reads,
`model*.safetensors`, some of its families take `mtp.` weights for a sign of a raw checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from tqstack.weights.codes import Code
from tqstack.weights.encode import stacked
from tqstack.weights.recipe import reason_to_keep
from tqstack.weights.shards import write_whole

FILE = "mtp.safetensors"
Encode = Callable[[mx.array, Code], dict[str, mx.array]]


@dataclass(frozen=True)
class Found:
    """What a folder has of such weights.

    Attributes:
        weights: by the checkpoint's names.
        raw: norms are stored less 1, as in checkpoints that mlx-lm has not converted.
        bits: of those that are codes.
    """

    weights: dict[str, mx.array]
    raw: bool
    bits: int = 0


def find(folder: Path) -> Found | None:
    """None: the folder has none."""
    own = folder / FILE
    if own.exists():
        loaded: Any = mx.load(str(own), return_metadata=True)
        weights, about = loaded
        raw = about.get("norms", "less 1") == "less 1"
        return Found(weights, raw, int(about.get("bits", 0)))
    files: list[Any] = [mx.load(str(file)) for file in sorted(folder.glob("*.safetensors"))]
    held = {name: x for file in files for name, x in file.items()}
    found = {name: x for name, x in held.items() if name.startswith("mtp.") or ".mtp." in name}
    # mlx-lm turns convolutions around, and adds the 1, in one go.
    raw = any("conv1d.weight" in name and x.shape[-1] != 1 for name, x in held.items())
    return Found(found, raw) if found else None


def carry(source: Path, destination: Path, code: Code, encode: Encode) -> None:
    """Write what a folder has of such weights: matrices as codes (`weight` and `scales`, an axis of
    experts in front where there is one), the rest as it is.

    Raises:
        DiskFullError
    """
    own = find(source)
    if own is None or (destination / FILE).exists():
        return
    found, carried = own.weights, {}
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
    norms = "less 1" if own.raw else "whole"
    about = {"format": "mlx", "norms": norms, "window": str(code.window), "bits": str(code.bits)}
    write_whole(
        destination / FILE, lambda path: mx.save_safetensors(str(path), carried, metadata=about)
    )
