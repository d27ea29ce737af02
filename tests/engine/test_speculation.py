"""Speculative decoding changes no answer: not alone, not in company, whatever is asked for."""

from __future__ import annotations

import io
import random
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from engine.books import check, empty, limited
from engine.jobs import answer, finished, submit
from tqstack.engine.depth import StepTimes
from tqstack.engine.grammar import Grammar
from tqstack.engine.jobs import Token
from tqstack.engine.sampling import GREEDY, Sampling
from tqstack.engine.worker import Worker
from tqstack.models.drafts import NONE

RANDOM = Sampling(temperature=0.8, seed=5)


def plainly(runtime):
    return Worker(replace(runtime, drafts=NONE))


def alone(worker, prompts, lengths, sampling=GREEDY, **options):
    return [
        finished(worker, submit(worker, prompt, length, sampling, **options))[0]
        for prompt, length in zip(prompts, lengths, strict=True)
    ]


def prompts_of(noise, count, seed=0):
    """Prompts, some of which repeat themselves or each other's beginnings."""
    rng, found = random.Random(seed), []
    for i in range(count):
        start, length = rng.randrange(30_000), rng.randint(2, 60)
        own = noise[start : start + length]
        found.append(own * 3 if i % 3 == 0 else noise[:100] + own if i % 3 == 1 else own)
    return found


def counts(worker):
    told = worker.status()["speculation"]
    return told["draft_tokens"], told["draft_tokens_accepted"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen3-next", {}),
        ("qwen3-next", {"exact_tokens": 0}),
        ("qwen3-next", {"codecs": "k4v3"}),
        ("qwen3.5", {}),
    ],
)
def test_greedy_answers_have_the_tokens_of_plain_decoding(eager, tiny, noise, name, options):
    runtime, rng = tiny(name, **options), random.Random(1)
    prompts = prompts_of(noise, 12)
    lengths = [rng.randint(1, 30) for _ in prompts]
    lengths[0] = 150  # over the end of a block
    want = alone(plainly(runtime), prompts, lengths)
    worker = eager(runtime)
    assert alone(worker, prompts, lengths) == want
    drafted, accepted = counts(worker)
    assert 0 < accepted < drafted
    together = eager(runtime)
    jobs = [submit(together, *job) for job in zip(prompts, lengths, strict=True)]
    assert finished(together, *jobs) == want and counts(together)[1] > 0
    check(together)
    assert empty(together)


@pytest.mark.parametrize("drafters", [("mtp",), ("lookup", "mtp")])
def test_the_models_own_head_changes_no_answer(eager, headed, text, drafters):
    starts, lengths = (0, 9000, 20_000, 33_000, 100), (60, 40, 30, 50, 1)
    prompts = [text[start : start + 120] for start in starts]
    want = alone(plainly(headed), prompts, lengths)
    worker = eager(headed, drafters)
    jobs = [submit(worker, *job) for job in zip(prompts, lengths, strict=True)]
    assert finished(worker, *jobs) == want
    drafted, accepted = counts(worker)
    assert 0 < drafted / 10 < accepted
    check(worker)
    # Its pairs are kept with the prefix, and it goes on from there.
    turn = prompts[0] + want[0] + text[500:540]
    cached = worker.totals["cached_tokens"]
    assert alone(worker, [turn], [40]) == alone(plainly(headed), [turn], [40])
    assert worker.totals["cached_tokens"] > cached + 150
    assert empty(worker)


def test_a_prompt_of_one_token_is_drafted_for_once_it_has_a_state(eager, headed):
    prompts = [[7], [9], [7]]
    want = alone(plainly(headed), prompts, [20] * 3)
    worker = eager(headed, ("lookup", "mtp"))
    jobs = [submit(worker, prompt, 20) for prompt in prompts]
    assert finished(worker, *jobs) == want and counts(worker)[1] > 0


def test_models_without_recurrent_layers_draft_too(eager, tiny, noise):
    runtime = tiny("llama")
    prompts = prompts_of(noise, 9)
    worker = eager(runtime)
    assert alone(worker, prompts, [30] * 9) == alone(plainly(runtime), prompts, [30] * 9)
    assert counts(worker)[1] > 0


def test_who_leaves_in_the_middle_changes_nothing_for_the_others(eager, tiny, noise):
    runtime, rng = tiny(), random.Random(3)
    prompts = prompts_of(noise, 16, seed=4)
    want = alone(plainly(runtime), prompts, [40] * 16)
    worker = eager(limited(runtime, 400, 8))
    jobs = [submit(worker, prompt, 40) for prompt in prompts]
    gone = set(rng.sample(range(16), 5))
    for i in gone:
        for _ in range(rng.randint(1, 8)):
            worker.step()
        worker.cancel(jobs[i][0])
        check(worker)
    while worker.busy:
        worker.step()
        check(worker)
    for i, (_, events) in enumerate(jobs):
        if i not in gone:
            assert answer(events, 0) == want[i]
    assert empty(worker)


