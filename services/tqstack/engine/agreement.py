"""What the ranks of one model may see differently, and must decide alike.

All ranks run the same worker on the same jobs, so their books agree as long as what goes into a
decision does. Clocks, disks and ends of sequences are asked for here. In a process that has all of
a model each value is its own.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx


class Agreement:
    """One process alone.

    Attributes:
        many: whether there are other ranks.
    """

    many = False

    def word(self, value: Any) -> Any:
        """The value of rank 0, which is plain data; called by all ranks in the same order."""
        return value

    def least(self, count: int) -> int:
        """The smallest count of all ranks."""
        return count

    def drawn(self, tokens: mx.array) -> mx.array:
        """(B,) tokens as rank 0 draws them: unlike machines round unlike."""
        return tokens

    def failed(self, error: Exception) -> None:
        """A step failed. Other ranks may wait for this one's part of it for ever, so it ends."""


ALONE = Agreement()
