"""What goes into the engine and what comes out of it: plain data, for other ranks too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from tqstack.engine.grammar import Grammar
from tqstack.engine.logprobs import Logprob
from tqstack.engine.sampling import Sampling

_numbers = count(1)


@dataclass(frozen=True, eq=False)
class Job:
    """One sequence to generate.

    Attributes:
        tokens: the prompt.
        boundaries: positions in it where its prefix is likely to be needed again, ascending.
        cache_prompt: keep it for later requests, and use what is kept of earlier ones.
        min_tokens: of the answer, before it may end.
        stop_tokens: that end the answer, beside the model's own end markers.
        ignore_eos: the model's end markers end nothing.
        logprobs: tell each token's, and so many of the likeliest; None: do not.
        prompt_logprobs: likewise of the prompt, all of which is read then.
        grammar: the form that the answer must have.
    """

    tokens: Sequence[int]
    max_tokens: int
    sampling: Sampling
    boundaries: tuple[int, ...] = ()
    cache_prompt: bool = True
    min_tokens: int = 0
    stop_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    id: int = field(default_factory=lambda: next(_numbers))

    @property
    def prompt_tokens(self) -> int:
        return len(self.tokens)

    @property
    def longest(self) -> int:
        """Tokens of the sequence, if it runs to its limit."""
        return len(self.tokens) + self.max_tokens


class JobError(Exception):
    """A job that will not be finished.

    Attributes:
        code: insufficient_memory, queue_full, bad_grammar, no_model or engine_error.
    """

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code, self.message = code, message


@dataclass(frozen=True)
class Progress:
    """Prompt tokens processed so far, those that were kept from before included."""

    done: int
    total: int
    cached: int


@dataclass(frozen=True)
class Measured:
    """Log-probabilities of a prompt's tokens from position `first` on, given those before."""

    first: int
    logprobs: tuple[Logprob, ...]


@dataclass(frozen=True)
class Token:
    """A token; the last one of a sequence has a reason ("stop": `id` is the end marker, or one of
    the job's stop tokens)."""

    id: int
    finish_reason: str | None = None
    stats: dict[str, Any] | None = None  # with the last one
    logprob: Logprob | None = None


@dataclass(frozen=True)
class Failed:
    error: JobError


@dataclass(frozen=True)
class Removed:
    """A cancelled job is off the engine; its stats are those of what it did."""

    stats: dict[str, Any]


Event = Progress | Measured | Token | Failed | Removed
Deliver = Callable[[Event], None]  # called in the engine's thread; must not block
