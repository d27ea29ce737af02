"""What is kept of earlier sequences: checkpoints in a tree of their tokens.

A checkpoint is a sequence's cache at a position: its blocks, shared with whoever else holds them,
and what has no history to cut: recurrent states, windows, and the exact tail, so that what follows
sees the keys that it would see without a checkpoint.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from tqstack.attention.pool import Pool
from tqstack.engine import caches
from tqstack.engine.caches import Cache
from tqstack.engine.prefix import Match, Node, PrefixTree, Tokens


@dataclass(eq=False)
class Checkpoint:
    """
    Attributes:
        cache: never changed; sequences go on with forks of it.
        state_bytes: bytes beside the pool's blocks.
        on_disk: it need not be written there again.
    """

    cache: Cache
    on_disk: bool = False
    state_bytes: int = field(init=False)
    blocks: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        caches.settle(self.cache)
        self.state_bytes = caches.state_bytes(self.cache)
        self.blocks = caches.blocks(self.cache)


class PrefixStore:
    """
    Args:
        pool: None: caches are mlx-lm's own, and a checkpoint holds all of its sequence.
        limit: bytes of all checkpoints and of the blocks that they hold.
        evicted: told of a checkpoint before it goes.
    """

    def __init__(
        self,
        pool: Pool | None,
        limit: int,
        evicted: Callable[[Node], object] = lambda node: None,
    ):
        self._pool, self.limit, self._evicted = pool, limit, evicted
        self._tree = PrefixTree(self._gives_back)
        self._holders: Counter[int] = Counter()  # of each block, checkpoints that hold it
        self.state_bytes = 0
        self.evictions = 0

    def __len__(self) -> int:
        return sum(1 for _ in self._tree.checkpoints())

    @property
    def nbytes(self) -> int:
        """Bytes of the checkpoints, blocks that running sequences share included."""
        return self.state_bytes + len(self._holders) * self.block_bytes

    @property
    def block_bytes(self) -> int:
        return self._pool.block_bytes if self._pool else 0

    def without(self, kept: Iterable[Node]) -> tuple[int, Counter[int]]:
        """(bytes of states that would stay, how many times less each block would be held) if all
        checkpoints but `kept` were evicted."""
        states, gone = 0, self._holders.copy()
        for node in kept:
            states += node.checkpoint.state_bytes
            gone.subtract(node.checkpoint.blocks)
        return states, gone

    def match(self, tokens: Tokens) -> Match:
        """Where a prompt can go on from; its last token is always read."""
        return self._tree.match(tokens, most=len(tokens) - 1)

    def tokens(self, node: Node) -> np.ndarray:
        return self._tree.path(node)

    def has(self, tokens: Tokens) -> bool:
        """Whether there is a checkpoint at the end of just these tokens."""
        return self._tree.match(tokens).usable == len(tokens)

    def use(self, node: Node) -> Cache:
        """A cache to go on with from this node."""
        self._tree.touch(node)
        return caches.fork(node.checkpoint.cache)

    def insert(self, tokens: Tokens, checkpoint: Checkpoint, kept: set[Node]) -> Node | None:
        """Keep a checkpoint, as far as the limit allows; less useful ones make room, not `kept`."""
        old = self._tree.match(tokens).node
        if old is not None and old.end == len(tokens):
            self._drop(old)
        node = self._tree.insert(tokens, checkpoint)
        self._holders.update(checkpoint.blocks)
        self.state_bytes += checkpoint.state_bytes
        while self.nbytes > self.limit:
            if not self.evict(kept):
                break
        if node.checkpoint is checkpoint and self.nbytes > self.limit:
            self._evict(node)
        return node if node.checkpoint is checkpoint else None

    def evict(self, kept: set[Node]) -> bool:
        """Let the least useful checkpoint go. False: there is none but `kept`."""
        node = self._tree.least_useful(kept)
        if node is not None:
            self._evict(node)
        return node is not None

    def _evict(self, node: Node) -> None:
        self._evicted(node)
        self._drop(node)
        self.evictions += 1

    def _drop(self, node: Node) -> None:
        checkpoint = self._tree.evict(node)
        self._holders.subtract(checkpoint.blocks)
        self._holders = +self._holders
        self.state_bytes -= checkpoint.state_bytes

    def clear(self) -> None:
        while self.evict(set()):
            pass

    def nodes(self) -> list[Node]:
        """Those with checkpoints."""
        return list(self._tree.checkpoints())

    def _gives_back(self, checkpoint: Checkpoint) -> int:
        own = sum(1 for block in checkpoint.blocks if self._holders[block] <= 1)
        return checkpoint.state_bytes + own * self.block_bytes
