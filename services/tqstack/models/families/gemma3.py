"""Gemma 3: five layers with a sliding window, then one that keeps all keys and values.

Of our faster layers it has the compiled single tokens of its MLPs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tqstack.models.families.sizes import geometry, size, softmax_layer
from tqstack.models.families.windows import windowed
from tqstack.models.geometry import Geometry

# mlx-lm's, where a config leaves them out, as Google's own do.
DEFAULTS = {
    "hidden_size": 1152,
    "num_hidden_layers": 26,
    "intermediate_size": 6912,
    "head_dim": 256,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "max_position_embeddings": 32768,
}


def read(text: Mapping[str, Any]) -> Geometry:
    return _read({**DEFAULTS, "num_attention_heads": 4, "num_key_value_heads": 1, **text})


def read_with_vision(text: Mapping[str, Any]) -> Geometry:
    return _read({**DEFAULTS, "num_attention_heads": 8, "num_key_value_heads": 4, **text})


def _read(text: Mapping[str, Any]) -> Geometry:
    pattern = size(text, "sliding_window_pattern")
    types = [
        "sliding_attention" if (i + 1) % pattern else "full_attention"
        for i in range(size(text, "num_hidden_layers"))
    ]
    return geometry(text, windowed(types, softmax_layer(text), size(text, "sliding_window")))


READERS = {"gemma3_text": read, "gemma3": read_with_vision}
