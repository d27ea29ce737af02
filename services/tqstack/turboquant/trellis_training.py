"""How the trellis codebooks in codebooks/ were made: python -m tqstack.turboquant.trellis_training

Generalised Lloyd on the trellis, on random directions and never on a model's keys or values: code
random vectors, move each level to the mean of the values that chose it, repeat. Noise on the
levels, cooled to nothing, carries it past poor optima.
"""

from __future__ import annotations

import argparse

import numpy as np

from .viterbi import tail_biting_path

_VECTORS, _DIM = 1280, 256
_INERTIA = 4.0  # counts that a level's old value is worth, so that rare levels move slowly
_NOISE = {1: 0.5, 2: 0.4, 3: 0.25, 4: 0.15}  # standard deviations, at the start


def train_codebook(bits: int, window: int, *, rounds: int = 250, seed: int = 0) -> np.ndarray:
    """(2^L,) float16 levels for unit-variance coordinates, from Gaussian quantiles in random order.

    About a minute on one core. Rounding differences between machines end up in the levels: the
    shipped files are the codebooks, this is their origin.
    """
    rng = np.random.default_rng([seed, bits, window])
    levels = np.sort(rng.standard_normal((1 << window, 512)), axis=0).mean(axis=1)
    codebook = rng.permutation(levels).astype(np.float32)
    for i in range(rounds):
        noise = _NOISE[bits] * max(1 - i / (0.8 * rounds), 0)
        codebook += noise * rng.standard_normal(codebook.shape).astype(np.float32)
        codebook = _lloyd_step(codebook, bits, rng)
    return codebook.astype(np.float16)


def _lloyd_step(codebook: np.ndarray, bits: int, rng: np.random.Generator) -> np.ndarray:
    count, total = np.full(len(codebook), _INERTIA), _INERTIA * codebook
    for _ in range(0, _VECTORS, 128):
        x = rng.standard_normal((_DIM, 128)).astype(np.float32)
        x *= np.sqrt(_DIM) / np.linalg.norm(x, axis=0)
        states = tail_biting_path(x, codebook, bits).ravel()
        count += np.bincount(states, minlength=len(codebook))
        total += np.bincount(states, x.ravel(), minlength=len(codebook))
    return (total / count).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bits", type=int)
    parser.add_argument("window", type=int)
    parser.add_argument("output", help="file.npy")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    np.save(arguments.output, train_codebook(arguments.bits, arguments.window, seed=arguments.seed))


if __name__ == "__main__":
    main()
