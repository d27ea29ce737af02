"""`tqstack evaluate` on the demo model and on smaller copies of it."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pytest
from mlx_lm.convert import convert

from commands import called
from processes import tqstack
from tqstack import demo_model
from tqstack.bench.evaluate import check_affine, windows
from tqstack.models.safetensors import Tensor
from tqstack.models.weight_bits import stored


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the demo model in 16 bits ("dense") and in mlx's 3 ("three")."""
    home = tmp_path_factory.mktemp("models")
    dense = str(home / "dense")
    with redirect_stdout(StringIO()):
        convert(str(demo_model.PATH), dense, dequantize=True, dtype="bfloat16")
        convert(dense, str(home / "three"), quantize=True, q_bits=3, q_group_size=64)
    return home


def evaluate(home, *arguments: str, run=tqstack):
    return run(home, "evaluate", *arguments, "--tokens", "96")


def test_a_model_and_codes_of_it_are_compared_with_the_reference(home):
    dense, three, plot, output = (str(home / n) for n in ("dense", "three", "a.png", "a.json"))
    files = ("--plot", plot, "--output", output)
    result = evaluate(home, dense, three, "--against", dense, "--affine", "2,3", "--json", *files)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report == json.loads((home / "a.json").read_text())
    assert report["against"] == dense and report["tokens"] == 96
    rows = {row["model"]: row for row in report["rows"]}
    assert list(rows)[:3] == ["dense (reference)", "dense", "three"]
    reference, same, coded, two, made = rows.values()
    assert reference["kl_divergence"] is None
    assert same["top1"] == 1 and abs(same["kl_divergence"]) < 2e-6
    assert same["perplexity"] == reference["perplexity"]
    assert two["kl_divergence"] > made["kl_divergence"] > 0
    assert two["kl_error"] > 0 and two["top1"] < 1
    # What mlx_lm.convert wrote, and the same code made of the reference on the fly.
    measured = ("perplexity", "kl_divergence", "top1", "bits_per_weight", "weight_bytes")
    assert [coded[key] for key in measured] == [made[key] for key in measured]
    assert [row["bits_per_weight"] for row in (same, two, made)] == [16, 2.5, 3.5]
    assert same["weight_bytes"] > 2 * 20e6 and made["weight_bytes"] < 10e6
    assert all(row["prefill_tps"] > 0 and row["decode_tps"] > 0 for row in rows.values())
    assert (home / "a.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_reference_the_table_has_perplexity_size_and_speed(home):
    text = home / "text.txt"
    text.write_text("def add(first, second):\n    return first + second\n\n" * 40)
    result = evaluate(home, str(home / "three"), "--text", str(text))
    assert result.returncode == 0, result.stderr
    assert "three" in result.stdout and "3.500" in result.stdout and "MB" in result.stdout
    assert "KL" not in result.stdout and "decode tok/s" in result.stdout


def test_what_cannot_be_compared_is_refused_with_what_to_do(home, tmp_path, monkeypatch):
    wrong = tmp_path / "wrong.npy"
    np.save(wrong, np.array([1, 8192]))
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # it is not installed
    cases = [
        (("demo", "/no/such/folder"), "is no folder and no hub name"),
        (("demo", "--affine", "4"), "--against MODEL"),
        (("demo", "--text", str(wrong)), "from 0 to 8,191"),
        (("demo", "--against", "demo", "--plot", "a.png"), "pip install 'tqstack[plot]'"),
    ]
    for arguments, sentence in cases:
        result = evaluate(home, *arguments, run=called)
        assert result.exit_code == 2 and sentence in result.stderr, result.stderr
    with pytest.raises(ValueError, match="--affine 7: mlx has affine codes of 2, 3, 4"):
        check_affine("demo", [4, 7])
    (tmp_path / "config.json").write_text('{"quantization": {"mode": "tqstack"}}')
    with pytest.raises(ValueError, match="needs a reference that is not compressed"):
        check_affine(str(tmp_path), [4])


def test_another_tokenizer_needs_a_text_and_is_never_compared(home, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(home / "three", other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    first, second = list(words)[-2:]
    words[first], words[second] = words[second], words[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    result = evaluate(home, str(other), run=called)
    assert result.exit_code == 2 and "--text FILE" in result.stderr
    result = evaluate(home, str(other), "--against", "demo", run=called)
    assert result.exit_code == 2 and "different tokenizers" in result.stderr


def test_windows_spread_over_the_text_predict_the_tokens_asked_for():
    text = np.arange(10_000)
    pieces = windows(text, 2500)
    assert [piece.size for piece in pieces] == [1025, 1025, 453]
    assert pieces[0][0] == 0 and pieces[1][0] > 2000 and 9000 > pieces[2][0] > 6000
    [whole] = windows(text[:101], 100)
    assert whole.tolist() == list(range(101))
    with pytest.raises(ValueError, match="101 are needed"):
        windows(text[:100], 100)


def test_bits_of_a_weight_count_its_scales_in_each_format():
    affine = {"a.weight": Tensor("U32", (64, 32)), "a.scales": Tensor("F16", (64, 4))}
    affine |= {"a.biases": Tensor("F16", (64, 4)), "a.bias": Tensor("F16", (64,))}
    router = {"gate.weight": Tensor("F16", (8, 256))}
    assert stored(affine | router, {"group_size": 64}).bits_per_weight == 4.5
    mixed = stored(affine, {"group_size": 32, "a": {"group_size": 64}})
    assert mixed.weights == 64 * 256
    tiles = {"a.weight": Tensor("U32", (4, 16, 24)), "a.scales": Tensor("F16", (64,))}
    assert stored(tiles, {"mode": "tqstack"}).bits_per_weight == 3 + 16 / 256
    tiles |= {"a.residual.weight": Tensor("U32", (4, 16, 8))}
    tiles |= {"a.residual.scales": Tensor("F16", (64,))}
    assert stored(tiles, {"mode": "tqstack"}) == (64 * 256, 64 * 256 // 8 * 4 + 4 * 64)
    polar = {"a.weight": Tensor("U32", (64, 26)), "a.scales": Tensor("F16", (64, 4))}
    polar |= {"a.signs": Tensor("F16", (256,)), "a.codebook": Tensor("F16", (8,))}
    bits = 32 * 26 / 256 + 16 / 64 + (256 + 8) * 16 / (64 * 256)
    assert stored(polar, {"mode": "turboquant"}).bits_per_weight == bits
    assert stored(router, {}).bits_per_weight == 16
