"""LFM2: short convolutions, which keep their last inputs alone, and a few softmax layers.

Of our faster layers they have the convolution.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tqstack.models.families.sizes import experts, geometry, size, softmax_layer
from tqstack.models.geometry import Geometry, Layer


def read(text: Mapping[str, Any]) -> Geometry:
    count, attention = size(text, "num_hidden_layers"), text.get("full_attn_idxs")
    if attention is None:
        attention = [i for i, kind in enumerate(text["layer_types"]) if kind == "full_attention"]
    hidden = size(text, "hidden_size")
    short = Layer("recurrent", convolution=(size(text, "conv_L_cache") - 1) * hidden)
    # Of the width alone: mlx-lm reads no head_dim here.
    head_dim = hidden // size(text, "num_attention_heads")
    softmax = softmax_layer({**text, "head_dim": head_dim})
    layers = [softmax if i in attention else short for i in range(count)]
    dense = size(text, "block_ff_dim", 0) or size(text, "intermediate_size")
    return geometry(text, layers, head_dim=head_dim, feed_forward=max(dense, experts(text)))


READERS = dict.fromkeys(("lfm2", "lfm2_moe", "lfm2-vl"), read)
