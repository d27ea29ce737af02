"""Single tokens in few launches: the kernels, compiled as C++, and whole models that use them."""

from __future__ import annotations

import gc
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import _get_classes

from attention import cpp_kernels
from attention.cpp_kernels import in_cpp  # noqa: F401
from models.architectures import SMALL_35B
from tqstack.attention.kernels import trust
from tqstack.attention.kernels.program import Program
from tqstack.attention.kernels.trust import distance
from tqstack.bench import shapes
from tqstack.bench.speed import merged
from tqstack.models.layers import decoder, delta_token, heads, joined, mixture, residual, routing
from tqstack.weights.codes import make_code
from tqstack.weights.kernels import twins
from tqstack.weights.loading import coded_like
from tqstack.weights.recipe import layers_of, reason_to_keep

pytestmark = pytest.mark.skipif(not cpp_kernels.COMPILER, reason="the C++ dialect needs g++")

BOTH = pytest.mark.parametrize("dtype", [mx.float16, mx.float32])
SMALL = {
    **SMALL_35B,
    "num_attention_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}


@BOTH
@pytest.mark.parametrize(
    "terms, scored, normed", [(9, True, True), (9, True, False), (1, False, True)]
)
def test_the_residual_stream_and_its_norm(terms, scored, normed, dtype):
    assert residual._error(terms, scored, normed, dtype) < 2e-6


@BOTH
@pytest.mark.parametrize("terms, scored", [(9, True), (1, False)])
@pytest.mark.parametrize("width", [2048, 2880, 12288, 96])
def test_the_residual_stream_its_norm_and_the_rotation_of_that(terms, scored, width, dtype):
    assert residual._rotated_error(terms, scored, width, dtype) < 5e-4


@BOTH
@pytest.mark.parametrize("experts, chosen", [(256, 8), (512, 10), (16, 3), (40, 40 - 9)])
@pytest.mark.parametrize("normalised", [False, True])
def test_the_best_experts_and_their_scores(experts, chosen, normalised, dtype):
    assert routing._error(experts, chosen, normalised, dtype) < 2e-6


def test_equal_logits_and_nan_stay_within_the_experts():
    logits = mx.concatenate([mx.zeros((1, 17)), mx.full((1, 17), float("nan"))])
    _, downs, scores = routing.routed(logits, 4, True)
    assert sorted(np.array(downs[0])) == [0, 1, 2, 3, 16]
    assert downs.max().item() == 16
    assert mx.allclose(scores[0], mx.array([0.25] * 4 + [0.5]))


@BOTH
@pytest.mark.parametrize("key_dim, value_dim, taps", [(128, 128, 4), (64, 96, 3), (32, 24, 4)])
def test_a_recurrent_layers_token_between_its_matrices(key_dim, value_dim, taps, dtype):
    assert delta_token._error(key_dim, value_dim, taps, dtype, mx.float32, dtype) < 2e-5


@BOTH
@pytest.mark.parametrize("head_dim, turned", [(256, 64), (128, 128)])
def test_heads_with_norms_and_positions(head_dim, turned, dtype):
    assert heads._error(head_dim, turned, dtype) < 1e-4


def config_of(family: str) -> dict[str, Any]:
    """Of four layers of a family's kinds."""
    sizes = dict(SMALL)
    if family == "dense":
        sizes |= {"num_experts": 0, "intermediate_size": 192}
    config = shapes.shape("qwen3.5-35b-a3b", 4, **sizes)
    if family == "qwen3_next":
        return {**config["text_config"], **QWEN3_NEXT}
    return QWEN3 if family == "qwen3" else config


def build(family: str = "experts") -> nn.Module:
    """A quantized model in float32, as mlx-lm makes it."""
    mx.random.seed(0)
    return ready(shapes.unbuilt(config_of(family)))


def ready(model: nn.Module) -> nn.Module:
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    model.eval()
    return model


def build_coded(family: str, bits_of: dict[str, int] | None = None) -> nn.Module:
    """The same with random codes of 4 bits, or of others by the last part of a layer's name."""
    mx.random.seed(0)
    config = config_of(family)
    model_class, arguments = _get_classes(config)
    model = ready(model_class(arguments.from_dict(config)))
    found = []
    for path, layer in layers_of(model).items():
        if reason_to_keep(path, layer["weight"].shape) is None:
            bits = (bits_of or {}).get(path.rpartition(".")[2], 4)
            coded = coded_like(layer, make_code("trellis", bits))
            *leading, tall, _, _ = coded.weight.shape
            packed = twins.random_weights((*leading, tall), coded.inputs, coded.code)
            coded.weight, coded.scales = packed[0], packed[1] * 5
            found.append((path, coded))
    model.update_modules(tree_unflatten(found))
    return model


QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "vocab_size": 256,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
QWEN3_NEXT = {
    "model_type": "qwen3_next",
    "intermediate_size": 192,
    "decoder_sparse_step": 2,  # every other layer has one MLP
    "mlp_only_layers": [],
    "rope_theta": 1e6,
    "partial_rotary_factor": 0.25,
    "norm_topk_prob": True,
}


def logits(model: nn.Module, batch: int, tokens: int = 3, ragged: bool = False) -> list[mx.array]:
    """Of some tokens, one by one, after short prompts."""
    caches = [make_prompt_cache(model) for _ in range(batch)]
    for i, cache in enumerate(caches):
        mx.eval(model(mx.arange(5 + ragged * i)[None] + i, cache=cache))
    cache = caches[0] if batch == 1 else merged(caches)
    out = [model(mx.arange(batch)[:, None] + i, cache=cache) for i in range(tokens)]
    mx.eval(out)
    return out


def difference(a: list[mx.array], b: list[mx.array]) -> float:
    return max(float(mx.abs(x - y).max()) for x, y in zip(a, b, strict=True))


@pytest.fixture
def kernels(monkeypatch) -> list[str]:
    """Kernels run, as on CUDA; the names of those that were launched."""
    launched: list[str] = []
    monkeypatch.setattr(trust, "gpu_dialect", lambda: "cuda")
    call = Program.__call__

    def counted(self, *arguments, **how):
        launched.append(self.name)
        return call(self, *arguments, **how)

    monkeypatch.setattr(Program, "__call__", counted)
    return launched


@pytest.mark.parametrize("family", ["experts", "dense", "qwen3_next", "qwen3"])
@pytest.mark.parametrize("batch, ragged", [(1, False), (3, True), (9, False)])
def test_tokens_of_whole_models_are_those_of_mlx_lm(family, batch, ragged, kernels):
    model = build(family)
    want = logits(model, batch, ragged=ragged)
    assert decoder.install(model) == 4
    assert difference(logits(model, batch, ragged=ragged), want) < 2e-4
    assert set(kernels[-100:]) >= {"residual"} | names_of(family, batch)


def names_of(family: str, batch: int) -> set[str]:
    """Kernels of a family's tokens, whatever its weights."""
    wanted = {"heads"} if family == "qwen3" else {"delta_token", "heads"}
    experts = family in ("experts", "qwen3_next") and batch <= mixture.MOST_ROWS
    return wanted | ({"route"} if experts else set())


@pytest.mark.parametrize("family", ["experts", "dense", "qwen3_next", "qwen3"])
@pytest.mark.parametrize("batch, ragged", [(1, False), (3, True), (9, False)])
def test_tokens_of_models_with_coded_weights_are_those_of_their_layers(
    family, batch, ragged, kernels
):
    model = build_coded(family)
    want = logits(model, batch, ragged=ragged)
    assert decoder.install(model) == 4
    kernels.clear()
    got = logits(model, batch, ragged=ragged)
    assert max(map(distance, got, want)) < 3e-3  # what halves round away, several times
    together = family == "experts" and batch > mixture.MOST_ROWS  # then the block's own code runs
    wanted = {"rotated_residual"} | (set() if together else {"rotate_activated"})
    assert set(kernels) >= wanted | names_of(family, batch)
    assert ("rotate_answers" in kernels) == (family != "qwen3")


def test_coded_matrices_of_different_bits_are_products_of_their_own(kernels):
    model = build_coded("qwen3", {"k_proj": 3, "up_proj": 2})
    want = logits(model, 2)
    assert decoder.install(model) == 4
    assert max(map(distance, logits(model, 2), want)) < 3e-3


def test_coded_weights_without_kernels_give_the_same_tokens():
    model = build_coded("experts")
    want = logits(model, 3, ragged=True)
    decoder.install(model)
    assert max(map(distance, logits(model, 3, ragged=True), want)) < 3e-3


def test_a_kernel_that_is_wrong_is_replaced_by_its_twin(kernels, monkeypatch, caplog):
    model = build()
    want = logits(model, 2)
    stepped = delta_token.stepped
    monkeypatch.setattr(
        delta_token, "stepped", lambda *a: (stepped(*a)[0] * 1.01, *stepped(*a)[1:])
    )
    monkeypatch.setattr(trust, "_found", {})
    decoder.install(model)
    assert difference(logits(model, 2), want) < 2e-4
    assert "delta_token kernel" in caplog.text and "is wrong" in caplog.text


def test_without_kernels_the_twins_give_the_same_tokens():
    model = build()
    want = logits(model, 3, ragged=True)
    decoder.install(model)
    assert difference(logits(model, 3, ragged=True), want) < 2e-4


def test_masked_tokens_and_prompts_go_through_the_layers_own_code(kernels):
    model = build()
    decoder.install(model)
    for cache in ([None] * 4, make_prompt_cache(model)):
        mx.eval(model(mx.zeros((1, 5), mx.int32), cache=cache))
    padded = merged([make_prompt_cache(model) for _ in range(2)])  # empty: padding is to come
    mx.eval(model(mx.zeros((2, 1), mx.int32), cache=padded))
    assert "delta_token" not in kernels


def settled_memory() -> int:
    gc.collect()
    mx.synchronize()
    return mx.get_active_memory()


@pytest.mark.parametrize("make", [build, build_coded])
def test_joining_matrices_takes_no_memory_and_keeps_every_parameter(make):
    model = make("experts")
    before = {name: np.array(x) for name, x in tree_flatten(model.parameters())}
    size = settled_memory()
    decoder.install(model)
    joined_bytes = sum(x.nbytes for x in before.values())  # nearly all of them
    assert abs(settled_memory() - size) < 0.1 * joined_bytes
    after = dict(tree_flatten(model.parameters()))
    assert after.keys() == before.keys()
    assert all(np.array_equal(after[name], before[name]) for name in after)


def test_linear_layers_of_other_classes_are_left_alone():
    class Compressed(nn.Linear):
        pass

    plain, other = nn.Linear(32, 8, bias=False), Compressed(32, 8, bias=False)
    assert joined.join([plain, other]) is None and joined.join([other, other]) is None
    assert joined.join([plain, nn.Linear(32, 8)]) is None  # a bias
    wide = nn.QuantizedLinear(64, 8, bias=False, group_size=32, bits=8)
    assert joined.join([nn.QuantizedLinear(64, 8, bias=False, group_size=32, bits=4), wide]) is None
    model = build()
    layers: Any = model.layers
    for layer in layers:
        layer.mlp.shared_expert.up_proj = Compressed(128, 64, bias=False)
        (layer.linear_attn if layer.is_linear else layer.self_attn).update_modules(
            {"in_proj_a" if layer.is_linear else "k_proj": other}
        )
    assert decoder.install(model) == 0


def test_a_norm_that_was_handed_over_serves_only_what_it_is_of():
    x, y, norm = mx.ones(4), mx.ones(4), residual.Norm(mx.ones(4), 1e-6)
    stream, handed = decoder.Handover(), mx.zeros(4)
    assert stream.give(x, (handed,)) is x
    assert stream.take(y, norm)[0] is not handed
    assert stream.take(x, norm)[0] is not handed  # it was given once
    stream.give(x, (handed,))
    assert stream.take(x, norm)[0] is handed


def test_a_dropped_model_gives_its_memory_back():
    gc.collect()
    before = mx.get_active_memory()
    model = build()
    decoder.install(model)
    logits(model, 1)
    del model
    gc.collect()
    assert mx.get_active_memory() - before < 100_000
