"""`tqstack router` as a process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import httpx

SERVE = "from tqstack.cli.router import router; router()"


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
        [sys.executable, "-c", SERVE], env=environment, stdout=subprocess.PIPE, text=True
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
        [sys.executable, "-c", SERVE],
        env={**os.environ, "TQSTACK_CONFIG": str(config)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1
    assert "ROUTER_PORT" in process.stderr
    assert "Traceback" not in process.stderr
