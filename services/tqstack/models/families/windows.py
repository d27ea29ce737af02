"""Llama, Mistral, Ministral, Devstral: softmax layers, some of which may keep a window alone.

Of our faster layers they have the compiled single tokens of their MLPs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tqstack.models.families.sizes import geometry, size, softmax_layer
from tqstack.models.geometry import Geometry, Layer

TYPES = ("llama", "mistral", "ministral3", "mistral3", "iquestcoder", "xverse")


def read(text: Mapping[str, Any]) -> Geometry:
    types = text.get("layer_types") or ["full_attention"] * size(text, "num_hidden_layers")
    return geometry(text, windowed(types, softmax_layer(text), size(text, "sliding_window", 0)))


def windowed(types: Sequence[str], full: Layer, window: int) -> list[Layer]:
    """A layer for each of the config's words: `full`, or the same with a sliding window."""
    sliding = replace(full, kind="window", window=window)
    return [sliding if kind == "sliding_attention" else full for kind in types]


READERS = dict.fromkeys(TYPES, read)
