"""The engine: one thread owns the model and mlx-lm's BatchGenerator; everyone else talks to it.

The HTTP side submits jobs and gets events back through a callback. Between two steps of the
generator the thread takes in what has come, so that requests join and leave a running batch.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, StopSequences
from mlx_lm.models.cache import LRUPromptCache

from tqstack.attention.cache import TurboQuantKVCache
from tqstack.openai_api.errors import ApiError
from tqstack.sidecar.runtime import Runtime
from tqstack.sidecar.sampling import Sampler

log = logging.getLogger(__name__)


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


class Engine:
    """Loads a model and generates for many requests at once.

    Args:
        load: makes the runtime; called in the engine's thread, which then owns the model.
        on_failure: told when loading fails; the process should end.
    """

    def __init__(
        self,
        load: Callable[[], Runtime],
        on_failure: Callable[[Exception], None] | None = None,
    ):
        self.runtime: Runtime | None = None
        self.error: str | None = None
        self.last_token_at: float | None = None
        self._load = load
        self._on_failure = on_failure
        self._inbox: queue.SimpleQueue[tuple[str, Job | None]] = queue.SimpleQueue()
        self._jobs: dict[int, Job] = {}
        self._uids: dict[int, int] = {}  # id(job) -> uid
        self._waiting: deque[Job] = deque()
        self._cache_bytes = (0, 0)
        self._totals = {"requests": 0, "prompt_tokens": 0, "cached_tokens": 0, "output_tokens": 0}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # -- called from other threads -------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout: float = 10) -> None:
        """End the thread; requests still running are told so."""
        self._inbox.put(("stop", None))
        self._thread.join(timeout)

    def submit(self, job: Job) -> None:
        self._inbox.put(("job", job))

    def cancel(self, job: Job) -> None:
        """Take a job off the engine; harmless if it has ended."""
        self._inbox.put(("cancel", job))

    def status(self) -> dict[str, Any]:
        """What `/health` tells about work and memory. A snapshot; any thread may ask."""
        jobs = list(self._jobs.values())
        held, plain = self._cache_bytes
        return {
            "requests": {
                "running": len(jobs),
                "waiting": len(self._waiting) + self._inbox.qsize(),
                "context_tokens": [job.prompt_tokens + job.generated for job in jobs],
            },
            "cache": {"bytes": held, "bytes_fp16": plain},
            "totals": dict(self._totals),
            "last_token_at": self.last_token_at,
        }

    # -- the engine's thread -------------------------------------------------------------

    def _run(self) -> None:
        try:
            self.runtime = self._load()
            self._prefixes = LRUPromptCache(max_bytes=self.runtime.prefix_cache_bytes)
            self._generator = self._new_generator()
        except Exception as error:
            log.exception("the model could not be loaded")
            self.error = f"{type(error).__name__}: {error}"
            if self._on_failure:
                self._on_failure(error)
            self._refuse_until_stopped()
            return
        while self._take_in():
            try:
                self._step()
            except Exception as error:
                log.exception("a step of the generator failed")
                self._fail_all(f"generation failed: {type(error).__name__}: {error}")
        self._fail_all("the sidecar is shutting down")

    def _new_generator(self) -> BatchGenerator:
        assert self.runtime is not None
        generator = BatchGenerator(
            self.runtime.model,
            prefill_step_size=self.runtime.prefill_step,
            completion_batch_size=self.runtime.batch_size,
            stream=mx.default_stream(mx.default_device()),
        )
        # It raises the wired limit, which has been traced to kernel panics; this undoes just that.
        generator.close()
        return generator

    def _take_in(self) -> bool:
        """Read the inbox, waiting while there is nothing to do. False: stop."""
        while True:
            try:
                message, job = self._inbox.get(block=not self._jobs)
            except queue.Empty:
                return True
            if message == "stop" or job is None:
                return False
            if message == "cancel":
                self._remove(job)
            else:
                self._admit(job)

    def _admit(self, job: Job) -> None:
        """Take a job in: to those who wait for room in the batch, or not at all."""
        assert self.runtime is not None
        plan = self.runtime.plan
        if not plan.fits(job.longest):
            job.deliver(Failed(_no_room(job, plan.max_tokens())))
            return
        self._waiting.append(job)
        self._admit_waiting()

    def _admit_waiting(self) -> None:
        """First come, first served, as far as the batch fits; stored prefixes make room."""
        assert self.runtime is not None
        while self._waiting:
            lengths = [job.longest for job in (*self._jobs.values(), self._waiting[0])]
            if not self.runtime.plan.fits_together(lengths, self._prefixes.nbytes):
                if not self.runtime.plan.fits_together(lengths):
                    return
                self._prefixes.trim_to(n_bytes=0)
            self._insert(self._waiting.popleft())

    def _insert(self, job: Job) -> None:
        assert self.runtime is not None
        job.started = time.perf_counter()
        tokens = [token for segment in job.segments for token in segment]
        cache, segments = self._reuse(tokens, job)
        (uid,) = self._generator.insert_segments(
            [segments],
            max_tokens=[job.max_tokens],
            caches=[cache],
            all_tokens=[tokens[: job.cached_tokens]],
            samplers=[job.sampler],
            logits_processors=[job.processors],
            stop_sequences=[StopSequences([[t] for t in self.runtime.end_tokens])],
        )
        self._jobs[uid], self._uids[id(job)] = job, uid
        self._totals["requests"] += 1
        self._totals["prompt_tokens"] += job.prompt_tokens
        self._totals["cached_tokens"] += job.cached_tokens

    def _reuse(self, tokens: list[int], job: Job) -> tuple[list[Any], list[list[int]]]:
        """The longest stored prefix of a prompt, and what is left to process, cut as it was."""
        assert self.runtime is not None
        cache, rest = self._prefixes.fetch_nearest_cache(self.runtime.id, tokens)
        if cache is None or not rest:
            return self.runtime.new_cache(), [list(segment) for segment in job.segments]
        skip = job.cached_tokens = len(tokens) - len(rest)
        segments = []
        for segment in job.segments:
            segments.append(segment[skip:])
            skip = max(0, skip - len(segment))
        return cache, segments

    def _remove(self, job: Job) -> None:
        if job in self._waiting:
            self._waiting.remove(job)
        uid = self._uids.pop(id(job), None)
        if uid is not None:
            if job.generated:
                cache, _ = self._generator.extract_cache([uid])[uid]
                job.ended = time.perf_counter()
                job.stats = _stats(job, cache)
            self._generator.remove([uid])
            del self._jobs[uid]
            self._measure()
            job.deliver(Removed())
        self._admit_waiting()

    def _step(self) -> None:
        if not self._jobs:
            return
        prompts, responses = self._generator.next()
        self._store_prefixes([r.uid for r in prompts if r.end_of_segment and not r.end_of_prompt])
        for response in prompts:
            if not response.end_of_prompt:
                self._jobs[response.uid].deliver(Progress(*response.progress))
        for response in responses:
            self._deliver(response)
        self._admit_waiting()
        self._measure()

    def _deliver(self, response: Any) -> None:
        job, now = self._jobs[response.uid], time.perf_counter()
        self.last_token_at = time.time()
        job.first_token = job.first_token or now
        job.generated += 1
        self._totals["output_tokens"] += 1
        if response.finish_reason is not None:
            job.ended = now
            job.stats = _stats(job, response.prompt_cache)
            del self._jobs[response.uid], self._uids[id(job)]
        job.deliver(Token(response.token, response.finish_reason))

    def _store_prefixes(self, uids: list[int]) -> None:
        """Keep the state at a prompt's message boundary: a recurrent state cannot be cut later."""
        assert self.runtime is not None
        for cache, tokens in self._generator.extract_cache(uids).values():
            if tokens:
                mx.eval([entry.state for entry in cache])
                self._prefixes.insert_cache(self.runtime.id, list(tokens), cache)

    def _measure(self) -> None:
        entries = [
            entry
            for batch in (self._generator._prompt_batch, self._generator._generation_batch)
            for entry in batch.prompt_cache
            if isinstance(entry, TurboQuantKVCache)
        ]
        self._cache_bytes = (
            sum(entry.nbytes for entry in entries),
            sum(entry.nbytes_fp16 for entry in entries),
        )

    def _fail_all(self, message: str) -> None:
        for job in (*self._jobs.values(), *self._waiting):
            job.deliver(Failed(ApiError(500, message, code="engine_error", retry=False)))
        self._jobs, self._uids = {}, {}
        self._waiting.clear()
        self._generator = self._new_generator()

    def _refuse_until_stopped(self) -> None:
        while True:
            message, job = self._inbox.get()
            if message == "stop" or job is None:
                return
            if message == "job":
                job.deliver(Failed(ApiError(503, f"no model: {self.error}", code="no_model")))


def _no_room(job: Job, most: int) -> ApiError:
    return ApiError(
        503,
        f"{job.prompt_tokens} prompt tokens and up to {job.max_tokens} more do not fit in memory; "
        f"{most} tokens in all would. Shorten the prompt, or set fewer TQ_KV_BITS",
        code="insufficient_memory",
        retry=False,
    )


def _stats(job: Job, cache: list[Any]) -> dict[str, Any]:
    """Speed and bytes of a finished sequence, measured on the cache that it really had."""
    entries = [entry for entry in cache if isinstance(entry, TurboQuantKVCache)]
    fresh = job.prompt_tokens - job.cached_tokens
    return {
        "prefill_tokens_per_second": round(fresh / (job.first_token - job.started), 1),
        "decode_tokens_per_second": round((job.generated - 1) / (job.ended - job.first_token), 1)
        if job.generated > 1
        else None,
        "cache_tokens": entries[0].length if entries else 0,
        "cache_bytes": sum(entry.nbytes for entry in entries),
        "cache_bytes_fp16": sum(entry.nbytes_fp16 for entry in entries),
    }
