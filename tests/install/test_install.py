"""install.sh and uninstall.sh: what they change, what they undo, and what is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    sys.platform == "darwin", reason="the stand-in is for systemctl; test_launchd.py is for launchd"
)


def test_a_dry_run_prints_every_action_and_changes_nothing(machine):
    before = machine.files()
    code, output = machine.run("install.sh", "--dry-run", "--model", "demo")
    assert code == 0, output
    assert machine.files() == before and machine.calls() == []
    for word in ("packages", "settings", "model", "install and start", "nothing was changed"):
        assert word in output
    assert machine.run("install.sh", "--yes")[0] == 0
    before, calls = machine.files(), machine.calls()
    assert machine.run("uninstall.sh", "--dry-run")[0] == 0
    assert machine.run("install.sh", "--dry-run", "--model", "demo")[0] == 0
    assert machine.files() == before
    changing = [call for call in machine.calls()[len(calls) :] if call[1] != "show"]
    assert changing == []


def test_install_then_uninstall_leaves_no_file_behind(machine):
    before = machine.files()
    code, output = machine.run("install.sh", "--yes", "--model", "demo")
    assert code == 0, output
    assert "SIDECAR_MODEL=demo\n" in machine.config.read_text()
    assert machine.config.stat().st_mode & 0o777 == 0o600
    assert (machine.fakes / "active").read_text().split() == [
        "tqstack-router.service",
        "tqstack-sidecar.service",
    ]
    code, output = machine.run("uninstall.sh", "--yes")
    assert code == 0, output
    assert machine.files() == before
    assert (machine.fakes / "active").read_text() == ""
    assert not (machine.home / "ai").exists()


def test_without_a_yes_and_without_a_terminal_settings_stay(machine):
    machine.run("install.sh", "--no-service")
    assert machine.calls() == []
    code, output = machine.run("uninstall.sh")
    assert code == 0, output
    assert machine.config.exists() and not (machine.checkout / ".venv").exists()


def test_an_environment_that_was_there_before_is_not_removed(machine):
    subprocess.run(
        [machine.environment["PYTHON"], "-m", "venv", str(machine.checkout / ".venv")], check=True
    )
    machine.run("install.sh", "--no-service")
    machine.run("uninstall.sh", "--yes")
    assert (machine.checkout / ".venv/bin/python").exists()


def test_a_second_install_keeps_the_users_changes_and_shows_them(machine):
    machine.run("install.sh", "--no-service", "--model", "demo")
    text = machine.config.read_text().replace("#TQ_KV_BITS=4", "TQ_KV_BITS=3.5 # mine")
    lines = [line for line in text.splitlines() if "ROUTER_STALL_SECONDS" not in line]
    machine.config.write_text("\n".join(lines) + "\n")
    code, output = machine.run("install.sh", "--no-service")
    assert code == 0, output
    assert "+#ROUTER_STALL_SECONDS=60" in output and "TQ_KV_BITS" not in output
    kept = machine.config.read_text()
    assert "TQ_KV_BITS=3.5 # mine\n" in kept and "\nSIDECAR_MODEL=demo\n" in kept
    assert kept.startswith("\n".join(lines))
    files = machine.files()
    code, output = machine.run("install.sh", "--no-service")
    assert code == 0 and machine.files() == files and "left as it is" in output


@pytest.mark.parametrize("had_config", [False, True])
def test_a_step_that_fails_undoes_what_was_done(machine, had_config):
    if had_config:
        machine.config.parent.mkdir(parents=True)
        machine.config.write_text("TQ_KV_BITS=3\n")
    before = machine.files()
    (machine.fakes / "broken-at").write_text("enable")
    code, output = machine.run("install.sh", "--yes", "--model", "demo")
    assert code != 0 and "it does not want to" in output and "undo" in output
    assert machine.files() == before


def test_unusable_settings_stop_the_install_and_stay_as_they_were(machine):
    machine.config.parent.mkdir(parents=True)
    machine.config.write_text("# mine\nTQ_KV_BITS=nine\n")
    before = machine.files()
    code, output = machine.run("install.sh", "--yes")
    assert code != 0 and f"{machine.config}:2: TQ_KV_BITS='nine'" in output
    assert machine.files() == before


def test_killed_at_every_step_in_turn_the_next_install_finishes_the_job(machine):
    before = machine.files()
    step, finished = 0, False
    while not finished:
        step += 1
        process = machine.start("install.sh", "--yes", "--model", "demo")
        assert process.stdout
        seen = 0
        for line in process.stdout:
            seen += line.startswith("install: ")
            if seen == step and not line.startswith("install: done"):
                os.killpg(process.pid, signal.SIGKILL)
                break
        process.stdout.close()
        finished = process.wait(timeout=60) == 0
    assert step >= 6
    assert "SIDECAR_MODEL=demo\n" in machine.config.read_text()
    assert (machine.fakes / "active").read_text().count("tqstack-") == 2
    assert machine.run("uninstall.sh", "--yes")[0] == 0
    assert machine.files() == before
