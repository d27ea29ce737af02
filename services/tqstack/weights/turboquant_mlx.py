"""Models in the format of turboquant-mlx-full (PyPI, versions 0.1 to 0.30).

A coded layer has, beside an ordinary `bias`:

    weight    (*E, N, words)  uint32: 32 // bits codes to a word, the first one lowest; the three
                              levels of ternary experts 20 to a word, as digits of base 3
    scales    (*E, N, groups) float16: each of K / groups neighbouring weights
    codebook  (levels,)       float16: 2^bits levels, or 3
    signs     (K,)            float16: of the rotation

    W_rotated = scale * codebook[code],  y = W_rotated . hadamard(signs * x)

E experts share codebook and signs. The Hadamard blocks are the largest m * 2^k that divide K, m of
1, 12, 20 and 28. Some linear layers have a residual r of W_rotated in signs (QJL): `qjl_packed`
(N, K / 32), `qjl_norms` (N,) and `qjl_signs` (K,), with which y gains

    sqrt(pi / 2 / K) * norm * (+-1 bits) . hadamard(qjl_signs * x_rotated).

Embeddings, and whatever else has scales and no codebook, are in mlx's affine code.
Described from the project's documentation and files; https://github.com/manjunathshiva/turboquant-mlx.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import SwitchLinear

Shapes = Mapping[str, tuple[int, ...]]

ROTATIONS = ("hadamard", "blockwise_hadamard", "none")  # the first two are the same
# What a layer is follows from its planes; the other fields tell how they were chosen.
FIELDS = {
    *("mode", "bits", "group_size", "use_qjl", "rotation", "rotation_seed", "fuse_rotations"),
    *("attn_bits", "mlp_bits", "mlp_group_size", "ternary_experts", "expert_down_bits"),
    *("protected_expert_layers", "protect_bits", "expert_layer_tiers", "codebook"),
    "affine_extras",
}
PLANES = ("weight", "scales", "codebook", "signs")
QJL_PLANES = ("qjl_packed", "qjl_norms", "qjl_signs")
TERNARY_DIGITS = 20  # of base 3 in a word
CHUNK = 1 << 22  # weights that are decoded at once; MLX has a few chunks in the works


def put_layers(model: nn.Module, quantization: Mapping[str, Any], names: Shapes) -> None:
    """Replace a model's layers by those that a folder's planes are of.

    Args:
        quantization: of the folder's config.
        names: shape of each of its tensors.

    Raises:
        ValueError: a field is unknown, or planes are missing or of another shape; the message says
            which and what to do.
    """
    _check_fields(quantization)
    modules = dict(model.named_modules())
    coded = [name.removesuffix(".codebook") for name in names if name.endswith(".codebook")]
    layers = []
    for path in coded:
        if path not in modules and path.rpartition(".")[0] not in modules:
            continue  # of a part that mlx-lm leaves out, such as a vision tower
        own = {part: names.get(f"{path}.{part}") for part in (*PLANES, *QJL_PLANES, "bias")}
        planes = {part: shape for part, shape in own.items() if shape is not None}
        layers.append((path, _layer(path, modules.get(path), planes, quantization)))
    for path, module in modules.items():
        if f"{path}.scales" in names and path not in coded and hasattr(module, "to_quantized"):
            layers.append((path, _affine(path, module, names)))
    model.update_modules(tree_unflatten(layers))


def expand(model: nn.Module) -> None:
    """Turn these layers into plain ones of float32 weights, in place: for a CPU."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, PolarLinear):
            model.update_modules(tree_unflatten([(path, layer.plain())]))


