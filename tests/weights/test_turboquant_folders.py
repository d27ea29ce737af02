"""Folders in turboquant-mlx-full's format load, and give what their dequantised weights give."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import SwitchLinear

from models.architectures import CONFIGS, unadapted
from tqstack import demo_model
from tqstack.models.adapt import adapt
from tqstack.models.device import this_machine
from tqstack.models.load import load_model
from tqstack.weights import turboquant_mlx
from tqstack.weights.turboquant_mlx import PolarLinear, PolarSwitchLinear
from weights.polar_writer import FIELDS, write_layer


def write_folder(folder: Path, model: nn.Module, config: dict, qjl: bool, **fields) -> None:
    """Save a model in the format; it then has the weights that were coded. Routers stay as they
    are, and so does every layer that is smaller than 32; the embedding gets mlx's affine code."""
    planes, coded = {}, []
    for path, module in model.named_modules():
        if path.endswith(("gate", "router")) or not isinstance(module, nn.Linear | SwitchLinear):
            continue
        *_, rows, inputs = module.weight.shape
        if min(rows, inputs) >= 32:
            experts = isinstance(module, SwitchLinear)
            levels = 3 if experts and "down" not in path else 8
            weight = np.array(module.weight.astype(mx.float32))
            layer = write_layer(weight, levels, qjl=qjl and not experts, seed=len(coded))
            planes |= {f"{path}.{name}": mx.array(x) for name, x in layer.planes.items()}
            coded.append((f"{path}.weight", mx.array(layer.weight)))
    embedding = next(p for p, m in model.named_modules() if isinstance(m, nn.Embedding))
    weight = dict(tree_flatten(model.parameters()))[f"{embedding}.weight"]
    affine = mx.quantize(weight, group_size=32, bits=4)
    parts = zip(("weight", "scales", "biases"), affine, strict=True)
    planes |= {f"{embedding}.{name}": x for name, x in parts}
    coded.append((f"{embedding}.weight", mx.dequantize(*affine, group_size=32, bits=4)))
    left = {name: x for name, x in tree_flatten(model.parameters()) if name not in planes}
    model.update(tree_unflatten(coded))
    folder.mkdir(exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), left | planes, {"format": "mlx"})
    config = {**config, "quantization": {**FIELDS, "use_qjl": qjl, **fields}}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["llama", "qwen3-moe", "gpt-oss", "qwen3.5"])
@pytest.mark.parametrize("qjl", [False, True])
def test_a_folder_gives_the_logits_of_its_dequantised_weights(name, qjl, tmp_path):
    twin = unadapted(CONFIGS[name])
    write_folder(tmp_path, twin, CONFIGS[name], qjl, affine_extras={"bits": 4, "group_size": 32})
    model, config = mlx_lm.utils.load_model(tmp_path)
    assert config["quantization"]["mode"] == "turboquant"
    kinds = {type(module) for _, module in model.named_modules()}
    assert PolarLinear in kinds and nn.QuantizedEmbedding in kinds
    assert (PolarSwitchLinear in kinds) == (name in ("qwen3-moe", "gpt-oss"))
    assert (nn.Linear in kinds) == (name != "llama")  # routers, and what is too narrow
    tokens = mx.array(np.random.default_rng(1).integers(0, 128, (2, 40)))
    want = twin(tokens)
    rounding = 1e-4 * mx.abs(want).max().item()
    assert mx.abs(model(tokens) - want).max().item() < rounding
    turboquant_mlx.expand(model)
    assert not [m for _, m in model.named_modules() if isinstance(m, PolarLinear)]
    assert mx.abs(model(tokens) - want).max().item() < rounding


def test_a_folder_with_a_tokenizer_is_loaded_like_any_model(tmp_path):
    twin = load_model("demo", adapted=False).model
    config = json.loads((demo_model.PATH / "config.json").read_text())
    del config["quantization_config"]
    write_folder(tmp_path, twin, config, qjl=False)
    for path in demo_model.PATH.glob("*token*.json"):
        shutil.copy(path, tmp_path)
    loaded = load_model(str(tmp_path))
    assert this_machine().expands_weights != any(
        isinstance(module, PolarLinear) for _, module in loaded.model.named_modules()
    )
    tokens = mx.array(demo_model.held_out_tokens()[None, :100].astype(np.int32))
    adapt(twin)
    expected = twin(tokens)
    difference = mx.abs(loaded.model(tokens) - expected).max()
    assert (difference < 1e-4 * mx.abs(expected).max()).item()
