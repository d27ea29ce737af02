"""What a job may wish beside tokens: forms, log-probabilities, when it may end, several answers."""

from __future__ import annotations

import queue

import mlx.core as mx
import numpy as np
import pytest

from engine.jobs import answer, finished, submit
from tqstack.engine.grammar import KEPT, Grammar, GrammarError, Grammars
from tqstack.engine.jobs import Failed, Job, Measured, Token
from tqstack.engine.sampling import GREEDY, Sampling
from tqstack.engine.worker import Worker
from tqstack.models.runtime import load_runtime
from tqstack.settings import Settings

NUMBER = Grammar("regex", "[0-9]{3}")
WORDS = Grammar("json", '{"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2}')


@pytest.fixture(scope="module")
def plain():
    """The demo model with a cache that is not compressed."""
    return load_runtime(Settings(sidecar_model="demo", tq_cache_version="none"))


def told(events):
    """Log-probabilities of the answer's tokens, and of the prompt's by position."""
    answered, prompt = [], {}
    while not events.empty():
        event = events.get()
        if isinstance(event, Token):
            answered.append(event.logprob)
        elif isinstance(event, Measured):
            prompt |= {event.first + i: one for i, one in enumerate(event.logprobs)}
    return answered, prompt


def text_of(runtime, tokens):
    return runtime.tokenizer.decode([t for t in tokens if t not in runtime.end_tokens])


def test_logprobs_are_the_plain_model_s(plain, text):
    worker, prompt = Worker(plain), text[:300]
    others = submit(worker, text[500:600], 30)
    _, events = submit(worker, prompt, 12, logprobs=5, prompt_logprobs=2)
    while worker.busy:
        worker.step()
    answered, read = told(events)
    tokens = [*prompt, *(one.token for one in answered)]
    logits = plain.model(mx.array(tokens)[None])[0].astype(mx.float32)
    wanted = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    assert sorted(read) == list(range(1, len(prompt)))
    places = [*read.items(), *((len(prompt) + i, one) for i, one in enumerate(answered))]
    for at, one in places:
        assert one.token == tokens[at]
        assert abs(one.value - wanted[at - 1, one.token]) < 1e-3
        best = np.sort(wanted[at - 1])[::-1][: len(one.top)]
        assert np.abs(best - [value for _, value in one.top]).max() < 1e-3
        assert all(abs(wanted[at - 1, t] - value) < 1e-3 for t, value in one.top)
    assert {len(one.top) for one in answered} == {5}
    assert len(answer(others[1], 0)) == 30


def test_an_answer_ends_no_earlier_than_it_may(runtime, text):
    worker, end = Worker(runtime), min(runtime.end_tokens)
    eager = Sampling(temperature=0, logit_bias=((end, 100.0),))
    jobs = [
        submit(worker, text[:50], 9, eager),
        submit(worker, text[:50], 9, eager, min_tokens=4),
        submit(worker, text[:50], 9, eager, ignore_eos=True),
        submit(worker, text[:50], 9, eager, min_tokens=2, grammar=NUMBER),
    ]
    first, later, never, number = finished(worker, *jobs)
    assert first == [end] and never == [end] * 9
    assert len(later) == 5 and later[-1] == end and end not in later[:-1]
    assert text_of(runtime, number).isdigit() and number[-1] == end
    [stop] = finished(worker, submit(worker, text[:50], 9))[0][2:3]
    assert len(finished(worker, submit(worker, text[:50], 9, stop_tokens=(stop,)))[0]) <= 3


@pytest.mark.parametrize("temperature", [0, 1])
def test_each_of_a_batch_has_its_own_form_or_none(runtime, text, temperature):
    worker, sampling = Worker(runtime), Sampling(temperature=temperature, seed=4)
    free = submit(worker, text[:80], 20, sampling)
    number = submit(worker, text[100:160], 20, sampling, grammar=NUMBER)
    words = submit(worker, text[200:230], 40, sampling, grammar=WORDS)
    unforced, digits, listed = finished(worker, free, number, words)
    assert len(text_of(runtime, digits)) == 3 and text_of(runtime, digits).isdigit()
    assert set(text_of(runtime, listed)) <= set('[]", \nab')
    alone = Worker(runtime)
    assert unforced == finished(alone, submit(alone, text[:80], 20, sampling))[0]


