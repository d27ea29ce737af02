"""One model over several ranks: each holds a part of every layer, or some of the layers.

mlx-lm's own `shard()` divides an architecture's matrices and sums what the parts give; a few
architectures have only `pipeline()`, which divides the layers. Everything here is done by all ranks
at the same point, and gives all of them the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tqstack.attention.kernels.program import gpu_dialect
from tqstack.models.geometry import Kind, Layer
from tqstack.models.plan import Plan
from tqstack.models.spec import ModelSpec
from tqstack.weights.layers import Coded
from tqstack.weights.turboquant_mlx import PolarLinear

How = Literal["tensor", "pipeline"]
KV_HEADS = ("num_key_value_heads", "n_kv_heads")  # as attention layers call them


class NotSplitError(ValueError):
    """The model cannot be divided like that; the message says what to do instead."""


def way(model: Any) -> How | None:
    """How mlx-lm can divide a model; None: it cannot."""
    if hasattr(model, "shard"):
        return "tensor"
    inner = getattr(model, "model", None)
    return "pipeline" if hasattr(inner, "pipeline") else None


class Part(NamedTuple):
    """What a rank has of a model: a part of each layer ("tensor"), or layers from `first` on."""

    how: How
    ranks: int
    first: int = 0


def split(spec: ModelSpec, model: nn.Module, group: mx.distributed.Group) -> Part:
    """Keep this rank's part of a model, in place. Weights may still be unread.

    Raises:
        NotSplitError
    """
    ranks = group.size()
    if any(isinstance(module, Coded | PolarLinear) for module in model.modules()):
        raise NotSplitError(
            f"{spec.id} has weights in a code that MLX does not know, which cannot be divided "
            "between ranks; use the model in 16 bits or in MLX's own quantization, or unset "
            "SIDECAR_RANKS and SIDECAR_HOSTS"
        )
    whole: Any = model
    try:
        if way(whole) == "tensor":
            whole.shard(group)
            if not all(_kv_heads(module) for module in model.modules()):
                raise ZeroDivisionError
            return Part("tensor", ranks)
        if way(whole) == "pipeline":
            return _pipeline(spec, whole, group)
    except NotSplitError:
        raise
    except (ArithmeticError, AssertionError, AttributeError, ValueError) as error:
        why = "there are fewer key and value heads" if isinstance(error, ArithmeticError) else error
        raise NotSplitError(
            f"{spec.id} cannot be divided between {ranks} ranks ({why}); use fewer"
        ) from error
    raise NotSplitError(
        f"mlx-lm cannot divide models of this kind ({spec.config.get('model_type')}); run "
        f"{spec.id} on one device: unset SIDECAR_RANKS and SIDECAR_HOSTS"
    )


def _kv_heads(module: nn.Module) -> int:
    """Key and value heads of an attention layer; of anything else, 1."""
    return next((getattr(module, name) for name in KV_HEADS if hasattr(module, name)), 1)


def _pipeline(spec: ModelSpec, model: Any, group: mx.distributed.Group) -> Part:
    """Layers, the last ones to rank 0. Ranks must have like ones, so that all count alike."""
    if gpu_dialect() == "cuda":
        raise NotSplitError(
            f"{spec.id} can only be divided by layers, and MLX cannot send them on between CUDA "
            "devices; unset SIDECAR_RANKS"
        )
    ranks, kinds = group.size(), spec.layers
    stage = len(kinds) // ranks
    stages = {kinds[at : at + stage] for at in range(0, len(kinds), max(1, stage))}
    if not kinds or len(stages) != 1:
        raise NotSplitError(
            f"the {len(kinds)} layers of {spec.id} do not give {ranks} ranks the same kinds of "
            "layers each; use another number of ranks"
        )
    model.model.pipeline(group)
    model.__class__ = _sending(type(model))
    return Part("pipeline", ranks, model.model.start_idx)


@dataclass(eq=False)
class _Sent:
    """Behind a pipelined model's cache entries: mlx-lm ties what it sends on to the last entry's
    keys, which compressed entries do not hold as one array."""

    keys: mx.array


def _sending(base: type[nn.Module]) -> type[nn.Module]:
    class Sending(base):
        """A pipelined model that sends on even where nobody reads the logits."""

        def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
            if cache is None:
                return super().__call__(inputs)
            sent = _Sent(mx.zeros(1))
            out = super().__call__(inputs, [*cache, sent])
            mx.async_eval(sent.keys)
            return out

    return Sending


# -- what all ranks count with ---------------------------------------------------------------------


def divided(spec: ModelSpec, part: Part) -> ModelSpec:
    """The spec with the geometry of one rank's part."""
    geometry = spec.geometry
    if geometry is None:
        return spec
    n = part.ranks
    if part.how == "pipeline":
        stage = len(geometry.layers) // n
        own = geometry.layers[part.first : part.first + stage]
        return replace(spec, geometry=replace(geometry, layers=own))
    return replace(
        spec,
        geometry=replace(
            geometry,
            layers=tuple(_divided(layer, n) for layer in geometry.layers),
            query_heads=-(-geometry.query_heads // n),
            feed_forward=-(-geometry.feed_forward // n),
            recurrence=-(-geometry.recurrence // n),
            recurrence_chunk=-(-geometry.recurrence_chunk // n),
        ),
    )


def _divided(layer: Layer, n: int) -> Layer:
    return replace(
        layer,
        kv_heads=-(-layer.kv_heads // n),
        state=-(-layer.state // n),
        convolution=-(-layer.convolution // n),
    )


def whole_layers(part: Part, kinds: tuple[Kind, ...], compressed: tuple[int, ...]):
    """(kinds, compressed entries) of all layers, from those of this rank's."""
    if part.how == "tensor":
        return kinds, compressed
    stage = len(kinds)
    everywhere = (at + stage * i for i in range(part.ranks) for at in compressed)
    return kinds * part.ranks, tuple(everywhere)


def common_plan(plan: Plan, group: mx.distributed.Group) -> Plan:
    """The plan that no rank exceeds: the least that any has beside its weights, and the most that
    any needs of everything else."""
    names = [name for name in asdict(plan) if name not in ("budget", "padded")]
    told = _told(group, [plan.budget - plan.weights, *(getattr(plan, name) for name in names)])
    most = dict(zip(names, map(int, told.max(axis=0)[1:]), strict=True))
    return replace(plan, **most, budget=most["weights"] + int(told[:, 0].min()))


def slowest(group: mx.distributed.Group, seconds: Sequence[float]) -> tuple[float, ...]:
    """Of what steps take, by their tokens, the most of all ranks."""
    if not seconds:
        return ()
    told = _told(group, [round(one * 1e9) for one in seconds])
    return tuple(int(most) / 1e9 for most in told.max(axis=0))


def same(group: mx.distributed.Group, what: str) -> bool:
    """Whether all ranks say the same."""
    told = _told(group, [_number(what)])
    return bool((told == told[0]).all())


def joined(group: mx.distributed.Group, what: str) -> str:
    """One word, the same on all ranks, for what each of them says."""
    return "-".join(f"{int(number):x}" for number in _told(group, [_number(what)])[:, 0])


def _number(what: str) -> int:
    """63 bits."""
    digest = hashlib.blake2b(what.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _told(group: mx.distributed.Group, numbers: list[int]) -> np.ndarray:
    """(ranks, numbers) int64: what every rank says."""
    return np.array(mx.distributed.all_gather(mx.array([numbers], mx.int64), group=group))
