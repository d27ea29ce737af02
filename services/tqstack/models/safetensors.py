"""Headers of safetensors files: what tensors a file holds, and whether it is whole. No mlx."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "BF16": 16, "F16": 16}
BITS |= {"I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8}


class BrokenFileError(ValueError):
    """The file is cut short or no safetensors file; the message says which and what to do."""


@dataclass(frozen=True)
class Tensor:
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * BITS[self.dtype] // 8


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name.

    Raises:
        BrokenFileError: the file is not whole.
    """
    try:
        with safe_open(path, "numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {n: Tensor(s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except SafetensorError as error:
        raise BrokenFileError(f"{path} is not whole ({error}): download the model again") from None


def head_tensors(folder: Path) -> dict[str, Tensor]:
    """Those of a folder that belong to multi-token prediction.

    Raises:
        BrokenFileError: a file is not whole.
    """
    files = sorted(folder.glob("*.safetensors"))
    found = {name: tensor for file in files for name, tensor in read_header(file).items()}
    return {name: tensor for name, tensor in found.items() if "mtp." in name}


def model_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model's `model*.safetensors`, those that mlx-lm loads.

    Raises:
        BrokenFileError: a file is missing or not whole.
    """
    files = sorted(folder.glob("model*.safetensors"))
    index = folder / "model.safetensors.index.json"
    wanted = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else set()
    missing = sorted(wanted - {file.name for file in files})
    if missing or not files:
        names = ", ".join(missing) or "model*.safetensors"
        raise BrokenFileError(f"{folder} lacks {names}: download the model again")
    return {name: tensor for file in files for name, tensor in read_header(file).items()}