class PolarLinear(nn.Module):
    """`nn.Linear`, or with experts `SwitchLinear`, that multiplies from a layer's planes.

    They are decoded in chunks of rows, one after the other: the whole layer is never there.
    """

    def __init__(self, planes: Shapes, rotated: bool | None):
        """
        Args:
            planes: shapes, checked.
            rotated: whether its inputs are; None: its signs will tell.
        """
        super().__init__()
        for part, shape in planes.items():
            packed = part in ("weight", "qjl_packed")
            self[part] = mx.zeros(shape, mx.uint32 if packed else mx.float16)
        self._rotated = rotated
        self.freeze()

    @property
    def inputs(self) -> int:
        return self["signs"].size

    @property
    def outputs(self) -> int:
        return self["weight"].shape[-2]

    def __call__(self, x: mx.array) -> mx.array:
        """(..., K) -> (..., N), in the type of x."""
        rotated = self._rotate(x)
        y = self._in_chunks(
            lambda weight, scales: rotated @ self._levels(weight, scales, x.dtype).swapaxes(-1, -2),
            (self["weight"], self["scales"]),
            self.inputs,
        )
        if "qjl_packed" in self:
            projected = _hadamard(rotated.astype(mx.float32) * self["qjl_signs"]).astype(x.dtype)
            signed = self._in_chunks(
                lambda packed: projected @ self._qjl_signs(packed, x.dtype).swapaxes(-1, -2),
                (self["qjl_packed"],),
                self.inputs,
            )
            y = y + signed * self._qjl_scales().astype(x.dtype)
        return y + self["bias"].astype(x.dtype) if "bias" in self else y

    def dense(self) -> mx.array:
        """(*E, N, K) float32: the weights as they count, not rotated."""
        weight = self._levels(self["weight"], self["scales"], mx.float32)
        if "qjl_packed" in self:
            signed = self._qjl_signs(self["qjl_packed"], mx.float32) * self._qjl_scales()[:, None]
            weight = weight + _transposed_hadamard(signed) * self["qjl_signs"]
        if not self._is_rotated():
            return weight
        return _transposed_hadamard(weight) * self["signs"].astype(mx.float32)

    def plain(self) -> nn.Module:
        """The layer of mlx that has these weights in float32."""
        layer: nn.Module = nn.Linear(1, 1, bias=False)
        layer.weight = self.dense()
        if "bias" in self:
            layer.bias = self["bias"]
        mx.eval(layer.parameters())
        return layer

    def _is_rotated(self) -> bool:
        # Old versions wrote `rotation: none` and rotated all the same: a sign below zero tells.
        if self._rotated is None:
            self._rotated = bool((self["signs"] < 0).any().item())
        return self._rotated

    def _rotate(self, x: mx.array) -> mx.array:
        if not self._is_rotated():
            return x
        return _hadamard(x.astype(mx.float32) * self["signs"]).astype(x.dtype)

    def _levels(self, weight: mx.array, scales: mx.array, dtype: mx.Dtype) -> mx.array:
        """(..., n, words) and (..., n, groups) -> (..., n, K) weights, rotated."""
        # Halves have one rounding, as in the project's own products; float32 has none.
        exact = mx.float32 if dtype == mx.float32 else mx.float16
        codes = _codes(weight, self["codebook"].size)[..., : self.inputs]
        levels = self["codebook"].astype(exact)[codes].reshape(*scales.shape, -1)
        return (levels * scales.astype(exact)[..., None]).flatten(-2).astype(dtype)

    def _qjl_signs(self, packed: mx.array, dtype: mx.Dtype) -> mx.array:
        """(n, words) -> (n, K) of +1 and -1."""
        return 2 * _codes(packed, 2)[..., : self.inputs].astype(dtype) - 1

    def _qjl_scales(self) -> mx.array:
        """(N,) float32"""
        return self["qjl_norms"].astype(mx.float32) * math.sqrt(math.pi / 2 / self.inputs)

    def _in_chunks(self, product: Any, planes: tuple[mx.array, ...], row: int) -> mx.array:
        """Products of a few rows (axis -2) of planes, joined along the last axis.

        Args:
            row: weights that are decoded for one row.
        """
        step, parts = max(1, CHUNK // row), []
        for at in range(0, self.outputs, step):
            rows = [plane[..., at : at + step, :] for plane in planes]
            # In order, or MLX may decode many chunks before it multiplies the first.
            rows = mx.depends(rows, parts[-1:]) if parts else rows
            parts.append(product(*rows))
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)


