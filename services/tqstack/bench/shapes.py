"""Models of a known geometry with random quantized weights: speed without a download."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import _get_classes, quantize_model

from tqstack.models.adapt import adapt
from tqstack.weights.codes import BITS, NAMES, Code, make_code
from tqstack.weights.layers import CompressedEmbedding
from tqstack.weights.loading import coded_like
from tqstack.weights.recipe import layers_of, reason_to_keep, shape_of

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
_QWEN3_8B = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 1_000_000,
}
SHAPES: dict[str, dict[str, Any]] = {"qwen3.5-35b-a3b": _QWEN35_35B_A3B, "qwen3-8b": _QWEN3_8B}
AFFINE_GROUP, AFFINE_BITS = 64, (2, 3, 4, 5, 6, 8)  # of what mlx codes weights with


def parse_weights(name: str) -> tuple[str, int]:
    """`affine-4`, `trellis-3`, ...: the code, and its bits.

    Raises:
        ValueError: there is no such code.
    """
    code, _, bits = name.partition("-")
    allowed = {"affine": AFFINE_BITS, **dict.fromkeys(NAMES, BITS)}.get(code, ())
    if bits not in map(str, allowed):
        raise ValueError(
            f"{name!r}: weights are affine-2 to affine-8, or {' or '.join(NAMES)} with -2, -3 or -4"
        )
    return code, int(bits)


def build(
    name: str,
    layers: int | None = None,
    adapted: bool = True,
    weights: str = "affine-4",
    **changes: int,
) -> nn.Module:
    """A model of this shape in bfloat16 with random weights.

    Args:
        layers: build only the first so many layers; per-layer figures need no more.
        adapted: with layers of ours where mlx-lm's are slow on this machine.
        weights: how matrices are coded, see `parse_weights`; affine ones in groups of 64.
        changes: other sizes of the (text) config.

    Raises:
        ValueError: there is no such code.
    """
    code, bits = parse_weights(weights)
    model = unbuilt(shape(name, layers, **changes), bits if code == "affine" else None)
    if code != "affine":
        put_random_codes(model, make_code(code, bits))
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
    whole = SHAPES[name]
    if "text_config" not in whole:
        return {**whole, **changes}
    return {**whole, "text_config": {**whole["text_config"], **changes}}


def put_random_codes(model: nn.Module, code: Code) -> None:
    """Code what a conversion would: any bits are codes, and scales make outputs like inputs."""
    for path, layer in layers_of(model).items():
        if reason_to_keep(path, shape_of(layer)) is None:
            coded = coded_like(layer, code)
            coded.weight = mx.random.randint(0, 0xFFFFFFFF, coded.weight.shape, mx.uint32)
            coded.scales = mx.full(coded.scales.shape, coded.inputs**-0.5, dtype=mx.float16)
            if isinstance(coded, CompressedEmbedding):
                coded.dtype = mx.bfloat16
            model.update_modules(tree_unflatten([(path, coded)]))


def unbuilt(config: dict[str, Any], bits: int | None = 4) -> nn.Module:
    """A model whose weights have sizes and no values yet: it takes no memory.

    bits: of affine codes of its matrices; None: they are in bfloat16.
    """
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    model.set_dtype(mx.bfloat16)
    if bits is None:
        return model
    return quantize_model(model, config, group_size=AFFINE_GROUP, bits=bits)[0]
