"""Loading a model: the embedded one, a folder, or a hub name; and what is told about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import dequantize_model, load

from tqstack import demo_model
from tqstack.attention.hybrid import softmax_entries
from tqstack.attention.prepare import prepare
from tqstack.sidecar import hub
from tqstack.sidecar.geometry import context_length


class ModelNotFoundError(ValueError):
    """The name leads to no model; the message says what to do."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and what is worth telling about it."""

    id: str
    path: str
    model: nn.Module
    tokenizer: TokenizerWrapper
    config: dict[str, Any]
    layers: int
    softmax_layers: tuple[int, ...]

    @property
    def context_length(self) -> int:
        return context_length(self.config)

    @property
    def architecture(self) -> str:
        return "softmax" if len(self.softmax_layers) == self.layers else "hybrid"


def resolve(name: str) -> tuple[str, str]:
    """(id, path or hub name) of a model as the user wrote it."""
    if name == "demo":
        return "demo", str(demo_model.PATH)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelNotFoundError(f"{path} holds no config.json: it is not a model folder")
        return path.resolve().name, str(path.resolve())
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelNotFoundError(
            f"{name!r} is no folder and no hub name; give demo, a model's folder, or owner/name"
        )
    return name, name


def load_model(name: str) -> LoadedModel:
    """Load `name`: "demo", a folder, or a hub name.

    On the CPU weights become float32: MLX multiplies bfloat16 and quantized matrices many times
    more slowly there.

    Raises:
        ModelNotFoundError: there is no such model.
    """
    model_id, path = resolve(name)
    if not Path(path).is_dir():
        path = str(hub.fetch(path))
    model, tokenizer, config = load(path, return_config=True)  # pyright: ignore
    if mx.default_device() == mx.cpu:
        model = dequantize_model(model)
        model.update(tree_map(_as_float32, model.parameters()))
        mx.eval(model.parameters())
    prepare(model)
    cache = make_prompt_cache(model)
    return LoadedModel(
        model_id, path, model, tokenizer, config, len(cache), tuple(softmax_entries(cache))
    )


def _as_float32(weight: mx.array) -> mx.array:
    return weight.astype(mx.float32) if mx.issubdtype(weight.dtype, mx.floating) else weight
