"""Clients as their users run them, against a router in front of a scripted model.

A client counts as installed if a Python has its package: the one that runs this, or that of an
environment in a folder of `CLIENTS`. Commands are looked for in PATH, and in `CLIENTS` likewise.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from router.agent import helpful, works
from router.stack import Stack

PROGRAMS = Path(__file__).with_name("clients")
SECONDS = 180


@dataclass(frozen=True)
class Client:
    """
    Attributes:
        package: its Python package; empty: it is a command.
        does: what is tried, for the table.
    """

    name: str
    program: str
    package: str
    does: str


_OPENAI_APIS = "chat and Responses"
CLIENTS = [
    Client(
        "openai-agents",
        "openai_agents.py",
        "agents",
        f"a tool over {_OPENAI_APIS}, whole and streamed; previous_response_id",
    ),
    Client(
        "pydantic-ai",
        "pydantic_ai.py",
        "pydantic_ai",
        f"a tool, typed output by tool and by schema, over {_OPENAI_APIS}",
    ),
    Client(
        "instructor",
        "instructor_modes.py",
        "instructor",
        "typed output in each mode, over chat, Responses and Messages",
    ),
    Client(
        "LangChain",
        "langchain_agent.py",
        "langchain_openai",
        "a tool, its result, streamed, typed output, over all three APIs",
    ),
    Client("Codex CLI", "codex", "", "runs a command and reads its output, with its own tools"),
    Client("opencode", "opencode", "", "runs a command and reads its output, with its own tools"),
]


@cache
def folders() -> list[Path]:
    return [Path(folder) for folder in os.environ.get("CLIENTS", "").split(os.pathsep) if folder]


@cache
def python_with(package: str) -> str | None:
    own = [Path(sys.executable)]
    for python in own + [p for folder in folders() for p in sorted(folder.glob("*/bin/python"))]:
        looks = [str(python), "-c", f"import importlib.util as u; assert u.find_spec({package!r})"]
        if subprocess.run(looks, capture_output=True).returncode == 0:
            return str(python)
    return None


def command(name: str) -> str | None:
    found = [p for folder in folders() for p in folder.glob(f"*/node_modules/.bin/{name}")]
    return str(found[0]) if found else shutil.which(name)


def installed(client: Client) -> bool:
    return bool(python_with(client.package) if client.package else command(client.program))


def try_client(client: Client, home: Path) -> str:
    """What it wrote. `home` is its home folder, empty.

    Raises:
        AssertionError: it failed; the message has the end of what it said.
    """
    with Stack() as stack:
        stack.sidecar.health["capabilities"] = ["json_schema", "json_object"]
        stack.probe()
        stack.sidecar.script = helpful
        environment = {**os.environ, "HOME": str(home), "CODEX_HOME": str(home)}
        environment["PWD"] = str(home)  # which opencode believes
        environment.pop("LD_PRELOAD", None)
        if client.package:
            python = python_with(client.package)
            return _run([str(python), str(PROGRAMS / client.program), stack.url], home, environment)
        argv = {"codex": codex, "opencode": opencode}[client.program](stack, home)
        said = _run(argv, home, environment)
        assert "forty-42" in said, said[-3000:]
        return said


def codex(stack: Stack, home: Path) -> list[str]:
    stack.sidecar.script = works("exec_command", lambda _: {"cmd": "echo forty-$((40+2))"})
    provider = f'{{name="tqstack", base_url="{stack.url}/v1", wire_api="responses"}}'
    options = ["--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]
    options += ["-c", f"model_providers.tq={provider}", "-c", "model_provider=tq", "-m", "tq:demo"]
    return [str(command("codex")), "exec", *options, "what does echo say?"]


def opencode(stack: Stack, home: Path) -> list[str]:
    wanted = {"command": "echo forty-$((40+2))", "description": "echo"}
    stack.sidecar.script = works("bash", lambda _: wanted)
    (home / "opencode.json").write_text(
        f"""{{"provider": {{"tq": {{
            "npm": "@ai-sdk/openai-compatible", "name": "tqstack",
            "options": {{"baseURL": "{stack.url}/v1"}},
            "models": {{"tq:demo": {{"name": "demo"}}}}}}}}}}"""
    )
    return [str(command("opencode")), "run", "-m", "tq/tq:demo", "what does echo say?"]


def _run(argv: list[str], home: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        argv,
        cwd=home,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    return done.stdout + done.stderr
