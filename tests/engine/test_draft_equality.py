"""Greedy answers with drafts are those without, whatever else goes on: alone and in batches of
mixed depths, behind kept prefixes, beside who is cancelled, with every codec, tail on and off.

A few prompts in every run; TQSTACK_DRAFTS=200 takes so many for each drafter.
"""

from __future__ import annotations

import os
import random
from dataclasses import replace

import mlx.core as mx
import pytest

from engine.books import check, empty, limited
from engine.jobs import answer, finished, submit
from tqstack.engine.worker import Worker
from tqstack.models.cache_spec import CacheSpec
from tqstack.models.drafts import NONE
from tqstack.turboquant.kv_codecs import KVCodecs

PROMPTS = int(os.environ.get("TQSTACK_DRAFTS", "6"))
CODECS = ["tq3", "tcq4-l8", "tq4", "tq2", "tq3.5", "k4v3", "tcq3-l8", "tcq2-l8", "tq4-g64", "none"]
CASES = [(codec, tail) for codec in CODECS for tail in (128, 0)]
USED = CASES if len(CASES) <= PROMPTS else CASES[1:3]
EACH = -(-PROMPTS // len(USED))
# Of the logits' spread: sums of another order move logits by 1e-5, and a value that lies between
# two codes may then get the other one.
TIE = 5e-3
TIES = 0.03  # of the answers

every_cache = pytest.mark.parametrize(("codec", "tail"), USED)


@every_cache
def test_looked_up_drafts_change_no_answer(eager, tiny, noise, codec, tail):
    runtime, rng = tiny("qwen3.5", codecs=codec, exact_tokens=tail), random.Random(codec)
    prompts = []
    for i in range(EACH):
        start, length = rng.randrange(30_000), rng.randint(3, 140)
        own = noise[start : start + length]
        prompts.append(own * 3 if i % 3 else noise[:150] + own)
    compare(runtime, eager(limited(runtime, 700, 8)), prompts, rng)


@every_cache
def test_drafts_of_the_models_head_change_no_answer(eager, headed, text, codec, tail):
    cache = CacheSpec(KVCodecs.parse(codec), exact_tokens=tail)
    runtime, rng = replace(headed, cache=cache), random.Random(codec)
    starts = [rng.randrange(35_000) for _ in range(EACH)]
    prompts = [text[start : start + rng.randint(1, 300)] for start in starts]
    drafters = rng.choice([("mtp",), ("lookup", "mtp")])
    compare(runtime, eager(runtime, drafters), prompts, rng)


def compare(runtime, worker, prompts, rng):
    """Each prompt alone, and its next turn, in company that comes and goes."""
    plain = Worker(replace(runtime, drafts=NONE))
    lengths = [rng.randint(1, 50) for _ in prompts]
    ties = told(runtime, prompts, alone(plain, prompts, lengths), alone(worker, prompts, lengths))
    turns = [
        [*prompt, *finished(plain, submit(plain, prompt, length))[0], *rng.choices(prompt, k=9)]
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    want = alone(plain, turns, lengths)
    jobs = [submit(worker, *job) for job in zip(turns, lengths, strict=True)]
    others = [submit(worker, rng.choice(prompts) * 2, 60) for _ in range(3)]
    for job, _ in others:
        for _ in range(rng.randint(1, 9)):
            worker.step()
        worker.cancel(job)
        check(worker)
    while worker.busy:
        worker.step()
    got = [answer(events, 0) for _, events in jobs]
    ties += told(runtime, turns, want, got)
    assert ties <= max(1, TIES * 2 * len(prompts))
    speculation = worker.status()["speculation"]
    assert speculation["draft_tokens"] > speculation["draft_tokens_accepted"] > 0
    assert empty(worker)


def alone(worker, prompts, lengths):
    return [
        finished(worker, submit(worker, prompt, length))[0]
        for prompt, length in zip(prompts, lengths, strict=True)
    ]


def told(runtime, prompts, want, got):
    """How many answers differ, all of them first where two tokens were as likely."""
    ties = 0
    for prompt, right, found in zip(prompts, want, got, strict=True):
        if right == found:
            continue
        at = next(i for i, pair in enumerate(zip(right, found, strict=True)) if pair[0] != pair[1])
        cache, tokens = runtime.new_cache(), [*prompt, *right[:at]]
        logits = runtime.model(mx.array([tokens]), cache=cache)[0, -1]
        gap = mx.abs(logits[right[at]] - logits[found[at]]) / (logits.max() - logits.min())
        assert gap.item() < TIE, (
            f"token {at}: {right[at]} and {found[at]} are {gap.item():.2g} apart"
        )
        ties += 1
    return ties
