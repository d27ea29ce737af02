"""A checkpoint as named arrays and a description, and back: what the disk tier writes and reads.

A file holds what lies behind the checkpoint before it: packed blocks of every compressed layer, and
the whole state at its own position.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from tqstack.attention.cache import TurboQuantKVCache
from tqstack.attention.tail import Tails
from tqstack.engine.caches import Cache, compressed

Arrays = dict[str, np.ndarray]
Description = dict[str, Any]


class DamagedError(ValueError):
    """A file does not hold what this model's cache has."""


def packed_blocks(cache: Cache) -> int:
    """Blocks that a sequence's layers have packed; the same in all of them."""
    return next((entry.packed[0] for entry in compressed(cache)), 0)


def to_arrays(cache: Cache, first: int) -> tuple[Arrays, Description]:
    """Copies in the host's memory: of blocks from `first` on, and of all other state."""
    arrays: Arrays = {}
    dtypes: dict[str, str] = {}
    entries: list[Any] = []
    for i, entry in enumerate(cache):
        if isinstance(entry, TurboQuantKVCache):
            found, about = _compressed(entry, first)
        else:
            found, about = _plain(entry)
        for name, array in found.items():
            arrays[f"{i}.{name}"], dtypes[f"{i}.{name}"] = _bytes(array)
        entries.append(about)
    return arrays, {"entries": entries, "dtypes": dtypes}


def restore(cache: Cache, arrays: Arrays, about: Description, first: int, last: bool) -> None:
    """Put a file's blocks into a sequence's cache, which has those before `first`.

    Args:
        cache: as the model makes it, or as the files before have left it.
        last: whether this is the checkpoint to go on from; of the others only blocks are needed.

    Raises:
        DamagedError: it is another cache's.
        PoolFullError: nobody promised the blocks.
    """
    try:
        for i, (entry, own) in enumerate(zip(cache, about["entries"], strict=True)):
            found = {
                name.split(".", 1)[1]: _array(array, about["dtypes"][name])
                for name, array in arrays.items()
                if name.split(".", 1)[0] == str(i)
            }
            if isinstance(entry, TurboQuantKVCache):
                _restore_blocks(entry, found, own, first)
                if last:
                    _restore_tail(entry, found, own)
            elif last:
                entry.state = _state(found, own)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DamagedError(f"{type(error).__name__}: {error}") from error


def _compressed(entry: TurboQuantKVCache, first: int) -> tuple[dict[str, mx.array], Description]:
    arrays: dict[str, mx.array] = {}
    layout, part = entry.layout, entry.tails.part(0)
    if entry.packed[0] > first:
        ids = entry.tables[0].ids[first : entry.packed[0]]
        arrays["blocks"] = entry.pool.read(entry.layer, ids)
    if part is not None:
        used = entry.lengths[0] - entry.tails.starts[0]
        arrays["keys"], arrays["values"] = (x[:, :, :used] for x in part)
    return arrays, {
        "length": entry.lengths[0],
        "packed": entry.packed[0],
        "start": entry.tails.starts[0],
        "shape": layout and [layout.kv_heads, layout.key_codec.dim, layout.value_codec.dim],
        "words": layout and layout.words,
    }


def _restore_blocks(
    entry: TurboQuantKVCache, found: dict[str, mx.array], about: Description, first: int
) -> None:
    layout, stop = entry.layout, about["packed"]
    if layout is None or about["words"] != layout.words:
        raise ValueError("blocks of another size")
    if stop > first:
        rows = found["blocks"]
        if rows.shape != (stop - first, layout.words):
            raise ValueError(f"blocks of shape {rows.shape}")
        entry.pool.write(entry.layer, entry.tables[0].to_write(entry.layer, first, stop), rows)
    entry.packed = [stop]


def _restore_tail(entry: TurboQuantKVCache, found: dict[str, mx.array], about: Description) -> None:
    part = (found["keys"], found["values"]) if "keys" in found else None
    held = part[0].shape[2] if part else 0
    if about["start"] + held != about["length"]:
        raise ValueError(f"a tail of {held} tokens from {about['start']}")
    entry.lengths = [about["length"]]
    entry.tails = Tails([about["start"]], [part], entry.tails.slots)


def _plain(entry: Any) -> tuple[dict[str, mx.array], Description]:
    """mlx-lm's own entries tell their state: arrays, numbers, None and texts in a tree."""
    arrays, values = {}, []
    for name, value in tree_flatten(entry.state):
        if isinstance(value, mx.array):
            arrays[f"s{name}"] = value
            values.append([name, "array"])
        else:
            values.append([name, value])
    return arrays, {"state": values, "empty": entry.empty()}


def _state(found: dict[str, mx.array], about: Description) -> Any:
    leaves = [
        (name, found[f"s{name}"] if value == "array" else value) for name, value in about["state"]
    ]
    return tree_unflatten(leaves)


def _bytes(array: mx.array) -> tuple[np.ndarray, str]:
    """A copy that numpy can hold (it has no bfloat16), and what it is."""
    name = str(array.dtype).rsplit(".", 1)[-1]
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.array(array, order="C"), name


def _array(array: np.ndarray, dtype: str) -> mx.array:
    made = mx.array(array)
    return made.view(mx.bfloat16) if dtype == "bfloat16" else made
