"""What touches the model: a prompt's chunk, and the next tokens of all sequences that decode.

Tokens are made one ahead: while the host hands one out, the device computes the next. Where a
sequence's form must know a token to tell what may follow it, the forward pass has been sent off
before: the host looks that up while the device computes the logits. Where drafts pay, a step
verifies some tokens of each sequence at once, and the next ones are known behind it
(`speculation.py`). A sequence's cache holds the tokens that were fed to the model: its prompt, and
all of its answer so far that has been handed out, the end marker included.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from tqstack.engine import caches, logprobs
from tqstack.engine.agreement import ALONE, Agreement
from tqstack.engine.caches import Cache
from tqstack.engine.depth import Chance, Prospect
from tqstack.engine.drawing import Drawer, Mark
from tqstack.engine.jobs import Job
from tqstack.engine.logprobs import Logprob
from tqstack.engine.speculation import Drafting, Speculation
from tqstack.models import verification
from tqstack.models.drafts import NONE, Drafts


@dataclass(eq=False, repr=False)
class Running:
    """A job on the model.

    Attributes:
        cache: of its own, until it joins the batch.
        tokens: those that the cache holds.
        drafting: None: its tokens are made one by one.
    """

    job: Job
    cache: Cache | None
    tokens: list[int]
    drawer: Drawer
    drafting: Drafting | None = None

    @property
    def generated(self) -> int:
        return max(0, len(self.tokens) - self.job.prompt_tokens)

    @property
    def room(self) -> int:
        """Tokens that the answer may have behind the one that is fed next."""
        return self.job.longest - len(self.tokens) - 1

    def finish_reason(self, token: int) -> str | None:
        """Why the sequence ends with this token; None: it goes on."""
        if token in self.drawer.ends:
            return "stop"
        return "length" if self.generated >= self.job.max_tokens else None


@dataclass(frozen=True)
class Made:
    """A sequence's next token; with the last one why it ends."""

    running: Running
    token: int
    logprob: Logprob | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Told:
    """Log-probabilities of a step's tokens, and where each job's begin."""

    rows: dict[int, int]
    measured: logprobs.DeviceLogprobs | None = None

    def of(self, running: Running, token: int, place: int = 0) -> Logprob | None:
        """Of the token that was drawn behind so many others of the step."""
        row, top = self.rows.get(running.job.id), running.job.logprobs
        if row is None or top is None or self.measured is None:
            return None
        return self.measured.read(row + place, token, top)

    def behind(self, places: dict[int, int]) -> Told:
        """The same, each job's beginning at its place."""
        return Told({job: row + places[job] for job, row in self.rows.items()}, self.measured)


NOTHING_TOLD = Told({})
NO_PROSPECT = Prospect(Chance(), 0)


