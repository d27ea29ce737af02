"""What launchd is given, and which calls it gets: a stand-in for launchctl on PATH records them."""

from __future__ import annotations

import json
import os
import plistlib
import re
from pathlib import Path

import pytest

from processes import tqstack
from tqstack.service.definition import Place, ServiceError
from tqstack.service.launchd import PAUSE_SECONDS, TEMPLATES, Launchd, label, render
from tqstack.settings import EXIT_CONFIG

GUI = f"gui/{os.getuid()}"
ROUTER = f"{GUI}/com.tqstack-router"


@pytest.fixture
def place(tmp_path):
    home = tmp_path / "a & b <home> -- @HOME@"
    home.mkdir()
    return Place(
        home=home,
        python=Path("/opt/py & co/bin/python"),
        config=home / "config.env",
        logs=home / "Library/Logs/tqstack",
    )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The stand-in's folder; the stand-in is `launchctl` on PATH."""
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "launchctl").symlink_to(Path(__file__).with_name("fake_launchctl.py"))
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_LAUNCHD", str(tmp_path))
    return tmp_path


def calls(folder) -> list[list[str]]:
    path = folder / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", ["router", "sidecar"])
def test_every_key_of_a_property_list_is_as_promised(name, place):
    found = plistlib.loads(render(name, place))
    logs = str(place.logs)
    assert found == {
        "Label": f"com.tqstack-{name}",
        "ProgramArguments": [str(place.python), "-m", "tqstack", name],
        "EnvironmentVariables": {
            "PATH": "/opt/py & co/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "TQSTACK_CONFIG": str(place.config),
            "TQSTACK_LOG_DIR": logs,
            "STARTED_BY_LAUNCHD": "1",
        },
        "WorkingDirectory": str(place.home),
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": {"router": 10, "sidecar": 30}[name],
        "ProcessType": "Interactive",
        "ExitTimeOut": 40,
        "SoftResourceLimits": {"NumberOfFiles": 8192},
        "StandardOutPath": f"{logs}/{name}.crash.log",
        "StandardErrorPath": f"{logs}/{name}.crash.log",
    }


def test_a_template_has_no_double_dash_in_a_comment_and_no_secret():
    for name in ("router", "sidecar"):
        text = (TEMPLATES / f"{label(name)}.plist.template").read_text()
        for comment in re.findall(r"<!--(.*?)-->", text, re.S):
            assert "--" not in comment
        assert "KEY@" not in text and "API" not in text


def test_install_writes_loads_and_can_be_repeated(folder, place):
    launchd = Launchd(place)
    launchd.install("router")
    plist = str(launchd.plist("router"))
    assert calls(folder) == [
        ["bootout", ROUTER],
        ["print", ROUTER],
        ["print", ROUTER],
        ["enable", ROUTER],
        ["bootstrap", GUI, plist],
    ]
    assert launchd.status("router").pid == 4711
    launchd.install("router")
    assert launchd.status("router").pid == 4711
    assert place.logs.is_dir()


def test_bootstrap_is_tried_again_while_the_old_service_goes_away(folder, place):
    pauses = []
    launchd = Launchd(place, pause=pauses.append)
    (folder / "busy").write_text("9")  # of PAUSE_SECONDS: the five seconds that were measured
    launchd.install("router")
    assert launchd.status("router").pid
    assert pauses == [PAUSE_SECONDS] * 9
    assert sum(call[0] == "bootstrap" for call in calls(folder)) == 10


def test_a_bootstrap_that_never_succeeds_is_told_after_fifteen_seconds(folder, place):
    pauses = []
    (folder / "busy").write_text("1000")
    with pytest.raises(ServiceError, match="exit code 5: Bootstrap failed"):
        Launchd(place, pause=pauses.append).install("router")
    assert sum(pauses) == pytest.approx(15)


def test_stop_start_and_restart_make_the_calls_that_launchd_wants(folder, place):
    launchd = Launchd(place)
    launchd.install("router")
    calls(folder)
    launchd.restart("router")
    assert calls(folder) == [["print", ROUTER], ["kickstart", "-k", ROUTER]]
    launchd.start("router")
    assert calls(folder) == [["print", ROUTER], ["kickstart", ROUTER]]
    launchd.stop("router")
    assert calls(folder) == [["bootout", ROUTER], ["print", ROUTER]]
    assert launchd.status("router").detail == "stopped"
    launchd.stop("router")  # exit code 3, not loaded: no error
    calls(folder)
    launchd.restart("router")
    assert calls(folder)[-1][0] == "bootstrap"


def test_uninstall_leaves_nothing_and_may_be_repeated(folder, place):
    launchd = Launchd(place)
    launchd.install("sidecar")
    for _ in range(2):
        launchd.uninstall("sidecar")
    assert not launchd.plist("sidecar").exists()
    assert not (place.home / "Library/LaunchAgents").exists()
    assert (folder / "loaded").read_text() == ""
    with pytest.raises(ServiceError, match="tqstack service install"):
        launchd.start("sidecar")


def test_a_service_that_has_ended_by_itself_is_not_called_stopped(place, folder):
    launchd = Launchd(place, pause=lambda seconds: None)
    launchd.install("sidecar")
    (folder / "ended").touch()
    assert launchd.status("sidecar").pid is None
    assert "service logs says why" in launchd.status("sidecar").detail
    launchd.stop("sidecar")
    assert launchd.status("sidecar").detail == "stopped"


@pytest.mark.parametrize("name", ["router", "sidecar"])
def test_a_wrong_setting_ends_a_service_of_launchd_for_good(name, tmp_path):
    wrong = {"TQ_KV_BITS": "nine"}
    result = tqstack(tmp_path, name, STARTED_BY_LAUNCHD="1", **wrong)
    assert result.returncode == 0 and "TQ_KV_BITS='nine'" in result.stderr
    assert tqstack(tmp_path, name, **wrong).returncode == EXIT_CONFIG
