"""What `tqstack doctor` finds out about other hosts: whether a rank could run there, and the link.

The other host is asked over ssh, as when ranks are started, and connects back to this one as ranks
do, so that what is measured is what they will use.
"""

from __future__ import annotations

import os
import secrets
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import orjson

from tqstack.ranks import control
from tqstack.ranks.control import UnreachableError
from tqstack.ranks.hosts import HERE, Host

TURNS, BYTES = 50, 32 << 20
SECONDS = 40.0  # for a host to come


@dataclass(frozen=True)
class Link:
    """
    Attributes:
        about: what the host says of itself (`group.about_this_rank`), and whether it has the model.
        round_trip: seconds of a small message and its answer; a token needs dozens.
        bandwidth: bytes a second towards it.
    """

    about: dict[str, Any]
    round_trip: float
    bandwidth: float


def probe(first: Host, host: Host, rank: int, model: str) -> Link:
    """
    Args:
        first: this machine.

    Raises:
        UnreachableError: the host does not come; the message says why.
    """
    key = secrets.token_bytes(32)
    try:
        listener = control.listen(first.ips[0])
    except OSError as error:
        raise UnreachableError(f"{first.ips[0]} is not this machine's: {error.strerror}") from None
    told = {"address": listener.getsockname()[:2], "key": key.hex(), "rank": rank, "model": model}
    command = over_ssh(host, ["rank", "--probe"])
    with (
        listener,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(orjson.dumps(told) + b"\n")
            process.stdin.flush()
            connection, about = control.take_in(listener, key, SECONDS, process.poll)
            with connection:
                return Link(about, *_measure(connection))
        except (OSError, EOFError, UnreachableError) as error:
            ended = process.poll() is not None
            said = process.stdout.read().decode(errors="replace").split("\n") if ended else []
            raise UnreachableError(next(filter(None, reversed(said)), str(error))) from None
        finally:
            process.kill()


def over_ssh(host: Host, arguments: list[str]) -> list[str]:
    """A command of ours on a host, where Python must lie as it does here."""
    command = [sys.executable, "-m", "tqstack", *arguments]
    if host.ssh in HERE:
        return command
    options = ("BatchMode=yes", "ConnectTimeout=10", "LogLevel=ERROR")
    return ["ssh", *(f"-o{one}" for one in options), host.ssh, "exec " + shlex.join(command)]


def _measure(connection: Connection) -> tuple[float, float]:
    turns = []
    for size in [1] * TURNS:
        turns.append(_turn(connection, bytes(size)))
    round_trip = statistics.median(turns)
    seconds = _turn(connection, os.urandom(BYTES)) - round_trip
    return round_trip, BYTES / max(seconds, 1e-6)


def _turn(connection: Connection, content: bytes) -> float:
    began = time.perf_counter()
    connection.send_bytes(content)
    connection.recv_bytes(1)
    return time.perf_counter() - began


def answer(line: bytes) -> None:
    """The other end: say what this host is, and answer until the connection ends."""
    from tqstack.models.spec import ModelNotFoundError, read_spec
    from tqstack.ranks.group import about_this_rank

    told = orjson.loads(line)
    about = {**about_this_rank(told["rank"]), "model": True}
    try:
        read_spec(told["model"])
    except ModelNotFoundError as error:
        about["model"] = str(error)
    address, key = tuple(told["address"]), bytes.fromhex(told["key"])
    connection = control.reach(address, key, about, 10)
    try:
        while True:
            connection.recv_bytes(BYTES)
            connection.send_bytes(b".")
    except (EOFError, OSError):
        return
