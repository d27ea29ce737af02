"""What a worker's jobs take: speed, keys and values, and the parts of the memory that is held."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tqstack.attention.pool import Pool
from tqstack.engine import caches
from tqstack.engine.budget import Budget
from tqstack.engine.forks import Fork
from tqstack.engine.grammar import Form
from tqstack.engine.jobs import Deliver, Job
from tqstack.engine.prefixes import Prefixes
from tqstack.engine.step import Model, Running
from tqstack.models.plan import Plan


@dataclass(eq=False)
class Tracked:
    """A job, whom to tell, and how far it is. Times are of `time.perf_counter`."""

    job: Job
    deliver: Deliver
    ids: np.ndarray  # int32, of the prompt: comparing and hashing lists takes long
    form: Form | None = None
    fork: Fork | None = None
    running: Running | None = None  # None: it waits
    cached: int = 0
    kept: int = 0  # tokens up to its last checkpoint
    started: float = 0.0
    first_token: float = 0.0


@dataclass(frozen=True)
class Meter:
    """Looks at what is really held. It takes too long for every token."""

    plan: Plan
    model: Model
    pool: Pool | None
    budget: Budget
    prefixes: Prefixes

    def memory(self, tracked: Iterable[Tracked]) -> dict[str, Any]:
        """Bytes: the budget, what is held of it, and what is held or promised."""
        disk, pool = self.prefixes.disk, self.pool
        reading = [t.running.cache for t in tracked if t.running is not None and t.running.cache]
        parts = {
            "weights": self.plan.weights,
            "pool": pool.nbytes if pool else 0,
            "sequences": self.model.nbytes + sum(map(caches.state_bytes, reading)),
            "checkpoints": self.prefixes.store.state_bytes,
            "in_flight": disk.in_flight if disk is not None else 0,
            "workspace": self.budget.workspace(),
        }
        held, committed = sum(parts.values()), self.budget.committed
        return {"budget": self.budget.limit, "held": held, "committed": committed, "parts": parts}

    def measure(self, tracked: Iterable[Tracked]) -> dict[str, Any]:
        """All that `/health` tells in bytes."""
        running = [t.running for t in tracked if t.running is not None]
        store, disk = self.prefixes.store, self.prefixes.disk
        return {
            "cache": {
                "bytes": sum(map(self.kv_bytes, running)),
                "bytes_fp16": sum(map(self.kv_bytes_fp16, running)),
            },
            "memory": self.memory(tracked),
            "prefixes": {
                "checkpoints": len(store),
                "bytes": store.nbytes,
                "evictions": store.evictions,
                "misses": dict(self.prefixes.misses),
                "disk": disk.as_dict() if disk is not None else None,
            },
        }

    def as_of_now(self, measured: dict[str, Any]) -> dict[str, Any]:
        """What was measured, with the disk as it is now: it writes on when nobody measures."""
        told, disk = copy.deepcopy(measured), self.prefixes.disk
        if disk is not None:
            told["prefixes"]["disk"] = disk.as_dict()
            parts = told["memory"]["parts"]
            parts["in_flight"] = disk.in_flight
            told["memory"]["held"] = sum(parts.values())
        return told

    def kv_bytes(self, running: Running) -> int:
        """Keys and values of a sequence; blocks that others share count in each."""
        if self.pool is None:
            return len(running.tokens) * self.plan.per_token
        blocks = len(self.model.blocks_of(running)) * self.pool.block_bytes
        return blocks + self.model.tail_bytes(running)

    def kv_bytes_fp16(self, running: Running) -> int:
        return len(running.tokens) * self.plan.per_token_fp16

    def stats(self, tracked: Tracked) -> dict[str, Any]:
        """Speed and bytes of a sequence that ends, measured on the cache that it really had."""
        running, now = tracked.running, time.perf_counter()
        assert running is not None
        fresh, generated = len(running.tokens) - tracked.cached, running.generated
        first, drafts = tracked.first_token or now, running.drafting
        decoding = generated > 1 and now > first
        return {
            "prefill_tokens_per_second": round((fresh - generated) / (first - tracked.started), 1),
            "decode_tokens_per_second": round((generated - 1) / (now - first), 1)
            if decoding
            else None,
            "draft_n": drafts.drafted if drafts else 0,
            "draft_n_accepted": drafts.accepted if drafts else 0,
            "cache_tokens": len(running.tokens),
            "cache_bytes": self.kv_bytes(running),
            "cache_bytes_fp16": self.kv_bytes_fp16(running),
        }
