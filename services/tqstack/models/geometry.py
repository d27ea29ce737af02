"""A model's geometry, read from its config.json: what a token and a context cost. No mlx."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

DEFAULT_CONTEXT = 32768  # where a model's config does not say
# Words of Hugging Face configs for what a layer keeps of the past.
KINDS: dict[str, Kind] = {
    "full_attention": "softmax",
    "sliding_attention": "window",
    "linear_attention": "recurrent",
}
# A config with one of these keeps something that this file has no formula for.
UNKNOWN = (
    *("kv_lora_rank", "hybrid_override_pattern", "mamba_d_state", "ssm_state_size"),
    *("sliding_window_pattern", "num_kv_shared_layers", "attn_type_list"),
)

Kind = Literal["softmax", "window", "recurrent", "other"]


class UnknownGeometryError(ValueError):
    """The config does not tell what the layers keep; the message says what to do instead."""


@dataclass(frozen=True)
class Layer:
    """What one entry of a model's cache keeps of the past. Sizes in values, not bytes.

    Attributes:
        kind: "softmax" keeps every token's keys and values, "window" those of the last `window`
            tokens, "recurrent" a state of fixed size.
        state: float32 values of a recurrent state.
        convolution: values of its convolution's state, in the model's type.
    """

    kind: Kind
    kv_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    window: int = 0
    state: int = 0
    convolution: int = 0

    @property
    def token_values(self) -> int:
        """Values of a token's keys and values."""
        return self.kv_heads * (self.key_dim + self.value_dim)

    def fixed_bytes(self, value_bytes: int) -> int:
        """Bytes of what does not grow with the context, at most."""
        window = self.window * self.token_values if self.kind == "window" else 0
        return 4 * self.state + value_bytes * (self.convolution + window)


@dataclass(frozen=True)
class Geometry:
    """Sizes in values, not bytes.

    Attributes:
        layers: of each entry of the model's cache what it keeps.
        head_dim: of a query head.
        feed_forward: intermediate values of a token in a feed-forward layer: experts that run,
            and the shared one.
        recurrence: values of a token's queries, keys and values in a recurrent layer.
    """

    model_type: str
    context_length: int
    layers: tuple[Layer, ...]
    hidden: int
    query_heads: int
    head_dim: int
    feed_forward: int
    recurrence: int

    @property
    def softmax(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.kind == "softmax"]


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
        raise not_planned(
            model_type,
            f"{', '.join(unknown)} in its config" if unknown else "no num_attention_heads",
        )
    head_dim = number("head_dim") or hidden // heads
    kv_heads = number("num_key_value_heads") or heads
    key_heads, value_heads = number("linear_num_key_heads", 0), number("linear_num_value_heads", 0)
    key_dim, value_dim = number("linear_key_head_dim", 0), number("linear_value_head_dim", 0)
    mixed = 2 * key_heads * key_dim + value_heads * value_dim
    experts = number("num_experts_per_tok", 0) * number("moe_intermediate_size", 0)
    dense = 0 if experts else number("intermediate_size", 0)
    kept = {
        "softmax": Layer("softmax", kv_heads, head_dim, head_dim),
        "window": Layer("window", kv_heads, head_dim, head_dim, number("sliding_window", 0)),
        "recurrent": Layer(
            "recurrent",
            state=value_heads * value_dim * key_dim,
            convolution=(number("linear_conv_kernel_dim", 1) - 1) * mixed,
        ),
    }
    return Geometry(
        model_type=model_type,
        context_length=context_length(config),
        layers=tuple(kept[kind] for kind in _kinds(text, model_type)),
        hidden=hidden,
        query_heads=heads,
        head_dim=head_dim,
        feed_forward=experts + number("shared_expert_intermediate_size", 0) + dense,
        recurrence=mixed,
    )


def _kinds(text: Mapping[str, Any], model_type: str) -> list[Kind]:
    count, interval = int(text["num_hidden_layers"]), text.get("full_attention_interval")
    types = text.get("layer_types")
    if types is None and interval:
        return ["recurrent" if (i + 1) % interval else "softmax" for i in range(count)]
    types = types or ["full_attention"] * count
    if foreign := sorted(set(types) - set(KINDS)):
        raise not_planned(model_type, f"layers of type {', '.join(foreign)}")
    return [KINDS[kind] for kind in types[:count]]


def not_planned(model_type: str, why: str) -> UnknownGeometryError:
    return UnknownGeometryError(
        f"a {model_type or 'model'} cannot be planned from its files ({why}): "
        "`tqstack doctor` with SIDECAR_MODEL set loads it and measures"
    )
