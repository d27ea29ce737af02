"""TQ_KV_CODE=auto takes the trellis code where its search is cheap beside the model."""

from __future__ import annotations

import pytest

from tqstack.models import search_cost
from tqstack.models.runtime import load_runtime
from tqstack.settings import Settings
from tqstack.turboquant.kv_codecs import KVCodecs


@pytest.fixture
def on_gpu(monkeypatch):
    """As if the search had a kernel: the search of a CPU, which is slow."""
    monkeypatch.setattr(search_cost, "gpu_dialect", lambda: "cuda")
    monkeypatch.setattr(search_cost, "trusted", lambda *_: True)
    monkeypatch.setattr(search_cost, "TRIALS", 1)


def load(**changes):
    return load_runtime(Settings(sidecar_model="demo", **changes))


def affords(runtime):
    trellis = KVCodecs.parse("tcq4-l8")
    return search_cost.affords(trellis, runtime.model, runtime.new_cache, 256)


@pytest.fixture(scope="module")
def lloyd():
    return load(tq_kv_code="lloyd")


def test_a_search_that_takes_as_long_as_the_model_is_not_affordable(lloyd, on_gpu):
    assert not affords(lloyd)


@pytest.mark.parametrize("seconds, affordable", [(1e-6, True), (1.0, False)])
def test_the_share_of_the_time_decides(lloyd, on_gpu, monkeypatch, seconds, affordable):
    monkeypatch.setattr(search_cost, "_search", lambda *_: seconds)
    assert affords(lloyd) == affordable


@pytest.mark.parametrize("affordable, codec", [(True, "tcq4-l8"), (False, "tq4")])
def test_auto_follows_what_was_measured(monkeypatch, affordable, codec):
    monkeypatch.setattr("tqstack.models.runtime.affords", lambda *_: affordable)
    assert load().codec == codec


def test_what_the_trellis_code_does_not_have_leaves_it_out(monkeypatch):
    monkeypatch.setattr("tqstack.models.runtime.affords", lambda *_: True)
    assert load(tq_kv_code="lloyd").codec == "tq4"
    assert load(tq_kv_group_size=64).codec == "tq4-g64"
    assert load(tq_kv_bits="5").codec == "tq5"


def test_without_a_gpu_nothing_is_measured():
    assert load().codec == "tq4"