class PolarSwitchLinear(PolarLinear):
    """`SwitchLinear` on planes: of few experts that are asked for, only those are decoded."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """(..., 1, K) and (..., k) experts -> (..., k, 1, N); as mlx-lm calls `SwitchLinear`."""
        rotated, planes = self._rotate(x), (self["weight"], self["scales"])
        experts, chosen = self["weight"].shape[0], indices
        if few := indices.size < experts:
            chosen = mx.arange(indices.size).reshape(indices.shape)

        def product(weight: mx.array, scales: mx.array) -> mx.array:
            if few:
                weight, scales = (plane[indices.flatten()] for plane in (weight, scales))
            levels = self._levels(weight, scales, x.dtype).swapaxes(-1, -2)
            return mx.gather_mm(rotated, levels, rhs_indices=chosen, sorted_indices=sorted_indices)

        y = self._in_chunks(product, planes, min(indices.size, experts) * self.inputs)
        if "bias" in self:
            y = y + self["bias"][indices][..., None, :].astype(x.dtype)
        return y

    def plain(self) -> nn.Module:
        layer = SwitchLinear(1, 1, 1, bias=False)
        layer.weight = self.dense()
        if "bias" in self:
            layer.bias = self["bias"]
        mx.eval(layer.parameters())
        return layer


def _check_fields(quantization: Mapping[str, Any]) -> None:
    unknown = sorted(set(quantization) - FIELDS)
    if unknown:
        raise ValueError(
            f"quantization.{unknown[0]} in config.json is a field that this version of tqstack "
            "does not know of turboquant-mlx models: update tqstack, or convert the 16-bit model "
            "with tqstack convert"
        )
    if (rotation := quantization.get("rotation", "hadamard")) not in ROTATIONS:
        raise ValueError(
            f"quantization.rotation in config.json is {rotation!r}; turboquant-mlx models have one "
            f"of {', '.join(ROTATIONS)}"
        )
    if quantization.get("fuse_rotations"):
        raise ValueError(
            "quantization.fuse_rotations in config.json: rotations cannot be fused into norms, and "
            "turboquant-mlx gave that up; convert the 16-bit model again"
        )


def _layer(
    path: str, module: nn.Module | None, planes: Shapes, quantization: Mapping[str, Any]
) -> PolarLinear:
    if not isinstance(module, nn.Linear | SwitchLinear):
        raise ValueError(
            f"the folder has codes of {path}, where a model of this kind has no linear layer: "
            "it needs another version of mlx-lm, or is broken"
        )
    experts = isinstance(module, SwitchLinear)
    _check_planes(path, module.weight.shape, planes)
    rotated = None if quantization.get("rotation") == "none" else True
    return PolarSwitchLinear(planes, rotated) if experts else PolarLinear(planes, rotated)


def _check_planes(path: str, weight: tuple[int, ...], planes: Shapes) -> None:
    """Planes of a layer (*E, N, K).

    Raises:
        ValueError
    """
    *rows, inputs = weight
    residual = any(part in planes for part in QJL_PLANES)
    missing = [part for part in (*PLANES, *QJL_PLANES * residual) if part not in planes]
    if missing:
        raise ValueError(
            f"the folder lacks {', '.join(f'{path}.{part}' for part in missing)}: download or "
            "convert the model again"
        )
    levels, groups = planes["codebook"][-1], planes["scales"][-1]
    if levels != 3 and (levels < 2 or levels & (levels - 1)):
        raise ValueError(
            f"{path}.codebook has {levels} levels; turboquant-mlx models have 3 or a power of two"
        )
    if not groups or inputs % groups:
        raise ValueError(
            f"{path}.scales has {groups} groups, into which a row of {inputs} weights cannot be "
            "divided: config.json and the weights are not of one model"
        )
    expected: dict[str, tuple[int, ...]] = {
        "weight": (*rows, -(-inputs // _codes_per_word(levels))),
        "scales": (*rows, groups),
        "codebook": (levels,),
        "signs": (inputs,),
        "bias": tuple(rows),
    }
    if residual:
        expected |= {"qjl_packed": (*rows, -(-inputs // 32)), "qjl_norms": tuple(rows)}
        expected |= {"qjl_signs": (inputs,)}
    for part, shape in planes.items():
        if tuple(shape) != expected[part]:
            raise ValueError(
                f"{path}.{part} has the shape {tuple(shape)} and should have {expected[part]}: "
                "config.json and the weights are not of one model"
            )


def _affine(path: str, module: Any, names: Shapes) -> nn.Module:
    """A layer in mlx's affine code: its shapes tell bits and group."""
    planes = {part: names.get(f"{path}.{part}") for part in ("weight", "scales", "biases")}
    if missing := [part for part, shape in planes.items() if shape is None]:
        raise ValueError(
            f"the folder lacks {path}.{missing[0]}: download or convert the model again"
        )
    inputs = module.weight.shape[-1]
    group = inputs // names[f"{path}.scales"][-1]
    return module.to_quantized(group, 32 * names[f"{path}.weight"][-1] // inputs)


def _codes_per_word(levels: int) -> int:
    return TERNARY_DIGITS if levels == 3 else 32 // (levels.bit_length() - 1)


def _codes(packed: mx.array, levels: int) -> mx.array:
    """(..., words) uint32 -> (..., words * codes of a word) uint32, each below `levels`."""
    places = mx.arange(_codes_per_word(levels), dtype=mx.uint32)
    words = packed[..., None]
    if levels == 3:
        digits = mx.array([3**i for i in range(TERNARY_DIGITS)], dtype=mx.uint32)
        return (words // digits % 3).flatten(-2)
    return ((words >> places * (levels.bit_length() - 1)) & (levels - 1)).flatten(-2)


def _block(width: int) -> tuple[int, int]:
    """(m, 2^k): m * 2^k is the largest Hadamard block that divides a width."""
    pairs = [(m, (width // m) & -(width // m)) for m in (1, 12, 20, 28) if width % m == 0]
    return max(pairs, key=math.prod)


def _hadamard(x: mx.array) -> mx.array:
    """(..., K) float32, each block times its orthonormal matrix."""
    if not x.size:
        return x  # MLX refuses empty arrays
    block = math.prod(_block(x.shape[-1]))
    return mx.hadamard_transform(x.reshape(*x.shape[:-1], -1, block)).reshape(x.shape)


def _transposed_hadamard(x: mx.array) -> mx.array:
    """The inverse of `_hadamard`: MLX's matrices for 20 and 28 are not symmetric."""
    outer, inner = _block(x.shape[-1])
    if outer in (1, 12):
        return _hadamard(x)
    # H = H_outer (x) H_inner, and MLX transforms the rows of the identity: to the transpose.
    matrix = mx.hadamard_transform(mx.eye(outer))
    parts = x.reshape(*x.shape[:-1], -1, outer, inner)
    return (matrix @ mx.hadamard_transform(parts)).reshape(x.shape)
