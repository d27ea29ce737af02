"""GPT-OSS: a layer with a sliding window, then one that keeps all; each head has a sink.

Of our faster layers it has none: its experts are in MXFP4, which MLX multiplies itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tqstack.models.families.sizes import experts, geometry, size, softmax_layer
from tqstack.models.families.windows import windowed
from tqstack.models.geometry import Geometry

# mlx-lm's, where a config leaves them out.
DEFAULTS = {
    "num_hidden_layers": 36,
    "num_experts_per_tok": 4,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "head_dim": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "sliding_window": 128,
}


def read(text: Mapping[str, Any]) -> Geometry:
    text = {**DEFAULTS, **text}
    pairs = size(text, "num_hidden_layers") // 2
    types = text.get("layer_types") or ["sliding_attention", "full_attention"] * pairs
    layers = windowed(types, softmax_layer(text), size(text, "sliding_window"))
    return geometry(text, layers, feed_forward=experts(text, "intermediate_size"))


READERS = {"gpt_oss": read}
