"""The README's commands and programs that talk to the services, against real ones."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pages import blocks_of, commands_of

README = Path(__file__).parents[2] / "README.md"
ADDRESS = re.compile(r"127\.0\.0\.1:800[01]")
COMMANDS = [command for command in commands_of(README) if ADDRESS.search(command)]
PROGRAMS = [program for program in blocks_of(README, "python") if ADDRESS.search(program)]


def run(stack, argv: list[str], text: str) -> str:
    """What a text of the README prints, with the addresses of the test's services in it."""
    for port, url in (("8000", stack.router), ("8001", stack.sidecar)):
        text = text.replace(f"127.0.0.1:{port}", url.removeprefix("http://"))
    result = subprocess.run([*argv, text], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, (text, result.stdout, result.stderr)
    return result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_is_answered(stack, command):
    told = run(stack, ["bash", "-c"], command)
    assert "error" not in told
    assert re.search(r'"choices"|"data"|"status":\s*"ok"', told)
    if " -i " in command:
        assert "x-tqstack-backend: ollama" in told


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.split()[1])
def test_each_program_prints_an_answer(stack, program):
    assert run(stack, [sys.executable, "-c"], program).strip()


def test_the_readme_shows_curl_and_both_sdks():
    assert len(COMMANDS) >= 4 and all(command.startswith("curl") for command in COMMANDS)
    assert [program.split()[1] for program in PROGRAMS] == ["openai", "anthropic"]
