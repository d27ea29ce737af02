"""The bench commands, small: their files have what they promise."""

from __future__ import annotations

import json

import numpy as np

from commands import called
from processes import tqstack


def test_speed_compares_the_caches_in_one_run(tmp_path):
    output, plot = tmp_path / "speed.json", tmp_path / "speed.png"
    sizes = ("--prompt-tokens", "96", "--generation-tokens", "4", "--context", "0,4000")
    files = ("--output", str(output), "--plot", str(plot))
    result = tqstack(tmp_path, "bench", "speed", "demo", "--trials", "1", *sizes, *files)
    assert result.returncode == 0, result.stderr
    rows = json.loads(output.read_text())["rows"]
    assert [row["backend"] for row in rows] == ["baseline", "mlx_quant", "turboquant"] * 2
    for row in rows:
        assert row["batch"] == 1
        assert row["prefill_tps"] > 0 and row["decode_tps"] > 0 and row["recurrent_bytes"] > 0
    held = {(row["backend"], row["context"]): row["kv_bytes"] for row in rows}
    # The plain one is float32, and so is the exact tail.
    assert held["turboquant", 4000] < 0.25 * held["baseline", 4000]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_speed_decodes_a_batch_with_the_caches_that_can(tmp_path):
    output = tmp_path / "speed.json"
    sizes = ("--prompt-tokens", "40", "--generation-tokens", "3", "--context", "300")
    command = ("bench", "speed", "demo", "--batch", "3", "--trials", "1", *sizes)
    result = tqstack(tmp_path, *command, "--output", str(output))
    assert result.returncode == 0, result.stderr
    assert "mlx_quant is left out" in result.stderr and "several sequences" in result.stderr
    rows = {row["backend"]: row for row in json.loads(output.read_text())["rows"]}
    assert list(rows) == ["baseline", "turboquant"]
    assert all(row["batch"] == 3 and row["decode_tps"] > 0 for row in rows.values())
    assert rows["baseline"]["recurrent_bytes"] == rows["turboquant"]["recurrent_bytes"]
    values = 2 * 2 * 2 * 256  # keys and values, layers, KV heads, head_dim; float32
    assert rows["baseline"]["kv_bytes"] >= 3 * 343 * 4 * values


def test_speed_measures_layers_as_mlx_lm_makes_them_and_counts_operations(tmp_path):
    output = tmp_path / "speed.json"
    sizes = ("--prompt-tokens", "40", "--generation-tokens", "2", "--trials", "1")
    command = ("bench", "speed", "demo", "--backend", "baseline,mlx_lm", *sizes)
    result = tqstack(tmp_path, *command, "--output", str(output))
    assert result.returncode == 0, result.stderr
    rows = {row["backend"]: row for row in json.loads(output.read_text())["rows"]}
    assert rows["mlx_lm"]["kv_bytes"] == rows["baseline"]["kv_bytes"]
    assert all(row["decode_operations"] > 100 for row in rows.values())
    result = called(tmp_path, "bench", "speed", "demo", "--backend", "fastest")
    assert result.exit_code == 2 and "allowed: all, or by commas baseline" in result.stderr


def test_start_tells_which_part_is_mlx_own_and_which_ours(tmp_path):
    output = tmp_path / "start.json"
    result = tqstack(tmp_path, "bench", "start", "--prompt-tokens", "50", "--output", str(output))
    assert result.returncode == 0, result.stderr
    written = json.loads(output.read_text())
    owners = [row["owner"] for row in written["rows"]]
    assert owners == ["mlx"] * 5 + ["tqstack"] * 5
    assert 0 <= written["own_seconds"] <= sum(row["seconds"] for row in written["rows"][5:])


def quality(folder, *arguments, run=tqstack):
    tokens, output = folder / "tokens.npy", folder / "quality.json"
    np.save(tokens, np.random.default_rng(0).integers(0, 8192, 800))
    files = ("--tokens", str(tokens), "--output", str(output))
    result = run(folder, "bench", "quality", "demo", "--windows", "1", *files, *arguments)
    return result, json.loads(output.read_text()) if output.exists() else None


def test_quality_measures_any_codec_on_any_tokens(tmp_path):
    plot = tmp_path / "quality.png"
    result, report = quality(
        tmp_path,
        *("--codecs", "tq4@0,tq4,tq2/tq3@0", "--window-tokens", "600", "--from", "300"),
        *("--needle-lengths", "200", "--questions", "2", "--plot", str(plot)),
    )
    assert result.returncode == 0, result.stderr
    exact, coded, tailed, mixed = report["rows"]
    assert (exact["kl_divergence"], exact["top1"], exact["bits_per_value"]) == (0, 1, 16)
    assert (coded["bits_per_value"], mixed["bits_per_value"]) == (4.0625, 2.5625)
    # 192 of 32,768 tokens are exact, on average.
    assert tailed["bits_per_value"] == round(4.0625 + (16 - 4.0625) * 192 / 32768, 4)
    assert 0 < tailed["kl_divergence"] < coded["kl_divergence"] < mixed["kl_divergence"]
    assert [row["exact_tokens"] for row in report["rows"]] == [None, 0, 128, 0]
    assert (report["plan"]["first"], report["plan"]["exact_tokens"]) == (300, 128)
    assert {"perplexity", "needle", "codec"} <= set(tailed)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_only_queries_behind_the_exact_tail_can_differ(tmp_path):
    window = ("--codecs", "tq2", "--needle-lengths", "0", "--window-tokens", "257")
    result, report = quality(tmp_path, *window, "--from", "100")
    assert result.returncode == 0, result.stderr
    assert report["rows"][1]["kl_divergence"] < 1e-6  # the newest 256 tokens are all there are
    result, _ = quality(tmp_path, *window, run=called)
    assert result.exit_code == 2 and "--from 256" in result.stderr and "0 to 255" in result.stderr


def test_a_codec_that_does_not_exist_is_refused_by_name(tmp_path):
    for name in ("tq4@x", "lloyd4"):
        result, _ = quality(tmp_path, "--codecs", name, run=called)
        assert result.exit_code == 2 and name in result.stderr


def test_distortion_stands_beside_the_papers_and_the_limit(tmp_path):
    output = tmp_path / "distortion.json"
    arguments = ("--codecs", "tq3-raw,tcq3-l8", "--vectors", "256", "--output", str(output))
    result = tqstack(tmp_path, "bench", "distortion", *arguments)
    assert result.returncode == 0, result.stderr
    plain, trellis = json.loads(output.read_text())["rows"]
    assert plain["paper"] == 0.0345 and plain["limit"] == 4.0**-3
    assert plain["limit"] < trellis["squared_error"] < plain["squared_error"] < 0.037


def test_speed_takes_codes_of_weights_by_name_and_refuses_others(tmp_path):
    for weights, why in (("trellis-5", "trellis or lloyd with -2, -3 or -4"), ("int4", "affine-2")):
        result = called(tmp_path, "bench", "speed", "--shape", "qwen3-8b", "--weights", weights)
        assert result.exit_code == 2 and why in result.stderr
    result = called(tmp_path, "bench", "speed", "demo", "--weights", "trellis-3")
    assert result.exit_code == 2 and "a named model has its own" in result.stderr
