"""What makes a loaded model's layers fast on this machine. The numbers they give stay the same."""

from __future__ import annotations

import mlx.nn as nn

from tqstack.attention.kernels.program import backend
from tqstack.models.layers import convolution, experts, gated_delta, steps


def adapt(model: nn.Module) -> None:
    """Replace slow layers in place. Call it when the weights are final."""
    dialect = backend()
    if dialect != "metal":  # there mlx-lm and MLX have kernels of their own
        gated_delta.install(model)
        convolution.install(model)
    if dialect is not None:  # a CPU gains nothing from fewer launches
        experts.install(model)
        steps.install(model)
