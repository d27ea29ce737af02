"""The disk tier: checkpoints in files, which outlive the process and an idle unload.

A file is named by its tokens and what made it (model, cache, format), and says which file comes
before it: a chain of files is a sequence. They are written behind by a thread of their own, each in
one piece or not at all, and the longest unused ones go when the quota is full. A file that is cut,
changed, foreign or older is not read: that prompt is read anew, and the log tells.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import queue
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from tqstack.engine.prefix import Tokens

log = logging.getLogger(__name__)

FORMAT = 1
SUFFIX = ".safetensors"
MOST_IN_FLIGHT = 256 << 20  # bytes that wait to be written; more are not taken

HEADER = ("length", "parent", "first", "packed")  # of a file's fields


@dataclass(frozen=True)
class File:
    """
    Attributes:
        length: tokens of the sequence up to here.
        parent: name of the file before it; empty: it begins the sequence.
        first: blocks that the files before it hold.
        packed: blocks that it and they hold.
    """

    name: str
    length: int
    parent: str
    first: int
    packed: int


class DiskStore:
    """
    Args:
        folder: of all models; made with mode 0700.
        quota: bytes of all files.
        fingerprint: of what makes the numbers: model, cache, versions.
    """

    def __init__(self, folder: Path, quota: int, fingerprint: str):
        self._folder, self._quota, self._fingerprint = folder, quota, fingerprint
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chmod(folder, 0o700)
        self._files: dict[str, File] = {}
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.in_flight = 0  # bytes that wait to be written
        self.written = self.read_back = self.rejected = 0
        for path in folder.glob("*" + SUFFIX):
            self._open(path)
        for part in folder.glob("*.part"):
            part.unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._write_behind, name="disk", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return len(self._files)

    def as_dict(self) -> dict[str, int]:
        return {
            "files": len(self),
            "written": self.written,
            "read": self.read_back,
            "rejected": self.rejected,
            "quota": self._quota,
        }

    def name(self, tokens: Tokens) -> str:
        """The name of the file at the end of these tokens."""
        return self._hasher(tokens).hexdigest()

    def _hasher(self, tokens: Tokens) -> Any:
        start = hashlib.blake2b(self._fingerprint.encode(), digest_size=16)
        start.update(np.asarray(tokens, dtype=np.int32).tobytes())
        return start

    def longest(self, tokens: Tokens) -> list[File]:
        """The files, first to last, of the longest sequence that is kept of a prompt's beginning;
        its last token does not count."""
        with self._lock:
            lengths = sorted({file.length for file in self._files.values()})
        ids, hasher, at, best = np.asarray(tokens, dtype=np.int32), self._hasher([]), 0, ""
        for length in lengths:
            if length >= len(ids):
                break
            hasher.update(ids[at:length].tobytes())
            at = length
            if (name := hasher.hexdigest()) in self._files:
                best = name
        return self._chain(best)

    def _chain(self, name: str) -> list[File]:
        chain: list[File] = []
        while name:
            file = self._files.get(name)
            if file is None:  # the one before was lost: this one is of no use
                return []
            chain.insert(0, file)
            name = file.parent
        return chain

    def __contains__(self, name: str) -> bool:
        return name in self._files

    # -- reading -------------------------------------------------------------------------------

    def read(self, file: File) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """Arrays and description of a file; None: it is damaged, and gone now."""
        path = self._path(file.name)
        try:
            with safe_open(path, framework="numpy") as opened:
                about = json.loads(opened.metadata()["tqstack"])
                names = opened.keys()  # it is no dict
                arrays = {name: opened.get_tensor(name) for name in names}
            if _checksum(arrays, about) != about.pop("checksum"):
                raise ValueError("its checksum is another")
            os.utime(path)  # used now
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            self.reject(file, str(error))
            return None
        self.read_back += 1
        return arrays, about

    def reject(self, file: File, why: str) -> None:
        """A file that cannot be used; its prompt is read anew."""
        log.warning("a kept prefix of %d tokens cannot be used (%s)", file.length, why)
        self.rejected += 1
        self._drop(file.name)

    def _open(self, path: Path) -> None:
        """Know a file by its header, if it is one of this model's."""
        try:
            with safe_open(path, framework="numpy") as opened:
                about = json.loads(opened.metadata()["tqstack"])
            if about["format"] == FORMAT and about["fingerprint"] == self._fingerprint:
                file = File(path.stem, *(about[name] for name in HEADER))
                self._files[file.name] = file
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            log.warning("%s is no kept prefix (%s): deleted", path.name, error)
            path.unlink(missing_ok=True)

    # -- writing -------------------------------------------------------------------------------

    def write(
        self,
        file: File,
        arrays: dict[str, np.ndarray],
        about: dict[str, Any],
    ) -> bool:
        """Have a checkpoint written. False: too much waits already."""
        size = sum(array.nbytes for array in arrays.values())
        if self.in_flight and self.in_flight + size > MOST_IN_FLIGHT:
            return False
        with self._lock:
            self.in_flight += size
            self._files[file.name] = file
        self._queue.put((file, arrays, about))
        return True

    def flush(self) -> None:
        """Wait until all is written."""
        written = threading.Event()
        self._queue.put(written)
        written.wait()

    def close(self) -> None:
        """Write what waits, and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _write_behind(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
                continue
            file, arrays, about = item
            try:
                self._write(file, arrays, about)
                self.written += 1
                self._keep_quota(file.name)
            except OSError as error:
                log.warning("a prefix of %d tokens was not kept on disk: %s", file.length, error)
                self._drop(file.name)
            with self._lock:
                self.in_flight -= sum(array.nbytes for array in arrays.values())

    def _write(self, file: File, arrays: dict[str, np.ndarray], about: dict[str, Any]) -> None:
        about = {
            **about,
            "format": FORMAT,
            "fingerprint": self._fingerprint,
            **{name: getattr(file, name) for name in HEADER},
        }
        about["checksum"] = _checksum(arrays, about)
        part = self._path(file.name).with_suffix(".part")
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as out:
            out.write(save(arrays, {"tqstack": json.dumps(about)}))
        part.replace(self._path(file.name))

    def _keep_quota(self, newest: str) -> None:
        """Delete the files that were not used for longest, whoever made them."""
        found = []
        for path in self._folder.glob("*" + SUFFIX):
            with suppress(OSError):
                status = path.stat()
                found.append((status.st_mtime, path.stem, status.st_size))
        over, before = sum(size for _, _, size in found) - self._quota, len(self)
        parents = {file.parent for file in self._files.values()}
        for _, name, size in sorted(found):
            if over <= 0:
                return
            if name in parents and name != newest:
                continue  # its children go first
            self._drop(name)
            over -= size
        if over > 0 and len(self) < before:
            self._keep_quota(newest)  # parents whose children are gone now

    def _drop(self, name: str) -> None:
        with self._lock:
            self._files.pop(name, None)
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / (name + SUFFIX)


def _checksum(arrays: dict[str, np.ndarray], about: dict[str, Any]) -> str:
    told = {key: value for key, value in about.items() if key != "checksum"}
    digest = hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=16)
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
