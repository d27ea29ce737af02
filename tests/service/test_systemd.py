"""Units for systemd, and the calls of systemctl; `systemd-analyze verify` reads them if it can."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from processes import clean_environment
from tqstack.service.definition import Place, ServiceError
from tqstack.service.systemd import Systemd, quoted, render


@pytest.fixture
def place(tmp_path):
    home = tmp_path / "home of 100% $me"
    home.mkdir()
    return Place(home, Path(sys.executable), home / "config.env", home / ".local/state/tqstack")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "systemctl").symlink_to(Path(__file__).with_name("fake_systemctl.py"))
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SYSTEMD", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    return tmp_path


def calls(folder) -> list[list[str]]:
    lines = [json.loads(line) for line in (folder / "calls").read_text().splitlines()]
    (folder / "calls").unlink()
    return lines


def test_a_unit_restarts_on_failure_but_not_on_unusable_settings(place):
    unit = render("router", place).decode()
    for line in (
        f"ExecStart={quoted(str(place.python))} -m tqstack router",
        "Restart=on-failure",
        "RestartSec=5",
        "RestartPreventExitStatus=78",
        "StartLimitBurst=10",
        "WantedBy=default.target",
    ):
        assert line in unit.splitlines()
    assert "100%% $$me" in unit


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd-analyze")
@pytest.mark.parametrize("name", ["router", "sidecar"])
def test_systemd_itself_finds_nothing_wrong_with_a_unit(name, place, tmp_path):
    unit = tmp_path / f"tqstack-{name}.service"
    unit.write_bytes(render(name, place))
    result = subprocess.run(
        ["systemd-analyze", "verify", "--user", "--man=no", str(unit)],
        capture_output=True,
        text=True,
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
    )
    assert result.returncode == 0 and unit.name not in result.stderr, result.stderr


def test_install_and_uninstall_make_these_calls_and_leave_nothing(folder, place):
    systemd = Systemd(place)
    systemd.install("router")
    assert calls(folder) == [
        ["--user", "daemon-reload"],
        ["--user", "enable", "tqstack-router.service"],
        ["--user", "restart", "tqstack-router.service"],
    ]
    assert systemd.status("router").pid == 4711
    systemd.stop("router")
    assert systemd.status("router").detail == "stopped"
    calls(folder)
    systemd.uninstall("router")
    assert calls(folder) == [
        ["--user", "disable", "--now", "tqstack-router.service"],
        ["--user", "daemon-reload"],
    ]
    assert not (place.home / ".config").exists()
    systemd.uninstall("router")


def test_without_a_systemd_of_the_user_the_message_says_what_to_do(folder, place):
    (folder / "broken").touch()
    with pytest.raises(ServiceError, match=r"No medium found.*tqstack up"):
        Systemd(place).install("router")


def service(home, folder, *arguments, **settings):
    environment = clean_environment(home, SIDECAR_MODEL="demo", **settings)
    environment |= {"PATH": os.environ["PATH"], "FAKE_SYSTEMD": str(folder)}
    return subprocess.run(
        [sys.executable, "-m", "tqstack", "service", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has launchd: test_launchd.py")
def test_the_command_from_install_to_uninstall_leaves_no_file(folder, tmp_path):
    home = tmp_path / "user"
    home.mkdir()
    assert service(home, folder, "status").returncode == 1
    planned = service(home, folder, "install", "--dry-run").stdout
    assert [path for path in home.rglob("*") if path.is_file()] == []
    result = service(home, folder, "install")
    assert result.returncode == 0, result.stderr
    found = json.loads(service(home, folder, "status", "--json").stdout)
    assert [(one["name"], one["pid"]) for one in found] == [("router", 4711), ("sidecar", 4711)]
    for unit in (home / ".config/systemd/user").glob("*.service"):
        assert str(unit) in planned and unit.read_text() in planned
    logs = home / ".local/state/tqstack"
    (logs / "router.log").write_text("one\ntwo\n")
    (logs / "router.log.1").write_text("older\n")
    assert service(home, folder, "logs", "-n", "1").stdout == "router: two\n"
    assert service(home, folder, "restart").returncode == 0
    # Without a sidecar, its service goes.
    assert service(home, folder, "install", SIDECAR_ENABLED="0").returncode == 0
    found = json.loads(service(home, folder, "status", "--json").stdout)
    assert [one["installed"] for one in found] == [True, False]
    assert service(home, folder, "uninstall").returncode == 0
    assert [path for path in home.rglob("*") if path.is_file()] == []
    assert service(home, folder, "stop").returncode == 1
