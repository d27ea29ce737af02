"""Connections between rank 0 and the others: TCP, both ends prove that they know the key.

Each other rank has two: one for orders and answers, one for the signs of life that watchers send.
What goes over them is JSON.
"""

from __future__ import annotations

import logging
import queue
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

import orjson

log = logging.getLogger(__name__)

ORDERS, PULSE = "orders", "pulse"
LARGEST = 256 << 20  # bytes of a message


class UnreachableError(RuntimeError):
    """Ranks did not find each other in time."""


def listen(host: str) -> socket.socket:
    """A socket that listens on a free port of this address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.bind((host, 0))
    listener.listen()
    return listener


def send(connection: Connection, message: Any) -> None:
    connection.send_bytes(orjson.dumps(message, option=orjson.OPT_SERIALIZE_NUMPY))


def receive(connection: Connection) -> Any:
    """
    Raises:
        EOFError, OSError: the other end is gone.
    """
    return orjson.loads(connection.recv_bytes(LARGEST))


def gather(
    listener: socket.socket, key: bytes, ranks: int, seconds: float
) -> dict[tuple[int, str], tuple[Connection, dict[str, Any]]]:
    """Rank 0 takes the others in: connections by (rank, purpose), and what each said of itself.

    Whoever does not know the key is let go, and holds up nobody.

    Raises:
        UnreachableError: not all came in time.
    """
    came: queue.SimpleQueue[tuple[Connection, dict[str, Any]]] = queue.SimpleQueue()
    found: dict[tuple[int, str], tuple[Connection, dict[str, Any]]] = {}
    deadline, wanted = time.monotonic() + seconds, 2 * (ranks - 1)
    threading.Thread(target=_accept, args=(listener, key, came), daemon=True).start()
    try:
        while len(found) < wanted:
            connection, hello = came.get(timeout=max(0.0, deadline - time.monotonic()))
            found[hello["rank"], hello["purpose"]] = connection, hello
    except queue.Empty:
        missing = sorted(set(range(1, ranks)) - {rank for rank, _ in found})
        raise UnreachableError(
            f"ranks {missing} did not come within {seconds:g} s; see their messages above"
        ) from None
    finally:
        listener.close()
    return found


def take_in(
    listener: socket.socket, key: bytes, seconds: float, ended: Callable[[], int | None]
) -> tuple[Connection, dict[str, Any]]:
    """One other end.

    Args:
        ended: not None once the process that should come has ended.

    Raises:
        UnreachableError: it did not come in time.
    """
    came: queue.SimpleQueue[tuple[Connection, dict[str, Any]]] = queue.SimpleQueue()
    deadline = time.monotonic() + seconds
    threading.Thread(target=_accept, args=(listener, key, came), daemon=True).start()
    while ended() is None and time.monotonic() < deadline:
        with suppress(queue.Empty):
            return came.get(timeout=0.2)
    raise UnreachableError(f"no connection came back within {seconds:g} s")


def _accept(listener: socket.socket, key: bytes, came: Any) -> None:
    while True:
        try:
            accepted, address = listener.accept()
        except OSError:  # closed: all are here
            return
        threading.Thread(target=_greet, args=(accepted, address, key, came), daemon=True).start()


def _greet(accepted: socket.socket, address: Any, key: bytes, came: Any) -> None:
    connection = _connection(accepted)
    try:
        deliver_challenge(connection, key)
        answer_challenge(connection, key)
        came.put((connection, receive(connection)))
    except (AuthenticationError, EOFError, OSError, ValueError) as error:
        log.warning("a connection from %s is refused: %s", address[0], error or "cut off")
        connection.close()


def reach(
    address: tuple[str, int], key: bytes, hello: dict[str, Any], seconds: float
) -> Connection:
    """A connection to rank 0.

    Raises:
        UnreachableError: it is not there, or does not know the key.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            connection = _connection(socket.create_connection(address, timeout=5))
            answer_challenge(connection, key)
            deliver_challenge(connection, key)
            send(connection, hello)
            return connection
        except AuthenticationError:
            raise UnreachableError(f"rank 0 at {address[0]} does not know the key") from None
        except (EOFError, OSError) as error:
            if time.monotonic() > deadline:
                why = f"rank 0 at {address[0]}:{address[1]} cannot be reached: {error}"
                raise UnreachableError(why) from error
            time.sleep(0.2)


def _connection(connected: socket.socket) -> Connection:
    """Small messages go at once: each is an order that others wait for."""
    connected.settimeout(None)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Connection(connected.detach())
