"""The files of a conversion: which tensor goes into which, each written whole or not at all.

All names and sizes are known before the first weight is read, so that the same conversion gives
the same files, whatever was interrupted. A file takes its name when it is whole; a folder becomes a
model with its `config.json`, which comes last.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

SHARD_BYTES = 512 << 20  # held in memory until the file is written; an interruption loses one
INDEX = "model.safetensors.index.json"


class DiskFullError(OSError):
    """There is no room for the converted model; the message says how much is missing."""


@dataclass(frozen=True)
class Group:
    """Tensors that come together: the planes of a layer, or one plain tensor.

    Attributes:
        tensors: bytes of each, by name.
    """

    name: str
    tensors: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        return sum(self.tensors.values())


class Shards:
    """Files of a folder, for groups of tensors in a given order."""

    def __init__(self, folder: Path, groups: Sequence[Group]):
        """
        Raises:
            DiskFullError
        """
        self.folder = folder
        self._shards = _fill(groups)
        self.total = sum(group.nbytes for group in groups)
        self._place = {g.name: i for i, shard in enumerate(self._shards) for g in shard}
        self._waiting: dict[int, dict[str, mx.array]] = {}
        self._check_room(sum(g.nbytes for g in groups if not self.done(g.name)))

    def done(self, group: str) -> bool:
        """Whether an earlier run has written it."""
        return self._path(self._place[group]).exists()

    def add(self, group: str, tensors: Mapping[str, mx.array]) -> None:
        """Takes a group's tensors, and writes the file that it completes.

        Raises:
            DiskFullError
        """
        place = self._place[group]
        held = self._waiting.setdefault(place, {})
        mx.eval(list(tensors.values()))
        held |= tensors
        wanted = [name for g in self._shards[place] for name in g.tensors]
        if len(held) == len(wanted):
            del self._waiting[place]
            write_whole(
                self._path(place),
                lambda path: mx.save_safetensors(
                    str(path), {name: held[name] for name in wanted}, metadata={"format": "mlx"}
                ),
            )

    def write_index(self) -> None:
        where = {
            name: self._path(i).name
            for i, shard in enumerate(self._shards)
            for group in shard
            for name in group.tensors
        }
        index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(where.items()))}
        text = json.dumps(index, indent=2) + "\n"
        write_whole(self.folder / INDEX, lambda path: path.write_text(text))

    def _path(self, place: int) -> Path:
        return self.folder / f"model-{place + 1:05d}-of-{len(self._shards):05d}.safetensors"

    def _check_room(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise DiskFullError(
                f"{self.folder} has {free / 1e9:.1f} GB free and {needed / 1e9:.1f} GB are still "
                "to be written: make room, or choose another disk"
            )


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name first, so that it is whole or not there.

    Raises:
        DiskFullError
    """
    partial = path.with_name(f"partial-{path.name}")
    try:
        write(partial)
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # MLX raises the latter
        partial.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        raise DiskFullError(
            f"{path} could not be written ({error}); the disk has {free / 1e9:.1f} GB free. Make "
            "room and run the same command again: it goes on from here"
        ) from error


def _fill(groups: Sequence[Group]) -> list[list[Group]]:
    shards: list[list[Group]] = [[]]
    size = 0
    for group in groups:
        if shards[-1] and size + group.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(group)
        size += group.nbytes
    return shards
