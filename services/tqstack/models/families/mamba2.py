"""Nemotron-H and Granite 4: Mamba 2 layers, and a few softmax layers.

Nemotron-H writes its feed-forward layers as layers of their own, which have no entry in a cache.
Of our faster layers they have the convolution; Granite has the compiled single tokens of its MLPs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tqstack.models.families.sizes import experts, geometry, head_dim, size, softmax_layer
from tqstack.models.geometry import Geometry, Layer

# What Nemotron-H's letters and words stand for; its feed-forward layers keep nothing.
NEMOTRON_KEEPS = {
    **dict.fromkeys(("*", "full_attention", "attention"), "softmax"),
    **dict.fromkeys(("M", "linear_attention", "mamba", "conv"), "recurrent"),
}
# mlx-lm works on so many tokens at once, with so many (tokens, tokens) float32 matrices a head.
CHUNK, MATRICES = 256, 8
# Float32 values of the work on a token, for each value that the convolution mixes (measured).
WORK = 14


def read_nemotron(text: Mapping[str, Any]) -> Geometry:
    blocks = (
        text.get("hybrid_override_pattern")
        or text.get("layers_block_type")
        or text.get("layer_types")
    )
    if not blocks:
        raise KeyError("hybrid_override_pattern")
    kept = [NEMOTRON_KEEPS[block] for block in blocks if block in NEMOTRON_KEEPS]
    shared = size(text, "n_shared_experts", 0) and size(
        text, "moe_shared_expert_intermediate_size", 0
    )
    return _read(
        text,
        kept,
        heads=size(text, "mamba_num_heads"),
        dim=size(text, "mamba_head_dim"),
        state=size(text, "ssm_state_size"),
        groups=size(text, "n_groups"),
        taps=size(text, "conv_kernel"),
        feed_forward=max(size(text, "intermediate_size", 0), experts(text) + shared),
        head_dim=head_dim(text),
    )


def read_granite(text: Mapping[str, Any]) -> Geometry:
    kept = ["recurrent" if kind == "mamba" else "softmax" for kind in text["layer_types"]]
    mixture = size(text, "num_local_experts", 0)
    shared = size(text, "shared_intermediate_size", 0)
    return _read(
        text,
        kept,
        heads=size(text, "mamba_n_heads", 0),
        dim=size(text, "mamba_d_head", 0),
        state=size(text, "mamba_d_state", 0),
        groups=size(text, "mamba_n_groups", 0),
        taps=size(text, "mamba_d_conv", 1),
        feed_forward=experts(text, "intermediate_size") + shared
        if mixture
        else size(text, "intermediate_size"),
        # Of the width alone: mlx-lm reads no head_dim here.
        head_dim=size(text, "hidden_size") // size(text, "num_attention_heads"),
    )


def _read(
    text: Mapping[str, Any],
    kept: list[str],
    *,
    heads: int,
    dim: int,
    state: int,
    groups: int,
    taps: int,
    feed_forward: int,
    head_dim: int,
) -> Geometry:
    mixed = heads * dim + 2 * groups * state
    recurrent = Layer("recurrent", state=heads * dim * state, convolution=(taps - 1) * mixed)
    softmax = softmax_layer({**text, "head_dim": head_dim})
    return geometry(
        text,
        [recurrent if kind == "recurrent" else softmax for kind in kept],
        head_dim=head_dim,
        feed_forward=feed_forward,
        recurrence=WORK * mixed,
        recurrence_chunk=MATRICES * heads * CHUNK * CHUNK,
    )


READERS = {"nemotron_h": read_nemotron, "granitemoehybrid": read_granite}
