"""What makes a loaded model's layers fast on this machine. The numbers they give stay the same."""

from __future__ import annotations

import mlx.nn as nn

from tqstack.attention.kernels.program import gpu_dialect
from tqstack.models.layers import (
    activations,
    convolution,
    decoder,
    experts,
    gated_delta,
    products,
    steps,
    whole,
)


def adapt(model: nn.Module) -> dict[str, int]:
    """Replace slow layers in place. Call it when the weights are final.

    Layers are found by what they are, so that a model of no known family has them too.

    Returns:
        How many of each kind were replaced.
    """
    dialect, replaced = gpu_dialect(), {}
    if dialect != "metal":  # there mlx-lm and MLX have kernels of their own
        replaced["gated delta"] = gated_delta.install(model)
        replaced["convolution"] = convolution.install(model)
    if dialect is None:
        replaced["activations"] = activations.install(model)
        replaced["products"] = products.install(model)
        replaced["layers"] = whole.install(model)
    else:
        replaced["layers"] = decoder.install(model)
        replaced["experts"] = experts.install(model)
    replaced["steps"] = steps.install(model)
    return replaced


def adapt_head(head: nn.Module) -> None:
    """The same for a head of multi-token prediction, a layer of the model's kind. On a GPU nothing
    in it waits for a prompt's other layers: what it says of a prompt is never computed."""
    if gpu_dialect() is None:
        activations.install(head)
        products.install(head)
        whole.install(head)
        steps.install(head)
    else:
        decoder.install(head)
        experts.install(head)
