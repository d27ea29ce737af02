"""Compressed weights. Importing this teaches `mlx_lm.load` to read them."""

import mlx.nn as nn

from tqstack.weights import layers, turboquant_mlx
from tqstack.weights.loading import install

install()


def expand(model: nn.Module) -> None:
    """Turn all coded layers into plain ones of float32 weights, in place: for a CPU."""
    layers.expand(model)
    turboquant_mlx.expand(model)
