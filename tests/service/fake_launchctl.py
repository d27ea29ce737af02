#!/usr/bin/env python3
"""A launchctl for tests: keeps what is loaded in a file, and records every call.

FAKE_LAUNCHD names its folder. `busy` there holds how often bootstrap still answers 5 after a
bootout, as the real one does for some seconds. `ended` there: what is loaded has ended by itself.
"""

import json
import os
import sys
from pathlib import Path

folder = Path(os.environ["FAKE_LAUNCHD"])
arguments = sys.argv[1:]
with (folder / "calls").open("a") as calls:
    calls.write(json.dumps(arguments) + "\n")
state = folder / "loaded"
loaded = set(state.read_text().split()) if state.exists() else set()
busy = folder / "busy"
verb, name = arguments[0], arguments[-1].rpartition("/")[2].removesuffix(".plist")


def end(code: int, message: str = "") -> None:
    state.write_text("\n".join(sorted(loaded)))
    print(message, file=sys.stderr if code else sys.stdout)
    sys.exit(code)


if verb == "bootstrap":
    left = int(busy.read_text()) if busy.exists() else 0
    if left:
        busy.write_text(str(left - 1))
        end(5, "Bootstrap failed: 5: Input/output error")
    if name in loaded:
        end(5, "Bootstrap failed: 5: Input/output error")
    loaded.add(name)
    end(0)
if verb == "bootout":
    if name not in loaded:
        end(3, "Boot-out failed: 3: No such process")
    loaded.discard(name)
    end(0)
if verb == "print":
    if name not in loaded:
        end(113, f'Could not find service "{name}" in domain for user gui')
    how = "not running" if (folder / "ended").exists() else "running\n\tpid = 4711"
    end(0, f"{arguments[-1]} = {{\n\tstate = {how}\n\tlast exit code = 0\n}}")
if verb == "kickstart" and name not in loaded:
    end(113, "Could not find service")
end(0)
