"""What a background service is, whoever runs it: launchd on macOS, systemd on Linux."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from tqstack.settings import config_path

Name = Literal["router", "sidecar"]
NAMES: tuple[Name, ...] = ("router", "sidecar")
# A service starts with no shell, so it gets no PATH of the user's.
SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"


class ServiceError(RuntimeError):
    """The service manager refused; the message says what, and what to do."""


@dataclass(frozen=True)
class Place:
    """Absolute paths that the services run with."""

    home: Path
    python: Path
    config: Path
    logs: Path

    @property
    def path(self) -> str:
        return f"{self.python.parent}:{SYSTEM_PATH}"


@dataclass(frozen=True)
class Status:
    """How a service is: not installed, stopped, or running as process `pid`."""

    name: Name
    installed: bool
    pid: int | None
    detail: str


class Manager(Protocol):
    """What runs services. Every call may be repeated, and raises ServiceError."""

    def definition(self, name: Name) -> tuple[Path, bytes]:
        """The file that `install` writes, and what it holds."""
        ...

    def install(self, name: Name) -> None:
        """Write the definition, start the service, and have it started at every login."""
        ...

    def start(self, name: Name) -> None: ...

    def stop(self, name: Name) -> None:
        """Until the next start, or the next login."""
        ...

    def restart(self, name: Name) -> None: ...

    def status(self, name: Name) -> Status: ...

    def uninstall(self, name: Name) -> None:
        """Stop it, and remove its definition."""
        ...


def this_place() -> Place:
    """Of the installation that is running now."""
    home = Path.home()
    logs = home / "Library/Logs/tqstack"
    if sys.platform != "darwin":
        logs = Path(os.environ.get("XDG_STATE_HOME") or home / ".local/state") / "tqstack"
    python = lasting(Path(sys.executable).absolute())
    return Place(home, python, config_path().absolute(), logs)


def lasting(path: Path) -> Path:
    """The name of a file that an upgrade does not take away.

    Homebrew keeps each version in `Cellar/NAME/VERSION`; `opt/NAME` is a link to the newest.
    """
    prefix, cellar, rest = str(path).partition("/Cellar/")
    if not cellar:
        return path
    name, _, *below = rest.split("/")
    linked = Path(prefix, "opt", name, *below)
    return linked if linked.exists() else path


def call(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a service manager's command.

    Raises:
        ServiceError: this machine has no such command.
    """
    try:
        return subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise ServiceError(
            f"this machine has no {argv[0]}: run `tqstack up` in a terminal instead"
        ) from None


def write(path: Path, content: bytes) -> None:
    """Replace a file as a whole, so that a crash leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def remove_empty(folder: Path, top: Path) -> None:
    """Remove a folder and those above it, below `top`, that hold nothing else."""
    while folder != top and top in folder.parents:
        try:
            folder.rmdir()
        except FileNotFoundError:
            pass
        except OSError:  # not empty
            return
        folder = folder.parent
