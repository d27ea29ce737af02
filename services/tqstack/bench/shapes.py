"""Models of a known geometry with random quantized weights: speed without a download."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes, quantize_model

from tqstack.models.adapt import adapt

_QWEN35_35B_A3B = {
    "model_type": "qwen3_5_moe",
    "text_config": {
        "model_type": "qwen3_5_moe_text",
        "hidden_size": 2048,
        "num_hidden_layers": 40,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "vocab_size": 248320,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "full_attention_interval": 4,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "type": "default",
            "rope_theta": 10_000_000,
            "partial_rotary_factor": 0.25,
        },
    },
}
SHAPES: dict[str, dict[str, Any]] = {"qwen3.5-35b-a3b": _QWEN35_35B_A3B}


def build(name: str, layers: int | None = None, adapted: bool = True, **changes: int) -> nn.Module:
    """A model of this shape in bfloat16, its matrices quantized to 4 bits in groups of 64.

    Args:
        layers: build only the first so many layers; per-layer figures need no more.
        adapted: with layers of ours where mlx-lm's are slow on this machine.
        changes: other sizes of the text config.
    """
    model = unbuilt(shape(name, layers, **changes))
    # Weights are lazy: made one by one, the unquantized ones never exist together.
    for _, weight in tree_flatten(model.parameters()):
        mx.eval(weight)
    if adapted:
        adapt(model)
    model.eval()
    return model


def shape(name: str, layers: int | None = None, **changes: int) -> dict[str, Any]:
    """The config of a shape, cut or changed."""
    if layers is not None:
        changes["num_hidden_layers"] = layers
    return {**SHAPES[name], "text_config": {**SHAPES[name]["text_config"], **changes}}


def unbuilt(config: dict[str, Any]) -> nn.Module:
    """A model whose weights have sizes and no values yet: it takes no memory."""
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    model.set_dtype(mx.bfloat16)
    return quantize_model(model, config, group_size=64, bits=4)[0]
