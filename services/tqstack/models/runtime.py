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

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from tqstack.attention.pool import Pool
from tqstack.models import verification
from tqstack.models.cache_spec import CacheSpec, read_cache_spec
from tqstack.models.device import this_machine
from tqstack.models.drafts import MOST, NONE, Drafts
from tqstack.models.load import load_model
from tqstack.models.measure import layer_kinds, measure
from tqstack.models.mtp import Predicting
from tqstack.models.mtp_load import load_head
from tqstack.models.plan import Machine, Plan, logits_bytes, prefill_workspace
from tqstack.models.planning import ModelFacts, head_of
from tqstack.models.search_cost import affords
from tqstack.models.spec import ModelSpec
from tqstack.models.split import (
    NotSplitError,
    Part,
    common_plan,
    divided,
    joined,
    same,
    slowest,
    whole_layers,
)
from tqstack.settings import Settings, SettingsError
from tqstack.turboquant.kv_codecs import KVCodecs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Runtime(ModelFacts):
    """What the engine runs.

    Attributes:
        prefill_step: tokens of a prefill step that the plan counts with.
        batch_size: most requests that are generated for at once.
        default_max_tokens: of an answer, where the request sets no limit.
        prefix_cache_bytes: of prompts that are kept for their next turn.
        fingerprint: the same where the same tokens lead to the same cache.
        drafts: what can be drafted.
        part: of the model that this process has; None: all of it.
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
    part: Part | None = None

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
    def facts(self) -> ModelFacts:
        """What is told about the model when it is no longer in memory."""
        return ModelFacts(self.spec, self.cache, self.plan, self.compressed_layers)

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


def load_runtime(settings: Settings, group: mx.distributed.Group | None = None) -> Runtime:
    """Load the model, prove that its cache is compressed, and measure what that cache holds.

    Args:
        group: of ranks that divide the model; each loads its part, at the same time.

    Raises:
        ModelNotFoundError, NotCompressedError, NotSplitError, SettingsError: the sidecar cannot
            serve; the message says why and what to do.
    """
    cache, machine = read_cache_spec(settings), this_machine(settings.sidecar_memory_mb)
    spec, model, tokenizer, part = load_model(settings.model_name, cache, group=group)
    if group is None:
        cache = _closest(settings, cache, model, machine.prefill_step)
    own = len(cache.make(model))
    headed = group is None and bool(head_of(settings, spec, cache))
    found = fingerprint(spec, cache, machine, part, headed=headed)
    if headed:
        model = _predicting(spec, model)
        spec = replace(spec, geometry=spec.geometry and spec.geometry.with_head)
    spec = divided(spec, part) if part else spec
    drafts = _drafts(settings, cache, model)
    plan, compressed = measure(spec, model, cache, machine, drafts.tokens)
    kinds = layer_kinds(cache.make(model)[:own])
    compressed = tuple(i for i in compressed if i < own)
    if group is not None and part is not None:
        if not same(group, fingerprint(spec, cache, machine, part, times=False)):
            raise NotSplitError(
                f"the ranks do not have the same files of {spec.id}, the same settings and the "
                "same MLX: copy the model to all hosts, and see tqstack doctor"
            )
        found = joined(group, found)
        plan = common_plan(plan, group)
        drafts = replace(drafts, step_seconds=slowest(group, drafts.step_seconds))
        kinds, compressed = whole_layers(part, kinds, compressed)
    if cache.native:
        log.info("mlx-lm's quantized cache cannot be batched: requests are served one by one")
    return Runtime(
        spec=replace(spec, layers=kinds),
        cache=cache,
        plan=plan,
        compressed_layers=compressed,
        model=model,
        tokenizer=tokenizer,
        prefill_step=machine.prefill_step,
        batch_size=1 if cache.native else settings.sidecar_max_batch,
        default_max_tokens=settings.sidecar_max_tokens,
        prefix_cache_bytes=settings.sidecar_prefix_cache_mb << 20,
        fingerprint=found,
        drafts=drafts,
        part=part,
    )


def _predicting(spec: ModelSpec, model: nn.Module) -> Predicting:
    """The model with its head.

    Raises:
        SettingsError: its files hold another one.
    """
    try:
        return Predicting(model, load_head(Path(spec.path), spec.config, model))
    except ValueError as error:
        raise SettingsError(
            f"the multi-token prediction in {spec.path} is not of this model's kind ({error}); "
            "SIDECAR_SPECULATION=lookup runs without it"
        ) from None


def _drafts(settings: Settings, cache: CacheSpec, model: nn.Module) -> Drafts:
    """What SIDECAR_SPECULATION asks for, as far as this model can have it.

    Raises:
        SettingsError: it asks for drafts, and there can be none.
    """
    mode = settings.sidecar_speculation
    if mode == "0":
        return NONE
    if mode == "mtp" and not isinstance(model, Predicting):
        raise SettingsError(
            "SIDECAR_SPECULATION='mtp': its files hold no multi-token prediction (mtp.*) of a "
            "known kind, its cache is not compressed, TQ_BOUNDARY_LAYERS is not 0, or ranks divide "
            "the model; allowed: auto, lookup, 0"
        )
    new_cache: Callable[[], list[Any]] = partial(cache.make, model)
    if why_not := verification.unsupported(model, new_cache()):
        if mode != "auto":
            raise SettingsError(f"SIDECAR_SPECULATION={mode!r}: {why_not}; allowed: auto, 0")
        return Drafts(mode, why_not=why_not)
    seconds = verification.step_seconds(model, new_cache, 1 + MOST)
    if not isinstance(model, Predicting):
        return Drafts(mode, ("lookup",), None, seconds, 0.0)
    each = verification.draft_seconds(model, new_cache)
    return Drafts(mode, ("lookup", "mtp"), None, seconds, each)


def fingerprint(
    spec: ModelSpec,
    cache: CacheSpec,
    machine: Machine,
    part: Part | None = None,
    times: bool = True,
    headed: bool = False,
) -> str:
    """What makes a cache's numbers: the model's files, the codecs with their seeds, the type that
    is computed in, the version of MLX, and how the model is divided.

    Args:
        times: when the files were written counts, too; copies on other machines differ in that.
        headed: the cache has the entries of a head of multi-token prediction, too.
    """
    files = sorted(Path(spec.path).glob("*.safetensors")) if spec.path else []
    weights = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns if times else 0) for file in files
    ]
    config = json.dumps(spec.config, sort_keys=True, default=str)
    parts = (part.how, part.ranks) if part else ()
    what = (spec.id, config, weights, cache, machine.value_bytes, version("mlx"), headed, *parts)
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
