"""Which layers of a model are coded, and with how many bits each."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from tqstack.weights import rotation
from tqstack.weights.codes import BITS
from tqstack.weights.tiles import TILE

RECIPES = ("even", "mixed")
KINDS = (
    nn.Linear,
    nn.Embedding,
    SwitchLinear,
    nn.QuantizedLinear,
    nn.QuantizedEmbedding,
    QuantizedSwitchLinear,
)
# By the last part of a layer's name. Routers choose experts by small differences; the two gates of
# a Gated DeltaNet layer are a few rows that rule all of its state.
KEPT = {
    **dict.fromkeys(("gate", "router", "shared_expert_gate"), "a router"),
    **dict.fromkeys(("in_proj_a", "in_proj_b", "in_proj_ba"), "gates of a recurrent layer"),
}
# Divergence per weight at 3 bits, relative: measured on the reference model, layer by layer.
SENSITIVITY = {
    **dict.fromkeys(("embed_tokens", "lm_head"), 20),
    **dict.fromkeys(("out_proj",), 18),
    **dict.fromkeys(("down_proj",), 12),
    **dict.fromkeys(("in_proj_qkv", "in_proj_z", "in_proj_qkvz"), 11),
    **dict.fromkeys(("o_proj", "q_proj", "k_proj", "v_proj", "qkv_proj"), 3),
}
OTHERS = 9  # gate, up, and what has no name here


@dataclass(frozen=True)
class Recipe:
    """
    Attributes:
        bits: of each layer that is coded, by its path.
        kept: why each other layer stays as it is.
    """

    bits: Mapping[str, int]
    kept: Mapping[str, str]

    def __str__(self) -> str:
        counts = sorted(Counter(self.bits.values()).items())
        return ", ".join(f"{count} with {bits} bits" for bits, count in counts)


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """A model's layers with a weight matrix, by path, in the order of its parameters."""
    return {path: m for path, m in _in_order(model) if isinstance(m, KINDS)}


def shape_of(layer: nn.Module) -> tuple[int, ...]:
    """(..., N, K) of a layer's weights, coded in whatever way."""
    *leading, outputs, width = layer["weight"].shape
    bits = getattr(layer, "bits", None)
    return (*leading, outputs, width * 32 // bits if bits else width)


def reason_to_keep(path: str, shape: tuple[int, ...]) -> str | None:
    """Why a layer is not coded, or None."""
    *_, outputs, inputs = shape
    if why := KEPT.get(path.rpartition(".")[2]):
        return why
    if outputs % TILE or inputs % TILE:
        return f"{outputs} x {inputs} is no multiple of {TILE}"
    if rotation.block_size(inputs) is None:
        return f"a width of {inputs} has no Hadamard block of {rotation.SMALLEST} or more"
    return None


def make_recipe(shapes: Mapping[str, tuple[int, ...]], bits: float, recipe: str) -> Recipe:
    """
    Args:
        shapes: of all layers, by path.
        bits: of a coded weight; with "mixed" the mean, which may be a fraction.

    Raises:
        ValueError: no such recipe, or it has no such width.
    """
    kept = {path: why for path, shape in shapes.items() if (why := reason_to_keep(path, shape))}
    sizes = {path: prod(shape) for path, shape in shapes.items() if path not in kept}
    if not sizes:
        raise ValueError("the model has no layer that could be coded")
    if recipe == "even":
        if bits not in BITS:
            raise ValueError(f"bits is {bits:g}; every layer has 2, 3 or 4, or use --recipe mixed")
        return Recipe(dict.fromkeys(sizes, int(bits)), kept)
    if recipe != "mixed":
        raise ValueError(f"recipe is {recipe!r}; choose {' or '.join(RECIPES)}")
    if not BITS[0] < bits < BITS[-1]:
        raise ValueError(
            f"bits is {bits:g}; a mixed recipe shares out a mean between {BITS[0]} and {BITS[-1]}"
        )
    return Recipe(_shared_out(sizes, bits), kept)


def _shared_out(sizes: Mapping[str, int], mean: float) -> dict[str, int]:
    """One bit after the other to the layer whose divergence it lowers most per byte: an error falls
    to a quarter with every bit, and so what the next one is worth."""
    bits = dict.fromkeys(sizes, BITS[0])
    left = (mean - BITS[0]) * sum(sizes.values())
    order = {path: i for i, path in enumerate(sizes)}
    queue = [(-_sensitivity(path), order[path], path) for path in sizes]
    heapq.heapify(queue)
    while queue:
        worth, place, path = heapq.heappop(queue)
        if sizes[path] > left:
            continue
        left -= sizes[path]
        bits[path] += 1
        if bits[path] < BITS[-1]:
            heapq.heappush(queue, (worth / 4, place, path))
    return bits


def _sensitivity(path: str) -> float:
    return SENSITIVITY.get(path.rpartition(".")[2], OTHERS)


def _in_order(module: nn.Module, path: str = "") -> list[tuple[str, nn.Module]]:
    """Modules depth first, as they stand in the model: `named_modules` goes from the end."""
    found = [(path, module)]
    for name, child in module.children().items():
        found += _children(child, f"{path}.{name}" if path else name)
    return found


def _children(child: object, path: str) -> list[tuple[str, nn.Module]]:
    if isinstance(child, nn.Module):
        return _in_order(child, path)
    if isinstance(child, dict):
        return [f for name, each in child.items() for f in _children(each, f"{path}.{name}")]
    if isinstance(child, (list, tuple)):
        return [f for i, each in enumerate(child) for f in _children(each, f"{path}.{i}")]
    return []
