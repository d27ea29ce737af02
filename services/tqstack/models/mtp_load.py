"""Loading a model's head of multi-token prediction from what its folder holds of it.

Weights are those of a raw checkpoint, whose norms are stored less 1 and whose experts one by one or
with gates and ups in one, or of `mtp.safetensors` (`weights/mtp.py`); matrices are plain, quantized
as mlx does it, or codes of ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from tqstack.models.adapt import adapt_head
from tqstack.models.device import this_machine
from tqstack.models.load import expand
from tqstack.models.mtp import Head, text_model
from tqstack.weights.codes import make_code
from tqstack.weights.loading import coded_like
from tqstack.weights.mtp import Found, find

_MIXTURE = "layers.0.mlp.switch_mlp"
_EXPERTS = re.compile(
    r"layers\.0\.mlp\.experts\.((?P<number>\d+)\.)?(?P<matrix>\w+_proj)(\.(?P<part>[\w.]+))?"
)


def load_head(folder: Path, config: Mapping[str, Any], model: nn.Module) -> Head:
    """The head of a loaded model, with layers that are fast on this machine.

    Raises:
        ValueError: weights of it are missing, or are no such head's.
    """
    found = find(folder)
    if found is None:
        raise ValueError(f"{folder} has no weights of multi-token prediction")
    head = Head(text_model(model).args)
    weights = _stacked({name.split("mtp.", 1)[1]: x for name, x in found.weights.items()})
    if found.raw:
        weights = {name: x + 1 if _is_norm(name, x) else x for name, x in weights.items()}
    _put_layers(head, weights, found, config.get("quantization") or {})
    head.load_weights(list(weights.items()))
    if this_machine().expands_weights:
        expand(head)
    mx.eval(head.parameters())
    adapt_head(head)
    return head


def _is_norm(name: str, x: mx.array) -> bool:
    return x.ndim == 1 and "norm" in name.rsplit(".", 2)[-2]


def _stacked(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Experts as mlx-lm has them: one array of each matrix, an expert behind the other."""
    found, apart = {}, {}
    for name, x in weights.items():
        mixture = _EXPERTS.fullmatch(name)
        if mixture is None:
            found[name] = x
        elif (number := mixture["number"]) is not None:
            apart.setdefault((mixture["matrix"], mixture["part"]), {})[int(number)] = x
        else:
            # (experts, outputs, ...), whether plain, quantized or coded
            both = mixture["matrix"] == "gate_up_proj"
            names = ("gate_proj", "up_proj") if both else (mixture["matrix"],)
            for matrix, own in zip(names, mx.split(x, len(names), axis=1), strict=True):
                found[f"{_MIXTURE}.{matrix}.{mixture['part'] or 'weight'}"] = own
    for (matrix, part), own in apart.items():
        found[f"{_MIXTURE}.{matrix}.{part}"] = mx.stack([own[i] for i in sorted(own)])
    return found


def _put_layers(
    head: Head, weights: Mapping[str, mx.array], found: Found, quantization: Mapping[str, Any]
) -> None:
    """Replace layers by quantized or coded ones, where weights are."""
    layers: list[tuple[str, Any]] = []
    for path, module in head.named_modules():
        weight, scales = weights.get(f"{path}.weight"), weights.get(f"{path}.scales")
        if weight is None or scales is None:
            continue
        if f"{path}.biases" in weights:
            inputs = module["weight"].shape[-1]
            sizes = inputs // scales.shape[-1], weight.shape[-1] * 32 // inputs
            layers.append((path, module.to_quantized(*sizes)))
        else:
            code = make_code(quantization.get("code", "trellis"), found.bits)
            options = {name: quantization.get(name, 0) for name in ("seed", "residual")}
            layers.append((path, coded_like(module, code, **options)))
    head.update_modules(tree_unflatten(layers))
