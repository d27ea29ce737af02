"""What touches the model: a prompt's chunk, and a token of all sequences that decode.

Tokens are made one ahead: while the host hands one out, the device computes the next. Where a
sequence's form must know a token to tell what may follow it, the forward pass has been sent off
before: the host looks that up while the device computes the logits. A sequence's cache holds the
tokens that were fed to the model: its prompt, and all of its answer so far that has been handed
out, the end marker included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from tqstack.engine import caches, logprobs
from tqstack.engine.caches import Cache
from tqstack.engine.drawing import Drawer
from tqstack.engine.jobs import Job
from tqstack.engine.logprobs import Logprob


@dataclass(eq=False, repr=False)
class Running:
    """A job on the model.

    Attributes:
        cache: of its own, until it joins the batch.
        tokens: those that the cache holds.
    """

    job: Job
    cache: Cache | None
    tokens: list[int]
    drawer: Drawer

    @property
    def generated(self) -> int:
        return max(0, len(self.tokens) - self.job.prompt_tokens)

    def finish_reason(self, token: int) -> str | None:
        """Why the sequence ends with this token; None: it goes on."""
        if token in self.drawer.ends:
            return "stop"
        return "length" if self.generated >= self.job.max_tokens else None


@dataclass(frozen=True)
class Made:
    """A sequence's next token."""

    running: Running
    token: int
    logprob: Logprob | None = None


@dataclass(frozen=True)
class Told:
    """Log-probabilities of a step's tokens, and whose they are: in which row."""

    rows: dict[int, int]
    measured: logprobs.DeviceLogprobs | None = None

    def of(self, running: Running, token: int) -> Logprob | None:
        row, top = self.rows.get(running.job.id), running.job.logprobs
        if row is None or top is None or self.measured is None:
            return None
        return self.measured.read(row, token, top)


NOTHING_TOLD = Told({})


class Model:
    """The model, and the batch of sequences that decode."""

    def __init__(self, model: nn.Module):
        self._model = model
        self.batch: list[Running] = []
        self.cache: Cache = []  # of the batch: merged, unless it is one sequence
        self._next: mx.array | None = None  # (B,) tokens to feed next
        self._told: Told = NOTHING_TOLD  # of those

    # -- prompts -----------------------------------------------------------------------------

    def read(self, running: Running, count: int) -> list[Logprob]:
        """Feed the next `count` tokens of a prompt. Returns what the job wants to know of those
        behind each of them; else nobody needs the logits, so they are not computed."""
        at, job = len(running.tokens), running.job
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
        first = mx.array([running.job.tokens[-1]])
        if not self.batch:
            self.cache, self._next = own, first
        else:
            if len(self.batch) == 1:
                self.cache = caches.merged([self.cache, own])
            else:
                caches.extend(self.cache, own)
            assert self._next is not None
            self._next = mx.concatenate([self._next, first])
        self.batch.append(running)

    def decode(self) -> list[Made]:
        """Every sequence's next token. A prompt's last token, which is fed first, gives none."""
        fed, told, self._next = self._next, self._told, None
        assert fed is not None
        logits = self._model(fed[:, None], cache=self.cache)[:, -1]
        self._next = self._draw(logits, fed)
        self._told = self._tell(logits, self._next)
        measured = self._told.measured
        mx.async_eval(self._next, *(measured.arrays if measured else ()))
        made = []
        for running, token in zip(self.batch, fed.tolist(), strict=True):  # pyright: ignore
            running.tokens.append(token)
            if running.generated:
                made.append(Made(running, token, told.of(running, token)))
        return made

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
        """Log-probabilities of what was drawn, for those who want to know."""
        wanted = {i: r.job.logprobs for i, r in enumerate(self.batch) if r.job.logprobs is not None}
        if not wanted:
            return NOTHING_TOLD
        rows, most = mx.array(list(wanted)), max(wanted.values())
        told = {self.batch[i].job.id: row for row, i in enumerate(wanted)}
        return Told(told, logprobs.measure(logits[rows], drawn[rows], most))

    def snapshot(self, running: Running) -> Cache:
        """The sequence's cache as it is now, in arrays of its own."""
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
        self._next = self._next[mx.array(stay)]
        if len(stay) == 1:
            self.cache = caches.row(self.cache, stay[0])
        else:
            caches.keep(self.cache, stay)

    def clear(self) -> None:
        """Forget all that decodes."""
        self.batch, self.cache, self._next = [], [], None
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
