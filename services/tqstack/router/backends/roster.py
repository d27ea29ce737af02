"""All backends by name, and how one set of them gives way to another while requests run."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

from tqstack.router.backends.backend import Backend
from tqstack.router.backends.definition import Definition

log = logging.getLogger(__name__)


class Roster(Mapping[str, Backend]):
    """The backends that there are now, in the order of their definitions.

    Attributes:
        current: the same as a plain mapping that never changes: a request keeps the one it began
            with, so that a backend that is taken out still ends what it has begun.
    """

    def __init__(self, make: Callable[[Definition], Backend]):
        self.current: Mapping[str, Backend] = {}
        self._make = make
        self._watches: dict[str, asyncio.Task[None]] = {}

    def __getitem__(self, name: str) -> Backend:
        return self.current[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.current)

    def __len__(self) -> int:
        return len(self.current)

    def replace(self, definitions: Sequence[Definition]) -> str:
        """Has these backends from now on; tells what changed.

        A backend whose definition is the same keeps its health and its load.
        """
        before, after = self.current, {}
        for one in definitions:
            old = before.get(one.name)
            after[one.name] = old if old and old.definition == one else self._make(one)
        gone = [name for name in before if after.get(name) is not before[name]]
        new = [name for name in after if after[name] is not before.get(name)]
        for name in gone:
            self._watches.pop(name).cancel()
        for name in new:
            self._watches[name] = asyncio.create_task(after[name].probe.watch())
        self.current = after
        words = {
            "new": [name for name in new if name not in gone],
            "changed": [name for name in new if name in gone],
            "taken out": [name for name in gone if name not in after],
        }
        told = [f"{word}: {', '.join(names)}" for word, names in words.items() if names]
        return "; ".join(told) or "nothing has changed"

    def close(self) -> None:
        for watch in self._watches.values():
            watch.cancel()
