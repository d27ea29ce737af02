"""Logs rotate: from Python, since launchd never does."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tqstack.cli import common
from tqstack.settings import Settings


@pytest.fixture
def root(monkeypatch):
    """The root logger; what a test adds to it goes again."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    return root


def test_logs_rotate_and_never_take_more_than_their_share(tmp_path, monkeypatch, root):
    monkeypatch.setattr(common, "LOG_BYTES", 2000)
    root.handlers = []  # pytest's own came after the fixture
    common.start_logging(Settings(tqstack_log_dir=str(tmp_path / "logs")), "router")
    for number in range(1000):
        logging.getLogger("x").info("line %d of a long log", number)
    files = sorted((tmp_path / "logs").iterdir())
    assert [file.name for file in files] == [
        "router.log",
        *(f"router.log.{i}" for i in range(1, 5)),
    ]
    assert all(file.stat().st_size <= 2000 for file in files)
    assert "line 999" in files[0].read_text()


def test_a_folder_that_cannot_be_written_is_named(tmp_path, root, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stopped:
        common.start_logging(Settings(tqstack_log_dir=str(Path(tmp_path, "file", "x"))), "router")
    assert stopped.value.code == 78
    assert "TQSTACK_LOG_DIR" in capsys.readouterr().err
