"""The codes of weights: Lloyd-Max, each value by itself, and the trellis, 256 values together.

Both are one thing to what reads them: value i of a tile's stream decodes from the `window` bits
that start at bit i * bits. Windows of a scalar code are as wide as its codes and do not overlap.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

from tqstack.turboquant.codebook import boundaries, lloyd_max
from tqstack.turboquant.trellis import trained_codebook
from tqstack.weights import tiles

NAMES = ("trellis", "lloyd")
BITS = (2, 3, 4)
TRELLIS_WINDOW = 10


@dataclass(frozen=True)
class Code:
    """
    Attributes:
        bits: of a weight.
        window: bits that a weight decodes from; `bits` for a scalar code.
    """

    bits: int
    window: int

    @property
    def scalar(self) -> bool:
        return self.window == self.bits

    @property
    def words(self) -> int:
        """32-bit words of a tile."""
        return tiles.VALUES * self.bits // 32

    @cached_property
    def levels(self) -> np.ndarray:
        """(2^window,) float32 that float16 holds exactly, in standard deviations of the weights."""
        return lloyd_max(self.bits) if self.scalar else trained_codebook(self.bits, self.window)

    @cached_property
    def codebook(self) -> mx.array:
        """The levels as halves, for kernels."""
        return mx.array(self.levels.astype(np.float16))

    def encode(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(count, 256) float32 of unit variance, a stream each -> codes (count, 256) uint8 and the
        levels (count, 256) that they stand for. Releases the interpreter's lock."""
        if self.scalar:
            return self.of_states(np.searchsorted(boundaries(self.levels), values))
        from tqstack.turboquant.viterbi import tail_biting_path  # compiles

        x = np.ascontiguousarray(values.T)
        return self.of_states(tail_biting_path(x, self.levels, self.bits).T)

    def of_states(self, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What `encode` returns, of windows (count, 256)."""
        return (states & ((1 << self.bits) - 1)).astype(np.uint8), self.levels[states]

    def decode(self, words: mx.array) -> mx.array:
        """(..., N / 16, K / 16, words) -> (..., N, K) float32 levels."""
        index = tiles.windows(words, self.bits, self.window)
        levels = mx.array(self.levels)[index]
        return tiles.from_tiles(levels)


def make_code(name: str, bits: int) -> Code:
    """
    Raises:
        ValueError: no such code, or not so many bits.
    """
    if name not in NAMES:
        raise ValueError(f"code is {name!r}; choose {' or '.join(NAMES)}")
    if bits not in BITS:
        raise ValueError(f"bits is {bits}; weights have {', '.join(map(str, BITS))}")
    return Code(bits, bits if name == "lloyd" else TRELLIS_WINDOW)


# The sign of a residual's coordinate: QJL (Zandieh et al., arXiv 2406.03482) as a code of one bit.
SIGN = Code(1, 1)
