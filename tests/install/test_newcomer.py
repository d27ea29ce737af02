"""Every command of docs/service.md and of the README, on a machine with nothing on it: the services
run. What the README asks a running stack is in tests/e2e/test_readme.py."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pages import commands_of
from processes import free_port, get, wait_until

ROOT = Path(__file__).parents[2]
ASKS_A_STACK = re.compile(r"127\.0\.0\.1:800[01]")
ALL_TESTS = "bash scripts/test.sh"  # would run this very test

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


def run(newcomer, command: str) -> str:
    machine, port = newcomer
    result = subprocess.run(
        ["bash", "-c", command.replace("8000", port)],
        cwd=machine.checkout,
        env=machine.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, (command, result.stdout, result.stderr)
    return result.stdout


def test_every_command_of_the_page_does_what_it_says(newcomer):
    machine, port = newcomer
    outputs = {}
    for command in commands_of(ROOT / "docs/service.md"):
        if "chat/completions" in command:
            wait_until(lambda: answers(port), "a backend answers")
        outputs[command] = run(newcomer, command)
    told = "".join(outputs.values())
    assert '"choices"' in told and '"status":"ok"' in told.replace(" ", "")
    assert "* TQ_KV_BITS=3.5" in told
    assert outputs[".venv/bin/tqstack service status"].count("running") == 2
    assert told.count("It fits") == 2
    assert not machine.config.exists() and not (machine.checkout / ".venv").exists()
    assert [path for path in machine.home.rglob("*") if path.is_file()] == []


def test_every_command_of_the_readme_works(newcomer):
    commands = [one for one in commands_of(ROOT / "README.md") if not ASKS_A_STACK.search(one)]
    outputs = {one: run(newcomer, one) for one in commands if one != ALL_TESTS}
    told = "".join(outputs.values())
    assert outputs[".venv/bin/tqstack service status"].count("running") == 2
    for words in ("sidecar", "48213\n", "The same 6 tokens", "It fits"):
        assert words in told
