"""`tqstack router` as a process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import httpx

from router.stack import Stack


def test_the_router_imports_neither_mlx_nor_transformers():
    report = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import tqstack.router.app"],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    loaded = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in report.splitlines()}
    assert "fastapi" in loaded
    assert not loaded & {"mlx", "mlx_lm", "transformers", "tokenizers", "torch"}


def test_the_command_serves_and_sigterm_ends_it_cleanly(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = tmp_path / "config.env"
    config.write_text(f"ROUTER_PORT={port}\nSIDECAR_PORT=1\nOLLAMA_BASE_URL=http://127.0.0.1:1\n")
    environment = {**os.environ, "TQSTACK_CONFIG": str(config)}
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "tqstack", "router"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        while True:
            try:
                status = httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code
                break
            except httpx.ConnectError:
                assert process.poll() is None
                assert time.monotonic() - began < 20
                time.sleep(0.02)
        assert status == 503  # no backend is there, and it serves all the same
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert process.stdout
        assert f"http://127.0.0.1:{port}/v1" in process.stdout.read()
    finally:
        process.kill()
        process.wait()


def test_a_setting_that_is_wrong_ends_the_command_with_its_name(tmp_path):
    config = tmp_path / "config.env"
    config.write_text("ROUTER_PORT=0\n")
    process = subprocess.run(
        [sys.executable, "-m", "tqstack", "router"],
        env={**os.environ, "TQSTACK_CONFIG": str(config)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 78  # EX_CONFIG: a supervisor does not try again
    assert "ROUTER_PORT" in process.stderr
    assert "Traceback" not in process.stderr


def test_top_shows_backends_and_requests_and_says_when_nobody_is_there(tmp_path):
    def top(port: int) -> subprocess.CompletedProcess[str]:
        config = tmp_path / "config.env"
        config.write_text(f"ROUTER_PORT={port}\n")
        return subprocess.run(
            [sys.executable, "-m", "tqstack", "top", "--once"],
            env={**os.environ, "TQSTACK_CONFIG": str(config), "COLUMNS": "160"},
            capture_output=True,
            text=True,
        )

    with Stack() as stack:
        stack.chat("hello", model="qwen")
        stack.settle()
        shown = top(int(stack.url.rpartition(":")[2])).stdout
        for expected in ("sidecar", "ollama", "up", "262,144", "qwen", "short-prompt", "ok"):
            assert expected in shown
    assert "does not answer" in top(1).stdout


def test_the_bench_measures_the_router(tmp_path):
    figures = tmp_path / "figures.json"
    command = ["bench", "router", "--rounds", "1", "--seconds", "0.5", "--output", str(figures)]
    command += ["--replicas", "2"]
    subprocess.run([sys.executable, "-m", "tqstack", *command], check=True, capture_output=True)
    measured = json.loads(figures.read_text())
    assert measured["tqstack"]["rps_small"] > 100
    # What a reader would notice first; generous, for a machine that does other things as well.
    assert measured["tqstack"]["ttft_small"] < measured["direct"]["ttft_small"] + 20
    assert measured["tqstack"]["cancel_wait"] < 200
    one, two = (measured[name]["rps_slow"] for name in ("1 slow backend", "2 slow backends"))
    assert one < 45 and two > 1.5 * one
