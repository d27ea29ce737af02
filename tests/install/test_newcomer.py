"""Every command of docs/service.md, in order, on a machine with nothing on it: the services run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pages import commands_of
from processes import free_port, get, wait_until

PAGE = Path(__file__).parents[2] / "docs/service.md"

pytestmark = pytest.mark.skipif(
    sys.platform == "darwin", reason="the stand-in that runs the services is for systemctl"
)


@pytest.fixture
def newcomer(machine):
    """A machine whose systemctl really runs the services."""
    (machine.fakes / "bin/systemctl").unlink()
    (machine.fakes / "bin/systemctl").symlink_to(Path(__file__).with_name("live_systemctl.py"))
    # A service gets no environment of ours, so its ports stand in the settings.
    port = str(free_port())
    machine.environment.pop("ROUTER_PORT")
    machine.config.parent.mkdir(parents=True)
    nobody = f"http://127.0.0.1:{free_port()}"
    machine.config.write_text(
        f"ROUTER_PORT={port}\nSIDECAR_PORT={free_port()}\nSIDECAR_MODEL=demo\n"
        f"OLLAMA_BASE_URL={nobody}\n"
    )
    yield machine, port
    for unit in ("tqstack-router.service", "tqstack-sidecar.service"):
        subprocess.run(
            [str(machine.fakes / "bin/systemctl"), "--user", "stop", unit],
            env=machine.environment,
            check=True,
        )


def answers(port: str) -> bool:
    response = get(f"http://127.0.0.1:{port}/health")
    return response is not None and response.is_success


def test_every_command_of_the_page_does_what_it_says(newcomer):
    machine, port = newcomer
    outputs = {}
    for command in commands_of(PAGE):
        if "chat/completions" in command:
            wait_until(lambda: answers(port), "a backend answers")
        result = subprocess.run(
            ["bash", "-c", command.replace("8000", port)],
            cwd=machine.checkout,
            env=machine.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, (command, result.stdout, result.stderr)
        outputs[command] = result.stdout
    told = "".join(outputs.values())
    assert '"choices"' in told and '"status":"ok"' in told.replace(" ", "")
    assert "* TQ_KV_BITS=3.5" in told
    assert outputs[".venv/bin/tqstack service status"].count("running") == 2
    assert told.count("It fits") == 2
    assert not machine.config.exists() and not (machine.checkout / ".venv").exists()
    assert [path for path in machine.home.rglob("*") if path.is_file()] == []
