"""How one sequence's tokens are drawn: its sampling parameters, its form, when it may end."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import TokenBuffer

from tqstack.engine.grammar import Form, GrammarError
from tqstack.engine.jobs import Job
from tqstack.engine.sampling import Sampler

Mark = tuple[int, mx.array | None, int]


class Drawer:
    """
    Args:
        end_tokens: the model's own.
        form: that the answer must have; None: any.

    Attributes:
        ends: tokens that end the answer.
        error: why the form cannot be kept to any more; the sequence must end.
    """

    def __init__(self, job: Job, end_tokens: frozenset[int], form: Form | None = None):
        self._job, self._form, self._drawn = job, form, 0
        self.ends = frozenset(job.stop_tokens) | (frozenset() if job.ignore_eos else end_tokens)
        self._sampler = Sampler(job.sampling)
        self._processors: list[Any] = job.sampling.processors()
        self._context = TokenBuffer(list(job.tokens[:-1])) if self._processors else None
        self._last = np.array(sorted(self.ends), np.int32)
        self.error: str | None = None

    @property
    def waits(self) -> bool:
        """Whether a token must be known before the next one is drawn."""
        return self._form is not None

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is the next one."""
        changed = self._processors or self._form or self._early
        return self._job.sampling.greedy and not changed

    @property
    def _early(self) -> bool:
        """Whether the next token may not end the answer yet."""
        return self._drawn < self._job.min_tokens and bool(self.ends)

    def allowed(self, last: int, vocabulary: int) -> mx.array | None:
        """Which tokens may come behind `last`, by the form; None: all."""
        if self._form is None or self.error:
            return None
        try:
            if self._drawn:  # else it is the prompt's last token
                self._form.take(last)
            mask = self._form.allowed(vocabulary)
        except GrammarError as error:
            self.error = str(error)
            return None
        return None if mask is None else mx.array(self._put_off(mask))

    def _put_off(self, mask: np.ndarray) -> np.ndarray:
        """The mask without the end, where it comes too early and is not all that is left."""
        if not self._early:
            return mask
        later = mask.copy()
        later[self._last] = False
        return later if later.any() else mask

    def draw(self, logits: mx.array, last: mx.array, allowed: mx.array | None) -> mx.array:
        """(1, vocabulary) logits behind the token `last` (1,) -> the next token (1,)."""
        if self._context is not None:
            context = self._context.update_and_fetch(last)
            for processor in self._processors:
                logits = processor(context, logits)
        if allowed is not None:
            logits = mx.where(allowed, logits, -mx.inf)
        elif self._early:
            logits = logits.at[:, mx.array(self._last)].add(-mx.inf)
        self._drawn += 1
        return self._sampler(logits - mx.logsumexp(logits, axis=-1, keepdims=True))

    def mark(self) -> Mark:
        """How far it is: for `back_to`."""
        return self._drawn, self._sampler.state, self._context._size if self._context else 0

    def back_to(self, mark: Mark) -> None:
        """What was drawn since then was not."""
        self._drawn, self._sampler.state, size = mark
        if self._context:
            self._context._size = size
