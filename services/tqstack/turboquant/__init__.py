"""TurboQuant: vector codecs for a KV cache. Arrays in, arrays out; no models, no I/O."""

from .codec import Codec, make_codec
from .kv_codecs import UNCOMPRESSED, KVCodecs
from .outliers import outlier_spec

__all__ = ["UNCOMPRESSED", "Codec", "KVCodecs", "make_codec", "outlier_spec"]
