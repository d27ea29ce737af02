"""How the trellis codebooks in codebooks/ were made.

    python -m tqstack.turboquant.trellis_training 4 tcq4-l8.npy
    ... 3 tcq3-l10.npy --window 10 --rounds 500 --vectors 3072 --seeds 1    (of weights; at 4 bits
    --rounds 400 --noise 0.05 --seeds 2)

Generalised Lloyd on the trellis, on random directions and never on a model's keys or values: code
random vectors, move each level to the mean of the values that chose it, repeat. Noise on the
levels, cooled to nothing, carries it past poor optima.
"""

from __future__ import annotations

import argparse

import numpy as np

from .viterbi import tail_biting_path

_BATCH, _DIM = 128, 256
_INERTIA = 4.0  # counts that a level's old value is worth, so that rare levels move slowly
NOISE = {1: 0.5, 2: 0.35, 3: 0.2, 4: 0.08}  # standard deviations, at the start


def train_codebook(
    bits: int,
    window: int,
    *,
    rounds: int = 400,
    vectors: int = 1280,
    noise: float | None = None,
    seed: int = 0,
) -> np.ndarray:
    """(2^L,) float16 levels for unit-variance coordinates, from Gaussian quantiles in random order.

    vectors: that a round codes. noise: at the start; None: what suits 256 levels.

    Rounding differences between machines end up in the levels: the shipped files are the
    codebooks, this is their origin.
    """
    rng = np.random.default_rng([seed, bits, window])
    levels = np.sort(rng.standard_normal((1 << window, 512)), axis=0).mean(axis=1)
    codebook = rng.permutation(levels).astype(np.float32)
    for i in range(rounds):
        heat = (noise or NOISE[bits]) * max(1 - i / (0.8 * rounds), 0)
        codebook += heat * rng.standard_normal(codebook.shape).astype(np.float32)
        codebook = _lloyd_step(codebook, bits, vectors, rng)
    return codebook.astype(np.float16)


def squared_error(codebook: np.ndarray, bits: int, *, seed: int = 0) -> float:
    """Mean over the coordinates of random directions that no training saw."""
    levels, rng = codebook.astype(np.float32), np.random.default_rng([seed, 0x7E57])
    x = _directions(rng, 1024)
    return float(np.square(x - levels[tail_biting_path(x, levels, bits)]).mean())


def _lloyd_step(
    codebook: np.ndarray, bits: int, vectors: int, rng: np.random.Generator
) -> np.ndarray:
    count, total = np.full(len(codebook), _INERTIA), _INERTIA * codebook
    for _ in range(0, vectors, _BATCH):
        x = _directions(rng, _BATCH)
        states = tail_biting_path(x, codebook, bits).ravel()
        count += np.bincount(states, minlength=len(codebook))
        total += np.bincount(states, x.ravel(), minlength=len(codebook))
    return (total / count).astype(np.float32)


def _directions(rng: np.random.Generator, count: int) -> np.ndarray:
    """(d, count) random directions, of unit variance per coordinate."""
    x = rng.standard_normal((_DIM, count)).astype(np.float32)
    return x * (np.sqrt(_DIM) / np.linalg.norm(x, axis=0)).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train a codebook from several seeds, keep the best."
    )
    parser.add_argument("bits", type=int)
    parser.add_argument("output", help="file.npy")
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--vectors", type=int, default=1280)
    parser.add_argument("--noise", type=float)
    arguments = parser.parse_args()
    best = np.inf
    for seed in range(arguments.seeds):
        codebook = train_codebook(
            arguments.bits,
            arguments.window,
            rounds=arguments.rounds,
            vectors=arguments.vectors,
            noise=arguments.noise,
            seed=seed,
        )
        error = squared_error(codebook, arguments.bits)
        print(f"{arguments.bits} bits, seed {seed}: squared error {error:.5f}", flush=True)
        if error < best:
            best = error
            np.save(arguments.output, codebook)


if __name__ == "__main__":
    main()
