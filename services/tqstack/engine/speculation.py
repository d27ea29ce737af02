"""Speculative decoding: drafts of sequences that decode, and what became of them.

A draft is a guess at the tokens that come next. One step of the model verifies it: what is drawn
behind each token, with the sequence's own seed, penalties and parameters, must be the draft's next
one. So an answer has the very tokens that it would have without drafts.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from tqstack.engine.agreement import ALONE, Agreement
from tqstack.engine.depth import Chance, StepTimes, Wish, depth
from tqstack.engine.lookup import Lookup
from tqstack.models.drafts import MOST, Drafts


class Drafting:
    """One sequence's drafts.

    Args:
        tokens: of its prompt, but for the last one.
        most: tokens of it in all.
        ends: tokens that end its answer.

    Attributes:
        drafted, accepted: its drafts so far.
    """

    def __init__(self, tokens: Sequence[int], most: int, ends: Collection[int]):
        self._lookup, self._ends = Lookup(tokens, most), ends
        self._expected: list[int] = []  # the token that is fed next, and those behind it
        self.chance = Chance()
        self.drafted = self.accepted = 0

    def expect(self, room: int) -> Wish:
        """What could be drafted, before the token that is fed next is known.

        Args:
            room: tokens that the answer may have behind it.
        """
        self._expected = self._lookup.guess(1 + MOST)
        return Wish(self.chance, min(room, MOST) if self._expected else 0)

    def take(self, token: int) -> None:
        """This token is fed next."""
        if self._expected:
            self.chance.learn(self._expected[0] == token)
        self._expected = []
        self._lookup.append(token)

    def propose(self, token: int, room: int) -> list[int]:
        """Drafts behind `token`, which has been taken; none behind the answer's end."""
        if token in self._ends:
            return []
        drafts = self._lookup.guess(min(MOST, room))
        end = next((i for i, one in enumerate(drafts) if one in self._ends), MOST)
        return drafts[: end + 1]

    def verified(self, drafts: Sequence[int], accepted: int) -> None:
        """Of these drafts the first ones were right."""
        for token in drafts[:accepted]:
            self._lookup.append(token)
        self.chance.learn_all(accepted, len(drafts))
        self.drafted += len(drafts)
        self.accepted += accepted


class Speculation:
    """What all sequences of a model share: times of steps, and what is told.

    Args:
        drafts: what the model can have drafted.
        ranks: draft alike, so by the times of one of them.
    """

    def __init__(self, drafts: Drafts, ranks: Agreement = ALONE):
        self.drafts, self._ranks = drafts, ranks
        self.times = StepTimes(drafts.step_seconds or (1.0,))
        self.counts: Counter[str] = Counter()
        self._last: tuple[float, int] | None = None  # when a step ended, and its tokens

    def begin(self, tokens: Sequence[int], most: int, ends: Collection[int], waits: bool):
        """The drafts of a sequence; None: it decodes plainly.

        Args:
            waits: each of its tokens must be known before the next one can be drawn.
        """
        if self.drafts.why_not is not None:
            return None
        if waits:
            self.counts["plain_sequences"] += 1
            return None
        return Drafting(tokens, most, ends)

    def stepped(self, sequences: int, tokens: int) -> None:
        """A step that fed so many tokens of each sequence has ended. What it took is known if one
        of its kind ended just before: others leave the device work, or none."""
        now = time.perf_counter()
        if self._last is not None and (self._last[1] > 1) == (tokens > 1):
            seconds = self._ranks.word(now - self._last[0])
            self.times.observe(sequences, tokens, seconds)
        self._last = now, tokens
        self.counts["verify_steps" if tokens > 1 else "plain_steps"] += 1

    def interrupted(self) -> None:
        """Something else was done since the last step."""
        self._last = None

    def depth(self, wishes: Sequence[Wish]) -> int:
        return depth(wishes, self.times)

    def verified(self, drafting: Drafting | None, drafts: Sequence[int], accepted: int) -> None:
        if drafting is not None:
            drafting.verified(drafts, accepted)
            self.counts["draft_tokens"] += len(drafts)
            self.counts["draft_tokens_accepted"] += accepted

    def as_dict(self) -> dict[str, Any]:
        """What `/health` tells."""
        names = ("plain_steps", "verify_steps", "draft_tokens", "draft_tokens_accepted")
        return {
            "mode": self.drafts.mode,
            "drafters": list(self.drafts.drafters),
            "why_not": self.drafts.why_not,
            **{name: self.counts[name] for name in (*names, "plain_sequences")},
            "step_ms": self.times.as_dict() if self.drafts.step_seconds else {},
        }
