"""A machine for tests of the installer: a copy of the checkout, and a HOME of its own.

The packages are those of the running Python, systemctl is a stand-in, and so is the router that
the installer waits for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from installed import Installation, install
from processes import clean_environment

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
COPIED = ("install.sh", "uninstall.sh", "scripts", "launchagents", "pyproject.toml")


class Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments) -> None:
        pass


@dataclass
class Machine:
    """A user's machine: HOME, a checkout, and the stand-ins' folder."""

    home: Path
    checkout: Path
    fakes: Path
    environment: dict[str, str]

    def start(self, script: str, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(self.checkout / script), *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, script: str, *arguments: str) -> tuple[int, str]:
        process = self.start(script, *arguments)
        output, _ = process.communicate(timeout=120)
        return process.returncode, output

    def files(self) -> dict[str, bytes]:
        """All that is on the machine, the stand-ins' own notes left out."""
        return {
            str(path): path.read_bytes()
            for top in (self.home, self.checkout)
            for path in sorted(top.rglob("*"))
            if path.is_file() and "__pycache__" not in path.parts
        }

    def calls(self) -> list[list[str]]:
        path = self.fakes / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def config(self) -> Path:
        return self.home / "ai/turboquant/config.env"


@pytest.fixture
def machine(tmp_path) -> Iterator[Machine]:
    home, checkout, fakes = (tmp_path / name for name in ("home", "a checkout", "fakes"))
    for folder in (home, checkout, fakes / "bin"):
        folder.mkdir(parents=True)
    for name in COPIED:
        subprocess.run(["cp", "-R", str(ROOT / name), str(checkout / name)], check=True)
    (checkout / "requirements.lock").touch()
    (checkout / "services").symlink_to(ROOT / "services")
    (fakes / "bin/systemctl").symlink_to(ROOT / "tests/service/fake_systemctl.py")
    python = fakes / "bin/python3-for-tests"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {HERE / "fake_python.py"} "$@"\n')
    python.chmod(0o755)
    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    environment = clean_environment(home, ROUTER_PORT=str(server.server_port))
    environment.pop("LD_PRELOAD", None)
    environment |= {
        "PATH": f"{fakes / 'bin'}:{os.environ['PATH']}",
        "PYTHON": str(python),
        "PYTHONDONTWRITEBYTECODE": "1",
        "FAKE_SYSTEMD": str(fakes),
    }
    yield Machine(home, checkout, fakes, environment)
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="session")
def installed(tmp_path_factory) -> Installation:
    """The wheel, installed; HOME is to stay empty."""
    return install(tmp_path_factory.mktemp("wheel"))
