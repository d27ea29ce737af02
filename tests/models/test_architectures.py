"""Every family through the compressed cache: proof, ragged batches, forks, quality, and bytes."""

from __future__ import annotations

import copy
import importlib
import json
from dataclasses import replace

import mlx.core as mx
import pytest
from mlx_lm.generate import _merge_caches
from mlx_lm.utils import MODEL_REMAPPING

from models.architectures import CONFIGS, VOCABULARY, build, unadapted
from tqstack.attention.dispatch import NotCompressedError, prove
from tqstack.models.adapt import adapt
from tqstack.models.cache_spec import CacheSpec, read_cache_spec
from tqstack.models.families import READERS, read_geometry
from tqstack.models.layers import products
from tqstack.models.load import load_model
from tqstack.models.measure import layer_kinds, measure
from tqstack.models.plan import Machine, prefill_workspace
from tqstack.models.planning import drafted_tokens, plan_spec, read_facts
from tqstack.models.runtime import load_runtime
from tqstack.models.safetensors import BrokenFileError
from tqstack.models.spec import ModelSpec, read_spec
from tqstack.settings import Settings, SettingsError
from tqstack.turboquant.kv_codecs import KVCodecs

ROUNDING = 2e-4  # of logits of the order of 1, in float32
# Products of other sizes round otherwise, and a value on the boundary of two codes may then get the
# other one, which moves a few logits a lot. Keys that are packed where they should be exact move
# most of them by more than this.
OTHER_CODES = 1e-3
PLAIN = CacheSpec(None)
FOUR_BITS = CacheSpec(KVCodecs.parse(4))
EIGHT_BITS = CacheSpec(KVCodecs.parse(8))


