"""The second half of a layer for single tokens: experts, or one MLP, with its matrices joined.

A block of experts is five launches: the router with the shared expert's gate, the choice, all gate
and up matrices of the chosen experts, their activation, and all down matrices. The shared expert is
one more in the stack that everybody chooses.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3
from mlx_lm.models.activations import swiglu
from mlx_lm.models.qwen3_next import Qwen3NextMLP, Qwen3NextSparseMoeBlock
from mlx_lm.models.switch_layers import SwiGLU, SwitchGLU

from tqstack.models.layers.joined import AnyJoined, Projections, alike, join, project, stack
from tqstack.models.layers.residual import Normed
from tqstack.models.layers.routing import route
from tqstack.weights.kernels.rotate import rotated_activations

_DENSE = (Qwen3NextMLP, qwen3.MLP)

# Beyond them `mx.gather_qmm` reads weights too often; mlx-lm sorts by expert then.
MOST_ROWS = 8

Terms = tuple[mx.array, mx.array | None]


class Half(Protocol):
    """What a layer ends with."""

    @property
    def seed(self) -> int | None:
        """Of the rotation in which it reads its input, too."""
        ...

    def __call__(self, x: Normed, /) -> Terms:
        """(B, 1, width) -> what is to be added, (B, terms, width), and scores (B, terms)."""
        ...


class Mixture(NamedTuple):
    """Experts and a shared one of the same sizes."""

    router: AnyJoined  # (experts + 1, inputs)
    gates_and_ups: AnyJoined  # of all experts, the shared one last, each
    downs: AnyJoined
    chosen: int
    normalised: bool
    block: nn.Module  # for many rows

    @property
    def seed(self) -> int | None:
        return self.gates_and_ups.seed

    def __call__(self, x: Normed) -> Terms:
        B, _, width = x.plain.shape
        if B > MOST_ROWS:
            return self.block(x.plain), None
        gates_and_ups, downs, scores = route(self.router(x)[:, 0], self.chosen, self.normalised)
        both = self.gates_and_ups.chosen(x.alone(), gates_and_ups)
        terms = self.downs.chosen(_activated(both, self.downs.seed), downs)
        return terms.reshape(B, -1, width), scores


class Dense(NamedTuple):
    """One MLP."""

    gate_and_up: Projections
    down: AnyJoined

    @property
    def seed(self) -> int | None:
        return self.gate_and_up.seed

    def __call__(self, x: Normed) -> Terms:
        both = self.gate_and_up(x)
        active = _activated(both.reshape(len(both), 2, 1, -1), self.down.seed)
        return self.down(active)[:, 0], None


class Whole(NamedTuple):
    """An MLP as it is."""

    module: Any
    seed: int | None = None

    def __call__(self, x: Normed) -> Terms:
        return self.module(x.plain), None


def half_of(module: Any) -> Half:
    """The single tokens of a layer's MLP, which nothing else of ours has wrapped yet."""
    half: Half | None = None
    parts: Any = module
    if type(module) is Qwen3NextSparseMoeBlock and module.sharding_group is None:
        half = _mixture(module)
    elif type(module) in _DENSE:
        gate_and_up = project([parts.gate_proj, parts.up_proj])
        down = gate_and_up and join([parts.down_proj])
        half = Dense(gate_and_up, down) if gate_and_up and down else None
    return half or Whole(module)


def _activated(both: mx.array, seed: int | None) -> Normed:
    """(B, 2 n, 1, inputs), gates and then what they are for -> (B, n, 1, inputs), as coded matrices
    of this seed or others read it."""
    if seed is None:
        gate, up = mx.split(both, 2, axis=1)
        return Normed(swiglu(gate, up))
    return Normed(both, rotated_activations(both, seed))


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
