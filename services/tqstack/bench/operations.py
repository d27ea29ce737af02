"""How many operations a decode step launches: a count repeats, a time on a shared host does not."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

# What only changes how memory is looked at.
FREE = {
    *("Reshape", "Transpose", "Squeeze", "ExpandDims", "Broadcast", "Slice", "Split", "AsStrided"),
    *("Unflatten", "Flatten", "View", "Depends", "BroadcastAxes", "StopGradient"),
}


def decode_operations(model: nn.Module, cache: list[Any], tokens: mx.array) -> Counter[str]:
    """Operations that one more step takes, by MLX's name of them. Those that a compiled function
    fuses count once; views count nothing. Nothing is computed, and the cache is used up.

    tokens: (B, 1), the last ones.
    """
    mx.eval(tokens, [entry.state for entry in cache])
    tokens = model(tokens, cache=cache)[:, -1:].argmax(-1)
    results = [tokens, *(entry.state for entry in cache)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.dot"
        mx.export_to_dot(str(path), *_arrays(results))
        return _counted(path.read_text())


def _arrays(tree: Any) -> list[mx.array]:
    if isinstance(tree, mx.array):
        return [tree]
    parts = tree if isinstance(tree, (list, tuple)) else ()
    return [x for part in parts for x in _arrays(part)]


def _counted(dot: str) -> Counter[str]:
    """Operations by name, of a graph as MLX draws it."""
    names = (line.partition('label ="')[2].partition('"')[0] for line in dot.splitlines())
    return Counter(name for name in names if name and name not in FREE)
