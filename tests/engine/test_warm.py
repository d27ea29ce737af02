"""What was kept changes no number: warm equals cold, whatever came between."""

from __future__ import annotations

import mlx.core as mx
import pytest

from engine.jobs import finished, submit
from models.architectures import CONFIGS
from tqstack.engine import caches
from tqstack.engine.disk import DiskStore
from tqstack.engine.worker import Worker

NEAR = 1e-3  # of the largest logit
FAMILIES = [name for name in CONFIGS if name != "deepseek-v2"]


def logits(worker, tokens):
    """The logits behind a prompt, from what is kept of it."""
    prefixes = worker._prefixes
    source = prefixes.find(tokens)
    cache, used = prefixes.open(source)
    out = worker.runtime.model(mx.array(tokens[used:])[None], cache=cache)[0, -1]
    mx.eval(out)
    return out, used


def cold_logits(worker, tokens, chunk=256):
    cache = worker._new_cache()
    for at in range(0, len(tokens) - 1, chunk):
        worker.runtime.model(
            mx.array(tokens[at : min(at + chunk, len(tokens) - 1)])[None], cache=cache
        )
        caches.settle(cache)
    out = worker.runtime.model(mx.array(tokens[-1:])[None], cache=cache)[0, -1]
    mx.eval(out)
    return out


def assert_warm_equals_cold(worker, tokens, at_least):
    warm, used = logits(worker, tokens)
    assert used >= at_least
    cold = cold_logits(worker, tokens)
    assert mx.abs(warm - cold).max().item() <= NEAR * mx.abs(cold).max().item()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_goes_on_from_a_prefix_as_if_it_had_read_it(tiny, noise, name):
    worker = Worker(tiny(name))
    first = finished(worker, submit(worker, noise[:700], boundaries=(100, 400, 690)))
    for end in (103, 450, 697, 760):
        tokens = noise[:end] if end < 700 else noise[:700] + first[0] + noise[:52]
        assert_warm_equals_cold(worker, tokens, min(end - 100, 690) if end < 700 else 690)


@pytest.mark.parametrize(
    "options", [{}, {"exact_tokens": 0}, {"codecs": None}, {"codecs": "tcq3-l8"}]
)
@pytest.mark.parametrize("name", ["qwen3", "qwen3-next"])
def test_with_the_tail_on_and_off_and_other_codes(tiny, noise, name, options):
    worker = Worker(tiny(name, **options))
    finished(worker, submit(worker, noise[:900]))
    assert_warm_equals_cold(worker, noise[:1000], 891)


def test_prefixes_made_in_a_batch_are_those_of_single_sequences(tiny, noise):
    worker = Worker(tiny())
    prompts = [noise[i * 1000 : i * 1000 + n] for i, n in enumerate((600, 20, 333))]
    answers = finished(worker, *(submit(worker, prompt, 40) for prompt in prompts))
    for prompt, made in zip(prompts, answers, strict=True):
        tokens = [*prompt, *made, *noise[:30]]
        assert_warm_equals_cold(worker, tokens, len(prompt) + len(made))


def test_answers_are_the_same_warm_cold_and_in_company(runtime, text):
    worker = Worker(runtime)
    prompts = [text[:1500], text[:1400] + text[3000:3100], text[200:900]]
    cold = [finished(worker, submit(worker, p, 12, cache_prompt=False))[0] for p in prompts]
    assert finished(worker, *(submit(worker, p, 12) for p in prompts)) == cold
    assert finished(worker, *(submit(worker, p, 12) for p in prompts)) == cold
    assert worker.totals["cached_tokens"] > 3000
    worker._prefixes.store.evict(set())
    assert finished(worker, *(submit(worker, p, 12) for p in prompts)) == cold


def test_a_checkpoint_is_never_changed_by_those_who_use_it(tiny, noise):
    for name in ("gemma3", "qwen3-next", "lfm2", "nemotron-h"):
        worker = Worker(tiny(name))
        finished(worker, submit(worker, noise[:500]))
        before, _ = logits(worker, noise[:520])
        finished(worker, *(submit(worker, noise[:500] + noise[i : i + 50], 30) for i in range(3)))
        worker_again = logits(worker, noise[:520])[0]
        assert mx.array_equal(before, worker_again), name


def test_after_a_restart_prefixes_come_back_from_the_disk(tiny, noise, tmp_path):
    runtime = tiny()
    worker = Worker(runtime, disk=DiskStore(tmp_path, 1 << 30, runtime.fingerprint))
    finished(worker, submit(worker, noise[:2500], boundaries=(600, 2400)))
    worker.close()
    again = Worker(runtime, disk=DiskStore(tmp_path, 1 << 30, runtime.fingerprint))
    assert_warm_equals_cold(again, noise[:2600], 2400)
    job = submit(again, noise[:2600], 4)
    finished(again, job)
    assert again.totals["cached_tokens"] >= 2400
    assert (
        finished(again, submit(again, noise[:2600], 4))[0]
        == finished(again, submit(again, noise[:2600], 4, cache_prompt=False))[0]
    )
