"""What compression does to a model's answers, against the uncompressed cache on the same tokens.

Windows of text go through the model once with the plain cache and once per codec, chunk by chunk
and side by side, so that only one chunk's logits exist at a time.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from tqstack.attention.cache import TurboQuantKVCache
from tqstack.attention.hybrid import make_turboquant_cache
from tqstack.bench.needle import Haystack

EXACT = "exact"
# The yardsticks of docs/codec.md: mlx's affine codes, rotated ones, the paper's, and ours.
CODECS = [
    *(
        "affine8-g64-none",
        "affine4-g64-none",
        "affine4-g64",
        "tq4",
        "tq4-raw",
        "tq4/tq3",
        "tq3/tq4",
    ),
    *("tq3", "affine3-g64-none", "tq2", "affine2-g64-none", "tcq4-l8", "tcq3-l8", "tcq2-l8"),
]
CHUNK = 512


@dataclass
class Score:
    """Sums over tokens, and what they make."""

    codec: str
    tokens: int = 0
    nll: float = 0.0
    divergence: float = 0.0
    agreed: int = 0
    stored_bits: int = 0
    values: int = 0
    needles: dict[int, list[bool]] = field(default_factory=dict)

    def add(self, logp: mx.array, exact: mx.array, targets: mx.array) -> None:
        """Log-probabilities (L, vocabulary) of this codec and of the exact cache."""
        rows = mx.arange(targets.size)
        self.nll -= _number(logp[rows, targets].sum())
        self.divergence += _number((mx.exp(exact) * (exact - logp)).sum())
        self.agreed += round(_number((logp.argmax(-1) == exact.argmax(-1)).sum()))
        self.tokens += targets.size

    def add_bytes(self, cache: list[Any]) -> None:
        for entry in cache:
            if isinstance(entry, TurboQuantKVCache) and not entry.empty():
                self.stored_bits += 8 * entry.nbytes_used
                self.values += entry.nbytes_fp16 // 2

    def row(self, exact: Score) -> dict[str, Any]:
        perplexity = float(np.exp(self.nll / self.tokens))
        plain = float(np.exp(exact.nll / exact.tokens))
        hits = [hit for length in self.needles.values() for hit in length]
        return {
            "codec": self.codec,
            "bits_per_value": round(self.stored_bits / self.values, 4) if self.values else 16.0,
            "perplexity": round(perplexity, 4),
            "perplexity_change": round(perplexity / plain - 1, 6),
            "kl_divergence": round(self.divergence / self.tokens, 7),
            "top1": round(self.agreed / self.tokens, 5),
            "needle": round(sum(hits) / len(hits), 4) if hits else None,
            "needle_by_length": {n: f"{sum(h)}/{len(h)}" for n, h in self.needles.items()},
        }


@dataclass(frozen=True)
class Plan:
    """What to measure: windows of text, and needles at some lengths."""

    windows: int = 6
    window_tokens: int = 2000
    needle_lengths: tuple[int, ...] = (1000, 4000)
    questions: int = 8
    seed: int = 0

    def steps(self, codecs: int) -> int:
        return self.windows + len(self.needle_lengths) * (codecs + 1)


def measure(
    model: nn.Module,
    tokenizer: Any,
    tokens: np.ndarray,
    codecs: list[str],
    plan: Plan,
) -> Iterator[list[dict[str, Any]] | None]:
    """Yields None after each step (for a progress bar), and the rows at the end."""
    scores = {name: Score(name) for name in (EXACT, *codecs)}
    for window in windows(tokens, plan):
        _read_window(model, window, scores)
        yield None
    for length in plan.needle_lengths:
        haystack = Haystack.make(tokenizer, tokens.tolist(), length, plan.seed, plan.questions)
        for name, score in scores.items():
            score.needles[length] = _ask(model, tokenizer, haystack, maker(model, name))
            yield None
    yield [score.row(scores[EXACT]) for score in scores.values()]


def maker(model: nn.Module, codec: str) -> Callable[[], list[Any]]:
    """How a codec's cache is made; "keys/values" names two codecs."""
    if codec == EXACT:
        return lambda: make_prompt_cache(model)
    return lambda: make_turboquant_cache(model, codec)


def windows(tokens: np.ndarray, plan: Plan) -> Iterator[np.ndarray]:
    """Windows spread over the text, shifted by the seed.

    Raises:
        ValueError: the text is shorter than one window.
    """
    spare = len(tokens) - plan.window_tokens
    if spare < 0:
        raise ValueError(
            f"the text has {len(tokens)} tokens, and a window {plan.window_tokens}; "
            "give a longer text, or --window-tokens"
        )
    shift = random.Random(plan.seed).random()
    for i in range(plan.windows):
        start = int(spare * ((i + shift) % plan.windows) / plan.windows)
        yield tokens[start : start + plan.window_tokens]


def _read_window(model: nn.Module, window: np.ndarray, scores: dict[str, Score]) -> None:
    caches = {name: maker(model, name)() for name in scores}
    x = mx.array(window.astype(np.int32))
    for start in range(0, x.size - 1, CHUNK):
        inputs = x[start : min(start + CHUNK, x.size - 1)]
        targets = x[start + 1 : start + 1 + inputs.size]
        exact = None
        for name, cache in caches.items():
            logits = model(inputs[None], cache=cache)[0].astype(mx.float32)
            logp = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            exact = logp if exact is None else exact
            scores[name].add(logp, exact, targets)
    for name, cache in caches.items():
        scores[name].add_bytes(cache)


def _ask(
    model: nn.Module,
    tokenizer: Any,
    haystack: Haystack,
    make_cache: Callable[[], list[Any]],
) -> list[bool]:
    """Read the document once, then ask every question on a copy of its cache."""
    prompts = [
        tokenizer.apply_chat_template(needle.messages, add_generation_prompt=True)
        for needle in haystack.needles
    ]
    shared = _common_prefix(prompts)
    cache = make_cache()
    document = mx.array(prompts[0][:shared])[None]
    for start in range(0, shared, CHUNK):
        model(document[:, start : start + CHUNK], cache=cache)
        mx.eval([c.state for c in cache])
    hits = []
    for prompt, code in zip(prompts, haystack.codes.values(), strict=True):
        answer = _continue(model, tokenizer, copy.deepcopy(cache), prompt[shared:], len(code))
        hits.append(code in answer)
    return hits


def _continue(
    model: nn.Module, tokenizer: Any, cache: list[Any], tokens: list[int], digits: int
) -> str:
    x, out = mx.array([tokens]), []
    for _ in range(digits + 4):
        token = model(x, cache=cache)[:, -1:].argmax(-1)
        out.append(int(token.item()))
        if out[-1] in tokenizer.eos_token_ids:
            break
        x = token
    return tokenizer.decode(out)


def _number(x: mx.array) -> float:
    return float(np.array(x))


def _common_prefix(sequences: list[list[int]]) -> int:
    first, last = min(sequences), max(sequences)
    return next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first) - 1
    )


def as_json(rows: list[dict[str, Any]], plan: Plan, about: dict[str, Any]) -> dict[str, Any]:
    return {**about, "plan": asdict(plan), "rows": rows}
