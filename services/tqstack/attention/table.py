"""The table of a sequence: which blocks hold its packed tokens, in every layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from uuid import uuid4
from weakref import WeakKeyDictionary

from tqstack.attention.pool import Pool, PoolError


class Table:
    """The packed blocks of one sequence, held by the caches of all its layers.

    Layers come one after the other, in a forward pass and in everything else that is done to a
    cache: the first one that needs a block takes it, and the others fill in their part.

    Attributes:
        ids: the blocks, in order; the same tuple as long as they are the same.
    """

    def __init__(self, pool: Pool, ids: Sequence[int] = ()):
        pool.retain(ids)
        self.pool = pool
        self.key = uuid4().hex  # names the sequence in a file, so that its layers meet again
        self._ids: tuple[int, ...] | None = tuple(ids)
        self._needed: dict[int, int] = {}  # blocks that each layer needs
        self._forks = PerLayer(pool.layers)
        self._copies: WeakKeyDictionary[Pool, PerLayer] = WeakKeyDictionary()

    @property
    def ids(self) -> tuple[int, ...]:
        if self._ids is None:
            raise PoolError("this sequence was freed; start a new one")
        return self._ids

    def reserve(self, count: int) -> None:
        """Have at least so many blocks.

        Raises:
            PoolFullError: the pool has no more; nothing has changed.
        """
        if count > len(self.ids):
            self._ids = (*self.ids, *self.pool.allocate(count - len(self.ids)))

    def to_write(self, layer: int, first: int, stop: int) -> tuple[int, ...]:
        """Blocks `first` to `stop`, which this layer fills now: held by nobody else.

        Raises:
            PoolFullError
        """
        self.reserve(stop)
        ids = list(self.ids)
        for at in range(first, stop):
            if self.pool.holders(ids[at]) > 1:
                ids[at] = self.pool.replace(ids[at])
        if tuple(ids) != self._ids:
            self._ids = tuple(ids)
        self._needed[layer] = stop
        return self.ids[first:stop]

    def cut(self, layer: int, count: int) -> None:
        """This layer needs only the first `count` blocks; what no layer needs is given back."""
        self._needed[layer] = count
        kept = max(self._needed.values())
        if kept < len(self.ids):
            self._ids, dropped = self.ids[:kept], self.ids[kept:]
            self.pool.release(dropped)

    def fork(self, layer: int, count: int) -> Table:
        """The table of a second sequence that begins with the same `count` blocks. The n-th fork
        that one layer asks for is the n-th that the others get."""
        ids = self.ids[:count]
        return self._forks.take(layer, ids, lambda: Table(self.pool, ids))

    def copy_to(self, pool: Pool, layer: int, count: int) -> Table:
        """A table of new blocks in another pool, which `layer` has filled with its part."""
        copies = self._copies.setdefault(pool, PerLayer(pool.layers))

        def make() -> Table:
            table = Table(pool)
            table.reserve(count)
            return table

        table = copies.take(layer, (), make)
        if count:
            blocks = table.to_write(layer, 0, count)
            pool.write(layer, blocks, self.pool.read(layer, self.ids[:count]))
        return table

    def free(self) -> None:
        """Give all blocks back; whoever reads the sequence afterwards gets an error."""
        if self._ids is not None:
            self.pool.release(self._ids)
            self._ids = None

    def __del__(self) -> None:
        if getattr(self, "_ids", None) is not None:
            self.free()


class PerLayer:
    """Hands one table to all layers of a cache, each of which asks by itself: the n-th that a layer
    asks for is the n-th of every layer, if it still begins with the blocks that are wanted. It is
    held until all have asked, since the first one may be done with it before the next one comes."""

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._asked: Counter[int] = Counter()
        self._taken: Counter[int] = Counter()
        self._made: dict[int, Table] = {}

    def take(self, layer: int, ids: tuple[int, ...], make: Callable[[], Table]) -> Table:
        number = self._asked[layer]
        self._asked[layer] += 1
        table = self._made.get(number)
        if table is None or table._ids is None or table.ids[: len(ids)] != ids:
            table = self._made[number] = make()
        self._taken[number] += 1
        if self._taken[number] == self._layers:
            del self._made[number], self._taken[number]
        return table
