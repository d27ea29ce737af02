"""TurboQuant: vector codecs for a KV cache. Arrays in, arrays out; no models, no I/O."""

from .codec import Codec, make_codec
from .kv_bits import native_arguments, parse_kv_bits
from .outliers import outlier_spec

__all__ = ["Codec", "make_codec", "native_arguments", "outlier_spec", "parse_kv_bits"]
