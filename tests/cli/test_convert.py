"""`tqstack convert`, and what it makes behind the sidecar."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import httpx
import numpy as np
import pytest

from commands import called
from processes import clean_environment, free_port, running, tqstack, wait_for
from tqstack import demo_model

QUESTION = "The secret code of alpha is 12345. What is the secret code of alpha?"


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    np.save(home / "text.npy", np.asarray(demo_model.held_out_tokens())[:1030])
    arguments = ("demo", str(home / "small"), "--bits", "4", "--text", str(home / "text.npy"))
    result = tqstack(home, "convert", *arguments)
    assert result.returncode == 0, result.stderr
    assert "4.0" in result.stdout and "nats" in result.stdout
    return home / "small"


def test_a_converted_model_is_named_and_measured_on_its_card(converted):
    card = (converted / "README.md").read_text()
    divergence = float(card.split(" nats")[0].rpartition("| ")[2])
    assert 0.005 < divergence < 0.04  # mlx affine has 0.03 with half a bit more
    quantization = json.loads((converted / "config.json").read_text())["quantization"]
    assert quantization["mode"] == "tqstack" and len(quantization["layers"]) == 51


def test_the_sidecar_serves_a_converted_model_like_any_other(converted, tmp_path):
    port, log = free_port(), tmp_path / "log"
    settings = {"SIDECAR_MODEL": str(converted), "SIDECAR_PORT": str(port)}
    url = f"http://127.0.0.1:{port}"
    with running(["-m", "tqstack", "sidecar"], clean_environment(tmp_path, **settings), log):
        wait_for(f"{url}/health", log)
        body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120).json()
        health = httpx.get(f"{url}/health").json()
    assert answer["choices"][0]["message"]["content"].strip() == "12345"
    assert health["model"]["compressed_layers"] == [3, 7]


def test_generate_and_evaluate_take_a_converted_model(converted, tmp_path):
    result = tqstack(tmp_path, "generate", str(converted), QUESTION, "--max-tokens", "10")
    assert result.stdout.splitlines()[0] == "12345"
    arguments = ("evaluate", str(converted), "--against", "demo", "--tokens", "96", "--json")
    rows = json.loads(tqstack(tmp_path, *arguments).stdout)["rows"]
    assert rows[1]["bits_per_weight"] == pytest.approx(4.036, abs=0.002)


def test_a_cut_file_or_an_unknown_format_is_said_in_a_sentence(converted, tmp_path):
    cut, newer = tmp_path / "cut", tmp_path / "newer"
    for folder in (cut, newer):
        shutil.copytree(converted, folder)
    shard = next(cut.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    config = json.loads((newer / "config.json").read_text())
    config["quantization"]["version"] = 99
    (newer / "config.json").write_text(json.dumps(config))
    for folder, said in ((cut, "is not whole"), (newer, "update tqstack")):
        result = called(tmp_path, "generate", str(folder), "hi", "--max-tokens", "1")
        assert result.exit_code == 2 and said in " ".join(result.stderr.split())


def test_a_calibration_text_brings_a_model_nearer_to_its_source(tmp_path):
    ids = np.asarray(demo_model.held_out_tokens())
    np.save(tmp_path / "text.npy", ids[-8192:])
    np.save(tmp_path / "other.npy", ids[:1030])
    found = []
    for options in ([], ["--calibrate", str(tmp_path / "text.npy")]):
        folder = tmp_path / f"out{len(options)}"
        arguments = ["convert", "demo", str(folder), "--bits", "2", "--code", "lloyd"]
        result = tqstack(tmp_path, *arguments, "--text", str(tmp_path / "other.npy"), *options)
        assert result.returncode == 0, result.stderr
        found.append(float(result.stdout.split(" nats")[0].split()[-1]))
    plain, calibrated = found
    assert calibrated < 0.9 * plain


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("/no/model", "out"), "is no folder"),
        (("demo", "out", "--bits", "5"), "2, 3 or 4"),
        (("demo", "out", "--bits", "4", "--recipe", "mixed"), "a mean between 2 and 4"),
        (("demo", "out", "--calibrate", "/no/text"), "/no/text"),
    ],
)
def test_what_cannot_be_converted_is_said_in_a_sentence(tmp_path, arguments, said):
    arguments = [str(tmp_path / "out") if word == "out" else word for word in arguments]
    result = called(tmp_path, "convert", *arguments)
    assert result.exit_code == 2 and said in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()
