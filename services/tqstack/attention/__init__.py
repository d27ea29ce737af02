"""Compressed caches for mlx-lm models, and attention over them."""

import os
from importlib.metadata import version

from tqstack.machine import cache_folder

# CUDA's shortened float32 products would put 2.6e-3 of error into long attention. MLX reads this
# at its first product.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
# And this at its first kernel that is compiled here, on CUDA: otherwise in a folder for temporary
# files, which a new boot empties.
os.environ.setdefault("MLX_PTX_CACHE_DIR", str(cache_folder() / f"kernels-{version('mlx')}"))

from tqstack.attention.cache import TurboQuantKVCache
from tqstack.attention.hybrid import convert_cache_to_turboquant, make_turboquant_cache

__all__ = ["TurboQuantKVCache", "convert_cache_to_turboquant", "make_turboquant_cache"]
