"""Loading a model: the embedded one, a folder, or a hub name."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import dequantize_model, load

from tqstack import weights
from tqstack.models import hub
from tqstack.models.adapt import adapt
from tqstack.models.cache_spec import CacheSpec
from tqstack.models.device import this_machine
from tqstack.models.planning import check_cache
from tqstack.models.safetensors import model_tensors
from tqstack.models.spec import ModelSpec, read_spec, resolve
from tqstack.models.split import Part, split


class Loaded(NamedTuple):
    spec: ModelSpec
    model: nn.Module
    tokenizer: TokenizerWrapper
    part: Part | None = None  # None: all of it


def load_model(
    name: str,
    cache: CacheSpec | None = None,
    adapted: bool = True,
    group: mx.distributed.Group | None = None,
) -> Loaded:
    """Load `name`: "demo", a folder, or a hub name, which is downloaded if it is not here.

    On the CPU weights become float32: MLX multiplies bfloat16 and quantized matrices many times
    more slowly there.

    Args:
        cache: what its softmax layers are to have; None: whatever comes.
        adapted: with layers of ours where mlx-lm's are slow on this machine.
        group: of ranks that divide it; None: this process has all of it.

    Raises:
        ModelNotFoundError: there is no such model.
        BrokenFileError: a file of it is missing or cut short.
        NotCompressedError, SettingsError: it has nothing that this cache could hold; told before it
            is loaded.
        NotSplitError: it cannot be divided like that.
    """
    fetched(name)
    spec = read_spec(name)
    if cache is not None:
        check_cache(spec, cache)
    model_tensors(Path(spec.path))  # whole, or it says which file is not
    model, tokenizer = load(spec.path, lazy=True)[:2]
    if this_machine().expands_weights:
        expand(model)
    part = split(spec, model, group) if group else None
    mx.eval(model.parameters())
    if adapted:
        adapt(model)
    return Loaded(spec, model, tokenizer, part)


def fetched(name: str) -> Path:
    """The folder of a model: "demo", a folder, or a hub name, downloaded if it is not here.

    Raises:
        ModelNotFoundError: there is no such model.
    """
    _, path = resolve(name)
    return Path(path) if Path(path).is_dir() else hub.fetch(path)


def expand(model: nn.Module) -> None:
    """Make all of a model's weights plain float32 matrices, in place and unevaluated."""
    weights.expand(model)
    dequantize_model(model)
    model.update(tree_map(_as_float32, model.parameters()))


def _as_float32(weight: mx.array) -> mx.array:
    return weight.astype(mx.float32) if mx.issubdtype(weight.dtype, mx.floating) else weight
