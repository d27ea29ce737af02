"""A model as its files tell it, before any weight is read: which it is, and what its layers keep.

Needs no mlx.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqstack import demo_model
from tqstack.models.families import read_geometry
from tqstack.models.families.sizes import context_length, size, text_config
from tqstack.models.geometry import Geometry, Kind, UnknownGeometryError


class ModelNotFoundError(ValueError):
    """The name leads to no model; the message says what to do."""


@dataclass(frozen=True)
class ModelSpec:
    """A model from its files.

    Attributes:
        path: its folder; empty for a model that has none.
        geometry: None: the config does not tell it.
        layers: of each entry of the model's cache the kind; empty: unknown until it is loaded.
    """

    id: str
    path: str
    config: Mapping[str, Any]
    geometry: Geometry | None
    layers: tuple[Kind, ...]

    @classmethod
    def of(cls, model_id: str, path: str, config: Mapping[str, Any]) -> ModelSpec:
        try:
            geometry = read_geometry(config)
        except UnknownGeometryError:
            return cls(model_id, path, config, None, ())
        kinds: list[Kind] = [layer.kind for layer in geometry.layers]
        return cls(model_id, path, config, geometry, tuple(kinds))

    @property
    def context_length(self) -> int:
        return context_length(self.config)

    @property
    def vocabulary(self) -> int:
        """Logits of a token; 0: unknown."""
        return size(text_config(self.config), "vocab_size", 0)

    @property
    def softmax_layers(self) -> list[int]:
        return [i for i, kind in enumerate(self.layers) if kind == "softmax"]

    def describe(self, compressed_layers: Sequence[int] = ()) -> dict[str, Any]:
        """What is told about the model; of its layers nothing while they are unknown.

        Args:
            compressed_layers: those that were proven to be.
        """
        about: dict[str, Any] = {"id": self.id, "context_length": self.context_length}
        if self.layers:
            softmax = self.softmax_layers
            about |= {
                "architecture": "softmax" if len(softmax) == len(self.layers) else "hybrid",
                "layers": len(self.layers),
                "softmax_layers": softmax,
                "recurrent_layers": self.layers.count("recurrent"),
            }
        return {**about, "compressed_layers": list(compressed_layers)}


def resolve(name: str) -> tuple[str, str]:
    """(id, path or hub name) of a model as the user wrote it.

    Raises:
        ModelNotFoundError
    """
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


def model_folder(name: str) -> tuple[str, Path]:
    """(id, folder) of a model that is on this machine.

    Raises:
        ModelNotFoundError: it is not, or not wholly.
    """
    model_id, path = resolve(name)
    if Path(path).is_dir():
        return model_id, Path(path)
    from huggingface_hub.errors import LocalEntryNotFoundError

    from tqstack.models import hub

    try:
        return model_id, hub.snapshot(path)
    except LocalEntryNotFoundError:
        raise ModelNotFoundError(
            f"{name} is not on this machine; download it: tqstack model download {name}"
        ) from None


def read_spec(name: str) -> ModelSpec:
    """The spec of "demo", a folder, or a hub name that has been downloaded.

    Raises:
        ModelNotFoundError: it is not here; the message says what to do.
    """
    model_id, folder = model_folder(name)
    return ModelSpec.of(model_id, str(folder), json.loads((folder / "config.json").read_text()))
