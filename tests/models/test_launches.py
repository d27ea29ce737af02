"""How many operations a single token takes on a GPU: its graph, drawn here and never computed."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

from tqstack.attention import make_turboquant_cache
from tqstack.attention.kernels import trust
from tqstack.attention.kernels.program import Program
from tqstack.bench import shapes
from tqstack.bench.operations import decode_operations
from tqstack.models.layers import decoder

SMALL = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_experts": 16,
    "vocab_size": 256,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,  # fewer are padded, which nobody's model needs
}


@pytest.fixture
def launches(monkeypatch):
    """Every kernel is one operation, ours and those that MLX has on GPUs alone."""

    def launch(self, inputs, *, outputs, **_):
        blank = [mx.zeros(shape, dtype) for shape, dtype in outputs]
        mx.eval(blank)
        first = mx.cumsum(mx.depends([blank[0]], list(inputs))[0], axis=-1)
        return [first, *(mx.depends([x], [first])[0] for x in blank[1:])]

    monkeypatch.setattr(Program, "__call__", launch)
    monkeypatch.setattr(trust, "gpu_dialect", lambda: "cuda")
    monkeypatch.setattr(trust, "disagreement", lambda *_: None)
    monkeypatch.setattr(mx.fast, "rms_norm", lambda x, *_: mx.cumprod(x, axis=-1))
    monkeypatch.setattr(mx.fast, "rope", lambda x, *_, **__: mx.cummax(x, axis=-1))
    attention = lambda q, k, v, **_: mx.cummin(mx.depends([q], [k, v])[0], axis=-1)  # noqa: E731
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention)


def operations(layers: int, make_cache) -> int:
    model = shapes.build("qwen3.5-35b-a3b", layers, False, **SMALL)
    assert decoder.install(model) == layers
    cache = make_cache(model)
    mx.disable_compile()
    mx.eval(model(mx.zeros((1, 2), mx.int32), cache=cache))
    token = model(mx.zeros((1, 1), mx.int32), cache=cache)[:, -1:].argmax(-1)
    mx.eval(token)
    mx.enable_compile()
    return decode_operations(model, cache, token).total()


@pytest.mark.parametrize("make_cache", [make_prompt_cache, make_turboquant_cache])
def test_a_layer_takes_few_launches_for_a_token(make_cache, launches):
    # Three recurrent layers, then a softmax layer.
    four, five, eight = (operations(layers, make_cache) for layers in (4, 5, 8))
    recurrent = five - four
    softmax = eight - four - 3 * recurrent
    assert 8 <= recurrent <= 12  # the matrices alone are four
    assert 8 <= softmax <= 18