def test_what_is_kept_of_an_answer_with_drafts_serves_its_next_turn(eager, tiny, noise):
    runtime = tiny()
    worker, plain = eager(runtime), plainly(runtime)
    prompt = noise[:150] * 2
    first = alone(worker, [prompt], [80])[0]
    turn = prompt + first + noise[500:540]
    assert alone(worker, [turn], [60]) == alone(plain, [turn], [60])
    assert worker.totals["cached_tokens"] > 300


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_p": 0.9, "top_k": 20, "min_p": 0.01},
        {"repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.3},
        {"logit_bias": ((3, 4.0), (5, -9.0))},
    ],
)
def test_a_seed_draws_the_tokens_that_it_draws_without_drafts(eager, tiny, noise, options):
    runtime, sampling = tiny(), replace(RANDOM, temperature=0.1, **options)
    prompts = prompts_of(noise, 8)
    want = alone(plainly(runtime), prompts, [50] * 8, sampling)
    worker = eager(runtime)
    jobs = [submit(worker, prompt, 50, sampling) for prompt in prompts]
    assert finished(worker, *jobs) == want
    assert counts(worker)[0] > 0


def test_sampling_with_drafts_has_the_distribution_of_the_model(eager, tiny):
    runtime, vocabulary, draws = tiny(vocabulary=8), 8, 640
    prompt = [1, 2, 3, 4, *alone(plainly(runtime), [[1, 2, 3, 4]], [60], ignore_eos=True)[0]]
    worker, seen = eager(runtime), np.zeros((vocabulary, vocabulary))
    for start in range(0, draws, 16):
        seeds = range(start, start + 16)
        jobs = [submit(worker, prompt, 2, Sampling(seed=n), ignore_eos=True) for n in seeds]
        for answered in finished(worker, *jobs):
            seen[tuple(answered)] += 1
    logits = [runtime.model(mx.array([[*prompt, t]])) for t in range(vocabulary)]
    first = np.array(mx.softmax(logits[0][0, -2]))
    second = np.array([mx.softmax(one[0, -1]) for one in logits])
    want = draws * first[:, None] * second
    chi2 = ((seen - want) ** 2 / want).sum()
    assert counts(worker)[1] > draws / 10
    assert chi2 < 63 + 5 * (2 * 63) ** 0.5  # 63 degrees of freedom, five deviations


def test_log_probabilities_are_those_of_plain_decoding(eager, tiny, noise):
    runtime = tiny()
    prompt = noise[:40] * 3

    def all_of(worker):
        _, events = submit(worker, prompt, 40, logprobs=3)
        while worker.busy:
            worker.step()
        found = [events.get() for _ in range(events.qsize())]
        return [event for event in found if isinstance(event, Token)]

    worker = eager(runtime)
    want, got = all_of(plainly(runtime)), all_of(worker)
    assert [t.id for t in got] == [t.id for t in want] and counts(worker)[1] > 0
    for a, b in zip(got, want, strict=True):
        assert a.logprob.value == pytest.approx(b.logprob.value, abs=1e-3)
        assert [t for t, _ in a.logprob.top] == [t for t, _ in b.logprob.top]


def test_an_end_within_a_draft_ends_the_answer_there(eager, tiny, noise):
    runtime = tiny()
    prompt = noise[:40] * 3
    whole = alone(plainly(runtime), [prompt], [60])[0]
    for stop in set(whole[5:40]):
        options = {"stop_tokens": (stop,), "min_tokens": 4}
        want = alone(plainly(runtime), [prompt], [60], **options)
        assert alone(eager(runtime), [prompt], [60], **options) == want


def test_an_answer_of_a_form_is_made_plainly_beside_others_and_counted(eager, runtime, text):
    form = Grammar("regex", "[a-z ]{30}")
    prompt = text[:60] * 3
    plain, worker = plainly(runtime), eager(runtime)
    want = alone(plain, [prompt], [40], grammar=form), alone(plain, [prompt], [40])
    jobs = submit(worker, prompt, 40, grammar=form), submit(worker, prompt, 40)
    assert finished(worker, *jobs) == [*want[0], *want[1]]
    told = worker.status()["speculation"]
    assert told["plain_sequences"] == 1 and told["draft_tokens"] > 0


def test_an_ended_sequence_tells_its_drafts(eager, tiny, noise):
    worker = eager(tiny())
    _, events = submit(worker, noise[:40] * 3, 60)
    while worker.busy:
        worker.step()
    stats = [events.get() for _ in range(events.qsize())][-1].stats
    assert (stats["draft_n"], stats["draft_n_accepted"]) == counts(worker)


def test_where_nothing_pays_no_step_is_longer_than_a_token(tiny, noise, monkeypatch):
    monkeypatch.setattr(StepTimes, "ratio", lambda *_: 9.0)
    worker = Worker(tiny())
    alone(worker, [noise[:40] * 3], [60])
    told = worker.status()["speculation"]
    assert told["verify_steps"] == 0 and told["plain_steps"] >= 60


def test_what_a_head_keeps_is_computed_with_every_token(headed, text, monkeypatch):
    monkeypatch.setattr(StepTimes, "ratio", lambda *_: 9.0)
    worker = Worker(headed)
    submit(worker, text[:60], 40)
    for _ in range(20):
        worker.step()
    mx.synchronize()
    graph = io.StringIO()
    mx.export_to_dot(graph, *headed.model.aside(worker._model.cache))
    assert graph.getvalue().count("->") < 20  # of one token, and not of twenty
