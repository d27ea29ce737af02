"""TurboQuant: vector codecs for a KV cache. Arrays in, arrays out; no models, no I/O."""

from .codec import Codec, make_codec

__all__ = ["Codec", "make_codec"]
