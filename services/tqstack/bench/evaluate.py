"""What smaller weights do to a model: its perplexity, and how far it is from a reference.

Models are loaded one after the other. The reference goes first, and its log-probabilities of every
token of the vocabulary are kept in half precision in a temporary file (2 bytes × vocabulary ×
tokens: 2.5 GB for 8,192 tokens of 150,000), so that memory holds one model and one chunk's logits.
Log-probabilities are finest where the probability is: half precision moves KL by less than 1e-6.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import dequantize_model

from tqstack.bench import speed
from tqstack.bench.shapes import AFFINE_BITS, AFFINE_GROUP
from tqstack.models.adapt import adapt
from tqstack.models.device import this_machine
from tqstack.models.load import expand, load_model
from tqstack.models.safetensors import Tensor, model_tensors
from tqstack.models.spec import read_spec
from tqstack.models.weight_bits import Stored, stored
from tqstack.weights.loading import FORMATS

WINDOW = 1024
CHUNK = 256  # tokens whose logits exist at once
GENERATED, TRIALS = 32, 3
DTYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}


class Candidate(NamedTuple):
    """A model to measure; with `affine_bits` it is quantized by mlx once it is loaded."""

    label: str
    name: str
    affine_bits: int | None = None


@dataclass(frozen=True)
class Row:
    """One model. Bytes, bits, nats per token, tokens per second.

    KL divergence is from the reference to this model over the whole vocabulary: the mean over the
    tokens, and its standard error as if they were independent. None: there is no reference, or
    speed was not measured.
    """

    model: str
    bits_per_weight: float
    weight_bytes: int
    tokens: int
    perplexity: float
    kl_divergence: float | None
    kl_error: float | None
    top1: float | None
    prefill_tps: float | None = None
    decode_tps: float | None = None


class Reference:
    """Log-probabilities (tokens, vocabulary), float16, in a file that nobody else sees; and which
    tokens were the likeliest, which half precision may not tell.

    Raises:
        OSError: the temporary folder has no room for them.
    """

    def __init__(self, tokens: int, vocabulary: int):
        folder, needed = tempfile.gettempdir(), 2 * tokens * vocabulary
        if (free := shutil.disk_usage(folder).free) < needed:
            raise OSError(
                f"the reference's distributions of {tokens:,} tokens take {needed / 1e9:,.1f} GB, "
                f"and {folder} has {free / 1e9:,.1f} free: ask for fewer --tokens, or set TMPDIR"
            )
        with tempfile.TemporaryFile() as file:  # its pages stay mapped
            self._rows = np.memmap(file, np.float16, "w+", shape=(tokens, vocabulary))
        self._likeliest = np.zeros(tokens, np.int64)

    def write(self, at: int, logp: mx.array) -> None:
        """Log-probabilities (L, vocabulary) of the tokens from `at` on."""
        span = slice(at, at + logp.shape[0])
        self._rows[span] = np.array(logp.astype(mx.float16))
        self._likeliest[span] = np.array(logp.argmax(-1))

    def read(self, at: int, count: int) -> tuple[mx.array, np.ndarray]:
        """Of `count` tokens from `at` on log-probabilities (count, vocabulary), float32, whose
        probabilities sum to one again, and the likeliest tokens (count,)."""
        rows = mx.array(self._rows[at : at + count]).astype(mx.float32)
        return _log_softmax(rows), self._likeliest[at : at + count]

    def check(self, label: str, vocabulary: int) -> None:
        """
        Raises:
            ValueError: a model has another vocabulary.
        """
        if vocabulary != (own := self._rows.shape[1]):
            raise ValueError(
                f"{label} gives probabilities of {vocabulary:,} tokens and the reference of "
                f"{own:,}: only models of one vocabulary can be compared"
            )


class Score:
    """What is kept of each token."""

    def __init__(self) -> None:
        self._nll: list[np.ndarray] = []
        self._divergence: list[np.ndarray] = []
        self._agreed: list[np.ndarray] = []

    def add(self, logp: mx.array, targets: mx.array) -> None:
        """Log-probabilities (L, vocabulary), and the tokens (L,) that really follow."""
        self._nll.append(np.array(-logp[mx.arange(targets.size), targets]))

    def compare(self, logp: mx.array, exact: mx.array, likeliest: np.ndarray) -> None:
        """Log-probabilities (L, vocabulary) with what the reference says."""
        self._divergence.append(np.array((mx.exp(exact) * (exact - logp)).sum(-1)))
        self._agreed.append(np.array(logp.argmax(-1)) == likeliest)

    def figures(self) -> dict[str, Any]:
        nll = np.concatenate(self._nll)
        figures = {"tokens": nll.size, "perplexity": round(float(np.exp(nll.mean())), 4)}
        if not self._divergence:
            return figures | dict.fromkeys(("kl_divergence", "kl_error", "top1"))
        kl = np.concatenate(self._divergence).astype(np.float64)
        return figures | {
            "kl_divergence": round(float(kl.mean()), 7),
            "kl_error": round(float(kl.std() / np.sqrt(kl.size)), 7),
            "top1": round(float(np.concatenate(self._agreed).mean()), 5),
        }


def windows(text: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Pieces of a text that together predict `tokens` tokens, spread over it: 1,024 each, the last
    one what remains; each is longer by one, the last prediction's answer.

    Raises:
        ValueError: the text is too short for them.
    """
    lengths = [WINDOW] * (tokens // WINDOW) + [tokens % WINDOW] * (tokens % WINDOW > 0)
    spare = len(text) - tokens - 1
    if spare < 0:
        raise ValueError(
            f"the text has {len(text):,} tokens, and {tokens + 1:,} are needed: give a longer text "
            "(--text), or ask for fewer --tokens"
        )
    starts = np.cumsum([0, *lengths[:-1]]) + spare * np.arange(len(lengths)) // len(lengths)
    return [text[at : at + n + 1] for at, n in zip(starts, lengths, strict=True)]


def measure(
    candidates: Sequence[Candidate],
    text: Sequence[np.ndarray],
    against: bool,
    timed: bool = True,
) -> Iterator[Row | None]:
    """Yields None after each window, and each model's row.

    Args:
        text: what to read, from `windows`.
        against: the first candidate is the reference.
        timed: measure their speed, too.

    Raises:
        ValueError, OSError: a model does not load, or has another vocabulary.
    """
    reference, tokens = None, sum(len(window) - 1 for window in text)
    for candidate in candidates:
        model, size, nbytes = _load(candidate)
        score, at = Score(), 0
        for window in text:
            for logp, targets in _read(model, window):
                score.add(logp, targets)
                if against and candidate is candidates[0]:
                    reference = reference or Reference(tokens, logp.shape[-1])
                    reference.write(at, logp)
                elif reference:
                    reference.check(candidate.label, logp.shape[-1])
                    score.compare(logp, *reference.read(at, targets.size))
                at += targets.size
            yield None
        yield Row(
            model=candidate.label,
            bits_per_weight=round(size.bits_per_weight, 4),
            weight_bytes=nbytes,
            **score.figures(),
            **(_speed(model, text[0][:-1]) if timed else {}),
        )
        del model
        gc.collect()
        mx.clear_cache()


def steps(candidates: Sequence[Candidate], text: Sequence[np.ndarray]) -> int:
    """What `measure` yields."""
    return len(candidates) * (len(text) + 1)


def check_affine(name: str, bits: Sequence[int]) -> None:
    """
    Raises:
        ValueError: mlx's affine code has no such bits, or cannot be made from this model.
    """
    if wrong := [b for b in bits if b not in AFFINE_BITS]:
        allowed = ", ".join(map(str, AFFINE_BITS))
        raise ValueError(f"--affine {wrong[0]}: mlx has affine codes of {allowed} bits")
    mode = (read_spec(name).config.get("quantization") or {}).get("mode")
    if bits and mode in FORMATS:
        raise ValueError(f"--affine needs a reference that is not compressed; {name} is ({mode})")


def as_json(rows: list[Row], about: dict[str, Any]) -> dict[str, Any]:
    return {**about, "rows": [asdict(row) for row in rows]}


def _read(model: nn.Module, window: np.ndarray) -> Iterator[tuple[mx.array, mx.array]]:
    """Log-probabilities (L, vocabulary) float32 and the tokens (L,) that really follow."""
    x, cache = mx.array(window.astype(np.int32)), make_prompt_cache(model)
    for at in range(0, x.size - 1, CHUNK):
        targets = x[at + 1 : at + 1 + CHUNK]
        logits = model(x[at : at + targets.size][None], cache=cache)[0]
        yield _log_softmax(logits.astype(mx.float32)), targets


def _log_softmax(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _speed(model: nn.Module, prompt: np.ndarray) -> dict[str, Any]:
    """Tokens per second with the plain cache: the middle of three, after one to warm up."""
    caches = {"plain": speed.CachedModel(model, lambda: make_prompt_cache(model))}
    speed.runnable(caches, prompt)
    work = speed.Workload(0, prompt.size, GENERATED)
    [row] = filter(None, speed.measure(caches, [work], prompt, TRIALS))
    return {"prefill_tps": row.prefill_tps, "decode_tps": row.decode_tps}


def _load(candidate: Candidate) -> tuple[nn.Module, Stored, int]:
    """The model, its linear layers' size, and bytes of all its weights."""
    spec = read_spec(candidate.name)
    tensors = model_tensors(Path(spec.path))
    model = load_model(candidate.name, adapted=candidate.affine_bits is None).model
    if candidate.affine_bits is None:
        size = stored(tensors, spec.config.get("quantization") or {})
        return model, size, sum(tensor.nbytes for tensor in tensors.values())
    size, nbytes = _quantize(model, candidate.affine_bits, _dtype(tensors))
    if this_machine().expands_weights:
        expand(model)
        mx.eval(model.parameters())
    adapt(model)
    return model, size, nbytes


def _dtype(tensors: dict[str, Tensor]) -> mx.Dtype:
    """What most of a model's numbers are stored in."""
    sizes = {
        dtype: sum(tensor.size for tensor in tensors.values() if tensor.dtype == name)
        for name, dtype in DTYPES.items()
    }
    return max(sizes, key=sizes.__getitem__)


def _quantize(model: nn.Module, bits: int, dtype: mx.Dtype) -> tuple[Stored, int]:
    """mlx's affine code in groups of 64 on the layers on which `mlx_lm.convert` puts it, in place;
    scales in the model's own precision, as there. The same as from `_load`, of the coded model."""
    dequantize_model(model)
    model.update(
        tree_map(
            lambda w: w.astype(dtype) if mx.issubdtype(w.dtype, mx.floating) else w,
            model.parameters(),
        )
    )
    wanted, weights, nbytes = getattr(model, "quant_predicate", None), 0, 0

    def takes(path: str, module: Any) -> bool | dict[str, Any]:
        fits = hasattr(module, "to_quantized") and module.weight.shape[-1] % AFFINE_GROUP == 0
        # A predicate may ask for other bits for a layer: a yardstick has one number of them.
        return bool(wanted(path, module)) if fits and wanted else fits

    nn.quantize(model, AFFINE_GROUP, bits, class_predicate=takes)
    mx.eval(model.parameters())
    for _, module in model.named_modules():
        if hasattr(module, "scales") and hasattr(module, "group_size"):
            weights += module.scales.size * AFFINE_GROUP
            nbytes += module.weight.nbytes + module.scales.nbytes + module.biases.nbytes
    whole = sum(array.nbytes for _, array in tree_flatten(model.parameters()))  # pyright: ignore
    return Stored(weights, nbytes), whole
