"""The engine: one thread owns the model; everyone else sends it messages, and gets events back."""

from __future__ import annotations

import gc
import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import mlx.core as mx

from tqstack.engine.grammar import Grammar
from tqstack.engine.jobs import Deliver, Failed, Job, JobError
from tqstack.engine.lifecycle import Lifecycle
from tqstack.engine.worker import TOTALS, Worker
from tqstack.models.planning import ModelFacts
from tqstack.models.runtime import Runtime

log = logging.getLogger(__name__)


class LoadError(Exception):
    """The model could not be loaded; everybody has been told why."""


class Engine:
    """Loads a model and generates for many requests at once.

    Args:
        load: makes the runtime; called in the engine's thread, which then owns the model.
        work: makes the worker of a runtime; None: one with default limits.
        on_failure: told when loading fails, or the thread does; the process should end.
        unloaded: facts of a model that is to be loaded when it is first needed; None: at once.
        idle_seconds: without a request for so long, the model is unloaded; 0: never.
    """

    def __init__(
        self,
        load: Callable[[], Runtime],
        work: Callable[[Runtime], Worker] = Worker,
        on_failure: Callable[[Exception], None] | None = None,
        unloaded: ModelFacts | None = None,
        idle_seconds: float = 0,
    ):
        self.lifecycle = Lifecycle(unloaded, idle_seconds)
        self.worker: Worker | None = None
        self.error: str | None = None
        self._load, self._work, self._on_failure = load, work, on_failure
        self._totals: Counter[str] = Counter()
        self._inbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
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
        if (worker := self.worker) is not None:
            future.set_result(worker.runtime)
        else:
            self._inbox.put(("ready", future))
        return future

    def submit(self, job: Job, deliver: Deliver) -> None:
        self.submit_all([(job, deliver)])

    def submit_all(self, jobs: Sequence[tuple[Job, Deliver]]) -> None:
        """Jobs of one prompt, which is read once."""
        self._inbox.put(("jobs", jobs))

    def check(self, grammar: Grammar) -> None:
        """Compile a form, so that the engine's thread need not.

        Raises:
            GrammarError: it cannot be had.
        """
        if (worker := self.worker) is not None:
            worker.grammars.form(grammar)

    def cancel(self, job: Job) -> None:
        """Take a job off the engine; harmless if it has ended."""
        self._inbox.put(("cancel", job))

    def status(self) -> dict[str, Any]:
        """What `/health` tells about work and memory. A snapshot; any thread may ask."""
        worker = self.worker
        told = worker.status() if worker else self._nothing()
        told["requests"]["waiting"] += self._inbox.qsize()
        return {**told, "lifecycle": self.lifecycle.as_dict()}

    def _nothing(self) -> dict[str, Any]:
        """The status while no model is in memory."""
        return {
            "requests": {"running": 0, "waiting": 0, "context_tokens": []},
            "cache": {"bytes": 0, "bytes_fp16": 0},
            "totals": {name: self._totals[name] for name in TOTALS},
            "last_token_at": None,
            "last_step_at": None,
        }

    # -- the engine's thread -------------------------------------------------------------

    def _run(self) -> None:
        try:
            if self.lifecycle.starting:
                self._load_model()
            while self._take_in():
                self._step()
            self._let_go("the sidecar is shutting down")
        except LoadError:
            self._refuse_until_stopped()
        except Exception as error:  # a thread that dies in silence would leave all waiting for ever
            log.exception("the engine failed")
            self._give_up(error)
            if self.worker:
                self.worker.fail_all(f"the engine failed: {self.error}")
            self._refuse_until_stopped()

    def _step(self) -> None:
        if self.worker is None:
            return
        if self.worker.busy:
            self.worker.step()
        else:
            self.worker.rest()

    def _give_up(self, error: Exception) -> None:
        """From now on `/health` is 503; the process should end, so that it is started again."""
        self.error = f"{type(error).__name__}: {error}"
        if self._on_failure:
            self._on_failure(error)

    def _load_model(self) -> Worker:
        """
        Raises:
            LoadError: it cannot be loaded, and all have been told.
        """
        try:
            with self.lifecycle.loading():
                worker = self._work(self._load())
        except Exception as error:
            log.exception("the model could not be loaded")
            self._give_up(error)
            raise LoadError from error
        worker.totals = self._totals  # they go on counting
        self.worker = worker
        self.lifecycle.loaded(worker.runtime.facts)
        return worker

    def _unload(self) -> None:
        """Give the model's memory back. Nobody is served now; whoever comes has it loaded again."""
        log.info("idle for %g s: unloading the model", self.lifecycle.idle_seconds)
        self._let_go("the model is unloaded")
        gc.collect()
        mx.clear_cache()
        self.lifecycle.unloaded()

    def _let_go(self, why: str) -> None:
        worker, self.worker = self.worker, None
        if worker:
            worker.fail_all(why)
            worker.close()

    def _take_in(self) -> bool:
        """Read the inbox, waiting while there is nothing to do. False: stop."""
        while (message := self._next_message()) != ("nothing", None):
            if message[0] == "stop":
                return False
            if message[0] == "unload":
                self._unload()
            else:
                self._handle(*message)
        return True

    def _next_message(self) -> tuple[str, Any]:
        """What has come; "nothing" while there is work, "unload" when there was none for long."""
        working = self.worker is not None and (self.worker.busy or self.worker.resting)
        limit = self.lifecycle.idle_seconds if self.worker else 0
        try:
            return self._inbox.get(block=not working, timeout=limit or None)
        except queue.Empty:
            return "nothing" if working else "unload", None

    def _handle(self, message: str, what: Any) -> None:
        if message == "cancel":
            if self.worker:
                self.worker.cancel(what)
            return
        try:
            # Before anything else looks at it: whoever waits is told if loading fails.
            worker = self.worker or self._load_model()
        except LoadError:
            self._refuse(message, what)
            raise
        if message == "ready":
            what.set_result(worker.runtime)
        else:
            worker.submit_all(what)

    def _refuse_until_stopped(self) -> None:
        while True:
            message, what = self._inbox.get()
            if message == "stop":
                return
            self._refuse(message, what)

    def _refuse(self, message: str, what: Any) -> None:
        error = JobError("no_model", f"no model: {self.error}")
        if message == "ready":
            what.set_exception(error)
        elif message == "jobs":
            for _, deliver in what:
                deliver(Failed(error))
