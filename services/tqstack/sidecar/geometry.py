"""A model's geometry, read from its config.json: what a token and a context cost. No mlx."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tqstack.sidecar.safetensors import Tensor

DEFAULT_CONTEXT = 32768  # where a model's config does not say
# Words of Hugging Face configs for what a layer keeps of the past.
KINDS = {
    "full_attention": "softmax",
    "sliding_attention": "window",
    "linear_attention": "recurrent",
}
# Parts of a checkpoint that mlx-lm drops: the vision tower and multi-token prediction.
NOT_LOADED = ("vision_tower", "model.visual", "visual.", "mtp.")
# A config with one of these keeps something that this file has no formula for.
UNKNOWN = (
    *("kv_lora_rank", "hybrid_override_pattern", "mamba_d_state", "ssm_state_size"),
    *("sliding_window_pattern", "num_kv_shared_layers", "attn_type_list"),
)


class UnknownGeometryError(ValueError):
    """The config does not tell what the layers keep; the message says what to do instead."""


@dataclass(frozen=True)
class Geometry:
    """Sizes in values, not bytes.

    Attributes:
        layers: of each layer "softmax" (keeps every token), "window" (keeps the last ones) or
            "recurrent" (keeps a state of fixed size).
        state: float32 values of a recurrent layer's state.
        convolution: values of its convolution's state, in the model's type.
        feed_forward: intermediate values of a token in a feed-forward layer: experts that run,
            and the shared one.
        recurrence: values of a token's queries, keys and values in a recurrent layer.
    """

    model_type: str
    context_length: int
    layers: tuple[str, ...]
    hidden: int
    query_heads: int
    kv_heads: int
    head_dim: int
    window: int
    state: int
    convolution: int
    feed_forward: int
    recurrence: int

    @property
    def softmax_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.layers) if kind == "softmax")

    @property
    def architecture(self) -> str:
        return "softmax" if len(self.softmax_layers) == len(self.layers) else "hybrid"


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config; models that also see keep it in a part of its own."""
    return config.get("text_config", config)


def context_length(config: Mapping[str, Any]) -> int:
    return int(text_config(config).get("max_position_embeddings") or DEFAULT_CONTEXT)


def read_geometry(config: Mapping[str, Any]) -> Geometry:
    """
    Raises:
        UnknownGeometryError: the layers are of a kind that has no formula here.
    """
    text = text_config(config)
    number = {name: value for name, value in text.items() if isinstance(value, int)}.get
    model_type = str(config.get("model_type", ""))
    heads, hidden = number("num_attention_heads", 0), number("hidden_size", 0)
    unknown = [name for name in UNKNOWN if text.get(name) is not None]
    if unknown or not heads or not hidden:
        why = f"{', '.join(unknown)} in its config" if unknown else "no num_attention_heads"
        raise UnknownGeometryError(
            f"a {model_type or 'model'} cannot be planned from its files ({why}): "
            "`tqstack doctor` with SIDECAR_MODEL set loads it and measures"
        )
    head_dim = number("head_dim") or hidden // heads
    kv_heads = number("num_key_value_heads") or heads
    key_heads, value_heads = number("linear_num_key_heads", 0), number("linear_num_value_heads", 0)
    key_dim, value_dim = number("linear_key_head_dim", 0), number("linear_value_head_dim", 0)
    mixed = 2 * key_heads * key_dim + value_heads * value_dim
    experts = number("num_experts_per_tok", 0) * number("moe_intermediate_size", 0)
    dense = 0 if experts else number("intermediate_size", 0)
    return Geometry(
        model_type=model_type,
        context_length=context_length(config),
        layers=_layers(text, model_type),
        hidden=hidden,
        query_heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        window=number("sliding_window", 0),
        state=value_heads * value_dim * key_dim,
        convolution=(number("linear_conv_kernel_dim", 1) - 1) * mixed,
        feed_forward=experts + number("shared_expert_intermediate_size", 0) + dense,
        recurrence=mixed,
    )


def _layers(text: Mapping[str, Any], model_type: str) -> tuple[str, ...]:
    count, interval = int(text["num_hidden_layers"]), text.get("full_attention_interval")
    types = text.get("layer_types")
    if types is None and interval:
        return tuple("recurrent" if (i + 1) % interval else "softmax" for i in range(count))
    types = types or ["full_attention"] * count
    if foreign := sorted(set(types) - set(KINDS)):
        raise UnknownGeometryError(
            f"a {model_type} cannot be planned from its files (layers of type "
            f"{', '.join(foreign)}): `tqstack doctor` with SIDECAR_MODEL set loads it and measures"
        )
    return tuple(KINDS[kind] for kind in types[:count])


def weight_bytes(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], as_float32: bool = False
) -> int:
    """Bytes of the weights once loaded.

    Args:
        as_float32: as on the CPU, where quantized matrices are expanded and all becomes float32.
    """
    loaded = {n: t for n, t in tensors.items() if not any(part in n for part in NOT_LOADED)}
    if not as_float32:
        return sum(tensor.nbytes for tensor in loaded.values())
    quantization = config.get("quantization") or {}
    total = 0
    for name, tensor in loaded.items():
        base, _, part = name.rpartition(".")
        scales = loaded.get(f"{base}.scales")
        if scales is None:
            total += 4 * tensor.size
        elif part == "weight":
            own = quantization.get(base)
            group = (own if isinstance(own, dict) else quantization)["group_size"]
            total += 4 * scales.size * group
    return total
