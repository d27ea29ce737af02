"""A loaded model with everything that the engine decides by: cache, limits, memory plan."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from tqstack.attention.pool import Pool
from tqstack.models import verification
from tqstack.models.cache_spec import CacheSpec, read_cache_spec
from tqstack.models.device import this_machine
from tqstack.models.drafts import MOST, NONE, Drafts
from tqstack.models.load import load_model
from tqstack.models.measure import layer_kinds, measure
from tqstack.models.plan import Machine, Plan, logits_bytes, prefill_workspace
from tqstack.models.planning import Facts
from tqstack.models.search_cost import affords
from tqstack.models.spec import ModelSpec
from tqstack.settings import Settings, SettingsError
from tqstack.turboquant.kv_codecs import KVCodecs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Runtime(Facts):
    """What the engine runs.

    Attributes:
        prefill_step: tokens of a prefill step that the plan counts with.
        batch_size: most requests that are generated for at once.
        default_max_tokens: of an answer, where the request sets no limit.
        prefix_cache_bytes: of prompts that are kept for their next turn.
        fingerprint: the same where the same tokens lead to the same cache.
        drafts: what can be drafted.
    """

    plan: Plan
    model: nn.Module
    tokenizer: TokenizerWrapper
    prefill_step: int
    batch_size: int
    default_max_tokens: int
    prefix_cache_bytes: int
    fingerprint: str
    drafts: Drafts = NONE

    @property
    def codecs(self) -> KVCodecs | None:
        """None: the cache is not compressed."""
        return self.cache.codecs

    @property
    def boundary_layers(self) -> int:
        return self.cache.boundary_layers

    @property
    def exact_tokens(self) -> int:
        return self.cache.exact_tokens

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        return frozenset(self.tokenizer.eos_token_ids)

    @property
    def facts(self) -> Facts:
        """What is told about the model when it is no longer in memory."""
        return Facts(self.spec, self.cache, self.plan, self.compressed_layers)

    def new_cache(self, pool: Pool | None = None) -> list[Any]:
        """The cache of one sequence.

        Args:
            pool: where compressed blocks come from; None: the model's own, without limit.
        """
        return self.cache.make(self.model, pool)

    def workspace(self, tokens: int) -> int:
        """Bytes that a prefill step of `tokens` needs beside weights and caches."""
        if self.spec.geometry is None:
            return -(-self.plan.workspace * tokens // self.prefill_step)
        value_bytes, drawn = this_machine().value_bytes, self.drafts.tokens
        return prefill_workspace(self.spec.geometry, tokens, value_bytes, drawn)

    def logits_bytes(self, drawn: int, measured: int) -> int:
        """Bytes of logits and what is made of them, beyond those of one sequence, which the
        workspace counts; parameters as in `plan.logits_bytes`."""
        vocabulary, each = self.spec.vocabulary, self.drafts.tokens
        one = logits_bytes(vocabulary, each)
        return max(0, logits_bytes(vocabulary, drawn * each, measured) - one)


def load_runtime(settings: Settings) -> Runtime:
    """Load the model, prove that its cache is compressed, and measure what that cache holds.

    Raises:
        ModelNotFoundError, NotCompressedError, SettingsError: the sidecar cannot serve; the message
            says why and what to do.
    """
    cache, machine = read_cache_spec(settings), this_machine(settings.sidecar_memory_mb)
    spec, model, tokenizer = load_model(settings.model_name, cache)
    cache = _closest(settings, cache, model, machine.prefill_step)
    drafts = _drafts(settings, cache, model)
    plan, compressed = measure(spec, model, cache, machine, drafts.tokens)
    if cache.native:
        log.info("mlx-lm's quantized cache cannot be batched: requests are served one by one")
    return Runtime(
        spec=replace(spec, layers=layer_kinds(cache.make(model))),
        cache=cache,
        plan=plan,
        compressed_layers=compressed,
        model=model,
        tokenizer=tokenizer,
        prefill_step=machine.prefill_step,
        batch_size=1 if cache.native else settings.sidecar_max_batch,
        default_max_tokens=settings.sidecar_max_tokens,
        prefix_cache_bytes=settings.sidecar_prefix_cache_mb << 20,
        fingerprint=fingerprint(spec, cache, machine),
        drafts=drafts,
    )


def _drafts(settings: Settings, cache: CacheSpec, model: nn.Module) -> Drafts:
    """What SIDECAR_SPECULATION asks for, as far as this model can have it.

    Raises:
        SettingsError: it asks for drafts, and there can be none.
    """
    mode = settings.sidecar_speculation
    if mode == "0":
        return NONE
    new_cache: Callable[[], list[Any]] = partial(cache.make, model)
    if why_not := verification.unsupported(model, new_cache()):
        if mode != "auto":
            raise SettingsError(f"SIDECAR_SPECULATION={mode!r}: {why_not}; allowed: auto, 0")
        return Drafts(mode, why_not=why_not)
    seconds = verification.step_seconds(model, new_cache, 1 + MOST)
    return Drafts(mode, ("lookup",), None, seconds)


def fingerprint(spec: ModelSpec, cache: CacheSpec, machine: Machine) -> str:
    """What makes a cache's numbers: the model's files, the codecs with their seeds, the type that
    is computed in, and the version of MLX."""
    files = sorted(Path(spec.path).glob("*.safetensors")) if spec.path else []
    weights = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    config = json.dumps(spec.config, sort_keys=True, default=str)
    what = (spec.id, config, weights, cache, machine.value_bytes, version("mlx"))
    return hashlib.blake2b(repr(what).encode(), digest_size=16).hexdigest()


def _closest(
    settings: Settings, cache: CacheSpec, model: nn.Module, prompt_tokens: int
) -> CacheSpec:
    """TQ_KV_CODE=auto: the trellis code where its search is affordable here."""
    if settings.tq_kv_code != "auto" or settings.tq_cache_version != "turboquant":
        return cache
    try:
        trellis = read_cache_spec(settings, "trellis")
    except SettingsError:  # its options, or bits, are another code's
        return cache
    assert trellis.codecs is not None
    new_cache: Callable[[], list[Any]] = partial(cache.make, model)
    return trellis if affords(trellis.codecs, model, new_cache, prompt_tokens) else cache
