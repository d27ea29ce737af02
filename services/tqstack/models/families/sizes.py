"""Sizes that configs of many families tell in the same words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tqstack.models.geometry import Geometry, Layer

DEFAULT_CONTEXT = 32768  # where a model's config does not say


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config; models that also see keep it in a part of its own."""
    return config.get("text_config") or config


def context_length(config: Mapping[str, Any]) -> int:
    """Tokens that the model takes."""
    return int(text_config(config).get("max_position_embeddings") or DEFAULT_CONTEXT)


def size(text: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A size, or the default where the config has none.

    Raises:
        KeyError: there is no default either.
    """
    value = text.get(name)
    if value is None:
        if default is None:
            raise KeyError(name)
        return default
    return int(value)


def head_dim(text: Mapping[str, Any]) -> int:
    """Of a query head, where the config may leave it to the width and the number of heads."""
    return size(text, "head_dim", size(text, "hidden_size") // size(text, "num_attention_heads"))


def softmax_layer(text: Mapping[str, Any]) -> Layer:
    """A layer that keeps all keys and values."""
    heads = size(text, "num_key_value_heads", size(text, "num_attention_heads"))
    return Layer("softmax", heads, head_dim(text), head_dim(text))


def experts(text: Mapping[str, Any], each: str = "moe_intermediate_size") -> int:
    """Intermediate values of a token in the experts that run for it; 0: the model has none.

    Args:
        each: the name of an expert's size.
    """
    return size(text, "num_experts_per_tok", 0) * size(text, each, 0)


def feed_forward(text: Mapping[str, Any]) -> int:
    """Intermediate values of a token in a feed-forward layer: experts that run and the shared one,
    or those of a plain layer."""
    return experts(text) + size(text, "shared_expert_intermediate_size", 0) or size(
        text, "intermediate_size"
    )


def geometry(text: Mapping[str, Any], layers: Sequence[Layer], **changes: int) -> Geometry:
    """Of these layers; `changes` are fields that the config tells in other words."""
    fields = {
        "context_length": context_length(text),
        "hidden": size(text, "hidden_size"),
        "query_heads": size(text, "num_attention_heads"),
        "vocabulary": size(text, "vocab_size", 0),
    }
    if "head_dim" not in changes:
        fields["head_dim"] = head_dim(text)
    if "feed_forward" not in changes:
        fields["feed_forward"] = feed_forward(text)
    return Geometry(layers=tuple(layers), **{**fields, **changes})
