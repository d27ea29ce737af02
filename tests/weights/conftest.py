from __future__ import annotations

import json
import shutil
from copy import deepcopy
from functools import cache
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from models import architectures
from tqstack import demo_model


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """Folders of tiny random models in bfloat16, with the demo model's tokenizer.

    Every token goes to every expert: rounding cannot change which.
    """

    @cache
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        config = deepcopy(architectures.CONFIGS[name])
        text = config.get("text_config", config)
        if "num_experts_per_tok" in text:
            text["num_experts_per_tok"] = 4
        model = architectures.unadapted(config)
        weights = {
            path: weight.astype(mx.bfloat16) if weight.dtype == mx.float32 else weight
            for path, weight in tree_flatten(model.parameters())
        }
        mx.save_safetensors(str(folder / "model.safetensors"), weights)
        (folder / "config.json").write_text(json.dumps(config))
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(demo_model.PATH / file, folder)
        return folder

    return make
