"""From a model folder to one with coded weights, a layer at a time.

mlx-lm reads weights lazily, so that a layer is in memory only while it is coded. What is written
stays: the same command goes on where an earlier one stopped.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np

from tqstack.weights import calibrate, mtp
from tqstack.weights.codes import SIGN, make_code
from tqstack.weights.encode import Calibration, encode, stacked
from tqstack.weights.loading import FORMATS, MODE, VERSION
from tqstack.weights.recipe import Recipe, layers_of, make_recipe, shape_of
from tqstack.weights.shards import Group, Shards, write_whole
from tqstack.weights.sources import (
    dtype_of,
    is_mixture,
    matrices,
    nbytes,
    parameters,
    peak_memory,
    plain,
)

JOURNAL = "conversion.json"  # of an unfinished conversion: what it was asked for
TEXT_WINDOW, TEXT_WINDOWS = 512, 32  # of a calibration text: tokens, and how many of them


class ConversionError(ValueError):
    """What was asked for cannot be done; the message says what to do."""


@dataclass(frozen=True)
class Options:
    """
    Attributes:
        bits: of a coded weight; with the mixed recipe their mean.
        code: "trellis" or "lloyd".
        recipe: "even" or "mixed".
        qjl: one bit more per weight for the sign of what the code misses.
        calibration: a digest of the calibration's tokens; empty: none.
    """

    bits: float
    code: str = "trellis"
    recipe: str = "even"
    qjl: bool = False
    seed: int = 0
    calibration: str = ""


@dataclass(frozen=True)
class Converted:
    """
    Attributes:
        coded_bits: per coded weight, scales included.
        nbytes: of all weights.
        largest_layer: bytes of the source's largest layer.
        peak_memory: bytes that the process held at most, Python and all libraries included.
    """

    coded_bits: float
    nbytes: int
    largest_layer: int
    peak_memory: int
    recipe: Recipe


def convert(
    source: Path,
    destination: Path,
    options: Options,
    *,
    text: mx.array | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Converted:
    """
    Args:
        source: a model folder that mlx-lm loads: 16-bit, affine or MXFP4 weights.
        text: (sequences, length) tokens, for a calibrated code.
        progress: told the weights that are coded, of how many.

    Raises:
        ConversionError, DiskFullError: nothing is lost, and no folder that loads is left behind.
    """
    model, tokenizer, config = _open(source)
    layers = layers_of(model)
    try:
        recipe = make_recipe(
            {p: shape_of(m) for p, m in layers.items()}, options.bits, options.recipe
        )
    except ValueError as error:
        raise ConversionError(str(error)) from None
    quantization = _quantization(options, recipe, model)
    _begin(destination, {"source": str(source), **asdict(options)})
    with _alone(destination):
        conversion = _Conversion(model, layers, options, recipe, destination, progress)
        if text is not None and conversion.left():
            calibrate.run(source, text, conversion.code_calibrated)
        conversion.code_rest()
        conversion.copy_others()
        conversion.shards.write_index()
        mtp.carry(
            source,
            destination,
            make_code(options.code, round(options.bits)),
            lambda matrix, code: encode(matrix, code, options.seed, residual=options.qjl),
        )
        done = Converted(
            conversion.coded_bits,
            conversion.shards.total,
            conversion.largest,
            peak_memory(),
            recipe,
        )
        _finish(source, destination, tokenizer, {**config, "quantization": quantization})
        (destination / JOURNAL).unlink()
    return done


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep a folder to one conversion. The lock ends with the process, however that ends.

    Raises:
        ConversionError: another one is writing it.
    """
    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConversionError(
                f"another conversion is writing {folder}: wait for it, or name another folder"
            ) from None
        yield
    finally:
        os.close(held)


class _Conversion:
    """Layers become codes one by one, and what is written of them is let go."""

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, nn.Module],
        options: Options,
        recipe: Recipe,
        destination: Path,
        progress: Callable[[int, int], None],
    ):
        self.options, self.recipe, self.progress = options, recipe, progress
        self.layers = layers  # that are not coded yet
        self.weights = {path: prod(shape_of(self.layers[path])) for path in recipe.bits}
        self.largest = max(nbytes(layer) for layer in self.layers.values())
        self.others = _others(model, self.layers, recipe)
        groups = _groups(model, self.layers, recipe, self.others, options)
        self.shards = Shards(destination, groups)
        coded = sum(g.nbytes for g in groups if g.name in recipe.bits)
        coded -= sum(
            m["bias"].nbytes for p, m in self.layers.items() if p in recipe.bits and "bias" in m
        )
        self.coded_bits = 8 * coded / sum(self.weights.values())
        self.coded = 0

    def left(self) -> list[str]:
        """Layers that are still to be coded."""
        return [path for path in self.recipe.bits if not self.shards.done(path)]

    def code_calibrated(self, hessians: Mapping[str, np.ndarray]) -> None:
        """Code the layers that these Hessians are of."""
        for path, hessian in hessians.items():
            if path in self.layers and path in self.recipe.bits:
                self._code(path, hessian)

    def code_rest(self) -> None:
        """Code all layers that are left, each weight by itself."""
        for path in list(self.layers):
            if path in self.recipe.bits:
                self._code(path, None)

    def _code(self, path: str, hessian: np.ndarray | None) -> None:
        layer = self.layers.pop(path)
        if self.shards.done(path):
            self._advance(self.weights[path])
        else:
            self.shards.add(path, self._planes(path, layer, hessian))
        layer.update({"weight": mx.zeros((1,))})
        mx.clear_cache()

    def copy_others(self) -> None:
        for name, array in self.others.items():
            if not self.shards.done(name):
                self.shards.add(name, {name: array()})

    def _planes(
        self, path: str, layer: nn.Module, hessian: np.ndarray | None
    ) -> dict[str, mx.array]:
        code = make_code(self.options.code, self.recipe.bits[path])
        calibration = None if hessian is None else Calibration.of(hessian, self.options.seed)
        coded = [
            encode(
                matrix,
                code,
                self.options.seed,
                calibration=calibration,
                residual=self.options.qjl,
                advance=self._advance,
            )
            for matrix in matrices(layer)
        ]
        planes = stacked(coded) if is_mixture(layer) else coded[0]
        if "bias" in layer:
            planes["bias"] = layer["bias"]
        return {f"{path}.{name}": plane for name, plane in planes.items()}

    def _advance(self, weights: int) -> None:
        self.coded += weights
        self.progress(self.coded, sum(self.weights.values()))


