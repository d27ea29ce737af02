"""Architecture families: what each one's config.json tells, a file per family. No mlx.

A family follows mlx-lm's model of that type, its defaults included, for that is what is run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tqstack.models.families import (
    gated_delta,
    gemma3,
    gemma4,
    gpt_oss,
    lfm2,
    mamba2,
    mla,
    softmax,
    windows,
)
from tqstack.models.families.sizes import text_config
from tqstack.models.geometry import Geometry, UnknownGeometryError

Reader = Callable[[Mapping[str, Any]], Geometry]
MODULES = (softmax, windows, gated_delta, gemma3, gemma4, gpt_oss, mamba2, lfm2, mla)
READERS: dict[str, Reader] = {
    name: reader for module in MODULES for name, reader in module.READERS.items()
}


def read_geometry(config: Mapping[str, Any]) -> Geometry:
    """
    Raises:
        UnknownGeometryError: no family knows this type, or its config lacks a size.
    """
    model_type = str(config.get("model_type", ""))
    reader = READERS.get(model_type)
    if mla.caches_latents(config):
        raise not_planned(model_type, "kv_lora_rank in its config")
    if reader is None:
        raise not_planned(model_type, "its layers are not known")
    try:
        return reader(text_config(config))
    except KeyError as missing:
        raise not_planned(model_type, f"no {missing.args[0]} in its config") from None


def not_planned(model_type: str, why: str) -> UnknownGeometryError:
    return UnknownGeometryError(
        f"a {model_type or 'model'} cannot be planned from its files ({why}): "
        "`tqstack doctor` with SIDECAR_MODEL set loads it and measures"
    )
