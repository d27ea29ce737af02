"""The engine: one thread owns the model and mlx-lm's BatchGenerator; everyone else talks to it.

The HTTP side submits jobs and gets events back through a callback. Between two steps of the
generator the thread takes in what has come, so that requests join and leave a running batch.
"""

from __future__ import annotations

import gc
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, StopSequences
from mlx_lm.models.cache import LRUPromptCache

from tqstack.attention.cache import TurboQuantKVCache
from tqstack.models.planning import Facts
from tqstack.models.runtime import Runtime
from tqstack.openai_api.errors import ApiError
from tqstack.sidecar.jobs import (
    Failed,
    Job,
    Progress,
    Removed,
    Token,
    no_room,
    stats_of,
)
from tqstack.sidecar.lifecycle import Lifecycle

log = logging.getLogger(__name__)


class LoadError(Exception):
    """The model could not be loaded; everybody has been told why."""


class Engine:
    """Loads a model and generates for many requests at once.

    Args:
        load: makes the runtime; called in the engine's thread, which then owns the model.
        on_failure: told when loading fails, or the thread does; the process should end.
        unloaded: facts of a model that is to be loaded when it is first needed; None: at once.
        idle_seconds: without a request for so long, the model is unloaded; 0: never.
    """

    def __init__(
        self,
        load: Callable[[], Runtime],
        on_failure: Callable[[Exception], None] | None = None,
        unloaded: Facts | None = None,
        idle_seconds: float = 0,
    ):
        self.runtime: Runtime | None = None
        self.lifecycle = Lifecycle(unloaded, idle_seconds)
        self.error: str | None = None
        self.last_token_at: float | None = None
        self.last_step_at: float | None = None  # a token, or a piece of a prompt
        self._load = load
        self._on_failure = on_failure
        self._inbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
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

    def ready(self) -> Future[Runtime]:
        """The runtime, once it is loaded; asking for it has it loaded."""
        future: Future[Runtime] = Future()
        if (runtime := self.runtime) is not None:
            future.set_result(runtime)
        else:
            self._inbox.put(("ready", future))
        return future

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
            "last_step_at": self.last_step_at,
            "lifecycle": self.lifecycle.as_dict(),
        }

    # -- the engine's thread -------------------------------------------------------------

    def _run(self) -> None:
        try:
            if self.lifecycle.starting:
                self._load_model()
            self._serve()
        except LoadError:
            self._refuse_until_stopped()
        except Exception as error:  # a thread that dies in silence would leave all waiting for ever
            log.exception("the engine failed")
            self._give_up(error)
            self._fail_jobs(f"the engine failed: {self.error}")
            self._refuse_until_stopped()

    def _give_up(self, error: Exception) -> None:
        """From now on `/health` is 503; the process should end, so that it is started again."""
        self.error = f"{type(error).__name__}: {error}"
        if self._on_failure:
            self._on_failure(error)

    def _load_model(self) -> None:
        """
        Raises:
            LoadError: it cannot be loaded, and all have been told.
        """
        try:
            with self.lifecycle.loading():
                runtime = self._load()
            self._prefixes = LRUPromptCache(max_bytes=runtime.prefix_cache_bytes)
            self.runtime = runtime
            self._generator = self._new_generator()
        except Exception as error:
            log.exception("the model could not be loaded")
            self._give_up(error)
            raise LoadError from error
        self.lifecycle.loaded(runtime.facts)

    def _unload(self) -> None:
        """Give the model's memory back. Nobody is served now; whoever comes has it loaded again."""
        log.info("idle for %g s: unloading the model", self.lifecycle.idle_seconds)
        self.runtime = None
        del self._prefixes, self._generator
        gc.collect()
        mx.clear_cache()
        self.lifecycle.unloaded()

    def _serve(self) -> None:
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
            limit = self.lifecycle.idle_seconds if self.runtime and not self._jobs else 0
            try:
                message, what = self._inbox.get(block=not self._jobs, timeout=limit or None)
            except queue.Empty:
                if self._jobs:
                    return True
                self._unload()
                continue
            if message == "stop":
                return False
            if message == "cancel":
                if self.runtime:
                    self._remove(what)
                continue
            if self.runtime is None:
                # Before anything else looks at it: whoever waits is told if it fails.
                self._load_for(message, what)
            if message == "ready":
                what.set_result(self.runtime)
            else:
                self._admit(what)

    def _load_for(self, message: str, what: Any) -> None:
        try:
            self._load_model()
        except LoadError:
            self._refuse(message, what)
            raise

    def _admit(self, job: Job) -> None:
        """Take a job in: to those who wait for room in the batch, or not at all."""
        assert self.runtime is not None
        plan = self.runtime.plan
        if not plan.fits(job.longest):
            job.deliver(Failed(no_room(job, plan.max_tokens())))
            return
        self._waiting.append(job)
        self._admit_waiting()

    def _admit_waiting(self) -> None:
        """First come, first served, as far as the batch fits; stored prefixes make room."""
        assert self.runtime is not None
        while self._waiting:
            lengths = [job.longest for job in (*self._jobs.values(), self._waiting[0])]
            prefills = 1 + sum(not job.generated for job in self._jobs.values())
            if not self.runtime.plan.fits_together(lengths, self._prefixes.nbytes, prefills):
                if not self.runtime.plan.fits_together(lengths, 0, prefills):
                    return
                self._prefixes.trim_to(n_bytes=0)
            self._insert(self._waiting[0])  # if that fails, the job is still there to be told
            self._waiting.popleft()

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
                job.stats = stats_of(job, cache)
            self._generator.remove([uid])
            del self._jobs[uid]
            self._measure()
            job.deliver(Removed())
        self._admit_waiting()

    def _step(self) -> None:
        if not self._jobs:
            return
        prompts, responses = self._generator.next()
        self.last_step_at = time.time()
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
            job.stats = stats_of(job, response.prompt_cache)
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
        self._fail_jobs(message)
        if self.runtime:
            self._generator = self._new_generator()

    def _fail_jobs(self, message: str) -> None:
        for job in (*self._jobs.values(), *self._waiting):
            job.deliver(Failed(ApiError(500, message, code="engine_error", retry=False)))
        self._jobs, self._uids = {}, {}
        self._waiting.clear()

    def _refuse_until_stopped(self) -> None:
        while True:
            message, what = self._inbox.get()
            if message == "stop":
                return
            self._refuse(message, what)

    def _refuse(self, message: str, what: Any) -> None:
        error = ApiError(503, f"no model: {self.error}", code="no_model")
        if message == "ready":
            what.set_exception(error)
        elif message == "job":
            what.deliver(Failed(error))
