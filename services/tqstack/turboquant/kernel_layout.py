"""How a codec's planes lie, for those that kernels can read."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .rotation import Rotation


@dataclass(frozen=True)
class KernelLayout:
    """A plane of codes of whole bits, packed, and a plane of float16 scales.

    Equal layouts have equal levels.
    """

    bits: int
    """Of a code."""
    window: int
    """Bits that a value decodes from, its own code's first; 0: its own code alone."""
    group: int
    """Values that share a scale."""
    rotation: Rotation = field(compare=False)
    """Of the values, which stay rotated."""
    levels: np.ndarray = field(compare=False)
    """(2^window or 2^bits,) float32, by what a value decodes from."""
