#!/usr/bin/env python3
"""A systemctl that really runs units, as far as tests need it: ExecStart, Environment, stop.

FAKE_SYSTEMD names its folder, where the processes' ids are. Like systemd, it gives a service
nothing of the caller's environment but HOME.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

folder, home = Path(os.environ["FAKE_SYSTEMD"]), Path(os.environ["HOME"])
verb = sys.argv[2]
unit = next((word for word in sys.argv if word.endswith(".service")), "")
note = folder / f"{unit}.pid"


def pid() -> int:
    """Of the unit's process, 0 if none runs."""
    try:
        number = int(note.read_text())
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ValueError):
        return 0
    return 0 if state == "Z" else number


def stop() -> None:
    if running := pid():
        os.kill(running, signal.SIGTERM)
        while pid():
            time.sleep(0.05)


def start() -> None:
    lines = (home / ".config/systemd/user" / unit).read_text().splitlines()
    words = {
        key: [word.replace("%%", "%").replace("$$", "$") for word in shlex.split(value)]
        for key, _, value in (line.partition("=") for line in lines)
        if key in ("ExecStart", "Environment")
    }
    process = subprocess.Popen(
        words["ExecStart"],
        env={"HOME": str(home), **dict(word.split("=", 1) for word in words["Environment"])},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    note.write_text(str(process.pid))


if verb in ("stop", "restart", "disable"):
    stop()
if verb in ("start", "restart"):
    start()
if verb == "show":
    print(f"ActiveState={'active' if pid() else 'inactive'}\nMainPID={pid()}\nExecMainStatus=0")
