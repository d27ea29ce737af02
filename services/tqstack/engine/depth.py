"""How many tokens are drafted: pure decisions from what steps took and what was accepted.

A step that verifies k drafts of a sequence makes 1 + p + ... + p^k tokens, if each draft is right
with probability p where those before it were. It pays if it makes more tokens a second than steps
of one token do. Both are measured on this machine: times of steps by how many sequences and tokens
they fed, at warm-up and ever after; p of each sequence from its own drafts, and, while none are
verified, from what drafts would have been.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

GAIN = 1.03  # that a step of drafts must promise: less is noise
RECENT = 9  # steps whose median counts
STALE = 512  # steps of one token after which what longer ones took is tried again


class StepTimes:
    """Seconds of a step, by sequences and by tokens that it feeds of each.

    Args:
        measured: those of one sequence at warm-up, of 1, 2, ... tokens.
    """

    def __init__(self, measured: Sequence[float]):
        self._first = list(measured)
        self._recent: dict[tuple[int, int], deque[float]] = {}
        self._plain = 0  # steps of one token since longer ones were forgotten

    def observe(self, sequences: int, tokens: int, seconds: float) -> None:
        self._recent.setdefault((sequences, tokens), deque(maxlen=RECENT)).append(seconds)
        self._plain = self._plain + 1 if tokens == 1 else 0
        if self._plain >= STALE:
            self._plain = 0
            self._recent = {key: kept for key, kept in self._recent.items() if key[1] == 1}

    @property
    def one(self) -> float:
        """Of one sequence and one token."""
        return median(self._recent.get((1, 1)) or self._first[:1])

    def ratio(self, sequences: int, tokens: int) -> float:
        """What a step of so many tokens takes, as a multiple of one of a single token."""
        one, more = (self._recent.get((sequences, n)) for n in (1, tokens))
        if one and more:
            return max(1.0, median(more) / median(one))
        return max(1.0, self._first[tokens - 1] / self._first[0])

    def as_dict(self) -> dict[str, float]:
        """Milliseconds of one sequence's steps, by tokens."""
        found = enumerate(self._first, 1)
        told = {n: self._recent.get((1, n)) or [seconds] for n, seconds in found}
        return {str(n): round(1000 * median(seconds), 2) for n, seconds in told.items()}


@dataclass
class Chance:
    """How often a sequence's next draft is right, of late.

    Attributes:
        rate: an average that forgets.
        tries: drafts that were compared.
    """

    rate: float = 0.3  # before anything is known
    tries: int = 0

    def learn(self, right: bool) -> None:
        self.tries += 1
        weight = max(0.08, 1 / (2 + self.tries))
        self.rate += weight * (right - self.rate)

    def learn_all(self, accepted: int, drafted: int) -> None:
        """Of the drafts of a step the first ones were accepted."""
        for _ in range(accepted):
            self.learn(True)
        if accepted < drafted:
            self.learn(False)

    def tokens(self, drafts: int) -> float:
        """What a step makes, on average, with so many drafts."""
        return sum(self.rate**n for n in range(drafts + 1))


@dataclass(frozen=True)
class Prospect:
    """What a sequence could have drafted.

    Attributes:
        most: drafts; 0: none.
        cost: seconds of drafting one, as a share of a step of one token.
    """

    chance: Chance
    most: int
    cost: float = 0.0


def depth(prospects: Sequence[Prospect], times: StepTimes) -> int:
    """Drafts of a step for sequences that step together; each has no more of them than it could
    have. 0: they do not pay."""
    sequences, best, found = len(prospects), GAIN, 0
    for k in range(1, max((prospect.most for prospect in prospects), default=0) + 1):
        made = (
            sum(prospect.chance.tokens(min(k, prospect.most)) for prospect in prospects) / sequences
        )
        drafting = k * max(prospect.cost for prospect in prospects)
        speed = made / (times.ratio(sequences, 1 + k) + drafting)
        if speed > best:
            best, found = speed, k
    return found
