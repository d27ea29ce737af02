"""Headers of safetensors files: what tensors a file holds, and whether it is whole. No mlx.

A file is the header's length (8 bytes, little-endian), the header (JSON: name -> dtype, shape and
data offsets), and the data. See https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "BF16": 16, "F16": 16}
BITS |= {"I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8}
_LARGEST_HEADER = 100_000_000  # the format's own limit


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
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length)) if 0 < length <= _LARGEST_HEADER else None
        except ValueError:
            header = None
    if not isinstance(header, dict):
        raise BrokenFileError(f"{path} has no safetensors header: download the model again")
    header.pop("__metadata__", None)
    expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if (found := path.stat().st_size) != expected:
        raise BrokenFileError(
            f"{path} holds {found:,} bytes and should hold {expected:,}: download the model again"
        )
    return {name: Tensor(e["dtype"], tuple(e["shape"])) for name, e in header.items()}


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
