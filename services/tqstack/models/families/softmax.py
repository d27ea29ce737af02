"""Models whose every layer keeps all keys and values: Qwen 2 and 3, Granite, Phi 3, GLM 4, ...

Of our faster layers they have the experts and the compiled single tokens of their MLPs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tqstack.models.families.sizes import experts, geometry, size, softmax_layer
from tqstack.models.geometry import Geometry

# They may write `layer_types` or `sliding_window` in their configs; mlx-lm reads neither.
PLAIN = (
    *("qwen2", "qwen2_moe", "qwen2_vl", "qwen2_5_vl", "qwen3", "qwen3_moe", "qwen3_vl"),
    *("qwen3_vl_moe", "granite", "glm", "glm4", "glm4_moe", "phi3", "gemma", "gemma2", "cohere"),
    *("internlm2", "internlm3", "nemotron", "olmo2", "olmoe", "seed_oss", "stablelm"),
    *("starcoder2", "helium", "hunyuan_v1_dense", "apertus", "dots1", "smollm3"),
)
# An expert's size is `intermediate_size`.
MIXTURES = ("mixtral", "granitemoe")


def read(text: Mapping[str, Any]) -> Geometry:
    return geometry(text, [softmax_layer(text)] * size(text, "num_hidden_layers"))


def read_mixture(text: Mapping[str, Any]) -> Geometry:
    layers = [softmax_layer(text)] * size(text, "num_hidden_layers")
    return geometry(text, layers, feed_forward=experts(text, "intermediate_size"))


READERS = {**dict.fromkeys(PLAIN, read), **dict.fromkeys(MIXTURES, read_mixture)}
