"""What the doctor finds around the model, each with what to do."""

from __future__ import annotations

import json
import os
import socket

import pytest

from commands import called
from processes import free_port
from tqstack import demo_model
from tqstack.cli import checks
from tqstack.settings import Settings


@pytest.fixture
def config(tmp_path, monkeypatch):
    path = tmp_path / "config.env"
    monkeypatch.setenv("TQSTACK_CONFIG", str(path))
    monkeypatch.setenv("HOME", str(tmp_path))
    return path


def test_a_port_of_another_program_is_wrong_and_the_program_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        settings = Settings(router_port=port, sidecar_port=free_port())
        router, sidecar = checks.ports(settings)
    assert router.state == "wrong" and f"(process {os.getpid()})" in router.detail
    assert "ROUTER_PORT" in router.advice
    assert sidecar.state == "ok" and "free" in sidecar.detail


def test_a_key_that_others_can_read_is_wrong(config):
    config.write_text("TQSTACK_API_KEY=secret\n")
    config.chmod(0o644)
    settings = Settings(tqstack_api_key="secret")
    (found,) = checks.permissions(settings)
    assert found.state == "wrong" and "chmod 600" in found.advice
    config.chmod(0o600)
    assert [one.state for one in checks.permissions(settings)] == ["ok"]


def test_model_files_are_checked_without_loading_them(tmp_path):
    assert checks.files("demo").state == "ok"
    (tmp_path / "config.json").write_text("{}")
    weights = (demo_model.PATH / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-100])
    found = checks.files(str(tmp_path))
    assert found.state == "wrong" and "download the model again" in found.detail
    found = checks.files("nobody/nothing")
    assert found.state == "wrong" and "tqstack model download nobody/nothing" in found.detail


def test_a_wrong_setting_is_found_with_its_line(config, tmp_path):
    config.write_text("# mine\n\nROUTER_PORT=80000\nTQ_KV_BITZ=4\n")
    result = called(tmp_path, "doctor", "--json", TQSTACK_CONFIG=str(config))
    found = json.loads(result.stdout)[-1]
    assert result.exit_code == 1 and found["state"] == "wrong"
    assert f"{config}:3: ROUTER_PORT='80000'" in found["detail"]
    assert f"{config}:4: TQ_KV_BITZ is not a setting" in found["detail"]


def test_a_wrong_setting_of_the_environment_blames_no_line(config, tmp_path):
    config.write_text("TQ_KV_BITS=4\n")
    result = called(tmp_path, "doctor", "--json", TQSTACK_CONFIG=str(config), TQ_KV_BITS="nine")
    assert json.loads(result.stdout)[-1]["detail"].startswith("TQ_KV_BITS='nine'")
