"""Tokens that are taken back leave a cache as if they had never been there."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm.models.cache import ArraysCache

from models.architectures import build
from tqstack.engine import caches
from tqstack.models import verification
from tqstack.models.cache_spec import CacheSpec
from tqstack.models.layers.drafts import MOST_TOKENS
from tqstack.turboquant.kv_codecs import KVCodecs

SPEC = CacheSpec(KVCodecs.parse("tq4"))
TOKENS = [5, 9, 2, 7, 7, 3, 1, 8]


@pytest.fixture(params=["qwen3-next", "qwen3.5"])
def model(request):
    return build(request.param)


def read(model, tokens):
    cache = SPEC.make(model)
    for start in range(0, len(tokens), 40):
        model(mx.array(tokens[start : start + 40])[None], cache=cache)
        caches.settle(cache)
    return cache


@pytest.mark.parametrize("count", [2, 3, 5, MOST_TOKENS])
def test_however_many_stay_the_rest_leaves_no_trace(model, count):
    prompt = [i * 7 % 100 for i in range(60)]
    want = read(model, prompt)
    logits = [model(mx.array([[token]]), cache=want) for token in TOKENS[:count]]
    for kept in range(1, count + 1):
        cache = read(model, prompt)
        given = verification.revocable(cache, [count])
        found = model(mx.array([TOKENS[:count]]), cache=given)
        assert mx.allclose(found, mx.concatenate(logits, axis=1), atol=1e-3)
        mx.eval(verification.accept(given, [count], [kept]))
        again = read(model, prompt)
        for token in TOKENS[:kept]:
            model(mx.array([[token]]), cache=again)
        for entry, like in zip(cache, again, strict=True):
            if isinstance(entry, ArraysCache):
                for a, b in zip(entry.cache, like.cache, strict=True):
                    assert mx.allclose(a, b, atol=1e-3)
            else:
                assert entry.lengths == like.lengths == [60 + kept]
        after = (model(mx.array([[4]]), cache=one) for one in (cache, again))
        assert mx.allclose(*after, atol=1e-3)


def test_every_sequence_of_a_batch_keeps_its_own_number(model):
    prompts = [[1, 2, 3], list(range(50)), [9] * 20]
    counts, kept = [3, 5, 1], [2, 5, 1]
    batch = caches.merged([read(model, prompt) for prompt in prompts])
    rows = mx.array([[*TOKENS[:n], *[0] * (5 - n)] for n in counts])
    given = verification.revocable(batch, counts)
    mx.eval(model(rows, cache=given))
    mx.eval(verification.accept(given, counts, kept))
    found = model(mx.array([[4]] * 3), cache=batch)
    for i, prompt in enumerate(prompts):
        alone = read(model, [*prompt, *TOKENS[: kept[i]]])
        assert mx.allclose(model(mx.array([[4]]), cache=alone)[0], found[i], atol=1e-3)


def test_caches_that_cannot_take_tokens_back_say_so():
    for name in ("gemma3", "nemotron-h"):
        model = build(name)
        assert "cannot take drafts back" in str(verification.unsupported(model, SPEC.make(model)))
    model = build("llama")
    assert verification.unsupported(model, SPEC.make(model)) is None
    assert verification.unsupported(model, CacheSpec(None).make(model))
