"""`tqstack rank`: one rank of a sidecar of several, as its supervisor starts it."""

from __future__ import annotations

import logging
import os
import signal
import threading
from functools import partial
from typing import Annotated, Any

import typer

from tqstack.cli.common import fail, preload_openblas, start_logging
from tqstack.ranks.links import answer
from tqstack.ranks.role import Role
from tqstack.settings import Settings

STDIN = 0


def rank(
    probe: Annotated[bool, typer.Option(help="Say what this host is, for doctor.")] = False,
) -> None:
    """Be one rank of a divided model; what it shall do comes on its standard input."""
    preload_openblas()
    line = bytearray()
    # Without a buffer: whoever waits in one at the process's end is a fatal error to Python.
    while not line.endswith(b"\n") and (read := os.read(STDIN, 1 << 16)):
        line += read
    if not line:
        fail("a rank is started by `tqstack sidecar`, with SIDECAR_RANKS or SIDECAR_HOSTS")
    if probe:
        answer(bytes(line))
        return
    role = Role.from_line(bytes(line))
    settings = role.own_settings()
    start_logging(settings, f"sidecar-rank{role.rank}" if role.rank else "sidecar")
    from tqstack.ranks.group import Group
    from tqstack.ranks.pulse import ENDED

    group = Group(role)
    threading.Thread(target=_end_with_supervisor, args=(group,), daemon=True).start()
    error = _serve(settings, group) if role.rank == 0 else _follow(settings, group)
    if error is None:
        # All is done and written. Python's own end would meet threads of MLX's collectives.
        logging.shutdown()
        os._exit(0)
    from tqstack.attention.dispatch import NotCompressedError

    # A sentence on what to do: starting again will not help. All else may pass.
    lasting = isinstance(error, ValueError | NotCompressedError)
    why = f"rank {role.rank} cannot serve {settings.model_name}: {error}"
    fail(why) if lasting else fail(why, ENDED)


def _end_with_supervisor(group: Any) -> None:
    from tqstack.ranks.pulse import end

    while os.read(STDIN, 1 << 16):
        pass
    if not group.progress.closing:
        end("its supervisor is gone")


def _serve(settings: Settings, group: Any) -> Exception | None:
    from tqstack.cli.sidecar import serve

    return serve(settings, group)


def _follow(settings: Settings, group: Any) -> Exception | None:
    # Rank 0 says when to end; a service manager's signals go to all processes.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    from tqstack.engine.worker import Worker
    from tqstack.ranks.follower import Follower
    from tqstack.sidecar.loader import Loader, new_worker

    try:
        follower = Follower(group)
        make = partial(Worker, ranks=follower.agreement)
        worker = new_worker(settings, Loader(settings, group).load(), group, make)
    except Exception as error:
        logging.exception("the model could not be loaded")
        return error
    follower.follow(worker)
    return None
