"""Where in a prompt checkpoints are made. Pure.

One of a hybrid model weighs as much as thousands of tokens (64 MB for Qwen3.5-35B-A3B), so they are
few: where an earlier prompt left this one's way, at the ends of the first and of the last messages,
at ends of messages farther and farther back, and on a ladder of doubling lengths, so that a prompt
that is cancelled, or edited anywhere, is not lost whole.
"""

from __future__ import annotations

from collections.abc import Sequence

APART = 16  # tokens between two checkpoints, at least
LADDER = 2048  # tokens of its first rung
BACK = 512  # tokens from the end of its first distance
MERGES = 8  # last tokens of a text that more text may merge with otherwise


def places(tokens: int, boundaries: Sequence[int], start: int, known: int) -> tuple[int, ...]:
    """Positions, ascending, above `start`.

    Args:
        tokens: of the prompt; the last one is not among those that checkpoints cover.
        boundaries: ends of its messages, ascending; none: it is one text.
        start: position that it goes on from.
        known: tokens that it shares with an earlier one.
    """
    last = tokens - 1
    ends = [end for end in boundaries if end <= last] or [last - MERGES]
    wanted = [ends[-1], *ends[:1], *ends[-2:-1], known]
    distance = BACK
    while distance < last:
        wanted.append(max((end for end in ends if end <= last - distance), default=0))
        distance *= 2
    rung = LADDER
    while rung < last:
        wanted.append(rung)
        rung *= 2
    chosen: list[int] = []
    for place in wanted:
        if start < place <= last and all(abs(place - other) >= APART for other in (start, *chosen)):
            chosen.append(place)
    return tuple(sorted(chosen))
