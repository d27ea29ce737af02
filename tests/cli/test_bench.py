"""The bench commands, small: their files have what they promise."""

from __future__ import annotations

import json

import numpy as np

from processes import tqstack


def test_speed_compares_the_caches_in_one_run(tmp_path):
    output, plot = tmp_path / "speed.json", tmp_path / "speed.png"
    sizes = ("--prompt-tokens", "96", "--generation-tokens", "4", "--context", "0,300")
    files = ("--output", str(output), "--plot", str(plot))
    result = tqstack(tmp_path, "bench", "speed", "demo", "--trials", "1", *sizes, *files)
    assert result.returncode == 0, result.stderr
    rows = json.loads(output.read_text())["rows"]
    assert [row["backend"] for row in rows] == ["baseline", "mlx_quant", "turboquant"] * 2
    for row in rows:
        assert row["prefill_tps"] > 0 and row["decode_tps"] > 0 and row["recurrent_bytes"] > 0
    held = {(row["backend"], row["context"]): row["kv_bytes"] for row in rows}
    assert held["turboquant", 300] < 0.3 * held["baseline", 300] / 2  # the plain one is float32
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_quality_measures_any_codec_on_any_tokens(tmp_path):
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, np.random.default_rng(0).integers(0, 8192, 400))
    output, plot = tmp_path / "quality.json", tmp_path / "quality.png"
    result = tqstack(
        tmp_path,
        *("bench", "quality", "demo", "--codecs", "tq4,tq2/tq3", "--tokens", str(tokens)),
        *("--windows", "1", "--window-tokens", "200", "--needle-lengths", "200"),
        *("--questions", "2", "--output", str(output), "--plot", str(plot)),
    )
    assert result.returncode == 0, result.stderr
    exact, tq4, mixed = json.loads(output.read_text())["rows"]
    assert (exact["kl_divergence"], exact["top1"], exact["bits_per_value"]) == (0, 1, 16)
    assert (tq4["bits_per_value"], mixed["bits_per_value"]) == (4.0625, 2.5625)
    assert 0 < tq4["kl_divergence"] < mixed["kl_divergence"]
    assert {"perplexity", "needle", "codec"} <= set(tq4)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_distortion_stands_beside_the_papers_and_the_limit(tmp_path):
    output = tmp_path / "distortion.json"
    arguments = ("--codecs", "tq3-raw,tcq3-l8", "--vectors", "256", "--output", str(output))
    result = tqstack(tmp_path, "bench", "distortion", *arguments)
    assert result.returncode == 0, result.stderr
    plain, trellis = json.loads(output.read_text())["rows"]
    assert plain["paper"] == 0.0345 and plain["limit"] == 4.0**-3
    assert plain["limit"] < trellis["squared_error"] < plain["squared_error"] < 0.037
