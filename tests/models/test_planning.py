"""The plan from files alone, against bytes that a loaded model really takes."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.models.cache import QuantizedKVCache

from commands import called
from tqstack import demo_model
from tqstack.attention.hybrid import make_turboquant_cache
from tqstack.bench import shapes
from tqstack.cli.plan import advice
from tqstack.models.families import read_geometry
from tqstack.models.geometry import UnknownGeometryError
from tqstack.models.plan import Plan, mac, prefill_workspace
from tqstack.models.planning import plan_spec, read_facts, weight_bytes
from tqstack.models.runtime import load_runtime
from tqstack.models.safetensors import BrokenFileError, model_tensors, read_header
from tqstack.models.spec import ModelSpec, read_spec
from tqstack.settings import Settings, SettingsError

TOLERANCE = 0.05
MAC = mac(32 * 10**9)
SPEC = read_spec("demo")


def settings(**changes) -> Settings:
    return Settings(sidecar_model="demo", **changes)


@pytest.fixture(scope="module")
def demo():
    return load_runtime(settings())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tq_kv_bits": "k4v3"},
        {"tq_kv_bits": "3.5"},
        {"tq_boundary_layers": 1},
        {"tq_cache_version": "affine", "tq_kv_bits": "8"},
        {"tq_cache_version": "none"},
        {"tq_exact_tokens": 0},
        {"tq_cache_version": "native"},
        {"tq_cache_version": "native", "tq_kv_bits": "8", "tq_boundary_layers": 1},
        {"sidecar_memory_mb": 900},
    ],
)
def test_the_demo_is_planned_as_the_loaded_one_measures(changes):
    facts, runtime = read_facts(settings(**changes)), load_runtime(settings(**changes))
    for field in fields(Plan):
        planned, measured = (getattr(plan, field.name) for plan in (facts.plan, runtime.plan))
        assert planned == pytest.approx(measured, rel=TOLERANCE), field.name
    assert facts.describe() == {**runtime.describe(), "compressed_layers": []}
    assert facts.codec == runtime.codec


def test_the_budget_is_what_the_settings_leave():
    assert plan_spec(settings(sidecar_memory_mb=900), SPEC).budget == 900 << 20
    assert plan_spec(settings(sidecar_memory_mb=900), SPEC, MAC).budget == MAC.budget


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"tq_kv_bits": "3.5"}, "allowed: 2, 3, 4, 5, 6, 8"),
        ({"tq_kv_bits": "k8v4"}, "same bits for keys and values"),
        ({"tq_kv_bits": "7"}, "allowed: 2, 3, 4, 5, 6, 8"),
        ({"tq_kv_bits": "3"}, "cannot store heads of 256 in TQ_KV_BITS=3"),  # as mlx-lm has it
        ({"tq_kv_group_size": 16}, "allowed: 32, 64, 128"),
    ],
)
def test_what_mlx_lms_quantized_cache_cannot_do_is_refused_with_a_sentence(changes, said):
    for make in (read_facts, load_runtime):
        with pytest.raises(SettingsError, match=said):
            make(settings(tq_cache_version="native", **changes))


def test_mlx_lms_quantized_cache_serves_one_request_at_a_time_and_says_so(demo):
    runtime = load_runtime(settings(tq_cache_version="native", tq_boundary_layers=0))
    kinds = [type(entry) for entry in runtime.new_cache()]
    assert [i for i, kind in enumerate(kinds) if kind is QuantizedKVCache] == [3, 7]
    assert runtime.batch_size == 1 and runtime.codec == "mlx4-g64"
    assert "one request at a time" in runtime.describe()["note"]
    assert "note" not in demo.describe()


def unknown(config):
    raise UnknownGeometryError("no formula")


@pytest.mark.parametrize("version", ["turboquant", "none"])
def test_a_model_without_a_formula_is_measured_when_loaded(version, monkeypatch):
    known = load_runtime(settings(tq_cache_version=version))
    monkeypatch.setattr("tqstack.models.spec.read_geometry", unknown)
    changed = settings(tq_cache_version=version)
    facts, runtime = read_facts(changed), load_runtime(changed)
    assert facts.plan is None and facts.codec == known.codec
    assert facts.describe() == {"id": "demo", "context_length": 32768, "compressed_layers": []}
    assert runtime.describe() == known.describe()
    for name in ("weights", "per_token", "per_token_fp16", "recurrent", "tail", "padded"):
        assert getattr(runtime.plan, name) == getattr(known.plan, name)
    # Measured on a short context, where attention takes less than it may.
    step = runtime.prefill_step
    assert known.plan.workspace / 4 < runtime.plan.workspace < known.plan.workspace
    assert runtime.workspace(step // 2) * 2 == pytest.approx(runtime.plan.workspace, abs=2)


def test_a_prefill_takes_no_more_than_planned_and_not_much_less(demo):
    plan, step, context = demo.plan, demo.prefill_step, 2048
    cache = demo.new_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for start in range(0, context, step):
        demo.model(mx.array([[5 + i % 1000 for i in range(start, start + step)]]), cache=cache)
        mx.eval([entry.state for entry in cache])
    held = sum(entry.nbytes for entry in cache)
    assert held + plan.drafts == pytest.approx(plan.request_bytes(context), rel=TOLERANCE)
    used = mx.get_peak_memory() - before - held
    assert plan.workspace / 3 < used < plan.workspace


@pytest.fixture(scope="module")
def small_35b(tmp_path_factory):
    """Four layers of the 35B-A3B with 8 of its 256 experts, built and saved: (config, folder)."""
    folder = tmp_path_factory.mktemp("small35b")
    sizes = {"layers": 4, "num_experts": 8, "vocab_size": 4096}
    model = shapes.build("qwen3.5-35b-a3b", **sizes)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return model, shapes.shape("qwen3.5-35b-a3b", **sizes), folder


@pytest.mark.parametrize("tokens", [64, 256, 512])
def test_a_smaller_prefill_step_takes_the_workspace_that_is_told(demo, tokens):
    cache = demo.new_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    demo.model(mx.zeros((1, tokens), mx.int32), cache=cache)
    mx.eval([entry.state for entry in cache])
    used = mx.get_peak_memory() - before - sum(entry.nbytes for entry in cache)
    assert used < demo.workspace(tokens) <= demo.plan.workspace


def test_the_35b_geometry_is_planned_as_four_of_its_layers_measure(small_35b):
    model, config, folder = small_35b
    weights = weight_bytes(model_tensors(folder), config)
    geometry = read_geometry(config)
    plan = plan_spec(settings(), ModelSpec.of("small", "", config), MAC, weights)
    softmax = [i for i, layer in enumerate(geometry.layers) if layer.kind == "softmax"]
    cache = make_turboquant_cache(model, 4)
    mx.eval(model(mx.array([[1, 2, 3, 4]]), cache=cache))
    for i in softmax:  # quantized products are slow on a CPU: no more of the model
        for tokens in (400, 1):
            one = mx.zeros((1, 2, tokens, 256), mx.bfloat16)
            cache[i].update_and_fetch(one, one)
        mx.eval(cache[i].state)
    packed = 256
    kv = sum(cache[i].nbytes for i in softmax)
    states = sum(entry.nbytes for entry in cache) - kv
    loaded = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    assert plan.weights == pytest.approx(loaded, rel=TOLERANCE)
    assert plan.per_token * packed + plan.tail == pytest.approx(kv, rel=TOLERANCE)
    assert plan.recurrent == pytest.approx(states, rel=TOLERANCE)
    assert plan.per_token_fp16 == 2048


def test_the_whole_35b_takes_what_its_layers_take_together():
    spec = ModelSpec.of("35b", "", shapes.shape("qwen3.5-35b-a3b"))
    plan = plan_spec(settings(), spec, MAC, weights=0)
    assert spec.softmax_layers == list(range(3, 40, 4))
    assert (plan.per_token, plan.per_token_fp16) == (10 * 2 * 2 * 130, 20_480)
    assert plan.recurrent == 30 * (32 * 128 * 128 * 4 + 3 * 8192 * 2)


def test_workspace_grows_with_the_step_and_not_with_the_context():
    geometry = read_geometry(shapes.shape("qwen3.5-35b-a3b"))
    small, large = (prefill_workspace(geometry, step, 2) for step in (512, 2048))
    # The wall that tiles take away: 16 heads x 2048 x 131,072 scores of 2 bytes.
    assert small < large < 16 * 2048 * 131_072 * 2 / 3


def test_a_file_that_was_cut_short_is_found_by_its_header(tmp_path):
    whole = demo_model.PATH / "model.safetensors"
    assert sum(t.nbytes for t in read_header(whole).values()) < whole.stat().st_size
    cut = tmp_path / "model.safetensors"
    for content in (whole.read_bytes()[:-1], b"", b"<html>404</html>"):
        cut.write_bytes(content)
        with pytest.raises(BrokenFileError, match=r"is not whole .* download the model again"):
            read_header(cut)


def test_a_model_that_lacks_a_file_of_its_index_is_not_whole(tmp_path):
    (tmp_path / "model-1.safetensors").symlink_to(demo_model.PATH / "model.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BrokenFileError, match=r"lacks model-2\.safetensors"):
        model_tensors(tmp_path)


@pytest.mark.parametrize(
    "model_type, changes, why",
    [
        ("odd", {}, "its layers are not known"),
        ("deepseek_v3", {"kv_lora_rank": 512}, "kv_lora_rank in its config"),
        ("llama", {"hidden_size": None}, "no hidden_size in its config"),
    ],
)
def test_a_model_without_a_formula_is_refused_not_guessed(model_type, changes, why):
    sizes = {"num_attention_heads": 4, "hidden_size": 64, "num_hidden_layers": 1}
    with pytest.raises(UnknownGeometryError, match=f"{why}.*tqstack doctor"):
        read_geometry({"model_type": model_type, **sizes, "intermediate_size": 8, **changes})


@examples(deadline=None, max_examples=40)  # each reads the model's files
@given(st.integers(1, 40_000), st.integers(0, 200_000_000))
def test_advice_is_given_only_if_needed_and_what_it_names_fits(tokens, room):
    one = plan_spec(settings(), SPEC)

    def planned(changed: Settings) -> Plan:
        return replace(plan_spec(changed, SPEC), budget=one.weights + one.workspace + room)

    tight = planned(settings())
    found = list(advice(settings(), planned, tight, 32768, tokens))
    assert bool(found) == (not tight.fits(tokens) or tokens > 32768)
    for line in found:
        if line.startswith("--context"):
            named = int(line.split()[1].rstrip(":"))
            assert named == 32768 or tight.fits(named)
        if line.startswith("TQ_KV_BITS="):
            bits = line.split()[0].partition("=")[2]
            assert planned(settings(tq_kv_bits=bits)).fits(min(tokens, 32768))


def test_the_command_tells_a_mac_of_32_gb_what_it_can_hold(tmp_path):
    whole = ["--shape", "qwen3.5-35b-a3b", "--context", "262144", "--json"]
    small = called(tmp_path, "plan", *whole, "--memory", "24")
    assert small.exit_code == 1
    assert "smaller model" in json.loads(small.stdout)["advice"][0]
    result = called(tmp_path, "plan", *whole, "--memory", "32")
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["fits"], report
    assert report["kv"] == 262_144 * 5200
    assert not called(tmp_path, "plan", *whole[:-1], "--memory", "32").stdout.count("does not fit")


def test_the_command_says_what_to_do_about_a_model_that_is_not_here(tmp_path):
    result = called(tmp_path, "plan", "nobody/nothing", "--context", "1000")
    assert result.exit_code == 78 and "tqstack model download" in result.stderr
