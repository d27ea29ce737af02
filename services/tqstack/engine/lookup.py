"""Drafts by look-up: what came after the longest recent n-gram when it was there before. No mlx.

Answers that repeat their prompt, such as a rewritten file, are drafted by it for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SHORTEST, LONGEST = 3, 32  # tokens of an n-gram


class Lookup:
    """The tokens of one sequence, its prompt and its answer so far.

    Args:
        most: tokens that it may have in all.
    """

    def __init__(self, tokens: Sequence[int], most: int):
        self._tokens = np.zeros(max(most, len(tokens)) + 1, np.int32)
        self._tokens[: len(tokens)] = tokens
        self._count = len(tokens)

    def append(self, token: int) -> None:
        if self._count == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)])
        self._tokens[self._count] = token
        self._count += 1

    def guess(self, count: int) -> list[int]:
        """The `count` tokens that come next, if it goes on as it did behind its last n-gram where
        that was before: the longest one that was, and of its places the last. Empty: its last
        SHORTEST tokens are new. What comes so soon that its end is not known repeats itself."""
        last, tokens = self._count - 1, self._tokens
        if last < SHORTEST:
            return []
        ends = np.flatnonzero(tokens[:last] == tokens[last])
        for back in range(1, LONGEST):
            found = ends[ends >= back]
            found = found[tokens[found - back] == tokens[last - back]]
            if not len(found):
                if back < SHORTEST:
                    return []
                break
            ends = found
        after, period = int(ends[-1]) + 1, last - int(ends[-1])
        return [int(tokens[after + i % period]) for i in range(count)]