def _open(source: Path) -> tuple[nn.Module, Any, dict[str, Any]]:
    config = json.loads((source / "config.json").read_text())
    mode = (config.get("quantization") or {}).get("mode")
    if mode in FORMATS:
        raise ConversionError(
            f"{source} is converted already ({mode}); start from the 16-bit model, or from an "
            "affine or MXFP4 one"
        )
    try:
        opened: Any = mlx_lm.load(str(source), lazy=True, return_config=True)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        raise ConversionError(f"mlx-lm cannot load {source}: {error}") from error
    return opened


def _begin(destination: Path, asked: dict[str, Any]) -> None:
    """An empty folder, or one where the same conversion was interrupted."""
    if destination.exists() and not destination.is_dir():
        raise ConversionError(f"{destination} is a file; give the folder that is to be made")
    journal = destination / JOURNAL
    if journal.exists():
        if json.loads(journal.read_text()) != asked:
            raise ConversionError(
                f"{destination} holds an unfinished conversion with other options ({journal.name} "
                "tells which); finish that one, remove the folder, or give another"
            )
        return
    if (destination / "config.json").exists():
        raise ConversionError(
            f"{destination} holds a model already; remove it, or give another folder"
        )
    if destination.exists() and any(destination.iterdir()):
        raise ConversionError(f"{destination} is not empty; give a folder that is")
    destination.mkdir(parents=True, exist_ok=True)
    write_whole(journal, lambda path: path.write_text(json.dumps(asked, indent=2) + "\n"))


def _quantization(options: Options, recipe: Recipe, model: nn.Module) -> dict[str, Any]:
    return {
        "mode": MODE,
        "version": VERSION,
        "code": options.code,
        "recipe": options.recipe,
        "seed": options.seed,
        "residual": options.qjl,
        "calibrated": bool(options.calibration),
        "dtype": str(dtype_of(model)).removeprefix("mlx.core."),
        "layers": dict(recipe.bits),
    }


def _others(
    model: nn.Module, layers: Mapping[str, nn.Module], recipe: Recipe
) -> dict[str, Callable[[], mx.array]]:
    """What is stored as it is, by name; a layer that is kept in 16 bits, if it was quantized."""
    found: dict[str, Callable[[], mx.array]] = {}
    for name, weight in parameters(model):
        path, _, part = name.rpartition(".")
        if path in recipe.bits:
            continue
        layer = layers.get(path)
        if layer is None or not hasattr(layer, "bits") or part == "bias":
            found[name] = lambda weight=weight: weight
        elif part == "weight":
            found[name] = lambda layer=layer: plain(layer, slice(None))
    return found


def _groups(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    recipe: Recipe,
    others: Mapping[str, Any],
    options: Options,
) -> list[Group]:
    groups: dict[str, Group] = {}
    for name, weight in parameters(model):
        path = name.rpartition(".")[0]
        if name in others:
            layer = layers.get(path)
            size = weight.nbytes
            if layer is not None and hasattr(layer, "bits") and name.endswith(".weight"):
                size = prod(shape_of(layer)) * layer["scales"].dtype.size
            groups[name] = Group(name, {name: size})
        elif path in recipe.bits and path not in groups:
            groups[path] = Group(path, _plane_sizes(path, layers[path], recipe.bits[path], options))
    return list(groups.values())


def _plane_sizes(path: str, layer: nn.Module, bits: int, options: Options) -> dict[str, int]:
    *leading, outputs, inputs = shape_of(layer)
    size, rows = prod(leading) * outputs * inputs, prod(leading) * outputs
    sizes = {f"{path}.weight": size * bits // 8, f"{path}.scales": 2 * rows}
    if options.qjl:
        sizes |= {
            f"{path}.residual.weight": size * SIGN.bits // 8,
            f"{path}.residual.scales": 2 * rows,
        }
    if "bias" in layer:
        sizes[f"{path}.bias"] = layer["bias"].nbytes
    return sizes


def _finish(source: Path, destination: Path, tokenizer: Any, config: dict[str, Any]) -> None:
    """The rest of a model folder; `config.json` last."""
    tokenizer.save_pretrained(destination)
    for pattern in ("generation_config.json", "*.py", "chat_template*"):
        for file in source.glob(pattern):
            if not (destination / file.name).exists():
                shutil.copy(file, destination)
    config.pop("quantization_config", None)
    text = json.dumps(dict(sorted(config.items())), indent=2) + "\n"
    write_whole(destination / "config.json", lambda path: path.write_text(text))
