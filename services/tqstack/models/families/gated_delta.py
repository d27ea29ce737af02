"""Qwen3-Next, Qwen 3.5 and 3.6: three Gated DeltaNet layers, then a softmax layer.

Of our faster layers they have all: the recurrence, the convolution, the experts, and single tokens
of MLPs and recurrent layers compiled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tqstack.models.families.sizes import geometry, size, softmax_layer
from tqstack.models.geometry import Geometry, Layer

TYPES = ("qwen3_next", "qwen3_5", "qwen3_5_moe")
# Float32 values of the work on a token, for each of its queries, keys and values (measured).
WORK = 24


def read(text: Mapping[str, Any]) -> Geometry:
    key_heads, value_heads = (size(text, f"linear_num_{kind}_heads") for kind in ("key", "value"))
    key_dim, value_dim = (size(text, f"linear_{kind}_head_dim") for kind in ("key", "value"))
    mixed = 2 * key_heads * key_dim + value_heads * value_dim
    recurrent = Layer(
        "recurrent",
        state=value_heads * value_dim * key_dim,
        convolution=(size(text, "linear_conv_kernel_dim", 4) - 1) * mixed,
        revocable=mixed + value_heads * (value_dim + key_dim + 1),
    )
    interval = size(text, "full_attention_interval", 4)
    count = size(text, "num_hidden_layers")
    softmax = softmax_layer(text)
    layers = [recurrent if (i + 1) % interval else softmax for i in range(count)]
    return geometry(text, layers, recurrence=WORK * mixed)


READERS = dict.fromkeys(TYPES, read)
