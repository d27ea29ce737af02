"""Gemma 4: layers with sliding windows and layers that keep all, with heads of their own size.

The last `num_kv_shared_layers` keep nothing: they read the cache of the last layer of their kind
before them, so that a cache has fewer entries than the model has layers. Of our faster layers it
has the experts and the compiled single tokens of its MLPs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tqstack.models.families.sizes import geometry, size
from tqstack.models.geometry import Geometry, Layer

TYPES = ("gemma4", "gemma4_text", "gemma4_unified")
# mlx-lm's, where a config leaves them out.
DEFAULTS = {
    "hidden_size": 1536,
    "num_hidden_layers": 35,
    "intermediate_size": 6144,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "global_head_dim": 512,
    "num_kv_shared_layers": 20,
    "sliding_window": 512,
    "sliding_window_pattern": 5,
    "max_position_embeddings": 131072,
}


def read(text: Mapping[str, Any]) -> Geometry:
    text = {**DEFAULTS, **text}
    count, heads = size(text, "num_hidden_layers"), size(text, "num_key_value_heads")
    small = size(text, "head_dim")
    large = size(text, "global_head_dim", 0) or small
    global_heads = heads
    if text.get("attention_k_eq_v"):
        global_heads = size(text, "num_global_key_value_heads", heads)
    kept = {
        "full_attention": Layer("softmax", global_heads, large, large),
        "sliding_attention": Layer("window", heads, small, small, size(text, "sliding_window")),
    }
    layers = [kept[kind] for kind in _types(text, count)]
    wide = 2 if text.get("use_double_wide_mlp", True) else 1
    return geometry(
        text,
        layers[: count - size(text, "num_kv_shared_layers")],
        head_dim=max(small, large),
        feed_forward=wide * size(text, "intermediate_size")
        + size(text, "top_k_experts", 0) * size(text, "moe_intermediate_size", 0),
    )


def _types(text: Mapping[str, Any], count: int) -> list[str]:
    if text.get("layer_types"):
        return text["layer_types"]
    pattern = size(text, "sliding_window_pattern")
    return ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(count)]


READERS = dict.fromkeys(TYPES, read)