class Model:
    """The model, and the batch of sequences that decode."""

    def __init__(self, model: nn.Module, drafts: Drafts = NONE, ranks: Agreement = ALONE):
        self._model, self._ranks = model, ranks
        self.batch: list[Running] = []
        self.cache: Cache = []  # of the batch: merged, unless it is one sequence
        self.speculation = Speculation(drafts, ranks)
        self._next: mx.array | None = None  # (B,) tokens to feed next
        self._told: Told = NOTHING_TOLD  # of those

    # -- prompts -----------------------------------------------------------------------------

    def read(self, running: Running, count: int) -> list[Logprob]:
        """Feed the next `count` tokens of a prompt. Returns what the job wants to know of those
        behind each of them; else nobody needs the logits, so they are not computed."""
        at, job = len(running.tokens), running.job
        self.speculation.interrupted()
        tokens = list(job.tokens[at : at + count])
        logits = self._model(mx.array(tokens)[None], cache=running.cache)
        told: list[Logprob] = []
        if (top := job.prompt_logprobs) is not None:
            following = list(job.tokens[at + 1 : at + count + 1])
            measured = logprobs.measure(logits[0], mx.array(following), top)
            told = [measured.read(i, token, top) for i, token in enumerate(following)]
        assert running.cache is not None
        caches.settle(running.cache)
        running.tokens.extend(tokens)
        return told

    # -- answers -----------------------------------------------------------------------------

    def join(self, running: Running) -> None:
        """Let a sequence decode whose prompt has been read but for its last token."""
        own, running.cache = running.cache, None
        assert own is not None
        self._settle_head(own)
        job, drawer = running.job, running.drawer
        running.drafting = self.speculation.begin(
            job.tokens[:-1], job.longest, drawer.ends, drawer.waits
        )
        first = mx.array([running.job.tokens[-1]])
        if not self.batch:
            self.cache, self._next = own, first
        else:
            self._settle_head(self.cache)
            if len(self.batch) == 1:
                self.cache = caches.merged([self.cache, own])
            else:
                caches.extend(self.cache, own)
            assert self._next is not None
            self._next = mx.concatenate([self._next, first])
        self.batch.append(running)

    def decode(self) -> list[Made]:
        """Every sequence's next token, or some. A prompt's last token, which is fed first, gives
        none."""
        assert self._next is not None
        known = self._expected() if any(r.drafting for r in self.batch) else None
        drafts = self._proposed(known) if known else []
        made = self._verify(known, drafts) if known and any(drafts) else self._plain(known)
        self.speculation.stepped(len(self.batch), 1 + max(map(len, drafts), default=0))
        return made

    def _plain(self, known: list[int] | None) -> list[Made]:
        """A token of each sequence, one ahead."""
        fed, told, self._next = self._next, self._told, None
        assert fed is not None
        logits = self._model(fed[:, None], cache=self.cache)[:, -1]
        self._next = self._ranks.drawn(self._draw(logits, fed))
        self._told = self._tell(logits[:, None], self._next[:, None])
        measured = self._told.measured
        mx.async_eval(self._next, *self._aside(), *(measured.arrays if measured else ()))
        made = []
        for running, token in zip(self.batch, fed.tolist(), strict=True):  # pyright: ignore
            if known is None and running.drafting:
                running.drafting.take(token)
            made += self._fed(running, token, told.of(running, token))
        return made

    def _fed(self, running: Running, token: int, logprob: Logprob | None) -> list[Made]:
        """A token has been fed: that is one of the answer, unless it is the prompt's last."""
        running.tokens.append(token)
        if not running.generated:
            return []
        return [Made(running, token, logprob, running.finish_reason(token))]

    def _aside(self) -> list[mx.array]:
        """What must be computed beside the next tokens: a head's part of the cache."""
        aside: Any = getattr(self._model, "aside", None)
        return aside(self.cache) if aside else []

    def _settle_head(self, cache: Cache) -> None:
        """Let a head store what it put off, before the cache is changed or copied."""
        if settle := getattr(self._model, "settle", None):
            settle(cache)

    # -- drafts ------------------------------------------------------------------------------

    def _expected(self) -> list[int] | None:
        """The tokens that are fed next, if drafts may pay; else they are not waited for."""
        cost = self.speculation.cost
        prospects = [
            r.drafting.expect(r.room, cost) if r.drafting else NO_PROSPECT for r in self.batch
        ]
        if not self.speculation.depth(prospects):
            return None
        assert self._next is not None
        known: list[int] = self._next.tolist()  # pyright: ignore
        for running, token in zip(self.batch, known, strict=True):
            if running.drafting:
                running.drafting.take(token)
        return known

    def _proposed(self, known: list[int]) -> list[list[int]]:
        """Each sequence's drafts behind the tokens that are fed next, as many as pay."""
        cost = self.speculation.cost
        found = [
            running.drafting.propose(token, running.room, cost)
            if running.drafting
            else (NO_PROSPECT, [])
            for running, token in zip(self.batch, known, strict=True)
        ]
        depth = self.speculation.depth([prospect for prospect, _ in found])
        drafts = [own[: min(depth, prospect.most)] for prospect, own in found]
        for i, own in self._heads(depth).items():
            drafts[i] = own[: found[i][0].most]
        return [
            running.drafting.until_end(own) if running.drafting else []
            for running, own in zip(self.batch, drafts, strict=True)
        ]

    def _heads(self, count: int) -> dict[int, list[int]]:
        """By row, what the model's head drafts for those that it is to draft for."""
        rows = [i for i, r in enumerate(self.batch) if r.drafting and r.drafting.by_head]
        if not count or not rows or self.cache[-1].empty():
            return {}
        assert self._next is not None
        model: Any = self._model  # one with a head, for nothing else drafts by it
        began, rooms = time.perf_counter(), [running.room for running in self.batch]
        drafts: list[list[int]] = model.draft(self._next, self.cache, count, rooms).tolist()
        self.speculation.drafted(count, time.perf_counter() - began)
        return {i: drafts[i] for i in rows}

    def _verify(self, known: list[int], drafts: list[list[int]]) -> list[Made]:
        """Feed the next tokens and drafts behind them; of these those stay that were right, and
        behind them the next token is known."""
        told, counts = self._told, [1 + len(own) for own in drafts]
        rows = zip(known, drafts, counts, strict=True)
        fed = mx.array([[at, *own, *[at] * (max(counts) - n)] for at, own, n in rows])
        self._settle_head(self.cache)
        given = verification.revocable(self.cache, counts)
        logits = self._model(fed, cache=given)  # (B, 1 + most drafts, vocabulary)
        drawn, marks = self._draw_behind(logits, fed, counts)
        drawn = self._ranks.drawn(drawn)
        ahead = self._tell(logits, drawn)
        mx.eval(drawn, *(ahead.measured.arrays if ahead.measured else ()))
        found: list[list[int]] = drawn.tolist()  # pyright: ignore
        right = [_right(own, row) for own, row in zip(drafts, found, strict=True)]
        states = verification.accept(given, counts, [1 + n for n in right])
        mx.async_eval(states, self._aside())
        made: list[Made] = []
        for i, (running, n) in enumerate(zip(self.batch, right, strict=True)):
            self.speculation.verified(running.drafting, drafts[i], n)
            if i in marks:
                running.drawer.back_to(marks[i][n])
            made += self._fed(running, known[i], told.of(running, known[i]))
            for place, token in enumerate(drafts[i][:n]):
                made += self._fed(running, token, ahead.of(running, token, place))
        self._next = mx.array([row[n] for row, n in zip(found, right, strict=True)])
        self._told = ahead.behind({r.job.id: n for r, n in zip(self.batch, right, strict=True)})
        return made

    def _draw_behind(
        self, logits: mx.array, fed: mx.array, counts: list[int]
    ) -> tuple[mx.array, dict[int, list[Mark]]]:
        """(B, L, vocabulary) behind (B, L) tokens -> (B, L) tokens; and, by row, how far its drawer
        is behind each of them, where there is something to take back."""
        likeliest = logits.argmax(-1)
        if all(running.drawer.plain for running in self.batch):
            return likeliest, {}
        rows, marks = [likeliest[i] for i in range(len(counts))], {}
        masks = self._masks(logits, fed[:, 0])
        for i, (running, count) in enumerate(zip(self.batch, counts, strict=True)):
            if running.drawer.plain:
                continue
            drawn, marks[i] = [], []
            for j in range(count):
                own = logits[i, j : j + 1]
                drawn.append(running.drawer.draw(own, fed[i, j : j + 1], masks.get(i)))
                marks[i].append(running.drawer.mark())
            rows[i] = mx.concatenate([*drawn, rows[i][count:].astype(drawn[0].dtype)])
        return mx.stack([row.astype(mx.int32) for row in rows]), marks

    def _draw(self, logits: mx.array, fed: mx.array) -> mx.array:
        """(B, vocabulary) -> (B,)"""
        if all(running.drawer.plain for running in self.batch):
            return logits.argmax(-1)
        masks = self._masks(logits, fed)
        rows = [
            running.drawer.draw(logits[i : i + 1], fed[i : i + 1], masks.get(i))
            for i, running in enumerate(self.batch)
        ]
        return mx.concatenate(rows)

    def _masks(self, logits: mx.array, fed: mx.array) -> dict[int, mx.array | None]:
        """By row, what the sequences' forms allow; made while the device computes the logits."""
        forced = [i for i, running in enumerate(self.batch) if running.drawer.waits]
        if not forced:
            return {}
        mx.async_eval(logits)
        known: list[int] = fed.tolist()  # pyright: ignore
        return {i: self.batch[i].drawer.allowed(known[i], logits.shape[-1]) for i in forced}

    def _tell(self, logits: mx.array, drawn: mx.array) -> Told:
        """Log-probabilities of the (B, L) tokens that were drawn from (B, L, vocabulary), for those
        who want to know."""
        wanted = {i: r.job.logprobs for i, r in enumerate(self.batch) if r.job.logprobs is not None}
        if not wanted:
            return NOTHING_TOLD
        rows, most, L = mx.array(list(wanted)), max(wanted.values()), drawn.shape[1]
        told = {self.batch[i].job.id: row * L for row, i in enumerate(wanted)}
        own = logits[rows].reshape(-1, logits.shape[-1])
        return Told(told, logprobs.measure(own, drawn[rows].reshape(-1), most))

    def snapshot(self, running: Running) -> Cache:
        """The sequence's cache as it is now, in arrays of its own."""
        self._settle_head(self.cache if running.cache is None else running.cache)
        if running.cache is not None:
            return caches.fork(running.cache)
        if len(self.batch) == 1:
            caches.settle(self.cache)
            return caches.fork(self.cache)
        return caches.row(self.cache, self.batch.index(running))

    def leave(self, gone: Sequence[Running]) -> None:
        """Take sequences out of the batch, and give back what they hold."""
        stay = [i for i, running in enumerate(self.batch) if running not in gone]
        if len(stay) == len(self.batch):
            return
        self.batch = [self.batch[i] for i in stay]
        if not stay:
            self.clear()
            return
        assert self._next is not None
        self._settle_head(self.cache)
        self._next = self._next[mx.array(stay)]
        if len(stay) == 1:
            self.cache = caches.row(self.cache, stay[0])
        else:
            caches.keep(self.cache, stay)

    def clear(self) -> None:
        """Forget all that decodes."""
        self.batch, self.cache, self._next = [], [], None
        self.speculation.interrupted()
        self._told = NOTHING_TOLD

    def blocks_of(self, running: Running) -> tuple[int, ...]:
        """The pool's blocks that a sequence holds."""
        if running.cache is not None:
            return caches.blocks(running.cache)
        return caches.blocks(self.cache, self.batch.index(running))

    # -- bytes -------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes that the batch holds beside the pool's blocks."""
        return caches.state_bytes(self.cache)

    def state_bytes(self, running: Running) -> int:
        """Of that what is a sequence's own; or of its cache, before it joins."""
        if running.cache is not None:
            return caches.state_bytes(running.cache)
        return caches.state_bytes(self.cache) // len(self.batch)

    def tail_bytes(self, running: Running) -> int:
        if running.cache is not None:
            return caches.tail_bytes(running.cache)
        return caches.tail_bytes(self.cache) // len(self.batch)


def _right(drafts: Sequence[int], drawn: Sequence[int]) -> int:
    """How many drafts were drawn, one after the other."""
    return next((i for i, draft in enumerate(drafts) if draft != drawn[i]), len(drafts))
