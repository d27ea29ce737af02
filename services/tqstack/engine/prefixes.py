"""Prefixes across memory and disk: where a job goes on from, and what of it is kept."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

from tqstack.engine import caches, saved
from tqstack.engine.agreement import ALONE, Agreement
from tqstack.engine.caches import Cache
from tqstack.engine.disk import MOST_IN_FLIGHT, DiskStore, File
from tqstack.engine.places import APART
from tqstack.engine.prefix import Node, Tokens
from tqstack.engine.store import Checkpoint, PrefixStore

log = logging.getLogger(__name__)

WORTH_READING = 256  # tokens that a file must save beside what is in memory


@dataclass(frozen=True)
class Source:
    """What a job goes on from: a checkpoint in memory, files, or nothing.

    Attributes:
        known: tokens that are shared with some earlier sequence.
        evicted: whether a better checkpoint was.
    """

    known: int
    node: Node | None = None
    files: tuple[File, ...] = ()
    evicted: bool = False

    @property
    def usable(self) -> int:
        if self.files:
            return self.files[-1].length
        return self.node.end if self.node else 0


NOTHING = Source(0)


class Prefixes:
    """
    Args:
        new_cache: an empty cache of one sequence.
        disk: None: there is no disk tier.
        ranks: each has files of its own, which all must have for one to be used.
    """

    def __init__(
        self,
        store: PrefixStore,
        new_cache: Callable[[], Cache],
        disk: DiskStore | None,
        ranks: Agreement = ALONE,
    ):
        self.store, self._new_cache, self.disk, self._ranks = store, new_cache, disk, ranks
        self.misses: Counter[str] = Counter()

    @property
    def in_flight(self) -> int:
        """Bytes on their way to the disk; of ranks, whose disks differ, as many as there may be."""
        if self.disk is None:
            return 0
        return MOST_IN_FLIGHT if self._ranks.many else self.disk.in_flight

    # -- going on ----------------------------------------------------------------------------

    def find(self, tokens: Tokens) -> Source:
        match = self.store.match(tokens)
        files = self._files(tokens)
        if files and files[-1].length >= match.usable + WORTH_READING:
            return Source(max(match.known, files[-1].length), files=files)
        return Source(match.known, match.node, evicted=match.evicted)

    def _files(self, tokens: Tokens) -> tuple[File, ...]:
        if self.disk is None:
            return ()
        told = self._ranks.word([astuple(file) for file in self.disk.longest(tokens)])
        return tuple(File(*fields) for fields in told)

    def open(self, source: Source) -> tuple[Cache, int]:
        """The cache to go on with, and how many of the tokens it holds."""
        files = source.files
        while files and self.disk is not None:
            cache = self._new_cache()
            good = self._ranks.least(self._read(cache, files))
            if good == len(files):
                return cache, files[-1].length
            files = files[:good]
        if source.node is not None:
            return self.store.use(source.node), source.node.end
        return self._new_cache(), 0

    def _read(self, cache: Cache, files: tuple[File, ...]) -> int:
        """Fill a cache from a chain of files. Returns how many of them are good."""
        assert self.disk is not None
        for i, file in enumerate(files):
            content = self.disk.read(file)
            if content is None:
                return i
            try:
                saved.restore(cache, *content, first=file.first, last=file is files[-1])
            except saved.DamagedError as error:
                self.disk.reject(file, str(error))
                return i
            caches.settle(cache)
        return len(files)

    def account(self, source: Source, tokens: int, used: int, job: int) -> None:
        """Count, and tell the log, why a prompt's beginning must be read."""
        if used and source.known - used < 2 * APART:
            return
        if source.evicted:
            why = "evicted"
        elif source.known - used >= 2 * APART:
            why = "no_checkpoint"
        else:
            why = "new"
        self.misses[why] += 1
        log.info(
            "request %d: %d of %d prompt tokens were kept (%s: %d are shared with an earlier one)",
            *(job, used, tokens, why.replace("_", " "), source.known),
        )

    # -- keeping -----------------------------------------------------------------------------

    def keep(self, tokens: Tokens, cache: Cache, kept: set[Node]) -> None:
        """Keep a sequence as it is now, if the limit allows."""
        self.store.insert(tokens, Checkpoint(cache), kept)

    def to_disk(self, node: Node) -> bool:
        """Have a checkpoint written behind. False: there is no disk, or too much waits for it."""
        checkpoint: Any = node.checkpoint
        if self.disk is None or checkpoint.on_disk:
            return self.disk is not None
        told = self._ranks.word(self._new_file(node, self.disk))
        if told is not None:
            file = File(*told)
            taken = self.disk.write(file, *saved.to_arrays(checkpoint.cache, file.first))
            if not self._ranks.word(taken):
                return False
        checkpoint.on_disk = True
        return True

    def _new_file(self, node: Node, disk: DiskStore) -> tuple[Any, ...] | None:
        """Fields of the file that a checkpoint is written to; None: it is there."""
        tokens = self.store.tokens(node)
        name = disk.name(tokens)
        if name in disk:
            return None
        chain = disk.longest(tokens)
        parent, first = (chain[-1].name, chain[-1].packed) if chain else ("", 0)
        packed = saved.packed_blocks(node.checkpoint.cache)
        return astuple(File(name, len(tokens), parent, first, packed))

    def bytes_to_write(self, node: Node) -> int:
        """Bytes of a checkpoint's copy on its way to the disk, at most."""
        if self.disk is None or node.checkpoint.on_disk:
            return 0
        return node.checkpoint.state_bytes + self.store.block_bytes * len(node.checkpoint.blocks)

    def unwritten(self) -> Node | None:
        """A checkpoint that is not on disk; short ones come first, so that longer ones hold only
        what lies behind them."""
        nodes = self.store.nodes() if self.disk is not None else []
        new = [node for node in nodes if not node.checkpoint.on_disk]
        return min(new, key=lambda node: node.end, default=None)

    def close(self) -> None:
        """Write what can be, and forget all."""
        while (node := self.unwritten()) is not None:
            if not self.to_disk(node) and self.disk is not None:
                self.disk.flush()
        if self.disk is not None:
            self.disk.close()
        self.store.clear()