@pytest.fixture(scope="module", params=CONFIGS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return build(name)


def tokens(count: int, seed: int = 1) -> mx.array:
    return mx.random.randint(0, VOCABULARY, (1, count), key=mx.random.key(seed))


def read(model, cache, prompt: mx.array, chunk: int = 128) -> mx.array:
    """Logits (1, tokens, vocabulary) of a prompt read in chunks."""
    parts = []
    for start in range(0, prompt.shape[1], chunk):
        parts.append(model(prompt[:, start : start + chunk], cache=cache))
        mx.eval(parts[-1], [entry.state for entry in cache])
    return mx.concatenate(parts, axis=1)


def in_float32(a, b, *arguments, product=mx.gather_mm, **options):
    """`mx.gather_mm`, which takes nothing else on a CPU."""
    y = product(a.astype(mx.float32), b.astype(mx.float32), *arguments, **options)
    return y.astype(a.dtype)


def distance(a: mx.array, b: mx.array) -> float:
    """The largest difference, beside the spread of the values."""
    return (mx.abs(a - b).max() / mx.std(b)).item()


def typical_distance(a: mx.array, b: mx.array) -> float:
    """The median difference, beside the spread of the values."""
    return (mx.median(mx.abs(a - b)) / mx.std(b)).item()


def test_every_softmax_layer_is_proven_to_be_compressed(name, model):
    spec = ModelSpec.of(name, "", CONFIGS[name])
    cache = FOUR_BITS.make(model)
    assert layer_kinds(cache) == spec.layers
    assert prove(model, cache) == spec.softmax_layers


def test_a_ragged_batch_gives_the_logits_of_single_sequences(model):
    prompts = [tokens(count, seed=count) for count in (5, 300, 150)]
    single = [FOUR_BITS.make(model) for _ in prompts]
    for cache, prompt in zip(single, prompts, strict=True):
        read(model, cache, prompt)
    batch = _merge_caches([copy.deepcopy(cache) for cache in single])
    for step in range(3):
        new = tokens(3, seed=step).reshape(3, 1)
        together = model(new, cache=batch)
        for i, cache in enumerate(single):
            assert distance(together[i : i + 1], model(new[i : i + 1], cache=cache)) < ROUNDING


def test_a_fork_and_what_it_was_forked_from_go_on_as_a_cold_cache(model):
    prompt = tokens(420)
    head, rest = prompt[:, :300], prompt[:, 300:]
    cold, warm = FOUR_BITS.make(model), FOUR_BITS.make(model)
    read(model, cold, head)
    want = read(model, cold, rest)
    read(model, warm, head)
    fork = copy.deepcopy(warm)
    for cache in (fork, warm):
        assert mx.array_equal(read(model, cache, rest), want)
    once, packed = (
        read(model, cache.make(model), prompt, chunk=420)[:, 300:]
        for cache in (FOUR_BITS, replace(FOUR_BITS, exact_tokens=0))
    )
    assert typical_distance(once, want) < OTHER_CODES < typical_distance(packed, want)


def test_logits_of_8_bits_are_near_those_of_the_plain_cache(model):
    """On the average: a router near a tie sends a token elsewhere."""
    prompt = tokens(420)
    plain, *packed = (
        read(model, cache.make(model), prompt) for cache in (PLAIN, EIGHT_BITS, FOUR_BITS)
    )
    eight, four = ((mx.abs(logits - plain).mean() / mx.std(plain)).item() for logits in packed)
    assert 0 < eight < 0.01 and eight < four / 3


@pytest.mark.parametrize("version", ["turboquant", "none"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_plan_of_a_config_is_what_the_loaded_model_holds(
    name, model, dtype, version, monkeypatch
):
    settings = Settings(tq_cache_version=version, tq_kv_code="lloyd")
    machine = Machine(1 << 40, prefill_step=256, value_bytes=dtype.size)
    spec = ModelSpec.of(name, "", CONFIGS[name])
    if dtype != mx.float32:
        model = build(name, dtype=dtype)
        monkeypatch.setattr(mx, "gather_mm", in_float32)
    cache = read_cache_spec(settings)
    measured, _ = measure(spec, model, cache, machine, drafted_tokens(settings, cache))
    assert plan_spec(settings, spec, machine, measured.weights) == measured


def test_a_window_and_a_state_take_what_was_planned_whatever_was_read(name, model):
    spec = ModelSpec.of(name, "", CONFIGS[name])
    cache = FOUR_BITS.make(model)
    for count in (100, 1, 1):
        read(model, cache, tokens(count))
    assert spec.geometry is not None
    for entry, layer in zip(cache, spec.geometry.layers, strict=True):
        if layer.kind != "softmax":
            assert entry.nbytes == layer.fixed_bytes(4)


def wide(name: str, **changes) -> dict:
    """The config with layers of a real model's width."""
    config = CONFIGS[name]
    if "text_config" in config:
        return {**config, "text_config": {**config["text_config"], **changes}}
    return {**config, **changes}


HEADS = {"hidden_size": 1024, "num_attention_heads": 16}
WIDE = {
    "nemotron-h": wide(
        "nemotron-h",
        hidden_size=1024,
        hybrid_override_pattern="MMM*",
        mamba_num_heads=64,
        mamba_head_dim=64,
        ssm_state_size=128,
        n_groups=8,
    ),
    "granite-hybrid": wide(
        "granite-hybrid", **HEADS, mamba_n_heads=48, mamba_d_head=64, mamba_d_state=128
    ),
    "lfm2": wide("lfm2", **HEADS, block_dim=1024, intermediate_size=4096),
    "gemma4": wide(
        "gemma4",
        hidden_size=512,
        num_attention_heads=8,
        head_dim=256,
        global_head_dim=512,
        sliding_window=512,
    ),
}


@pytest.mark.parametrize("name", WIDE)
def test_a_step_of_a_prompt_takes_no_more_than_planned_and_not_much_less(name):
    model, step = unadapted(WIDE[name]), 512
    adapt(model)
    cache = FOUR_BITS.make(model)
    read(model, cache, tokens(1500))  # whole tiles of packed keys
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    model(tokens(step), cache=cache)
    mx.eval([entry.state for entry in cache])
    used = mx.get_peak_memory() - before
    geometry = read_geometry(WIDE[name])
    assert used < prefill_workspace(geometry, step, 4) < 3 * used


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="what a CPU has")
def test_our_layers_replace_the_slow_ones_and_give_the_same_logits(name):
    model, layers = unadapted(CONFIGS[name]), read_geometry(CONFIGS[name]).layers
    want = read(model, PLAIN.make(model), tokens(40))
    replaced = adapt(model)
    convolutions = sum(layer.convolution > 0 for layer in layers)
    delta = convolutions if name.startswith(("qwen3-next", "qwen3.5")) else 0
    assert (replaced["gated delta"], replaced["convolution"]) == (delta, convolutions)
    assert replaced["products"] or not products.pays()
    assert distance(read(model, PLAIN.make(model), tokens(40)), want) < ROUNDING


def test_mlx_lms_quantized_cache_is_planned_as_it_holds_or_refused(name, model):
    settings = Settings(tq_cache_version="native", tq_kv_group_size=32)
    machine, spec = Machine(1 << 40, 256, 4), ModelSpec.of(name, "", CONFIGS[name])
    if name in ("gpt-oss", "gemma4"):  # sinks; layers that read another's cache
        with pytest.raises(SettingsError, match="does not serve this model"):
            measure(spec, model, read_cache_spec(settings), machine)
        return
    measured, compressed = measure(spec, model, read_cache_spec(settings), machine)
    assert compressed == ()
    assert plan_spec(settings, spec, machine, measured.weights) == measured


def test_every_type_that_is_planned_is_one_of_mlx_lm():
    for model_type in READERS:
        module = MODEL_REMAPPING.get(model_type, model_type)
        assert importlib.import_module(f"mlx_lm.models.{module}").Model


def test_latents_are_refused_with_a_sentence_before_anything_is_loaded(tmp_path):
    config = {"model_type": "deepseek_v3", "kv_lora_rank": 512, "max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = read_spec(str(tmp_path))
    assert spec.geometry is None and spec.context_length == 4096
    for version in ("turboquant", "affine", "native"):
        settings = Settings(sidecar_model=str(tmp_path), tq_cache_version=version)
        for make in (read_facts, load_runtime):
            with pytest.raises(NotCompressedError, match="run it with TQ_CACHE_VERSION=none"):
                make(settings)
    with pytest.raises(BrokenFileError, match="lacks model"):
        load_model(str(tmp_path), PLAIN)
