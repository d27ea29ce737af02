"""A model's own head of multi-token prediction: loaded from every form; drafts leave no trace."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from models.architectures import CONFIGS, build
from tqstack import demo_model
from tqstack.engine import caches
from tqstack.models import verification
from tqstack.models.adapt import adapt_head
from tqstack.models.cache_spec import CacheSpec
from tqstack.models.layers.drafts import MOST_TOKENS
from tqstack.models.load import load_model
from tqstack.models.mtp import ENTRIES, Head, Predicting, output, text_model
from tqstack.models.mtp_load import load_head
from tqstack.models.planning import plan_spec
from tqstack.models.runtime import load_runtime
from tqstack.models.spec import read_spec
from tqstack.settings import Settings, SettingsError
from tqstack.turboquant.kv_codecs import KVCodecs
from tqstack.weights.codes import make_code
from tqstack.weights.encode import encode
from tqstack.weights.mtp import carry

KINDS = ("qwen3.5", "qwen3.5-moe", "qwen3-next")
PROMPT = [i * 11 % 90 for i in range(30)]


def random_head(name):
    """(model, head, its weights by the checkpoint's names)"""
    model = build(name)
    head = Head(text_model(model).args)
    mx.random.seed(0)
    changed = [
        (path, x + 0.3 * mx.random.normal(x.shape) if "norm" in path else x)
        for path, x in tree_flatten(head.parameters())
    ]
    head.load_weights(changed)
    return model, head, {f"mtp.{path}": x for path, x in changed}


def answers(head, model):
    width = text_model(model).args.hidden_size
    hidden, embedded = (mx.random.normal((1, 5, width), key=mx.random.key(i)) for i in (1, 2))
    return head(hidden, embedded)


def raw(weights, one_by_one):
    """As its makers' checkpoint has them: norms less 1, experts apart, or gates and ups in one."""
    found = {}
    for name, x in weights.items():
        if x.ndim == 1 and "norm" in name:
            found[name] = x - 1
        elif "switch_mlp" not in name:
            found[name] = x
        elif one_by_one:
            path, matrix = name.split("switch_mlp.")
            for i, own in enumerate(x):
                found[f"{path}experts.{i}.{matrix}"] = own
    if not one_by_one and any("switch_mlp" in name for name in weights):
        path = "mtp.layers.0.mlp."
        gate, up, down = (
            weights[f"{path}switch_mlp.{n}_proj.weight"] for n in ("gate", "up", "down")
        )
        found[f"{path}experts.gate_up_proj"] = mx.concatenate([gate, up], axis=1)
        found[f"{path}experts.down_proj"] = down
    return found


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("one_by_one", [True, False])
def test_a_head_is_read_from_a_raw_checkpoint(tmp_path, name, one_by_one):
    model, head, weights = random_head(name)
    stored = {**raw(weights, one_by_one), "x.conv1d.weight": mx.zeros((4, 1, 4))}
    mx.save_safetensors(str(tmp_path / "model-1.safetensors"), stored)
    found = load_head(tmp_path, CONFIGS[name], model)
    assert mx.allclose(answers(found, model), answers(head, model), atol=1e-4)


@pytest.mark.parametrize("code", ["lloyd", "trellis"])
def test_a_converted_head_is_that_of_the_checkpoint_as_codes(tmp_path, code):
    model, head, weights = random_head("qwen3.5-moe")
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    stored = {**raw(weights, False), "x.conv1d.weight": mx.zeros((4, 1, 4))}
    mx.save_safetensors(str(source / "model.safetensors"), stored)
    carry(source, out, make_code(code, 4), lambda matrix, own: encode(matrix, own, 0))
    config = {**CONFIGS["qwen3.5-moe"], "quantization": {"code": code, "seed": 0}}
    found = load_head(out, config, model)
    got, want = answers(found, model), answers(head, model)
    assert mx.linalg.norm(got - want) < 0.3 * mx.linalg.norm(want)
    again = tmp_path / "again"  # converted once more, it is carried as it is
    again.mkdir()
    carry(out, again, make_code(code, 4), lambda matrix, own: encode(matrix, own, 0))
    assert mx.allclose(answers(load_head(again, config, model), model), got, atol=1e-5)


def test_a_head_that_lacks_weights_is_refused_with_what_to_do(tmp_path, monkeypatch):
    for file in demo_model.PATH.iterdir():
        if file.suffix in (".json", ".safetensors", ".jinja"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = dict(mx.load(str(tmp_path / "mtp.safetensors")))
    weights.pop("mtp.norm.weight")
    mx.save_safetensors(str(tmp_path / "mtp.safetensors"), weights)
    with pytest.raises(SettingsError, match="SIDECAR_SPECULATION=lookup"):
        load_runtime(Settings(sidecar_model=str(tmp_path), sidecar_speculation="mtp"))
    (tmp_path / "mtp.safetensors").unlink()
    with pytest.raises(SettingsError, match="hold no multi-token prediction"):
        load_runtime(Settings(sidecar_model=str(tmp_path), sidecar_speculation="mtp"))


@pytest.mark.parametrize("name", KINDS)
def test_drafts_are_what_the_head_says_and_leave_the_cache_as_it_was(name):
    body, head, _ = random_head(name)
    model, spec = Predicting(body, head), CacheSpec(KVCodecs.parse("tq4"))
    plain = spec.make(body)
    want = [body(mx.array([[token]]), cache=plain) for token in PROMPT]
    caches_of = [spec.make(model) for _ in range(2)]
    for cache, count in zip(caches_of, (len(PROMPT), 20), strict=True):
        assert mx.allclose(
            model(mx.array([PROMPT[:count]]), cache=cache),
            mx.concatenate(want[:count], axis=1),
            atol=1e-3,
        )
        caches.settle(cache)
    batch = caches.merged(caches_of)
    found = model.draft(mx.array([4, 5]), batch, 3, [9, 1])
    assert batch[-ENTRIES].lengths == [len(PROMPT), 20]
    assert mx.array_equal(found, model.draft(mx.array([4, 5]), batch, 3, [9, 1]))
    for i, (count, token) in enumerate(((len(PROMPT), 4), (20, 5))):
        assert found[i].tolist()[:2] == plainly(body, head, PROMPT[:count], token, 2)


@pytest.mark.parametrize("name", KINDS)
def test_pairs_that_waited_are_those_that_a_prompt_stores(name):
    body, head, _ = random_head(name)
    adapt_head(head)
    model, spec, token = Predicting(body, head), CacheSpec(KVCodecs.parse("tq4")), mx.array([7])
    at_once, one_by_one = spec.make(model), spec.make(model)
    model(mx.array([PROMPT]), cache=at_once)
    model(mx.array([PROMPT[:9]]), cache=one_by_one)
    for i, fed in enumerate(PROMPT[9:], 10):
        model(mx.array([[fed]]), cache=one_by_one)
        assert i - MOST_TOKENS <= one_by_one[-ENTRIES].lengths[0] < i
    model.settle(one_by_one)
    assert one_by_one[-ENTRIES].lengths == at_once[-ENTRIES].lengths == [len(PROMPT)]
    tails = (cache[-ENTRIES].tails.part(0) for cache in (one_by_one, at_once))
    for got, want in zip(*tails, strict=True):
        stored = slice(0, len(PROMPT))
        assert mx.allclose(got[:, :, stored], want[:, :, stored], atol=1e-4)
    drafts = (model.draft(token, cache, 3, [9]) for cache in (one_by_one, at_once))
    assert mx.array_equal(*drafts)


def plainly(body, head, prompt, token, count):
    """Drafts, all pairs computed anew for each."""
    text = text_model(body)
    hidden = text.model(mx.array([prompt]))
    shifted = mx.concatenate([mx.zeros_like(hidden[:, :1]), hidden], axis=1)
    tokens, found = [*prompt, token], []
    for _ in range(count):
        own = head(shifted, text.model.embed_tokens(mx.array([tokens])))[:, -1:]
        found.append(int(output(text, own)[0, -1].argmax().item()))
        tokens.append(found[-1])
        shifted = mx.concatenate([shifted, own], axis=1)
    return found


def test_the_hidden_state_behind_accepted_tokens_is_kept():
    body, head, _ = random_head("qwen3.5")
    model, spec = Predicting(body, head), CacheSpec(KVCodecs.parse("tq4"))
    cache, want = spec.make(model), spec.make(model)
    for one in (cache, want):
        mx.eval(model(mx.array([PROMPT]), cache=one))
    given = verification.revocable(cache, [4])
    mx.eval(model(mx.array([[7, 8, 9, 1]]), cache=given))
    mx.eval(verification.accept(given, [4], [2]))
    for token in (7, 8):
        mx.eval(model(mx.array([[token]]), cache=want))
    assert mx.allclose(cache[-1][0], want[-1][0], atol=1e-3)
    drafts = (model.draft(mx.array([3]), one, 3, [9]).tolist() for one in (cache, want))
    assert next(drafts) == next(drafts)


def test_the_embedded_models_head_is_small_and_says_much_of_what_comes():
    file = demo_model.PATH / "mtp.safetensors"
    assert file.stat().st_size <= 3e6
    body = load_model("demo").model
    head = load_head(demo_model.PATH, read_spec("demo").config, body)
    text, tokens = text_model(body), mx.array(demo_model.held_out_tokens()[None, 3000:3400])
    tokens = tokens.astype(mx.int32)
    hidden = text.model(tokens)
    drafts = output(text, head(hidden[:, :-1], text.model.embed_tokens(tokens[:, 1:]))).argmax(-1)
    same = mx.mean(drafts == output(text, hidden)[:, 1:].argmax(-1))
    assert same > 0.4


def test_the_plan_counts_the_head_and_health_does_not():
    settings = Settings(sidecar_model="demo", sidecar_speculation="mtp")
    runtime, without = load_runtime(settings), load_runtime(Settings(sidecar_model="demo"))
    assert isinstance(runtime.model, Predicting) and isinstance(without.model, nn.Module)
    assert runtime.describe() == without.describe()
    assert runtime.plan.per_token * 2 == without.plan.per_token * 3
    assert runtime.plan.weights > without.plan.weights
    assert runtime.fingerprint != without.fingerprint
    spec = read_spec("demo")
    planned = plan_spec(settings, spec)
    for name in ("weights", "per_token", "tail", "drafts", "workspace"):
        assert getattr(planned, name) == pytest.approx(getattr(runtime.plan, name), rel=0.01)
    assert runtime.drafts.drafters == ("lookup", "mtp")
    assert without.drafts.drafters == ("lookup",)
