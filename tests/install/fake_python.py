"""A Python for tests of the installer: `-m venv` makes an environment that is this one, and
`-m pip` does nothing; all else is the real Python."""

import os
import sys
from pathlib import Path

arguments = sys.argv[1:]
if arguments[:2] == ["-m", "venv"]:
    python = Path(arguments[2]) / "bin/python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} "$@"\n')
    python.chmod(0o755)
    script = python.with_name("tqstack")
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m tqstack "$@"\n')
    script.chmod(0o755)
elif arguments[:2] != ["-m", "pip"]:
    os.execv(sys.executable, [sys.executable, *arguments])
