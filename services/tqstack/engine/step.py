"""What touches the model: a prompt's chunk, and a token of all sequences that decode.

Tokens are made one ahead: while the host hands one out, the device computes the next. A sequence's
cache holds the tokens that were fed to the model: its prompt, and all of its answer so far that has
been handed out, the end marker included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import TokenBuffer

from tqstack.engine import caches
from tqstack.engine.caches import Cache
from tqstack.engine.jobs import Job
from tqstack.engine.sampling import Sampler


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
    sampler: Sampler = field(init=False)
    processors: list[Any] = field(init=False)
    _context: TokenBuffer | None = None

    def __post_init__(self) -> None:
        self.sampler = self.job.sampling.sampler()
        self.processors = self.job.sampling.processors()

    @property
    def generated(self) -> int:
        return max(0, len(self.tokens) - self.job.prompt_tokens)

    def draw(self, logits: mx.array, last: mx.array) -> mx.array:
        """(1, vocabulary) logits behind the token `last` (1,) -> the next token (1,)."""
        if self.processors:
            if self._context is None:
                self._context = TokenBuffer(list(self.job.tokens[:-1]))
            context = self._context.update_and_fetch(last)
            for processor in self.processors:
                logits = processor(context, logits)
        return self.sampler(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


class Model:
    """The model, and the batch of sequences that decode."""

    def __init__(self, model: nn.Module):
        self._model = model
        self.batch: list[Running] = []
        self.cache: Cache = []  # of the batch: merged, unless it is one sequence
        self._next: mx.array | None = None  # (B,) tokens to feed next

    # -- prompts -----------------------------------------------------------------------------

    def read(self, running: Running, count: int) -> None:
        """Feed the next `count` tokens of a prompt."""
        at = len(running.tokens)
        tokens = list(running.job.tokens[at : at + count])
        self._model(mx.array(tokens)[None], cache=running.cache)
        assert running.cache is not None
        caches.settle(running.cache)  # nobody needs the logits, so they are not computed
        running.tokens.extend(tokens)

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

    def decode(self) -> list[tuple[Running, int]]:
        """Every sequence's next token. A prompt's last token, which is fed first, gives none."""
        fed, self._next = self._next, None
        assert fed is not None
        logits = self._model(fed[:, None], cache=self.cache)[:, -1]
        self._next = self._draw(logits, fed)
        mx.async_eval(self._next)
        made = []
        for running, token in zip(self.batch, fed.tolist(), strict=True):  # pyright: ignore
            running.tokens.append(token)
            if running.generated:
                made.append((running, token))
        return made

    def _draw(self, logits: mx.array, fed: mx.array) -> mx.array:
        """(B, vocabulary) -> (B,)"""
        if all(r.job.sampling.greedy and not r.processors for r in self.batch):
            return logits.argmax(-1)
        return mx.concatenate(
            [r.draw(logits[i : i + 1], fed[i : i + 1]) for i, r in enumerate(self.batch)]
        )

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
            self.cache, self._next = [], None
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
