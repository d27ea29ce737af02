"""One budget: weights, workspace, pool, states and checkpoints, held or promised.

A job is admitted when all that it may ever need has room beside what is held and promised already;
on Metal, memory that runs out aborts the process. Prefixes give way first, the least useful ones
first, and those that a waiting job will use last. Before a job is refused its chunks are halved.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from tqstack.attention.blocks import BLOCK_TOKENS
from tqstack.attention.pool import Pool, PoolFullError
from tqstack.engine.prefix import Node
from tqstack.engine.store import PrefixStore

SMALLEST_CHUNK = 64
KV_STEP = 256  # tokens by which mlx-lm's own caches grow


@dataclass(frozen=True)
class Costs:
    """Bytes.

    Attributes:
        fixed: of a sequence, whatever its length: states, windows, the exact tail.
        block: of a block in all compressed layers.
        token: of a token in layers that have no pool; batches are padded there.
        workspace: of a step that reads so many tokens.
        logits: of so many sequences of which a token is drawn and so many prompt tokens that are
            measured at once, beyond what the workspace counts.
        exact: tokens that a query sees unpacked, beside its own block.
        step: tokens that a step feeds of each sequence that decodes.
    """

    limit: int
    weights: int
    fixed: int
    block: int
    token: int
    workspace: Callable[[int], int]
    logits: Callable[[int, int], int] = lambda drawn, measured: 0
    exact: int = 0
    step: int = 1
    block_tokens: int = BLOCK_TOKENS

    def blocks(self, tokens: int) -> int:
        """Blocks that are packed when a sequence has so many tokens."""
        if not self.block:
            return 0
        return max(0, tokens // self.block_tokens - self.exact // self.block_tokens)


@dataclass(frozen=True)
class Promise:
    """What a job may need in all."""

    tokens: int
    blocks: int
    chunk: int
    measured: int = 0


@dataclass(frozen=True)
class Wish:
    """A job that asks for room.

    Attributes:
        tokens: at its longest.
        node: the checkpoint that it goes on from.
        shared: blocks that it shares otherwise.
        measured: tokens of its prompt whose log-probabilities are told at once.
    """

    tokens: int
    node: Node | None = None
    shared: int = 0
    measured: int = 0


class Budget:
    """
    Args:
        chunk: most tokens of a chunk.
        held: blocks that a job's sequence holds now.
        in_flight: bytes of what is being written to the disk.
    """

    def __init__(
        self,
        costs: Costs,
        chunk: int,
        pool: Pool | None,
        store: PrefixStore,
        held: Callable[[int], int],
        in_flight: Callable[[], int] = lambda: 0,
    ):
        self._costs, self._chunk, self._pool, self._store = costs, chunk, pool, store
        self._held, self._in_flight = held, in_flight
        self._promises: dict[int, Promise] = {}

    @property
    def limit(self) -> int:
        return self._costs.limit

    @property
    def committed(self) -> int:
        """Bytes that are held or promised."""
        return self._total(list(self._promises.values()), self._due())

    def workspace(self) -> int:
        """Bytes that steps of the admitted jobs may take for a moment."""
        return self._workspace(self._promises.values())

    def _due(self) -> int:
        """Blocks that were promised, and not taken yet."""
        return sum(max(0, p.blocks - self._held(job)) for job, p in self._promises.items())

    def _workspace(self, promises: Collection[Promise]) -> int:
        """While a chunk is read, the batch's tokens may still be drawn."""
        runs = sum(p.chunk > 0 for p in promises)
        fed = max([self._costs.step * runs, *(p.chunk for p in promises)])
        reading = self._costs.workspace(fed) if fed else 0
        measured = max((p.measured for p in promises), default=0)
        return reading + self._costs.logits(runs, measured)

    def _fixed(self, promises: list[Promise]) -> int:
        """All that is no prefix and not in the pool."""
        costs = self._costs
        longest = max((p.tokens for p in promises), default=0) + KV_STEP
        plain = costs.token * longest * len(promises) if costs.token else 0
        states = costs.fixed * len(promises) + plain
        return costs.weights + self._workspace(promises) + states + self._in_flight()

    def _total(self, promises: list[Promise], due: int) -> int:
        pool, blocks = self._pool, 0
        if pool is not None:
            blocks = max(pool.nbytes, (pool.blocks_used + due) * self._costs.block)
        return self._fixed(promises) + blocks + self._store.state_bytes

    # -- admission ---------------------------------------------------------------------------

    def alone(self, wish: Wish) -> int:
        """Tokens of a chunk by which the job could be read if nothing else were held; 0: never."""
        for promise in self._promised(wish):
            needed = self._fixed([promise]) - self._in_flight()
            if needed + promise.blocks * self._costs.block <= self.limit:
                return promise.chunk
        return 0

    def longest(self, measured: int = 0) -> int:
        """Tokens of the longest sequence that `alone` lets in; `measured` as in `Wish`."""
        low, high = 0, 1 << 32
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.alone(Wish(middle, measured=measured))
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def admit(self, job: int, wish: Wish, kept: set[Node]) -> int:
        """Promise a job what it may need; prefixes make room, but not `kept`.

        Returns:
            Tokens of a chunk; 0: there is no room now, and nothing was evicted in vain.
        """
        for promise in self._promised(wish):
            if self._could(promise, wish, kept) and self._makes_room(promise, wish, kept):
                self._promises[job] = promise
                return promise.chunk
        return 0

    def hold(self, key: int, tokens: int, kept: set[Node]) -> bool:
        """Promise room for a copy of a sequence, beside the blocks that it shares; prefixes make
        it, but not `kept`. False: there is none, and none was evicted."""
        self._promises[key] = Promise(tokens, 0, 0)
        if not self.room_for(0, kept):
            del self._promises[key]
            return False
        return True

    def release(self, job: int) -> None:
        """A job has ended, or given way."""
        self._promises.pop(job, None)

    def room_for(self, nbytes: int, kept: set[Node]) -> bool:
        """Make room for a checkpoint's state; prefixes make it, but not `kept`. False: they cannot,
        and none was evicted."""
        if self._without(list(self._promises.values()), self._due(), kept) + nbytes > self.limit:
            return False
        while self.committed + nbytes > self.limit:
            if self._pool is not None and self._pool.shrink(self._due()):
                continue
            if not self._store.evict(kept):
                return False
        return True

    def _promised(self, wish: Wish) -> Iterator[Promise]:
        """What the job may need, in chunks of half the size again and again."""
        blocks, chunk = self._costs.blocks(wish.tokens), self._chunk
        while True:
            yield Promise(wish.tokens, blocks, chunk, wish.measured)
            if chunk <= SMALLEST_CHUNK:
                return
            chunk = max(SMALLEST_CHUNK, chunk // 2)

    def _shared(self, wish: Wish) -> int:
        return len(wish.node.checkpoint.blocks) if wish.node else wish.shared

    def _could(self, promise: Promise, wish: Wish, kept: set[Node]) -> bool:
        """Whether there would be room without any prefix but `kept`."""
        due = self._due() + promise.blocks - self._shared(wish)
        return self._without([*self._promises.values(), promise], due, kept) <= self.limit

    def _without(self, promises: list[Promise], due: int, kept: set[Node]) -> int:
        """Bytes that would be held and promised if all prefixes but `kept` were evicted."""
        states, gone = self._store.without(kept)
        blocks = 0
        if self._pool is not None:
            used, capacity = self._pool.without(gone)
            blocks = max(capacity, used + due)
        return self._fixed(promises) + states + blocks * self._costs.block

    def _makes_room(self, promise: Promise, wish: Wish, kept: set[Node]) -> bool:
        pool, promises = self._pool, [*self._promises.values(), promise]
        while True:
            due = self._due() + promise.blocks - self._shared(wish)
            total = self._total(promises, due)
            if total <= self.limit and (pool is None or self._grown(pool, due, total)):
                return True
            if pool is not None and pool.shrink():  # and grows again by just what is due
                continue
            if not self._store.evict(kept):
                if pool is not None:  # what others were promised is there again
                    self._grown(pool, self._due(), self.committed)
                return False

    def _grown(self, pool: Pool, due: int, total: int) -> bool:
        """Have the blocks that are due."""
        others = total - max(pool.nbytes, (pool.blocks_used + due) * self._costs.block)
        pool.limit = self.limit - others
        try:
            pool.ensure(due)
        except PoolFullError:  # its slabs are used up
            return False
        return True
