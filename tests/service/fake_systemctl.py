#!/usr/bin/env python3
"""A systemctl for tests: keeps enabled and active units in a file, and records every call."""

import json
import os
import sys
from pathlib import Path

folder = Path(os.environ["FAKE_SYSTEMD"])
arguments = sys.argv[1:]
with (folder / "calls").open("a") as calls:
    calls.write(json.dumps(arguments) + "\n")
if (folder / "broken").exists():
    print("Failed to connect to bus: No medium found", file=sys.stderr)
    sys.exit(1)
if (folder / "broken-at").exists() and arguments[1] == (folder / "broken-at").read_text():
    print("it does not want to", file=sys.stderr)
    sys.exit(1)
state = folder / "active"
active = set(state.read_text().split()) if state.exists() else set()
verb, unit = arguments[1], next((a for a in arguments if a.endswith(".service")), "")
if verb in ("start", "restart"):
    active.add(unit)
if verb in ("stop", "disable"):
    active.discard(unit)
if verb == "show":
    runs = unit in active
    print(f"ActiveState={'active' if runs else 'inactive'}")
    print(f"SubState={'running' if runs else 'dead'}\nMainPID={4711 if runs else 0}")
    print("ExecMainStatus=0")
state.write_text("\n".join(sorted(active)))
