"""What a job asks of the memory, and what it is told if that cannot be had."""

from __future__ import annotations

from tqstack.engine.budget import Budget, Wish
from tqstack.engine.jobs import Job, JobError

MEASURED_CHUNK = 32  # tokens whose logits are computed at once: a large vocabulary's take 1 MB each


def wish_of(job: Job) -> Wish:
    """What a job needs by itself."""
    return Wish(job.longest, measured=0 if job.prompt_logprobs is None else MEASURED_CHUNK)


def refusal(job: Job, code: str, waiting: int, budget: Budget) -> JobError:
    """Why a job is not taken: "queue_full", or "insufficient_memory"."""
    if code == "queue_full":
        return JobError(code, f"{waiting} requests wait already; try again later")
    longest = budget.longest(wish_of(job).measured)
    return JobError(
        code,
        f"{job.prompt_tokens} prompt tokens and up to {job.max_tokens} more do not fit in "
        f"memory; {longest} tokens in all would. Shorten the prompt, set fewer TQ_KV_BITS, or "
        "more SIDECAR_MEMORY_MB",
    )
