"""What all tests share: `--fast`, and an environment in which nothing is downloaded."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

COMPILERS = {"g++"}  # of the kernels' C++ dialect: what is compiled once is kept


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="skip tests that start processes")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--fast"):
        sys.addaudithook(_skip_processes)


def _skip_processes(event: str, arguments: tuple) -> None:
    """A test shows by itself that it starts a process: nobody has to mark it."""
    if event != "subprocess.Popen" or "PYTEST_CURRENT_TEST" not in os.environ:
        return
    if Path(arguments[0]).name not in COMPILERS:
        pytest.skip("starts a process: left out by --fast")
