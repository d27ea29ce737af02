"""Layers made fast by `adapt` give the numbers of the layers that they replace."""

from __future__ import annotations

import gc

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchGLU

from models.architectures import SMALL_35B
from tqstack.bench import shapes
from tqstack.bench.speed import fill
from tqstack.models.layers import convolution, drafts, experts, steps
from tqstack.weights.layers import Coded
from tqstack.weights.recipe import layers_of


def build() -> nn.Module:
    mx.random.seed(0)
    return shapes.build("qwen3.5-35b-a3b", layers=4, **SMALL_35B)


def logits(model: nn.Module, batch: int = 2, tokens: int = 4) -> list[mx.array]:
    """Of a prompt that is no draft, and of some tokens after it one by one."""
    cache = make_prompt_cache(model)
    length = drafts.MOST_TOKENS + 1
    prompt = mx.arange(length * batch).reshape(batch, length)
    out = [model(prompt, cache=cache)]
    out += [model(mx.full((batch, 1), i), cache=cache) for i in range(tokens)]
    mx.eval(out)
    return out


def difference(a: list[mx.array], b: list[mx.array]) -> float:
    return max(float(mx.abs(x - y).max()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 37])
def test_a_shifted_sum_is_the_depthwise_convolution(tokens, dtype, bias):
    plain = nn.Conv1d(24, 24, 4, groups=24, bias=bias)
    model = nn.Sequential(plain)
    model.set_dtype(dtype)
    x = mx.random.normal((3, tokens + 3, 24)).astype(dtype)
    want = plain(x)
    assert convolution.install(model) == 1
    got = model.layers[0](x)
    assert got.dtype == want.dtype and got.shape == want.shape
    assert mx.allclose(got, want, rtol=1e-5 if dtype == mx.float32 else 1e-2, atol=1e-6)


def test_convolutions_of_other_kinds_are_left_alone():
    others = [
        nn.Conv1d(8, 8, 4),
        nn.Conv1d(8, 8, 4, groups=8, padding=3),
        nn.Conv1d(8, 8, 4, groups=8, stride=2),
    ]
    assert convolution.install(nn.Sequential(*others)) == 0


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 3), (2, 40)])  # the last one is sorted
def test_experts_of_single_tokens_equal_mlx_lms(shape, bias):
    layer = SwitchGLU(64, 128, 8, bias=bias)
    nn.quantize(layer, group_size=64, bits=4)
    x = mx.random.normal((*shape, 64))
    chosen = mx.random.randint(0, 8, (*shape, 2)).astype(mx.uint32)
    want = layer(x, chosen)
    assert experts.install(layer) == 3
    assert mx.array_equal(layer(x, chosen), want)


def test_on_cuda_prompts_wait_for_the_half_of_a_layer_before(monkeypatch):
    model = build()
    want, started = logits(model), []
    wait = steps._wait_behind
    monkeypatch.setattr(steps, "gpu_dialect", lambda: "cuda")
    monkeypatch.setattr(steps, "PROMPT", 2)
    monkeypatch.setattr(steps, "_wait_behind", lambda x: started.append(len(x)) or wait(x))
    steps.install(model)
    assert difference(logits(model), want) == 0
    # Of a prompt in four layers: three recurrences with their two states, four MLPs.
    assert started.count(3) % 3 == 0 and started.count(1) * 3 == started.count(3) * 4 > 0


def test_compiled_single_tokens_equal_the_layers_own_step(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(steps, "install", lambda model: 0)
        model = build()
    want, names = logits(model), [name for name, _ in tree_flatten(model.parameters())]
    assert steps.install(model) == 7  # four blocks of experts, three recurrences
    assert steps.install(model) == 0  # once is enough
    assert difference(logits(model), want) == 0
    assert [name for name, _ in tree_flatten(model.parameters())] == names
    alone = logits(model, batch=1)  # traced again for another batch size
    assert difference(alone, logits(model, batch=1)) == 0


def test_a_dropped_model_gives_its_memory_back():
    before = mx.get_active_memory()
    model = build()
    steps.install(model)
    logits(model)
    del model
    gc.collect()
    assert mx.get_active_memory() - before < 100_000


def test_shapes_have_the_codes_that_a_conversion_would_make():
    model = shapes.build("qwen3.5-35b-a3b", layers=4, weights="trellis-3", **SMALL_35B)
    kinds = {path.rpartition(".")[2]: type(layer) for path, layer in layers_of(model).items()}
    coded = {path for path, layer in model.named_modules() if isinstance(layer, Coded)}
    assert issubclass(kinds["gate"], nn.Linear) and issubclass(kinds["in_proj_a"], nn.Linear)
    assert any(path.endswith("switch_mlp.down_proj") for path in coded)
    logits = model(mx.zeros((1, 3), mx.int32))
    assert logits.dtype == mx.bfloat16 and mx.isfinite(logits).all()


def test_speed_is_measured_on_a_filled_cache_of_every_shape():
    sizes = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 64, "num_attention_heads": 4}
    model = shapes.build("qwen3-8b", layers=1, num_key_value_heads=2, **sizes)
    cache = make_prompt_cache(model)
    fill(model, cache, 100)
    assert cache[0].offset == 100 and cache[0].state[0].shape[1] == 2
