from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import pytest

from models.architectures import CONFIGS, VOCABULARY, build
from tqstack import demo_model
from tqstack.engine.depth import StepTimes
from tqstack.engine.worker import Worker
from tqstack.models import verification
from tqstack.models.cache_spec import CacheSpec
from tqstack.models.drafts import MOST, NONE, Drafts
from tqstack.models.measure import layer_kinds, measure
from tqstack.models.plan import Machine
from tqstack.models.runtime import Runtime, load_runtime
from tqstack.models.spec import ModelSpec
from tqstack.settings import Settings
from tqstack.turboquant.kv_codecs import KVCodecs


@pytest.fixture(scope="session")
def runtime():
    """The demo model with the compressed cache."""
    return load_runtime(Settings(sidecar_model="demo"))


@pytest.fixture(scope="session")
def headed():
    """The same with the model's own head of multi-token prediction."""
    return load_runtime(Settings(sidecar_model="demo", sidecar_speculation="mtp"))


@pytest.fixture(scope="session")
def text():
    """Tokens of held-out text."""
    return [int(token) for token in demo_model.held_out_tokens()[:40_000]]


@pytest.fixture(scope="session")
def tiny(runtime):
    """Makes runtimes of tiny random models: fast, and of every family."""
    models = cache(build)

    def make(
        name: str = "qwen3-next",
        codecs: str | None = "tq4",
        vocabulary: int = VOCABULARY,
        **cache_options,
    ) -> Runtime:
        spec = ModelSpec.of(name, "", {**CONFIGS[name], "vocab_size": vocabulary})
        own = CacheSpec(KVCodecs.parse(codecs) if codecs else None, **cache_options)
        model = models(name, vocabulary)
        able = not verification.unsupported(model, own.make(model))
        drafts = replace(runtime.drafts, drafters=("lookup",)) if able else NONE
        plan, compressed = measure(spec, model, own, Machine(1 << 30, 256, 4), drafts.tokens)
        return replace(
            runtime,
            spec=replace(spec, layers=layer_kinds(own.make(model))),
            cache=own,
            plan=plan,
            compressed_layers=compressed,
            model=model,
            prefill_step=256,
            fingerprint=f"{name} {own}",
            drafts=drafts,
        )

    return make


@pytest.fixture
def eager(monkeypatch):
    """Workers that draft whenever something can be drafted, as if longer steps took no longer."""
    monkeypatch.setattr(StepTimes, "ratio", lambda *_: 1.0)

    def make(runtime, drafters=("lookup",), **options):
        drafts = Drafts("auto", drafters, None, (1.0,) * (1 + MOST), 1e-9)
        return Worker(replace(runtime, drafts=drafts), **options)

    return make


@pytest.fixture(scope="session")
def noise():
    """Random tokens of the tiny models' vocabulary."""
    rng = random.Random(1)
    return [rng.randrange(VOCABULARY) for _ in range(40_000)]
