"""Compressed caches for mlx-lm models, and attention over them."""

from tqstack.attention.cache import TurboQuantKVCache
from tqstack.attention.hybrid import convert_cache_to_turboquant, make_turboquant_cache

__all__ = ["TurboQuantKVCache", "convert_cache_to_turboquant", "make_turboquant_cache"]
