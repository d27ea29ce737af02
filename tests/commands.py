"""`tqstack` commands in the process of the tests: what they say, without the seconds in which a
process of their own imports everything (`processes.tqstack`)."""

from __future__ import annotations

import os
from pathlib import Path

from typer.testing import CliRunner, Result

from processes import clean_environment
from tqstack.cli import app


def called(home: Path, *arguments: str, **settings: str) -> Result:
    """A command's `exit_code`, `stdout` and `stderr`. What it does not catch, the test gets."""
    environment = clean_environment(home, **settings)
    others = dict.fromkeys(os.environ.keys() - environment.keys())
    return CliRunner().invoke(app, arguments, env=others | environment, catch_exceptions=False)
