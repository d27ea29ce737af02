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
from tqstack.engine.depth import Chance, Prospect, StepTimes, depth
from tqstack.engine.lookup import Lookup
from tqstack.models.drafts import MOST, Drafts

BEGINNING = 0.6  # how often a head is right, before anything is known of it
PROBE = 64  # steps of one token after which the head is tried again


class Drafting:
    """One sequence's drafts.

    Args:
        tokens: of its prompt, but for the last one.
        most: tokens of it in all.
        ends: tokens that end its answer.
        drafters: "lookup", "mtp", or both.
        head: what is known of the model's head to begin with.

    Attributes:
        drafted, accepted: its drafts so far.
    """

    def __init__(
        self,
        tokens: Sequence[int],
        most: int,
        ends: Collection[int],
        drafters: Collection[str],
        head: Chance,
    ):
        self._lookup = Lookup(tokens, most) if "lookup" in drafters else None
        self._ends = ends
        self._expected: list[int] = []  # the token that is fed next, and those behind it
        self._seen = Chance()  # of the look-up
        self._head = Chance(head.rate) if "mtp" in drafters else None
        self.by_head = False  # whether the head makes the next drafts
        self.drafted = self.accepted = 0

    def expect(self, room: int, cost: float) -> Prospect:
        """What could be drafted, before the token that is fed next is known.

        Args:
            room: tokens that the answer may have behind it.
            cost: of a draft of the head, as in `Prospect`.
        """
        self._expected = self._lookup.guess(1 + MOST) if self._lookup else []
        return self._prospect(bool(self._expected), min(room, MOST), cost)

    def take(self, token: int) -> None:
        """This token is fed next."""
        if self._expected:
            self._seen.learn(self._expected[0] == token)
        self._expected = []
        if self._lookup:
            self._lookup.append(token)

    def propose(self, token: int, room: int, cost: float) -> tuple[Prospect, list[int]]:
        """What can be drafted behind `token`, which has been taken, and the look-up's drafts if
        those are better than the head's."""
        if token in self._ends:
            return Prospect(self._seen, 0), []
        found = self._lookup.guess(min(MOST, room)) if self._lookup else []
        prospect = self._prospect(bool(found), min(room, MOST), cost)
        return prospect, [] if self.by_head else found

    def _prospect(self, seen: bool, most: int, cost: float) -> Prospect:
        """By the drafter that is right more often; the look-up costs nothing."""
        self.by_head = self._head is not None and not (seen and self._seen.rate >= self._head.rate)
        if self.by_head and self._head is not None:
            return Prospect(self._head, most, cost)
        return Prospect(self._seen, most if seen else 0)

    def until_end(self, drafts: list[int]) -> list[int]:
        """None behind the answer's end."""
        end = next((i for i, one in enumerate(drafts) if one in self._ends), len(drafts))
        return drafts[: end + 1]

    def verified(self, drafts: Sequence[int], accepted: int) -> None:
        """Of these drafts the first ones were right."""
        if self._lookup:
            for token in drafts[:accepted]:
                self._lookup.append(token)
        chance = self._head if self.by_head and self._head is not None else self._seen
        chance.learn_all(accepted, len(drafts))
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
        self._head = Chance(BEGINNING)
        self._draft_seconds = drafts.draft_seconds
        self._spent = 0.0  # by the head since the last step
        self._last: tuple[float, int] | None = None  # when a step ended, and its tokens
        self._since = 0  # steps of one token since the last longer one

    def begin(
        self, tokens: Sequence[int], most: int, ends: Collection[int], waits: bool
    ) -> Drafting | None:
        """The drafts of a sequence; None: it decodes plainly.

        Args:
            waits: each of its tokens must be known before the next one can be drawn.
        """
        if self.drafts.why_not is not None:
            return None
        if waits:
            self.counts["plain_sequences"] += 1
            return None
        return Drafting(tokens, most, ends, self.drafts.drafters, self._head)

    @property
    def cost(self) -> float:
        """Of a draft of the head, as a share of a step of one token."""
        return self._draft_seconds / self.times.one

    def depth(self, prospects: Sequence[Prospect]) -> int:
        """Drafts that pay; now and then one by the head though it does not, to see whether it is
        right more often than it was."""
        found = depth(prospects, self.times)
        if not found and self._since >= PROBE and any(w.cost and w.most for w in prospects):
            return 1
        return found

    def drafted(self, count: int, seconds: float) -> None:
        """The head has made `count` drafts, one after the other."""
        self._draft_seconds += (seconds / count - self._draft_seconds) / 8
        self._spent += seconds

    def stepped(self, sequences: int, tokens: int) -> None:
        """A step that fed so many tokens of each sequence has ended. What it took is known if one
        of its kind ended just before: others leave the device work, or none."""
        now = time.perf_counter()
        if self._last is not None and (self._last[1] > 1) == (tokens > 1):
            seconds = self._ranks.word(now - self._last[0] - self._spent)
            self.times.observe(sequences, tokens, seconds)
        self._last, self._spent = (now, tokens), 0.0
        self._since = self._since + 1 if tokens == 1 else 0
        self.counts["verify_steps" if tokens > 1 else "plain_steps"] += 1

    def interrupted(self) -> None:
        """Something else was done since the last step."""
        self._last = None

    def verified(self, drafting: Drafting | None, drafts: Sequence[int], accepted: int) -> None:
        if drafting is None:
            return
        drafting.verified(drafts, accepted)
        if drafting.by_head:
            self._head.learn_all(accepted, len(drafts))
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
            "draft_ms": round(1000 * self._draft_seconds, 2),
        }
