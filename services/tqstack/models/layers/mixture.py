"""The second half of a layer for single tokens: experts, or one MLP, with its matrices joined.

A block of experts is five launches: the router with the shared expert's gate, the choice, all gate
and up matrices of the chosen experts, their activation, and all down matrices. The shared expert is
one more in the stack that everybody chooses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu
from mlx_lm.models.qwen3_next import Qwen3NextMLP, Qwen3NextSparseMoeBlock
from mlx_lm.models.switch_layers import SwiGLU, SwitchGLU

from tqstack.models.layers.experts import inputs_of
from tqstack.models.layers.joined import Joined, alike, join, stack
from tqstack.models.layers.routing import route

# Beyond them `mx.gather_qmm` reads weights too often; mlx-lm sorts by expert then.
MOST_ROWS = 8

Terms = tuple[mx.array, mx.array | None]
Half = Callable[[mx.array], Terms]


class Mixture(NamedTuple):
    """Experts and a shared one of the same sizes."""

    router: Joined  # (experts + 1, inputs)
    gates_and_ups: Joined  # of all experts, the shared one last, each
    downs: Joined
    chosen: int
    normalised: bool
    block: nn.Module  # for many rows

    def __call__(self, x: mx.array) -> Terms:
        """(B, 1, width) -> what is to be added, (B, terms, width), and scores (B, terms)."""
        B, _, width = x.shape
        if B > MOST_ROWS:
            return self.block(x), None
        gates_and_ups, downs, scores = route(
            self.router(x.reshape(B, width)), self.chosen, self.normalised
        )
        both = _product(self.gates_and_ups, x.reshape(B, 1, 1, width), gates_and_ups)
        gate, up = mx.split(both, 2, axis=1)
        return _product(self.downs, swiglu(gate, up), downs).reshape(B, -1, width), scores


class Dense(NamedTuple):
    """One MLP."""

    gate_and_up: Joined
    down: nn.Module

    def __call__(self, x: mx.array) -> Terms:
        gate, up = mx.split(self.gate_and_up(x), 2, axis=-1)
        down: Any = self.down
        return down(swiglu(gate, up)), None


def half_of(module: Any) -> Half:
    """The single tokens of a layer's MLP, which nothing else of ours has wrapped yet."""
    half: Half | None = None
    if type(module) is Qwen3NextSparseMoeBlock and module.sharding_group is None:
        half = _mixture(module)
    elif type(module) is Qwen3NextMLP:
        joined = join([module.gate_proj, module.up_proj])
        half = joined and Dense(joined, module.down_proj)
    return half or (lambda x: (module(x), None))


def _mixture(block: Any) -> Mixture | None:
    routed, shared = block.switch_mlp, block.shared_expert
    if type(routed) is not SwitchGLU or type(routed.activation) is not SwiGLU:
        return None
    firsts = [routed.gate_proj, shared.gate_proj, routed.up_proj, shared.up_proj]
    downs = [routed.down_proj, shared.down_proj]
    routers = [block.gate, block.shared_expert_gate]
    stackable = all(map(alike, (firsts, downs, routers)))
    stackable &= shared.gate_proj.weight.shape == routed.gate_proj.weight.shape[1:]
    if not stackable or type(routed.gate_proj) is type(shared.gate_proj):
        return None  # nothing is joined unless everything is
    router, first, second = join(routers), stack(firsts), stack(downs)
    if router is None or first is None or second is None:
        return None
    return Mixture(router, first, second, block.top_k, block.norm_topk_prob, block)


def _product(of: Joined, x: mx.array, chosen: mx.array) -> mx.array:
    """(B, 1 or k, 1, inputs) with matrices (B, k) of a stack -> (B, k, 1, outputs)"""
    return mx.gather_qmm(
        x,
        *of.planes,
        lhs_indices=inputs_of(x.shape[:2], chosen.shape),
        rhs_indices=chosen,
        group_size=of.group_size,
        bits=of.bits,
    )