def test_a_form_begins_where_the_reasoning_ends(runtime, text):
    worker, (mark, other) = Worker(runtime), (77, 78)
    bias = Sampling(temperature=0, logit_bias=((mark, 90.0),))
    waits = Grammar("regex", "[0-9]{3}", after=(mark,))
    opened = Grammar("regex", "[0-9]{3}", after=(mark,), opening=mark)
    closed = Grammar("regex", "[0-9]{3}", after=(mark,), opening=other)
    jobs = [submit(worker, text[:50], 9, bias, grammar=g) for g in (waits, opened, closed)]
    first, second, third = finished(worker, *jobs)
    assert first[0] == mark and text_of(runtime, first[1:]).isdigit()
    assert second[:2] == [mark, mark] and text_of(runtime, second[2:]).isdigit()
    assert text_of(runtime, third).isdigit()


def test_bad_forms_are_refused_and_compiled_ones_kept_within_bounds(runtime, text):
    grammars = Grammars(runtime.tokenizer, runtime.end_tokens)
    wrongs = [("json", '{"type": "thing"}'), ("json", "[]"), ("regex", "("), ("lark", "?")]
    for kind, wrong in wrongs:
        with pytest.raises(GrammarError, match=r"\w"):
            grammars.form(Grammar(kind, wrong))
    for i in range(KEPT + 5):
        grammars.form(Grammar("regex", f"a{{{i + 1}}}"))
    assert len(grammars) == KEPT
    worker = Worker(runtime)
    _, events = submit(worker, text[:50], grammar=Grammar("json", '{"type": "thing"}'))
    assert answer(events, 0).code == "bad_grammar" and not worker.busy


def together(worker, prompt, count, max_tokens=12, **options):
    """Jobs of one prompt, submitted at once."""
    queues = [queue.SimpleQueue() for _ in range(count)]
    seeds = [Sampling(temperature=1.0, seed=seed) for seed in range(count)]
    jobs = [Job(list(prompt), max_tokens, sampling, **options) for sampling in seeds]
    worker.submit_all([(job, one.put) for job, one in zip(jobs, queues, strict=True)])
    return list(zip(jobs, queues, strict=True))


@pytest.mark.parametrize("cache_prompt", [True, False])
def test_answers_of_one_prompt_share_its_blocks_and_it_is_read_once(runtime, text, cache_prompt):
    worker, prompt = Worker(runtime), text[:600]
    read = 0
    real = worker._model.read

    def counted(running, count):
        nonlocal read
        read += count
        return real(running, count)

    worker._model.read = counted
    jobs = together(worker, prompt, 3, cache_prompt=cache_prompt)
    while len(worker._model.batch) < 3:
        worker.step()
    tables = [worker._model.blocks_of(running) for running in worker._model.batch]
    assert tables[0] == tables[1] == tables[2] and len(tables[0]) == 600 // 128 - 1
    assert worker._pool.blocks_used == len(tables[0]) and read == 599
    answers = finished(worker, *jobs)
    assert len({tuple(tokens) for tokens in answers}) == 3
    assert not worker._budget._promises
    alone = Worker(runtime)
    sampling = Sampling(temperature=1.0, seed=2)
    assert finished(alone, submit(alone, prompt, 12, sampling))[0] == answers[2]


def test_whoever_is_left_reads_the_prompt_when_its_reader_has_gone(runtime, text):
    worker = Worker(runtime)
    jobs = together(worker, text[:600], 3)
    worker.step()
    worker.cancel(jobs[0][0])
    assert [len(tokens) for tokens in finished(worker, *jobs[1:])] == [12, 12]
    assert not worker._budget._promises and not worker._model.batch


def test_a_seed_makes_the_same_answer_in_a_batch_of_six(runtime, text):
    sampling = Sampling(temperature=1.0, seed=11)
    worker = Worker(runtime)
    alone = finished(worker, submit(worker, text[:100], 24, sampling))
    others = [submit(worker, text[i * 200 :][: 50 + i], 40, GREEDY) for i in range(1, 6)]
    again = submit(worker, text[:100], 24, sampling)
    assert finished(worker, again, *others)[0] == alone[0]


def test_a_form_that_grows_too_complex_ends_its_sequence_alone(runtime, text, monkeypatch):
    worker = Worker(runtime)
    form = submit(worker, text[:50], 9, grammar=NUMBER)
    free = submit(worker, text[100:150], 9)

    def broken(self, token):
        raise GrammarError("too complex")

    monkeypatch.setattr("tqstack.engine.grammar.Form.take", broken)
    while worker.busy:
        worker.step()
    assert len(answer(free[1], 0)) == 9
    events = [form[1].get() for _ in range(form[1].qsize())]
    assert isinstance(events[-1], Failed) and "too complex" in events[-1].error.message
