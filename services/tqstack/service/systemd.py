"""systemd: user units under ~/.config/systemd/user, and the calls of systemctl --user."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tqstack.service.definition import (
    Name,
    Place,
    ServiceError,
    Status,
    call,
    remove_empty,
    write,
)
from tqstack.settings import EXIT_CONFIG

UNIT = """\
# Written by `tqstack service install`.
[Unit]
Description=tqstack {name}
# Ten failures within five minutes: something is wrong that a restart does not mend.
StartLimitIntervalSec=300
StartLimitBurst=10

[Service]
ExecStart={python} -m tqstack {name}
WorkingDirectory={home}
Environment={environment}
Restart=on-failure
RestartSec=5
# A setting that cannot be used: starting again will not help.
RestartPreventExitStatus={config_error}
# Longer than it takes to finish the answers that are being given.
TimeoutStopSec=40

[Install]
WantedBy=default.target
"""


def unit_name(name: Name) -> str:
    return f"tqstack-{name}.service"


def render(name: Name, place: Place) -> bytes:
    """The unit file of a service."""
    environment = {
        "PATH": place.path,
        "TQSTACK_CONFIG": place.config,
        "TQSTACK_LOG_DIR": place.logs,
    }
    return UNIT.format(
        name=name,
        python=quoted(str(place.python)),
        home=str(place.home).replace("%", "%%"),
        environment=" ".join(quoted(f"{key}={value}") for key, value in environment.items()),
        config_error=EXIT_CONFIG,
    ).encode()


def quoted(text: str) -> str:
    """One word of a unit file: systemd.syntax(7)."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"'


class Systemd:
    """Services of the user's own systemd."""

    def __init__(self, place: Place):
        self._place = place

    def unit(self, name: Name) -> Path:
        base = os.environ.get("XDG_CONFIG_HOME") or self._place.home / ".config"
        return Path(base) / "systemd/user" / unit_name(name)

    def definition(self, name: Name) -> tuple[Path, bytes]:
        return self.unit(name), render(name, self._place)

    def install(self, name: Name) -> None:
        self._place.logs.mkdir(parents=True, exist_ok=True)
        write(*self.definition(name))
        self._check("daemon-reload")
        self._check("enable", unit_name(name))
        self._check("restart", unit_name(name))

    def start(self, name: Name) -> None:
        self._installed(name)
        self._check("start", unit_name(name))

    def stop(self, name: Name) -> None:
        self._installed(name)
        self._check("stop", unit_name(name))

    def restart(self, name: Name) -> None:
        self._installed(name)
        self._check("restart", unit_name(name))

    def status(self, name: Name) -> Status:
        if not self.unit(name).exists():
            return Status(name, False, None, "not installed")
        result = self._check(
            "show", unit_name(name), "--property=ActiveState,SubState,MainPID,ExecMainStatus"
        )
        facts = dict(line.split("=", 1) for line in result.stdout.splitlines() if "=" in line)
        pid, exit_code = int(facts.get("MainPID", 0)), facts.get("ExecMainStatus", "0")
        active = facts.get("ActiveState", "unknown")
        detail = {"active": "running", "inactive": "stopped"}.get(active, active)
        if exit_code != "0" and not pid:
            detail += f"; last exit code {exit_code}"
        return Status(name, True, pid or None, detail)

    def uninstall(self, name: Name) -> None:
        if not self.unit(name).exists():
            return
        self._check("disable", "--now", unit_name(name))
        self.unit(name).unlink()
        remove_empty(self.unit(name).parent, self._place.home)
        self._check("daemon-reload")

    def _installed(self, name: Name) -> None:
        if not self.unit(name).exists():
            raise ServiceError(f"the {name} is not installed: tqstack service install")

    def _check(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        result = call(["systemctl", "--user", *arguments])
        if result.returncode:
            message = result.stderr.strip() or f"exit code {result.returncode}"
            raise ServiceError(
                f"systemctl --user {' '.join(arguments)}: {message}. If this login has no systemd "
                "of its own, run `tqstack up` in a terminal, or: loginctl enable-linger"
            )
        return result
