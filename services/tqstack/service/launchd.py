"""launchd: property lists under ~/Library/LaunchAgents, and the calls of launchctl."""

from __future__ import annotations

import os
import plistlib
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tqstack
from tqstack.service.definition import (
    Name,
    Place,
    ServiceError,
    Status,
    call,
    remove_empty,
    write,
)

_PACKAGED = Path(tqstack.__file__).with_name("launchagents")  # in a wheel
TEMPLATES = _PACKAGED if _PACKAGED.is_dir() else Path(tqstack.__file__).parents[2] / "launchagents"
NOT_LOADED = (3, 113)  # exit codes of bootout and of print
# A service that was booted out is still going away for some seconds; bootstrap then answers 5.
BUSY = (5, 37)
WAIT_SECONDS, PAUSE_SECONDS = 15.0, 0.5


def label(name: Name) -> str:
    return f"com.tqstack-{name}"


def render(name: Name, place: Place) -> bytes:
    """The property list of a service.

    The template is parsed before its words are filled in, so no path can break the XML.
    """
    template = TEMPLATES / f"{label(name)}.plist.template"
    words = {
        "PYTHON": str(place.python),
        "PATH": place.path,
        "CONFIG": str(place.config),
        "LOGS": str(place.logs),
        "HOME": str(place.home),
    }

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: fill(item) for key, item in value.items()}
        if isinstance(value, list):
            return [fill(item) for item in value]
        if isinstance(value, str):
            return re.sub(r"@([A-Z]+)@", lambda match: words[match[1]], value)
        return value

    return plistlib.dumps(fill(plistlib.loads(template.read_bytes())))


class Launchd:
    """Services of the user's login session, `gui/UID`.

    Args:
        pause: waits for so many seconds.
    """

    def __init__(self, place: Place, pause: Callable[[float], None] = time.sleep):
        self._place = place
        self._pause = pause
        self._domain = f"gui/{os.getuid()}"

    def plist(self, name: Name) -> Path:
        return self._place.home / "Library/LaunchAgents" / f"{label(name)}.plist"

    def definition(self, name: Name) -> tuple[Path, bytes]:
        return self.plist(name), render(name, self._place)

    def install(self, name: Name) -> None:
        self._place.logs.mkdir(parents=True, exist_ok=True)
        write(*self.definition(name))
        self.stop(name)
        self.start(name)

    def start(self, name: Name) -> None:
        if not self.plist(name).exists():
            raise ServiceError(f"the {name} is not installed: tqstack service install")
        if self._loaded(name):
            self._check(self._launchctl("kickstart", self._target(name)), f"start the {name}")
            return
        # A service that the user once disabled cannot be loaded.
        self._launchctl("enable", self._target(name))
        self._bootstrap(name)

    def stop(self, name: Name) -> None:
        result = self._launchctl("bootout", self._target(name))
        if result.returncode not in (0, 36, *NOT_LOADED):  # 36: it is on its way out
            self._check(result, f"stop the {name}")
        self._wait(lambda: not self._loaded(name))

    def restart(self, name: Name) -> None:
        if not self._loaded(name):
            self.start(name)
            return
        self._check(self._launchctl("kickstart", "-k", self._target(name)), f"restart the {name}")

    def status(self, name: Name) -> Status:
        installed = self.plist(name).exists()
        result = self._launchctl("print", self._target(name))
        if result.returncode:
            return Status(name, installed, None, "stopped" if installed else "not installed")
        facts = dict(re.findall(r"^\t(state|pid|last exit code) = (.+)$", result.stdout, re.M))
        pid, state = facts.get("pid"), facts.get("state", "unknown")
        exit_code = facts.get("last exit code", "")
        failed = exit_code not in ("", "0", "(never exited)")
        detail = f"{state}; last exit code {exit_code}" if failed else state
        if exit_code == "0" and not pid:  # one that was stopped is not loaded
            detail = "has ended; tqstack service logs says why"
        return Status(name, installed, int(pid) if pid else None, detail)

    def uninstall(self, name: Name) -> None:
        self.stop(name)
        self.plist(name).unlink(missing_ok=True)
        remove_empty(self.plist(name).parent, self._place.home)

    def _bootstrap(self, name: Name) -> None:
        result = None

        def succeeds() -> bool:
            nonlocal result
            result = self._launchctl("bootstrap", self._domain, str(self.plist(name)))
            return result.returncode not in BUSY

        self._wait(succeeds)
        assert result is not None
        self._check(result, f"load the {name}")

    def _wait(self, condition: Callable[[], bool]) -> None:
        """Until it holds, but not for ever: the call after it tells what is wrong then."""
        for _ in range(int(WAIT_SECONDS / PAUSE_SECONDS)):
            if condition():
                return
            self._pause(PAUSE_SECONDS)

    def _loaded(self, name: Name) -> bool:
        return self._launchctl("print", self._target(name)).returncode == 0

    def _target(self, name: Name) -> str:
        return f"{self._domain}/{label(name)}"

    def _launchctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return call(["launchctl", *arguments])

    def _check(self, result: subprocess.CompletedProcess[str], what: str) -> None:
        if result.returncode:
            raise ServiceError(
                f"launchctl could not {what} (exit code {result.returncode}: "
                f"{result.stderr.strip() or 'no message'}); see {self._place.logs}, or run "
                "`tqstack up` in a terminal"
            )
