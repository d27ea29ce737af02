"""What goes into the engine and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tqstack.attention.cache import TurboQuantKVCache
from tqstack.openai_api.errors import ApiError
from tqstack.sidecar.sampling import Sampler


@dataclass(eq=False)
class Job:
    """One sequence to generate. `deliver` is called from the engine's thread and must not block."""

    segments: list[list[int]]
    max_tokens: int
    sampler: Sampler
    processors: list[Any]
    deliver: Callable[[Event], None]
    cached_tokens: int = 0
    generated: int = 0
    started: float = 0.0
    first_token: float = 0.0
    ended: float = 0.0
    stats: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(segment) for segment in self.segments)

    @property
    def longest(self) -> int:
        """Tokens of the sequence, if it runs to its limit."""
        return self.prompt_tokens + self.max_tokens


@dataclass(frozen=True)
class Progress:
    """Prompt tokens processed so far."""

    done: int
    total: int


@dataclass(frozen=True)
class Token:
    """A token; the last one of a sequence has a reason ("stop": `id` is the end marker)."""

    id: int
    finish_reason: str | None


@dataclass(frozen=True)
class Failed:
    error: ApiError


@dataclass(frozen=True)
class Removed:
    """A cancelled job is off the engine; its stats are those of what it did."""


Event = Progress | Token | Failed | Removed


def no_room(job: Job, most: int) -> ApiError:
    return ApiError(
        503,
        f"{job.prompt_tokens} prompt tokens and up to {job.max_tokens} more do not fit in memory; "
        f"{most} tokens in all would. Shorten the prompt, or set fewer TQ_KV_BITS",
        code="insufficient_memory",
        retry=False,
    )


def stats_of(job: Job, cache: list[Any]) -> dict[str, Any]:
    """Speed and bytes of a finished sequence, measured on the cache that it really had."""
    entries = [entry for entry in cache if isinstance(entry, TurboQuantKVCache)]
    fresh = job.prompt_tokens - job.cached_tokens
    return {
        "prefill_tokens_per_second": round(fresh / (job.first_token - job.started), 1),
        "decode_tokens_per_second": round((job.generated - 1) / (job.ended - job.first_token), 1)
        if job.generated > 1
        else None,
        "cache_tokens": entries[0].size() if entries else 0,
        "cache_bytes": sum(entry.nbytes for entry in entries),
        "cache_bytes_fp16": sum(entry.nbytes_fp16 for entry in entries),
    }
