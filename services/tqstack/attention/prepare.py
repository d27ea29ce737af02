"""What makes a loaded model's layers fast on this machine. The numbers they give stay the same."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from tqstack.attention import convolution, experts, gated_delta, steps
from tqstack.attention.kernels.program import backend


def prepare(model: nn.Module) -> None:
    """Replace slow layers in place. Call it when the weights are final."""
    if not mx.metal.is_available():  # there mlx-lm and MLX have kernels of their own
        gated_delta.install(model)
        convolution.install(model)
    if backend() is not None:  # a CPU gains nothing from fewer launches
        experts.install(model)
        steps.install(model)
