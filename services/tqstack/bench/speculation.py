"""What speculative decoding gains: tokens a second with each drafter, as multiples of without.

Three tasks: held-out code goes on; a file of 300 lines is written again with every 25th line
changed; and text is drawn so hot that nothing in it can be drafted. Small models do not do as they
are told, so the second answer is scripted: the model computes its logits as ever, and the script's
token is made the likeliest. Modes take turns, so that whatever else the machine does hits all of
them; medians over the trials are reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np

from tqstack import demo_model
from tqstack.attention.cache import TurboQuantKVCache
from tqstack.engine.jobs import Job, Token
from tqstack.engine.sampling import GREEDY, Sampling
from tqstack.engine.worker import Worker
from tqstack.models.drafts import NONE
from tqstack.models.mtp import Predicting
from tqstack.models.runtime import Runtime

LINES, CHANGED = 300, 25  # of the file that is written again; every so many one is changed
PROMPT = 400  # tokens before held-out code goes on
DEFINITIONS = 4  # in so many tokens, at least: it is code
HOT = Sampling(temperature=3.0, seed=1)


@dataclass(frozen=True)
class Task:
    """`script`: all tokens of every sequence, its prompt's and its answer's; None: as the model
    says."""

    name: str
    prompts: tuple[tuple[int, ...], ...]
    sampling: Sampling = GREEDY
    script: tuple[int, ...] | None = None


class Scripted:
    """A model that says what a script says, and takes as long as ever."""

    def __init__(self, model: Any, script: Sequence[int]):
        self._model, self._script = model, mx.array([*script, *[0] * 16])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, inputs: mx.array, cache: Any) -> mx.array:
        entry = next(own for own in cache if isinstance(own, TurboQuantKVCache))
        first = mx.array(entry.offset).reshape(-1, 1)  # before these tokens
        logits = self._model(inputs, cache=cache)
        places = mx.minimum(first + mx.arange(1, inputs.shape[1] + 1), len(self._script) - 1)
        said = mx.arange(logits.shape[-1]) == self._script[places][..., None]
        return mx.where(said, logits.max(axis=-1, keepdims=True) + 1, logits)


@dataclass(frozen=True)
class Row:
    """Medians. `speedup` is against the same task without drafts."""

    task: str
    mode: str
    sequences: int
    tokens_per_second: float
    speedup: float
    drafted: int
    accepted: int
    same_tokens: bool  # as without drafts


def tasks(tokenizer: Any, sequences: int) -> list[Task]:
    """Of held-out text; of `sequences` prompts each."""
    held = [int(token) for token in demo_model.held_out_tokens()]
    texts = [held[at : at + PROMPT] for at in range(0, len(held) - PROMPT, 2 * PROMPT)]
    code = [own for own in texts if tokenizer.decode(own).count("def ") >= DEFINITIONS]
    noise = np.random.default_rng(0).integers(100, len(tokenizer.vocab) - 100, (sequences, PROMPT))
    prompt, script = _rewritten(tokenizer, held)
    return [
        Task("code", tuple(map(tuple, (code * sequences)[:sequences]))),
        Task("rewrite", (prompt,) * sequences, GREEDY, script),
        Task("nothing", tuple(map(tuple, noise.tolist())), HOT),
    ]


def _rewritten(tokenizer: Any, held: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A file as prompt; and behind it the file again, changed here and there."""
    lines = [line for line in tokenizer.decode(list(held[:40_000])).split("\n") if line.strip()]
    lines = lines[200 : 200 + LINES]
    changed = [line if i % CHANGED else f"{line}  # changed: {i}" for i, line in enumerate(lines)]
    prompt, answer = (
        tokenizer.encode("\n".join(own) + "\n\n", add_special_tokens=False)
        for own in (lines, changed)
    )
    return tuple(prompt), (*prompt, *answer)


def _for(runtime: Runtime, task: Task) -> Runtime:
    if task.script is None:
        return runtime
    model: Any = Scripted(runtime.model, task.script)
    return replace(runtime, model=model)


def modes(runtime: Runtime) -> dict[str, Runtime]:
    """The model with every choice of drafters that it has, and without; weights are shared.

    Args:
        runtime: as SIDECAR_SPECULATION=mtp loads it, or lookup where the model has no head.
    """
    if not isinstance(runtime.model, Predicting):
        return {"0": replace(runtime, drafts=NONE), "lookup": runtime}
    body = runtime.model.body
    lookup = replace(runtime.drafts, mode="lookup", drafters=("lookup",), draft_seconds=0.0)
    return {
        "0": replace(runtime, model=body, drafts=NONE),
        "lookup": replace(runtime, model=body, drafts=lookup),
        "mtp": runtime,
    }


def measure(runtime: Runtime, sequences: int, generated: int, trials: int) -> Iterator[Row | None]:
    """Run everything; yields None after each single run (for a progress bar), then the rows."""
    for task in tasks(runtime.tokenizer, sequences):
        workers = {name: Worker(_for(own, task)) for name, own in modes(runtime).items()}
        runs: dict[str, list[_Run]] = {name: [] for name in workers}
        for _ in range(trials):
            for name, worker in workers.items():
                runs[name].append(_run(worker, task, generated))
                yield None
        plain = median(run.speed for run in runs["0"])
        for name, own in runs.items():
            speed, last = median(run.speed for run in own), own[-1]
            yield Row(
                task.name,
                name,
                sequences,
                round(speed, 1),
                round(speed / plain, 2),
                last.drafted,
                last.accepted,
                last.answers == runs["0"][-1].answers,
            )


@dataclass(frozen=True)
class _Run:
    answers: list[list[int]]
    speed: float
    drafted: int
    accepted: int


def _run(worker: Worker, task: Task, generated: int) -> _Run:
    """All prompts of a task together."""
    events: list[list[Any]] = [[] for _ in task.prompts]
    for prompt, own in zip(task.prompts, events, strict=True):
        job = Job(prompt, generated, task.sampling, ignore_eos=True)
        worker.submit(job, own.append)
    while worker.busy:
        worker.step()
    tokens = [[event for event in own if isinstance(event, Token)] for own in events]
    stats = [own[-1].stats or {} for own in tokens]
    return _Run(
        [[token.id for token in own] for own in tokens],
        sum(one["decode_tokens_per_second"] or 0 for one in stats),
        sum(one["draft_n"] for one in stats),
        sum(one["draft_n_accepted"] for one in stats),
    )
