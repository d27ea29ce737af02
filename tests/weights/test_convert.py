"""Conversions: real files, loaded by mlx-lm, interrupted, refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from tqstack import demo_model
from tqstack.models.load import expand
from tqstack.weights import rotation
from tqstack.weights.codes import make_code
from tqstack.weights.convert import ConversionError, Options, convert
from tqstack.weights.layers import Coded, CompressedSwitchLinear
from tqstack.weights.recipe import layers_of, make_recipe, shape_of
from tqstack.weights.shards import DiskFullError, Group, Shards

FAMILIES = ["llama", "qwen3-moe", "qwen3.5-moe", "gpt-oss", "nemotron-h", "gemma3"]
LLOYD = Options(4, "lloyd")


def digests(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def load(folder: Path):
    return mlx_lm.load(str(folder), lazy=True)[0]


def tensors(folder: Path) -> dict[str, mx.array]:
    held: list[Any] = [mx.load(str(file)) for file in folder.glob("model*.safetensors")]
    return {name: array for part in held for name, array in part.items()}


def logits(model, tokens) -> np.ndarray:
    return np.array(model(tokens).astype(mx.float32))


@pytest.fixture(scope="module")
def demo_lloyd(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "lloyd4"
    convert(demo_model.PATH, folder, LLOYD)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_model_gives_the_logits_of_its_dequantised_weights(family, folder_of, tmp_path):
    converted = convert(folder_of(family), tmp_path / "out", LLOYD)
    model = load(tmp_path / "out")
    coded = [m for m in model.modules() if isinstance(m, Coded)]
    assert len(coded) == len(converted.recipe.bits) > 0
    model.set_dtype(mx.float32, lambda dtype: dtype == mx.bfloat16)
    for layer in coded:
        layer.dtype = mx.float32
    for tokens in (mx.array([[3, 5, 7]]), mx.arange(2 * 40).reshape(2, 40) % 100):  # few, sorted
        found = logits(model, tokens)
        plain = load(tmp_path / "out")
        expand(plain)
        wanted = logits(plain, tokens)
        # Inputs are halves on their way into a coded layer.
        assert np.abs(found - wanted).max() < 2e-2 * np.abs(wanted).max()


def test_experts_stay_coded_and_batch_like_one_by_one(folder_of, tmp_path):
    convert(folder_of("qwen3-moe"), tmp_path / "out", LLOYD)
    model = load(tmp_path / "out")
    assert sum(isinstance(m, CompressedSwitchLinear) for m in model.modules()) == 6
    tokens = mx.arange(6 * 8).reshape(6, 8) % 100
    together = logits(model, tokens)
    for row, alone in zip(tokens, together, strict=True):
        np.testing.assert_allclose(logits(model, row[None])[0], alone, atol=0.05, rtol=0.05)


def test_routers_and_the_gates_of_recurrent_layers_are_kept(folder_of, tmp_path):
    converted = convert(folder_of("qwen3.5-moe"), tmp_path / "out", LLOYD)
    names = {path.rpartition(".")[2] for path in converted.recipe.kept}
    assert names == {"gate", "shared_expert_gate", "in_proj_a", "in_proj_b"}
    model = load(tmp_path / "out")
    source = load(folder_of("qwen3.5-moe"))
    ours, theirs = layers_of(model), layers_of(source)
    for path in converted.recipe.kept:
        assert ours[path]["weight"].shape == theirs[path]["weight"].shape


def test_affine_sources_are_decoded_first_and_their_routers_end_in_16_bits(folder_of, tmp_path):
    source = tmp_path / "affine"
    mlx_lm.convert(str(folder_of("qwen3-moe")), str(source), quantize=True, q_bits=8)
    convert(source, tmp_path / "ours", LLOYD)
    convert(folder_of("qwen3-moe"), tmp_path / "direct", LLOYD)
    for name in ("ours", "direct"):
        model = load(tmp_path / name)
        gates = [m for p, m in layers_of(model).items() if p.endswith("mlp.gate")]
        assert gates and all(not hasattr(gate, "bits") for gate in gates)


def test_a_killed_conversion_goes_on_to_identical_files(tmp_path):
    """Killed at any point: here after files of 1 MB."""
    script = (
        "import sys, tqstack.weights.shards as shards; shards.SHARD_BYTES = 1 << 20\n"
        "from pathlib import Path\n"
        "from tqstack import demo_model\n"
        "from tqstack.weights.convert import Options, convert\n"
        "convert(demo_model.PATH, Path(sys.argv[1]), Options(4, 'lloyd'))"
    )

    def start(folder: Path) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", script, str(folder)])

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(whole).wait() == 0
    files, kills = len(list(whole.glob("model-*"))), 0
    assert files > 4
    for written in range(1, files, 5):
        process = start(broken)
        while process.poll() is None and len(list(broken.glob("model-*.safetensors"))) < written:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        assert not (broken / "config.json").exists() or process.returncode == 0
    assert start(broken).wait() == 0 and kills
    assert digests(broken) == digests(whole)


def test_a_folder_belongs_to_one_conversion_at_a_time(folder_of, tmp_path):
    source, refused = folder_of("llama"), []

    def again(done: int, total: int) -> None:
        with pytest.raises(ConversionError, match="another conversion is writing"):
            convert(source, tmp_path / "out", LLOYD)
        refused.append(done)

    convert(source, tmp_path / "out", LLOYD, progress=again)
    assert refused
    mlx_lm.load(str(tmp_path / "out"), lazy=True)


def test_an_unfinished_folder_is_no_model_and_takes_no_other_options(tmp_path, monkeypatch):
    folder = tmp_path / "out"

    def full(*_):
        raise DiskFullError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(Shards, "write_index", full)
        with pytest.raises(DiskFullError):
            convert(demo_model.PATH, folder, LLOYD)
    with pytest.raises(Exception, match=r"config.json"):
        mlx_lm.load(str(folder))
    with pytest.raises(ConversionError, match="other options"):
        convert(demo_model.PATH, folder, Options(3, "lloyd"))
    convert(demo_model.PATH, folder, LLOYD)
    assert not (folder / "conversion.json").exists()


def test_a_full_disk_stops_before_a_weight_is_coded(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DiskFullError, match="still to be written"):
        Shards(tmp_path, [Group("a", {"a.weight": 5000})])


def test_what_cannot_be_converted_is_refused_and_nothing_is_left(tmp_path, demo_lloyd):
    with pytest.raises(ConversionError, match="converted already"):
        convert(demo_lloyd, tmp_path / "again", LLOYD)
    with pytest.raises(ConversionError, match="holds a model already"):
        convert(demo_model.PATH, demo_lloyd, LLOYD)
    with pytest.raises(ConversionError, match="2, 3 or 4"):
        convert(demo_model.PATH, tmp_path / "five", Options(5))
    alien = tmp_path / "alien"
    alien.mkdir()
    (alien / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    mx.save_safetensors(str(alien / "model.safetensors"), {"a": mx.zeros((2, 2))})
    with pytest.raises(ConversionError, match="mlx-lm cannot load"):
        convert(alien, tmp_path / "out", LLOYD)
    assert not (tmp_path / "again").exists() and not (tmp_path / "five").exists()
    assert not (tmp_path / "out").exists()


def test_odd_widths_are_left_and_listed():
    shapes = {
        "a.q_proj": (100, 64),
        "a.k_proj": (64, 100),
        "a.v_proj": (64, 80),
        "b.up_proj": (64, 64),
    }
    recipe = make_recipe(shapes, 3, "even")
    assert list(recipe.bits) == ["b.up_proj"] and set(recipe.kept) == set(shapes) - {"b.up_proj"}
    assert all(str(n) in why for n, why in zip((100, 100, 80), recipe.kept.values(), strict=True))


def test_a_mixed_recipe_gives_sensitive_layers_more_and_keeps_the_mean():
    model = load(demo_model.PATH)
    shapes = {path: shape_of(layer) for path, layer in layers_of(model).items()}
    sizes = {path: shape[0] * shape[1] for path, shape in shapes.items()}
    recipe = make_recipe(shapes, 3, "mixed")
    mean = sum(sizes[p] * b for p, b in recipe.bits.items()) / sum(sizes[p] for p in recipe.bits)
    assert 2.9 < mean <= 3

    def given(kind: str) -> float:
        return float(np.mean([b for path, b in recipe.bits.items() if path.endswith(kind)]))

    assert given("embed_tokens") > given("up_proj") > given("q_proj")


def test_weights_of_multi_token_prediction_go_along_in_codes(folder_of, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(folder_of("qwen3.5"), source)
    given = {
        "mtp.fc.weight": mx.random.normal((128, 256)),
        "mtp.norm.weight": mx.ones((128,)),
        "mtp.layers.0.mlp.experts.down_proj": mx.random.normal((3, 128, 64)),
    }
    mx.save_safetensors(str(source / "model-mtp.safetensors"), given)
    convert(source, tmp_path / "out", LLOYD)
    load(tmp_path / "out")  # mlx-lm does not mind
    held: Any = mx.load(str(tmp_path / "out" / "mtp.safetensors"))
    code = make_code("lloyd", 4)
    for name, shape in (
        ("mtp.fc", (128, 256)),
        ("mtp.layers.0.mlp.experts.down_proj", (3, 128, 64)),
    ):
        levels = code.decode(held[f"{name}.weight"]) * held[f"{name}.scales"][..., None]
        wanted = given[name] if name in given else given[f"{name}.weight"]
        found = rotation.unrotate(levels)
        assert found.shape == shape
        assert mx.square(found - wanted).mean() < 0.02 * mx.square(wanted).mean()
    assert mx.array_equal(held["mtp.norm.weight"], given["mtp.norm.weight"])


def test_memory_stays_within_three_layers_and_a_gigabyte(folder_of, tmp_path):
    """A layer of 67 million weights, and all that a process of its own ever held."""
    source = tmp_path / "source"
    shutil.copytree(folder_of("llama"), source)
    config, weights, count = (
        json.loads((source / "config.json").read_text()),
        tensors(source),
        1 << 20,
    )
    some = mx.random.normal((1 << 12, 128)).astype(mx.bfloat16)
    weights["model.embed_tokens.weight"] = mx.tile(some, (count >> 12, 1))
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    (source / "config.json").write_text(json.dumps({**config, "vocab_size": count}))
    del weights
    script = (
        "import sys\nfrom pathlib import Path\n"
        "from tqstack.weights.convert import Options, convert\n"
        "done = convert(Path(sys.argv[1]), Path(sys.argv[2]), Options(3, 'lloyd'))\n"
        "print(done.peak_memory, done.largest_layer)"
    )
    command = [sys.executable, "-c", script, str(source), str(tmp_path / "out")]
    peak, largest = map(int, subprocess.check_output(command, text=True).split()[-2:])
    assert largest == 2 * count * 128
    assert peak < 3 * largest + (1 << 30)


def test_a_calibrated_conversion_resumes_to_the_same_codes(folder_of, tmp_path, monkeypatch):
    source, tokens = folder_of("qwen3.5"), mx.random.randint(0, 100, (4, 128))
    options = Options(2, "lloyd", calibration="x")
    convert(source, tmp_path / "whole", options, text=tokens)
    monkeypatch.setattr("tqstack.weights.shards.SHARD_BYTES", 1 << 13)
    calls = []

    def stop(self, group, tensors, add=Shards.add):
        calls.append(group)
        if len(calls) == 30:
            raise KeyboardInterrupt
        add(self, group, tensors)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Shards, "add", stop)
        convert(source, tmp_path / "parts", options, text=tokens)
    convert(source, tmp_path / "parts", options, text=tokens)
    first, second = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert first.keys() == second.keys()
    assert all(mx.array_equal(first[name], second[name]) for name in first)
