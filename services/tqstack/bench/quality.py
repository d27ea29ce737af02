"""What compression does to a model's answers, against the uncompressed cache on the same tokens.

Windows of text go through the model once with the plain cache and once per codec, chunk by chunk
and side by side, so that only one chunk's logits exist at a time. Only queries far enough into a
window count: the first ones see nothing but the exact tail.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import mean
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from tqstack.attention.blocks import BLOCK_TOKENS
from tqstack.attention.hybrid import make_turboquant_cache, softmax_entries
from tqstack.bench.caches import MakeCache
from tqstack.bench.needle import Haystack
from tqstack.turboquant.kv_codecs import KVCodecs

EXACT = "exact"
# mlx's affine codes as yardsticks, the paper's code and ours. With @0 all tokens are coded at once,
# as in the paper; without it the exact tail of `Plan.exact_tokens` stands beside the code.
CODECS = [
    *("affine4-g64-none@0", "tq4@0", "tq4", "tcq4-l8@0", "tcq4-l8"),
    *("tq4/tq3", "affine3-g64-none@0", "tq3", "tcq3-l8"),
    *("affine2-g64-none@0", "tq2", "tcq2-l8"),
]
CHUNK = 512
STATED_TOKENS = 32_768  # length of the sequence that bits per value are stated for
EXACT_BITS = 16


@dataclass(frozen=True)
class CacheKind:
    """A compressed cache to measure.

    Attributes:
        name: as it was asked for: codecs, and perhaps `@` and the tokens that stay exact.
        exact_tokens: newest tokens, beside a query's own block, that stay exact; 0: none at all.
    """

    name: str
    codecs: KVCodecs
    exact_tokens: int

    @classmethod
    def parse(cls, name: str, exact_tokens: int) -> CacheKind:
        """That of "tq4", "tq4/tq3" or, with exact tokens of its own, "tq4@0".

        Raises:
            ValueError: there is no such codec, or no number behind the @.
        """
        codecs, at, own = name.partition("@")
        if at and not own.isdecimal():
            raise ValueError(f"{name}: behind @ stand the exact tokens, such as @0 or @128")
        return cls(name, KVCodecs.parse(codecs), int(own) if at else exact_tokens)

    def make(self, model: nn.Module) -> list[Any]:
        return make_turboquant_cache(model, self.codecs, exact_tokens=self.exact_tokens)

    def bits_per_value(self, head_dims: list[tuple[int, int]]) -> float:
        """Bits of a cached value, on average over a sequence of 32,768 tokens and all layers.

        Packed tokens take what their planes take, scales included. The newest tokens take 16 bits:
        `exact_tokens`, and the block of 128 that is being filled, on average half of it. With 0
        exact tokens that block holds no more than its codes say, and counts as them.

        Args:
            head_dims: (of keys, of values) of each compressed layer.
        """
        packed = mean(self._packed_bits(*dims) for dims in head_dims)
        exact = self.exact_tokens + BLOCK_TOKENS // 2 if self.exact_tokens else 0
        return packed + (EXACT_BITS - packed) * exact / STATED_TOKENS

    def _packed_bits(self, key_dim: int, value_dim: int) -> float:
        codecs = self.codecs.codecs(key_dim, value_dim)
        return sum(c.dim * c.bits_per_value for c in codecs) / (key_dim + value_dim)


@dataclass
class Score:
    """Sums over scored tokens, and what they make."""

    tokens: int = 0
    nll: float = 0.0
    divergence: float = 0.0
    agreed: int = 0
    needles: dict[int, list[bool]] = field(default_factory=dict)

    def add(self, logp: mx.array, exact: mx.array, targets: mx.array) -> None:
        """Log-probabilities (L, vocabulary) of this codec and of the exact cache."""
        rows = mx.arange(targets.size)
        self.nll -= _number(logp[rows, targets].sum())
        self.divergence += _number((mx.exp(exact) * (exact - logp)).sum())
        self.agreed += round(_number((logp.argmax(-1) == exact.argmax(-1)).sum()))
        self.tokens += targets.size

    def row(self, exact: Score) -> dict[str, Any]:
        perplexity = float(np.exp(self.nll / self.tokens))
        plain = float(np.exp(exact.nll / exact.tokens))
        hits = [hit for length in self.needles.values() for hit in length]
        return {
            "perplexity": round(perplexity, 4),
            "perplexity_change": round(perplexity / plain - 1, 6),
            "kl_divergence": round(self.divergence / self.tokens, 7),
            "top1": round(self.agreed / self.tokens, 5),
            "needle": round(sum(hits) / len(hits), 4) if hits else None,
            "needle_by_length": {n: f"{sum(h)}/{len(h)}" for n, h in self.needles.items()},
        }


@dataclass(frozen=True)
class Plan:
    """What to measure: windows of text, and needles at some lengths.

    Attributes:
        first: position of the first query of a window that counts.
        exact_tokens: of caches whose name does not say.

    Raises:
        ValueError: no query of a window would count.
    """

    windows: int = 2
    window_tokens: int = 4000
    first: int = 256
    needle_lengths: tuple[int, ...] = (4000,)
    questions: int = 8
    seed: int = 0
    exact_tokens: int = BLOCK_TOKENS

    def __post_init__(self) -> None:
        if self.first > self.window_tokens - 2:  # the last token is only predicted
            raise ValueError(
                f"--from {self.first}: a window of {self.window_tokens} tokens has no prediction "
                f"there; allowed: 0 to {self.window_tokens - 2}"
            )

    def steps(self, codecs: int) -> int:
        return self.windows + len(self.needle_lengths) * (codecs + 1)


def measure(
    model: nn.Module,
    tokenizer: Any,
    tokens: np.ndarray,
    codecs: list[str],
    plan: Plan,
) -> Iterator[list[dict[str, Any]] | None]:
    """Yields None after each step (for a progress bar), and the rows at the end.

    Raises:
        ValueError: a codec is unknown or does not go with this model, or the text is too short.
    """
    kinds = [CacheKind.parse(name, plan.exact_tokens) for name in codecs]
    about = _about(kinds, _head_dims(model))
    makers: dict[str, MakeCache] = {EXACT: lambda: make_prompt_cache(model)}
    makers |= {kind.name: partial(kind.make, model) for kind in kinds}
    scores = {name: Score() for name in makers}
    for window in windows(tokens, plan):
        _read_window(model, window, plan.first, makers, scores)
        yield None
    for length in plan.needle_lengths:
        haystack = Haystack.make(tokenizer, tokens.tolist(), length, plan.seed, plan.questions)
        for name, score in scores.items():
            score.needles[length] = _ask(model, tokenizer, haystack, makers[name])
            yield None
    yield [about[name] | score.row(scores[EXACT]) for name, score in scores.items()]


def _about(kinds: list[CacheKind], head_dims: list[tuple[int, int]]) -> dict[str, dict[str, Any]]:
    """What a row tells of its cache."""
    exact = {"codec": EXACT, "exact_tokens": None, "bits_per_value": float(EXACT_BITS)}
    compressed = {
        kind.name: {
            "codec": kind.name,
            "exact_tokens": kind.exact_tokens,
            "bits_per_value": round(kind.bits_per_value(head_dims), 4),
        }
        for kind in kinds
    }
    return {EXACT: exact} | compressed


def _head_dims(model: nn.Module) -> list[tuple[int, int]]:
    """(of keys, of values) of each layer that can be compressed.

    Raises:
        ValueError: there is none.
    """
    cache = make_prompt_cache(model)
    model(mx.zeros((1, 1), mx.int32), cache=cache)
    layers = [cache[i] for i in softmax_entries(cache)]
    if not layers:
        raise ValueError("this model has no softmax layer whose cache can be compressed")
    return [(entry.keys.shape[-1], entry.values.shape[-1]) for entry in layers]


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


def _read_window(
    model: nn.Module,
    window: np.ndarray,
    first: int,
    makers: dict[str, MakeCache],
    scores: dict[str, Score],
) -> None:
    caches = {name: make() for name, make in makers.items()}
    x = mx.array(window.astype(np.int32))
    for start in range(0, x.size - 1, CHUNK):
        inputs = x[start : min(start + CHUNK, x.size - 1)]
        skipped = min(max(0, first - start), inputs.size)
        targets = x[start + 1 : start + 1 + inputs.size][skipped:]
        exact = None
        for name, cache in caches.items():
            logits = model(inputs[None], cache=cache)[0, skipped:].astype(mx.float32)
            if targets.size:
                logp = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
                exact = logp if exact is None else exact
                scores[name].add(logp, exact, targets)
            mx.eval([c.state for c in cache])


def _ask(
    model: nn.Module,
    tokenizer: Any,
    haystack: Haystack,
    make_cache: MakeCache,
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
