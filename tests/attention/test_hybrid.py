"""A whole model through the compressed cache: the right layers, the same answers."""

from __future__ import annotations

import copy

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache, make_prompt_cache

from tqstack import demo_model
from tqstack.attention.cache import TurboQuantKVCache
from tqstack.attention.dispatch import NotCompressedError, prove
from tqstack.attention.hybrid import (
    convert_cache_to_turboquant,
    layer_codecs,
    make_turboquant_cache,
    softmax_entries,
)
from tqstack.turboquant import UNCOMPRESSED, KVCodecs

TOKENS = demo_model.held_out_tokens().astype(np.int32).tolist()


def logits(demo, cache, tokens, chunk=64):
    x = mx.array([tokens])
    parts = [demo.model(x[:, a : a + chunk], cache=cache) for a in range(0, len(tokens), chunk)]
    return np.array(mx.concatenate(parts, axis=1))


def test_only_softmax_layers_are_compressed(demo):
    cache = make_turboquant_cache(demo.model)
    kinds = [type(entry) for entry in cache]
    assert [i for i, kind in enumerate(kinds) if kind is TurboQuantKVCache] == [3, 7]
    assert all(kind is ArraysCache for i, kind in enumerate(kinds) if i not in (3, 7))


def test_entries_that_are_not_plain_kv_caches_are_left_alone():
    cache = [KVCache(), RotatingKVCache(8), ArraysCache(2), KVCache()]
    assert softmax_entries(cache) == [0, 3]


def test_boundary_layers_count_softmax_layers_from_both_ends():
    layers = layer_codecs(10, KVCodecs.parse(4), 2)
    exact = [codecs == UNCOMPRESSED for codecs in layers]
    assert exact == [True] * 2 + [False] * 6 + [True] * 2


def test_with_the_exact_codec_logits_equal_those_of_the_plain_cache(demo):
    plain = logits(demo, make_prompt_cache(demo.model), TOKENS[:200])
    ours = logits(demo, make_turboquant_cache(demo.model, "none"), TOKENS[:200])
    assert np.abs(plain - ours).max() < 0.02  # keys and values pass through float16
    assert (plain.argmax(-1) == ours.argmax(-1)).mean() > 0.98


def test_compressed_logits_do_not_depend_on_the_chunks_of_the_prompt(demo):
    once = logits(demo, make_turboquant_cache(demo.model), TOKENS[:600], chunk=600)
    parts = logits(demo, make_turboquant_cache(demo.model), TOKENS[:600], chunk=37)
    assert np.abs(once - parts).max() < 0.15 and np.abs(once - parts).mean() < 0.005


def test_plain_mlx_lm_generate_takes_the_cache(demo):
    cache = make_turboquant_cache(demo.model)
    text = mlx_lm.generate(
        demo.model, demo.tokenizer, TOKENS[:100], max_tokens=8, prompt_cache=cache
    )
    assert text and cache[3].size() >= 107 and cache[3].reads > 8


def test_an_exact_prefill_can_be_compressed_afterwards(demo):
    exact = make_prompt_cache(demo.model)
    logits(demo, exact, TOKENS[:1500])
    converted = convert_cache_to_turboquant(exact)
    assert converted[0] is exact[0] and converted[3].offset == exact[3].offset == 1500
    mx.eval(converted[3].state)
    assert converted[3].nbytes < exact[3].nbytes / 3  # 220 tokens are exact, in float32 on a CPU
    untouched = copy.deepcopy(exact)  # recurrent entries are shared, and go on
    after = logits(demo, converted, TOKENS[1500:1510])
    expected = logits(demo, untouched, TOKENS[1500:1510])
    assert (after.argmax(-1) == expected.argmax(-1)).mean() >= 0.9


def greedy_tokens(demo, prompts, cache_of, count=12):
    generator = BatchGenerator(demo.model, prefill_step_size=64, stop_tokens=None)
    uids = generator.insert(
        prompts, max_tokens=[count] * len(prompts), caches=[cache_of() for _ in prompts]
    )
    out = {uid: [] for uid in uids}
    while any(len(tokens) < count for tokens in out.values()):
        for response in generator.next()[1]:
            out[response.uid].append(response.token)
    return [out[uid] for uid in uids]


@pytest.mark.parametrize("boundary", [0, 1])
def test_a_batch_of_uneven_prompts_gives_the_tokens_of_single_ones(demo, boundary):
    def fresh():
        return make_turboquant_cache(demo.model, boundary_layers=boundary)

    prompts = [TOKENS[:n] for n in (500, 5, 290, 131)]
    together = greedy_tokens(demo, prompts, fresh)
    assert together == [greedy_tokens(demo, [prompt], fresh)[0] for prompt in prompts]


def test_the_proof_names_every_compressed_layer(demo):
    assert prove(demo.model, make_turboquant_cache(demo.model)) == [3, 7]


def test_the_proof_fails_loudly_if_nothing_can_be_compressed(demo):
    with pytest.raises(NotCompressedError, match="no softmax layer"):
        prove(demo.model, make_prompt_cache(demo.model))


def test_the_proof_fails_loudly_if_a_layer_bypasses_the_compressed_path(demo, monkeypatch):
    scope = type(demo.model.layers[7].self_attn).__call__.__globals__
    cache = make_turboquant_cache(demo.model)

    def bypass(queries, keys, values, **_):
        return mx.zeros_like(queries)

    monkeypatch.setitem(scope, "scaled_dot_product_attention", bypass)
    with pytest.raises(NotCompressedError, match="layer 3 did not go through"):
        prove(demo.model, cache)


def test_other_caches_are_served_as_before_after_installation(demo):
    make_turboquant_cache(demo.model)
    cache = make_prompt_cache(demo.model)
    assert np.isfinite(logits(demo, cache, TOKENS[:10])).all()
    assert cache[3].offset == 10
