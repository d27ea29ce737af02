"""Which cache a model's softmax layers have, as the settings ask; every other layer has its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import QuantizedKVCache, make_prompt_cache

from tqstack.attention.blocks import BLOCK_TOKENS
from tqstack.attention.hybrid import layer_codecs, make_turboquant_cache, softmax_entries
from tqstack.attention.pool import Pool
from tqstack.attention.tail import tail_slots
from tqstack.kv_bits import parse_widths
from tqstack.models.geometry import Layer
from tqstack.settings import Settings, SettingsError
from tqstack.turboquant.codec import Codec
from tqstack.turboquant.kv_codecs import UNCOMPRESSED, KVCodecs

NATIVE_BITS = ("2", "3", "4", "5", "6", "8")
NATIVE_GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class Native:
    """mlx-lm's quantized cache. It serves one sequence at a time: it cannot be batched."""

    bits: int
    group_size: int

    @property
    def name(self) -> str:
        return f"mlx{self.bits}-g{self.group_size}"

    def vector_bytes(self, dim: int, value_bytes: int) -> int:
        """Bytes of a stored vector: its words, and a scale and an offset for each group.

        Raises:
            SettingsError: vectors of this size do not go with these bits or groups.
        """
        if dim % self.group_size:
            raise SettingsError(
                f"TQ_CACHE_VERSION='native': heads of {dim} are no whole groups of "
                f"{self.group_size}; set TQ_KV_GROUP_SIZE to one of {_words(NATIVE_GROUPS)} that "
                "divides them"
            )
        # mlx-lm makes room for dim // (32 // bits) words, and mx.quantize returns dim * bits / 32.
        if dim * self.bits != 32 * (dim // (32 // self.bits)):
            raise SettingsError(
                f"TQ_CACHE_VERSION='native' cannot store heads of {dim} in TQ_KV_BITS={self.bits}; "
                "allowed: 2, 4, 8"
            )
        return dim * self.bits // 8 + 2 * value_bytes * dim // self.group_size


@dataclass(frozen=True)
class CacheSpec:
    """The cache of softmax layers: compressed (`codecs`), mlx-lm's quantized one (`native`), or,
    where both are None, mlx-lm's own in the model's type.

    Attributes:
        boundary_layers: softmax layers at either end that are not quantized.
        exact_tokens: newest tokens that stay exact, beside a query's own block; of `codecs` only.
    """

    codecs: KVCodecs | None
    native: Native | None = None
    boundary_layers: int = 0
    exact_tokens: int = BLOCK_TOKENS

    @property
    def name(self) -> str:
        """How people name what the cache stores."""
        return (self.native or self.codecs or UNCOMPRESSED).name

    @property
    def tail_tokens(self) -> int:
        """Most newest tokens of a sequence that are not compressed; 0: nothing is."""
        return tail_slots(self.exact_tokens, BLOCK_TOKENS) if self.codecs else 0

    def make(self, model: nn.Module, pool: Pool | None = None) -> list[Any]:
        """The cache of one sequence.

        Args:
            pool: where compressed blocks come from; None: the model's own, without limit.
        """
        if self.codecs is not None:
            return make_turboquant_cache(
                model, self.codecs, self.boundary_layers, self.exact_tokens, pool
            )
        cache = make_prompt_cache(model)
        if self.native is not None:
            softmax = softmax_entries(cache)
            for i in softmax[self.boundary_layers : len(softmax) - self.boundary_layers]:
                cache[i] = QuantizedKVCache(self.native.group_size, self.native.bits)
        return cache

    def token_bytes(self, softmax: Sequence[Layer], value_bytes: int) -> list[int]:
        """Bytes of a stored token's keys and values, of each of a model's softmax layers.

        Raises:
            SettingsError: mlx-lm's quantized cache cannot store vectors of these sizes.
        """
        if self.codecs is not None:
            codecs = layer_codecs(len(softmax), self.codecs, self.boundary_layers)
            return [_coded(layer, pair) for layer, pair in zip(softmax, codecs, strict=True)]
        plain = [value_bytes * layer.token_values for layer in softmax]
        if self.native is None:
            return plain
        inner = slice(self.boundary_layers, len(softmax) - self.boundary_layers)
        plain[inner] = [_native(layer, self.native, value_bytes) for layer in softmax[inner]]
        return plain


def read_cache_spec(settings: Settings, code: str | None = None) -> CacheSpec:
    """The cache that the settings ask for.

    Args:
        code: "lloyd" or "trellis", where TQ_KV_CODE leaves it open; None: lloyd.

    Raises:
        SettingsError: there is none such; the message says what is allowed.
    """
    version, group = settings.tq_cache_version, settings.tq_kv_group_size
    codecs = native = None
    if version == "native":
        native = Native(_native_bits(settings), _native_group(settings))
    elif version != "none":
        try:
            codecs = KVCodecs.from_settings(
                settings.tq_kv_bits,
                version,
                group_size=None if group == "auto" else group,
                rotation=settings.tq_use_rotation,
                normalization=settings.tq_use_normalization,
                code=(code or "lloyd") if settings.tq_kv_code == "auto" else settings.tq_kv_code,
            )
        except ValueError as error:
            raise SettingsError(str(error)) from None
    return CacheSpec(codecs, native, settings.tq_boundary_layers, settings.tq_exact_tokens)


def _native_bits(settings: Settings) -> int:
    keys, values = parse_widths(settings.tq_kv_bits)
    if keys != values or keys not in NATIVE_BITS:
        raise SettingsError(
            f"TQ_KV_BITS={settings.tq_kv_bits!r} is none of TQ_CACHE_VERSION=native, which has the "
            f"same bits for keys and values; allowed: {_words(NATIVE_BITS)}"
        )
    return int(keys)


def _native_group(settings: Settings) -> int:
    group = settings.tq_kv_group_size
    if group != "auto" and group not in NATIVE_GROUPS:
        raise SettingsError(
            f"TQ_KV_GROUP_SIZE={group} is none of TQ_CACHE_VERSION=native; allowed: "
            f"{_words(NATIVE_GROUPS)}"
        )
    return 64 if group == "auto" else group


def _coded(layer: Layer, codecs: KVCodecs) -> int:
    pair = codecs.codecs(layer.key_dim, layer.value_dim)
    return layer.kv_heads * sum(map(codec_bytes, pair))


def _native(layer: Layer, native: Native, value_bytes: int) -> int:
    dims = (layer.key_dim, layer.value_dim)
    return layer.kv_heads * sum(native.vector_bytes(dim, value_bytes) for dim in dims)


def codec_bytes(codec: Codec) -> int:
    """Bytes of one stored vector."""
    return sum(width * dtype.size for width, dtype in codec.plane_shapes())


def _words(allowed: Sequence[object]) -> str:
    return ", ".join(map(str, allowed))
