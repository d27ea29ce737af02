"""The file of backends, read again in mid-flight: on SIGHUP, or by `tqstack config reload`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator

from tqstack.router.backends.definition import definitions
from tqstack.router.services import Services
from tqstack.settings import SettingsError

log = logging.getLogger(__name__)


def reload(services: Services) -> str:
    """Reads the file again; tells what changed.

    Raises:
        SettingsError: the file cannot be used; nothing has changed.
    """
    try:
        change = services.backends.replace(definitions(services.settings))
    except SettingsError as error:
        log.warning("the backends stay as they were: %s", error)
        raise
    log.info("the backends were read again: %s", change)
    return change


@contextlib.contextmanager
def reloading_at_hangup(services: Services) -> Iterator[None]:
    """Where this is the main thread of the process, whose signals these are."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    has_terminal = _has_terminal()

    def hangup() -> None:
        if has_terminal and not _has_terminal():  # it was closed: nobody can end us there any more
            os.kill(os.getpid(), signal.SIGTERM)
            return
        with contextlib.suppress(SettingsError):
            reload(services)

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, hangup)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)


def _has_terminal() -> bool:
    """Whether this process belongs to a terminal that is there."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
