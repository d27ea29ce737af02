"""A rank's ties to the others: who they are, connections, the group of MLX's collectives."""

from __future__ import annotations

import os
import platform
import signal
import socket
import tempfile
import time
from importlib.metadata import version
from multiprocessing.connection import Connection
from typing import Any

import mlx.core as mx

from tqstack.machine import accelerator
from tqstack.models.split import NotSplitError
from tqstack.ranks import control
from tqstack.ranks.control import ORDERS, PULSE
from tqstack.ranks.pulse import Progress, Watcher
from tqstack.ranks.role import Role

JOIN_SECONDS = 60  # in which all ranks must find each other
SAME = ("tqstack", "mlx", "mlx-lm", "transformers", "llguidance")  # packages whose versions count


def about_this_rank(rank: int) -> dict[str, Any]:
    """What a rank says of itself."""
    return {
        "rank": rank,
        "host": platform.node(),
        "pid": os.getpid(),
        "device": accelerator(),
        "versions": {name: version(name) for name in SAME},
    }


def check_alike(own: dict[str, Any], other: dict[str, Any]) -> None:
    """
    Raises:
        NotSplitError: their devices or versions differ, so numbers would.
    """
    if other["device"] != own["device"]:
        raise NotSplitError(
            f"rank {other['rank']} on {other['host']} computes on {other['device']}, rank 0 on "
            f"{own['device']}: use machines of one kind"
        )
    for name, here in own["versions"].items():
        if (there := other["versions"].get(name)) != here:
            raise NotSplitError(
                f"rank {other['rank']} on {other['host']} has {name} {there}, rank 0 has {here}: "
                "install the same version on all hosts"
            )


class Group:
    """
    Attributes:
        orders: of rank 0: a connection to each other rank; of the others: one to rank 0.
        collectives: what MLX's collectives go over; None: not joined yet.
    """

    def __init__(self, role: Role):
        self.role = role
        self.orders: list[Connection] = []
        self.progress = Progress()
        self.collectives: mx.distributed.Group | None = None
        self._about = {role.rank: about_this_rank(role.rank)}
        self._watcher: Watcher | None = None

    @property
    def rank(self) -> int:
        return self.role.rank

    def join(self) -> mx.distributed.Group:
        """Find the others; watch them from now on.

        Raises:
            NotSplitError: they are not of the same versions.
            UnreachableError
        """
        # MLX's start holds Python's lock until all are there, so that no thread could end it: an
        # alarm of the system's does.
        signal.alarm(2 * JOIN_SECONDS)
        connections = self._gather() if self.rank == 0 else self._reach()
        self.collectives = _collectives(self.role)
        signal.alarm(0)
        self._watcher = Watcher(connections, self.progress)
        self._watcher.start()
        return self.collectives

    def _gather(self) -> dict[int, Connection]:
        role = self.role
        assert role.listener is not None
        listener = socket.socket(fileno=role.listener)
        found = control.gather(listener, bytes.fromhex(role.key), role.ranks, JOIN_SECONDS)
        self.orders = [found[rank, ORDERS][0] for rank in range(1, role.ranks)]
        self._about |= {rank: found[rank, ORDERS][1] for rank in range(1, role.ranks)}
        try:
            for rank in range(1, role.ranks):
                check_alike(self._about[0], self._about[rank])
        except NotSplitError as error:
            for connection in self.orders:
                control.send(connection, ["refused", str(error)])
            raise
        for connection in self.orders:
            control.send(connection, ["welcome"])
        return {rank: found[rank, PULSE][0] for rank in range(1, role.ranks)}

    def _reach(self) -> dict[int, Connection]:
        role, key, about = self.role, bytes.fromhex(self.role.key), self._about[self.rank]
        orders, pulse = (
            control.reach(role.address, key, {**about, "purpose": purpose}, JOIN_SECONDS)
            for purpose in (ORDERS, PULSE)
        )
        self.orders = [orders]
        answer = control.receive(orders)
        if answer[0] == "refused":
            raise NotSplitError(answer[1])
        return {0: pulse}

    def status(self) -> dict[str, Any]:
        """What `/health` tells of the ranks; any thread may ask."""
        watcher, now, each = self._watcher, time.monotonic(), []
        for rank, about in sorted(self._about.items()):
            told: dict[str, Any] = {}
            if watcher is not None and rank == self.rank:
                told = {**watcher.beat(), "silent_seconds": 0.0}
            elif watcher is not None:
                silence = round(watcher.peers.silence(rank, now), 1)
                told = {**watcher.peers.told(rank), "silent_seconds": silence}
            each.append({key: about[key] for key in ("rank", "host", "pid", "device")} | told)
        return {
            "count": self.role.ranks,
            "backend": self.role.backend,
            "experimental": True,
            "each": each,
        }


def _collectives(role: Role) -> mx.distributed.Group:
    os.environ.update(role.environment)
    with tempfile.TemporaryDirectory(prefix="tqstack-rank-") as folder:
        for name, content in role.files.items():
            path = os.path.join(folder, name)
            with open(path, "w") as file:
                file.write(content)
            os.environ[name] = path
        group = mx.distributed.init(strict=True, backend=role.backend.removesuffix("-ring"))
    if group.size() != role.ranks:
        raise RuntimeError(f"MLX found {group.size()} ranks of {role.ranks}")
    return group
