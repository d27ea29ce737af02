"""Loading models with coded weights, in mlx-lm's own way.

`config.json` says what a folder holds:

    "quantization": {"mode": "tqstack", "version": 1, "code": "trellis", "seed": 0,
                     "dtype": "bfloat16", "residual": false,
                     "layers": {"model.layers.0.mlp.up_proj": 3, ...}}      # bits of each
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import SwitchLinear

from tqstack.weights import turboquant_mlx
from tqstack.weights.codes import make_code
from tqstack.weights.layers import CompressedEmbedding, CompressedLinear, CompressedSwitchLinear

MODE, VERSION = "tqstack", 1
Shapes = Mapping[str, tuple[int, ...]]
PutLayers = Callable[[nn.Module, dict[str, Any], Shapes], None]


class UnknownFormatError(ValueError):
    """The folder's weights are of a format that this version cannot read; the message says so."""


def put_layers(model: nn.Module, quantization: dict[str, Any], shapes: Shapes) -> None:
    """Replace a model's layers by those whose codes a folder holds.

    Args:
        shapes: of the folder's tensors.

    Raises:
        UnknownFormatError
    """
    if quantization.get("version") != VERSION:
        raise UnknownFormatError(
            f"the weights are of format {quantization.get('version')!r}; this version of tqstack "
            f"reads {VERSION}: update tqstack, or convert the model again"
        )
    modules = dict(model.named_modules())
    unknown = sorted(set(quantization["layers"]) - set(modules))
    if unknown:
        raise UnknownFormatError(
            f"config.json names the layer {unknown[0]}, which a model of this kind has not: "
            "convert the model again with the mlx-lm that is installed"
        )
    dtype = getattr(mx, quantization["dtype"])
    layers = []
    for path, bits in quantization["layers"].items():
        code = make_code(quantization["code"], bits)
        layer = coded_like(
            modules[path], code, seed=quantization["seed"], residual=quantization["residual"]
        )
        if isinstance(layer, CompressedEmbedding):
            layer.dtype = dtype
        layers.append((path, layer))
    model.update_modules(tree_unflatten(layers))


def coded_like(module: nn.Module, code: Any, **options: Any) -> Any:
    """The layer that takes a plain one's place, its codes still to come."""
    *_, outputs, inputs = module["weight"].shape
    if isinstance(module, nn.Embedding):
        return CompressedEmbedding(outputs, inputs, code, **options)
    bias = "bias" in module
    if isinstance(module, SwitchLinear):
        experts = module["weight"].shape[0]
        return CompressedSwitchLinear(inputs, outputs, experts, code, bias=bias, **options)
    return CompressedLinear(inputs, outputs, code, bias=bias, **options)


# Formats that mlx-lm does not know, by `mode`.
FORMATS: dict[str, PutLayers] = {MODE: put_layers, "turboquant": turboquant_mlx.put_layers}


def install() -> None:
    """Teach `mlx_lm.load` these formats. What it loaded before, it loads as before."""
    original = mlx_lm.utils.load_model
    if getattr(original, "reads_coded_weights", False):
        return

    @wraps(original)
    def load_model(model_path: Path, *args: Any, **kwargs: Any) -> tuple[nn.Module, dict[str, Any]]:
        config = mlx_lm.utils.load_config(Path(model_path))
        quantization = config.get("quantization") or {}
        put = FORMATS.get(quantization.get("mode", ""))
        if put is None:
            return original(model_path, *args, **kwargs)
        classes_of = kwargs.pop("get_model_classes", mlx_lm.utils._get_classes)

        def get_model_classes(config: dict[str, Any]) -> tuple[Any, Any]:
            make_model, arguments = classes_of(config=config)

            def make(args: Any) -> nn.Module:
                model = make_model(args)
                put(model, quantization, _shapes(Path(model_path)))
                return model

            return make, arguments

        plain = {"quantization": None, "quantization_config": None}
        kwargs["model_config"] = {**(kwargs.get("model_config") or {}), **plain}
        model, loaded = original(model_path, *args, get_model_classes=get_model_classes, **kwargs)
        return model, {**loaded, "quantization": quantization}

    load_model.reads_coded_weights = True  # type: ignore[attr-defined]
    mlx_lm.utils.load_model = load_model


def _shapes(folder: Path) -> Shapes:
    """Of every tensor that mlx-lm loads; nothing is read but headers."""
    files = sorted(folder.glob("model*.safetensors"))
    tensors: list[Any] = [mx.load(str(file)) for file in files]
    return {name: array.shape for held in tensors for name, array in held.items()}
