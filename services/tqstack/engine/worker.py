"""The engine's work on a loaded model, a step at a time; its thread calls nothing else."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from tqstack.attention.pool import Pool
from tqstack.engine import caches
from tqstack.engine.agreement import ALONE, Agreement
from tqstack.engine.budget import Budget, Costs
from tqstack.engine.disk import DiskStore
from tqstack.engine.drawing import Drawer
from tqstack.engine.forks import Fork
from tqstack.engine.grammar import Form, GrammarError, Grammars
from tqstack.engine.jobs import Deliver, Failed, Job, JobError, Measured, Progress, Removed, Token
from tqstack.engine.meter import Meter, Tracked
from tqstack.engine.places import APART, places
from tqstack.engine.prefix import Node
from tqstack.engine.prefixes import NOTHING, Prefixes, Source
from tqstack.engine.scheduler import Admission, Scheduler, Waiter
from tqstack.engine.step import Model, Running
from tqstack.engine.store import PrefixStore
from tqstack.engine.wishes import MEASURED_CHUNK, refusal, wish_of
from tqstack.models.runtime import Runtime

log = logging.getLogger(__name__)

MEASURE_SECONDS = 0.5  # between two looks at what is held, while jobs run
TOTALS = ("requests", "prompt_tokens", "cached_tokens", "output_tokens")


class Worker:
    """
    Args:
        queue: most jobs that wait.
        gap: seconds that reading a prompt may keep other streams waiting.
        disk: where prefixes outlive this worker; None: nowhere.
        ranks: the other workers of this model, if it is divided.
    """

    def __init__(
        self,
        runtime: Runtime,
        queue: int = 64,
        gap: float = 1.0,
        disk: DiskStore | None = None,
        ranks: Agreement = ALONE,
    ):
        self.runtime, self._ranks = runtime, ranks
        self.totals: Counter[str] = Counter()
        self.grammars = Grammars(runtime.tokenizer, runtime.end_tokens)
        self.resting = disk is not None  # there may be something to write while nobody waits
        self.last_token_at: float | None = None
        self.last_step_at: float | None = None  # tokens, or a piece of a prompt
        self._tracked: dict[int, Tracked] = {}
        self._model = Model(runtime.model, runtime.drafts, ranks)
        self._pool = self._new_pool()
        store = PrefixStore(self._pool, runtime.prefix_cache_bytes, self._give_up)
        self._prefixes = Prefixes(store, self._new_cache, disk, ranks)
        self._budget = Budget(
            self._costs(),
            runtime.prefill_step,
            self._pool,
            store,
            self._blocks_held,
            lambda: self._prefixes.in_flight,
        )
        self._scheduler = Scheduler(self, runtime.batch_size, queue, gap)
        self._meter = Meter(runtime.plan, self._model, self._pool, self._budget, self._prefixes)
        self._measure()

    def _new_pool(self) -> Pool | None:
        """The pool, which a first token has told what its blocks look like."""
        entries = caches.compressed(self.runtime.new_cache())
        if not entries:
            return None
        pool = Pool(len(entries))
        cache = self.runtime.new_cache(pool)
        mx.eval(self.runtime.model(mx.zeros((1, 1), mx.int32), cache=cache))
        caches.settle(cache)
        return pool

    def _new_cache(self) -> caches.Cache:
        return self.runtime.new_cache(self._pool)

    def _costs(self) -> Costs:
        plan, pool = self.runtime.plan, self._pool
        return Costs(
            limit=plan.budget,
            weights=plan.weights,
            fixed=plan.recurrent + plan.tail + plan.drafts,
            block=pool.block_bytes if pool else 0,
            token=0 if pool else plan.per_token,
            workspace=self.runtime.workspace,
            logits=self.runtime.logits_bytes,
            exact=self.runtime.exact_tokens,
            step=self.runtime.drafts.tokens,
        )

    # -- jobs come and go ----------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return bool(self._tracked)

    def submit(self, job: Job, deliver: Deliver) -> None:
        """Take a job in, or tell at once why not."""
        self.submit_all([(job, deliver)])

    def submit_all(self, jobs: Sequence[tuple[Job, Deliver]]) -> None:
        """Take jobs of one prompt in; it is read once."""
        taken = [tracked for job, deliver in jobs if (tracked := self._take(job, deliver))]
        if len(taken) > 1:
            ids = [tracked.job.id for tracked in taken]
            fork = Fork(ids, taken[0].job.prompt_tokens - 1, self._budget)
            for tracked in taken:
                tracked.fork = fork
        first: int | None = None
        for job, tracked in [(tracked.job, tracked) for tracked in taken]:
            waiter = Waiter(job.id, job.prompt_tokens - 1, self._found(tracked).usable, after=first)
            if why := self._scheduler.submit(waiter):
                self._fail([tracked], refusal(job, why, self._scheduler.waits, self._budget))
            elif first is None:
                first = job.id

    def _take(self, job: Job, deliver: Deliver) -> Tracked | None:
        """Follow a job, unless its form cannot be had."""
        form: Form | None = None
        try:
            form = self.grammars.form(job.grammar) if job.grammar else None
        except GrammarError as error:
            deliver(Failed(JobError("bad_grammar", str(error))))
            return None
        ids = np.asarray(job.tokens, dtype=np.int32)
        tracked = self._tracked[job.id] = Tracked(job, deliver, ids, form)
        return tracked

    def _found(self, tracked: Tracked) -> Source:
        """What is kept of a job's prompt."""
        job = tracked.job
        if not job.cache_prompt or job.prompt_logprobs is not None:
            return NOTHING
        return self._prefixes.find(tracked.ids)

    def cancel(self, job: Job) -> None:
        """Take a job off; harmless if it has ended. What was read of its prompt is kept."""
        tracked = self._tracked.get(job.id)
        if tracked is None:
            return
        stats: dict[str, Any] = {}
        if tracked.running is not None:
            self._keep(tracked)
            stats = self._meter.stats(tracked)
        self._forget([tracked])
        tracked.deliver(Removed(stats))

    def fail_all(self, message: str) -> None:
        self._fail(list(self._tracked.values()), JobError("engine_error", message))

    def close(self) -> None:
        """Nobody is served any more; what was kept goes to disk."""
        self._model.clear()
        self._prefixes.close()

    def _fail(self, gone: list[Tracked], error: JobError) -> None:
        self._forget(gone)
        for tracked in gone:
            tracked.deliver(Failed(error))

    def _forget(self, gone: list[Tracked]) -> None:
        """Free all that jobs hold."""
        self._model.leave([t.running for t in gone if t.running is not None])
        for tracked in gone:
            tracked.running = None
            if tracked.fork:
                tracked.fork.leave(tracked.job.id)
            self._tracked.pop(tracked.job.id, None)
            self._scheduler.remove(tracked.job.id)
            self._budget.release(tracked.job.id)
        self._measure()

    # -- a step --------------------------------------------------------------------------------

    def step(self) -> None:
        """Do what the scheduler says: begin a job, read a piece of a prompt, make tokens."""
        step = self._scheduler.next()
        for job in step.refused:
            tracked = self._tracked[job]
            why = refusal(tracked.job, "insufficient_memory", self._scheduler.waits, self._budget)
            self._fail([tracked], why)
        if step.read:
            self._read(self._tracked[step.read[0]], step.read[1])
        if step.decode:
            self._decode()
        if time.monotonic() - self._measured_at > MEASURE_SECONDS:
            self._measure()

    def rest(self) -> None:
        """Something useful while nobody waits."""
        node = self._prefixes.unwritten()
        self.resting = node is not None and self._give_up(node)

    def _read(self, tracked: Tracked, count: int) -> None:
        running, began = tracked.running, time.perf_counter()
        assert running is not None and running.cache is not None
        try:
            told = self._model.read(running, count) if count else ()
        except Exception as error:
            log.exception("reading a prompt failed")
            self._ranks.failed(error)
            self._fail([tracked], JobError("engine_error", f"reading the prompt failed: {error}"))
            return
        self.last_step_at = time.time()
        seconds = self._ranks.word(time.perf_counter() - began)
        waiter = self._scheduler.was_read(tracked.job.id, count, seconds)
        if len(running.tokens) in waiter.stops:
            self._keep(tracked)
        if told:
            tracked.deliver(Measured(len(running.tokens) - count + 1, tuple(told)))
        if not waiter.left:
            if tracked.fork:
                tracked.fork.offer(running.cache, self._wanted())
            self._model.join(running)
        else:
            total = tracked.job.prompt_tokens
            tracked.deliver(Progress(len(running.tokens), total, tracked.cached))

    def _decode(self) -> None:
        began = time.perf_counter()
        batch = {running: self._tracked[running.job.id] for running in self._model.batch}
        try:
            made = self._model.decode()
        except Exception as error:
            log.exception("a step of the batch failed")
            self._ranks.failed(error)
            self._model.clear()
            failure = JobError("engine_error", f"generation failed: {error}")
            self._fail(list(batch.values()), failure)
            return
        now, self.last_step_at = time.perf_counter(), time.time()
        self._scheduler.decoded(self._ranks.word(now - began))
        ended: list[tuple[Tracked, Token]] = []
        for one in made:
            tracked, self.last_token_at = batch[one.running], self.last_step_at
            tracked.first_token = tracked.first_token or now
            self.totals["output_tokens"] += 1
            if one.reason is None:
                tracked.deliver(Token(one.token, logprob=one.logprob))
                continue
            self._keep(tracked)
            stats = self._meter.stats(tracked)
            ended.append((tracked, Token(one.token, one.reason, stats, one.logprob)))
        self._forget([tracked for tracked, _ in ended])
        for tracked, last in ended:
            tracked.deliver(last)
        self._fail_formless(batch)

    def _fail_formless(self, batch: dict[Running, Tracked]) -> None:
        """End those whose form has become too complex to keep to."""
        for running, tracked in batch.items():
            if running.drawer.error and tracked.running:
                why = f"the answer's form cannot be kept to: {running.drawer.error}"
                self._fail([tracked], JobError("engine_error", why))

    # -- room: what the scheduler asks -----------------------------------------------------------

    def alone(self, job: int) -> bool:
        return self._budget.alone(wish_of(self._tracked[job].job)) > 0

    def admit(self, job: int) -> Admission | None:
        tracked = self._tracked[job]
        if (fork := tracked.fork) and fork.ready:
            wish = replace(wish_of(tracked.job), shared=fork.blocks)
            if chunk := self._budget.admit(job, wish, self._wanted()):
                return self._begin(tracked, NOTHING, chunk)
            if self._scheduler.runs:
                return None
            fork.drop()  # it takes the last room
        for source, kept in self._choices(self._found(tracked)):
            wish = replace(wish_of(tracked.job), node=source.node)
            if chunk := self._budget.admit(job, wish, kept):
                return self._begin(tracked, source, chunk)
        return None

    def _choices(self, found: Source) -> Iterator[tuple[Source, set[Node]]]:
        """What a job may go on from, and which checkpoints must then stay: those that waiting jobs
        will use; if nothing runs, and so nothing will make more room, its own; at last none."""
        own = {found.node} if found.node else set()
        yield found, own | self._wanted()
        if not self._scheduler.runs:
            if (disk := self._prefixes.disk) is not None and disk.in_flight:
                disk.flush()
            yield found, own
            yield NOTHING, set()

    def _wanted(self) -> set[Node]:
        """Checkpoints that waiting jobs will go on from."""
        waiting = [t for t in self._tracked.values() if t.running is None and t.job.cache_prompt]
        nodes = {self._prefixes.store.match(t.ids).node for t in waiting}
        return {node for node in nodes if node is not None}

    def _begin(self, tracked: Tracked, source: Source, chunk: int) -> Admission:
        job = tracked.job
        tracked.started = time.perf_counter()
        if (fork := tracked.fork) and fork.ready:
            cache, used = fork.take(), fork.tokens
        else:
            cache, used = self._prefixes.open(source)
        drawer = Drawer(job, self.runtime.end_tokens, tracked.form)
        tracked.running = Running(job, cache, list(job.tokens[:used]), drawer)
        if fork:
            fork.leave(job.id)
        tracked.cached = tracked.kept = used
        self.totals["requests"] += 1
        self.totals["prompt_tokens"] += job.prompt_tokens
        self.totals["cached_tokens"] += used
        stops: tuple[int, ...] = ()
        if job.cache_prompt and not (fork and used == fork.tokens):
            self._prefixes.account(source, job.prompt_tokens, used, job.id)
            stops = places(job.prompt_tokens, job.boundaries, used, source.known)
        if source.files and used:
            tracked.kept = 0
            self._keep(tracked)
        self._measure()
        tracked.deliver(Progress(used, job.prompt_tokens, used))
        if job.prompt_logprobs is not None:
            chunk = min(chunk, MEASURED_CHUNK)
        return Admission(chunk, used, stops)

    def _keep(self, tracked: Tracked) -> None:
        """Keep what a job's cache holds for later ones, if there is room for it."""
        running, store = tracked.running, self._prefixes.store
        assert running is not None
        tokens = running.tokens
        if not tracked.job.cache_prompt or len(tokens) - tracked.kept < APART:
            return
        size = self._model.state_bytes(running)
        if size > store.limit or store.has(tokens):
            return
        kept = self._wanted()
        if self._budget.room_for(size, kept):
            self._prefixes.keep(tokens, self._model.snapshot(running), kept)
            tracked.kept = len(tokens)
            self.resting = self._prefixes.disk is not None

    def _give_up(self, node: Node) -> bool:
        """The disk may have a checkpoint, if the copy on its way there fits. Whether it took it."""
        size = self._prefixes.bytes_to_write(node)
        return self._budget.committed + size <= self._budget.limit and self._prefixes.to_disk(node)

    def _blocks_held(self, job: int) -> int:
        tracked = self._tracked.get(job)
        running = tracked.running if tracked else None
        return len(self._model.blocks_of(running)) if running else 0

    # -- what is told --------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """What `/health` tells about work and memory; any thread may ask. Bytes are those of the
        last time that a job came or went, or of a moment ago."""
        tracked = list(self._tracked.values())
        running = [t.running for t in tracked if t.running is not None]
        return {
            "requests": {
                "running": len(running),
                "waiting": len(tracked) - len(running),
                "context_tokens": [len(one.tokens) for one in running],
            },
            **self._meter.as_of_now(self._measured),
            "speculation": self._model.speculation.as_dict(),
            "totals": {name: self.totals[name] for name in TOTALS},
            "last_token_at": self.last_token_at,
            "last_step_at": self.last_step_at,
        }

    def books(self) -> tuple[int, int]:
        """Blocks in use, and bytes that are held or promised; the same in all ranks."""
        return self._pool.blocks_used if self._pool else 0, self._budget.committed

    def memory(self) -> dict[str, Any]:
        """Bytes of the budget and its parts, now; in the engine's thread alone."""
        return self._meter.memory(self._tracked.values())

    def _measure(self) -> None:
        self._measured_at = time.monotonic()
        self._measured = self._meter.measure(self._tracked.values())
