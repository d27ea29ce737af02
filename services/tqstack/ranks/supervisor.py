"""Starts all ranks, and all of them again when one ends.

Each rank is told its role on its standard input, which stays open: a rank whose supervisor is gone
reads its end, and ends too, on other machines as well.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import secrets
import signal
import socket
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tqstack.machine import accelerator
from tqstack.ranks import control
from tqstack.ranks.hosts import HERE, Host, Hosts, read_hosts
from tqstack.ranks.links import over_ssh
from tqstack.ranks.role import Backend, Role, settings_of_others
from tqstack.settings import EXIT_CONFIG, Settings

log = logging.getLogger(__name__)

FIRST_DELAY, LONGEST_DELAY, HEALTHY_SECONDS = 0.5, 30.0, 60.0
STOP_SECONDS = 20
RING_PORT = 32323  # as mlx.launch has it


@dataclass(frozen=True)
class Places:
    """Where the ranks run.

    Attributes:
        local: all on this machine, which SIDECAR_RANKS says.
    """

    hosts: Hosts
    local: bool

    @classmethod
    def of(cls, settings: Settings) -> Places:
        """
        Raises:
            SettingsError: SIDECAR_HOSTS is no such file.
        """
        if settings.sidecar_hosts:
            return cls(read_hosts(settings.sidecar_hosts), local=False)
        here = Host(ssh=HERE[0], ips=HERE[:1])
        return cls(Hosts(hosts=(here,) * settings.sidecar_ranks), local=True)

    def __len__(self) -> int:
        return len(self.hosts.hosts)

    def host(self, rank: int) -> Host:
        """The first one is this machine, whatever its name."""
        host = self.hosts.hosts[rank]
        return host if rank else host.model_copy(update={"ssh": HERE[0]})

    def is_here(self, rank: int) -> bool:
        return self.host(rank).ssh in HERE

    @property
    def backend(self) -> Backend:
        return "nccl" if self.local and accelerator() == "cuda" else self.hosts.links

    def beside(self, rank: int) -> int:
        """Ranks that share a rank's memory."""
        if self.backend == "nccl":
            return 1
        here, own = self.is_here(rank), self.host(rank).ssh
        others = map(self.host, range(len(self)))
        return sum(host.ssh in HERE if here else host.ssh == own for host in others)

    def roles(self, settings: Settings, listener: socket.socket) -> list[Role]:
        """What each rank is told; anew for every start."""
        key, found = secrets.token_hex(32), []
        host, port = listener.getsockname()[:2]
        environment, files = self._mlx()
        for rank in range(len(self)):
            given = settings.model_dump(mode="json") if not rank else settings_of_others(settings)
            if not self.is_here(rank):
                given["tqstack_log_dir"] = ""
            own = {"MLX_RANK": str(rank), **environment}
            if self.backend == "nccl":
                own["CUDA_VISIBLE_DEVICES"] = str(rank)
            found.append(
                Role(
                    rank=rank,
                    ranks=len(self),
                    beside=self.beside(rank),
                    backend=self.backend,
                    address=(host, port),
                    key=key,
                    environment=own,
                    files=files,
                    settings=given,
                    listener=None if rank else listener.fileno(),
                )
            )
        return found

    def _mlx(self) -> tuple[dict[str, str], dict[str, str]]:
        """(variables, variables whose values are files) of MLX, but for each rank's own."""
        environment, hosts = self.hosts.environment, self.hosts.hosts
        first = hosts[0].ips[0]
        if self.backend == "nccl":
            [port] = free_ports(1)
            nccl = {"NCCL_HOST_IP": first, "NCCL_PORT": str(port), "NCCL_SOCKET_IFNAME": "lo"}
            return {**environment, **nccl, "MLX_WORLD_SIZE": str(len(hosts))}, {}
        if self.backend == "ring":
            addresses = [len(host.ips) for host in hosts]
            ports = iter(
                free_ports(sum(addresses))
                if self.local
                else range(RING_PORT, RING_PORT + sum(addresses))
            )
            ring = [[f"{ip}:{next(ports)}" for ip in host.ips] for host in hosts]
            return environment, {"MLX_HOSTFILE": json.dumps(ring)}
        environment = {**environment, "MLX_JACCL_COORDINATOR": f"{first}:{RING_PORT}"}
        if self.backend == "jaccl-ring":
            environment["MLX_JACCL_RING"] = "1"
        return environment, {"MLX_IBV_DEVICES": json.dumps([host.rdma for host in hosts])}


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody has now."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind((HERE[0], 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Supervisor:
    def __init__(self, settings: Settings):
        self._settings, self._places = settings, Places.of(settings)
        self._events: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._processes: list[subprocess.Popen[bytes]] = []

    def run(self) -> int:
        """Until a signal comes, or until a rank says that starting again will not help.

        Returns:
            The exit code.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._events.put(("stop", None)))
        delay = FIRST_DELAY / 2
        while True:
            started = time.monotonic()
            self._start()
            ended, code = self._wait(None)
            if ended == "stop":
                return self._stop()
            self._kill()
            if code == EXIT_CONFIG:
                return code
            healthy = time.monotonic() - started > HEALTHY_SECONDS
            delay = FIRST_DELAY if healthy else min(LONGEST_DELAY, 2 * delay)
            log.error("rank %s ended (code %s): all start again in %g s", ended, code, delay)
            if self._wait(delay)[0] == "stop":
                return 0

    def _start(self) -> None:
        with control.listen(self._places.hosts.hosts[0].ips[0]) as listener:
            roles = self._places.roles(self._settings, listener)
            self._processes = [self._spawn(role) for role in roles]
        for rank, process in enumerate(self._processes):
            threading.Thread(target=self._await, args=(rank, process), daemon=True).start()

    def _spawn(self, role: Role) -> subprocess.Popen[bytes]:
        command, environment = over_ssh(self._places.host(role.rank), ["rank"]), dict(os.environ)
        descriptors = () if role.listener is None else (role.listener,)
        if self._places.is_here(role.rank) and accelerator() == "cpu":
            share = max(1, (os.cpu_count() or 1) // role.beside)
            environment.setdefault("OPENBLAS_NUM_THREADS", str(share))
        # A session of its own: Ctrl-C reaches this process alone, which then stops rank 0.
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            pass_fds=descriptors,
            start_new_session=True,
        )
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, which is seen soon
            process.stdin.write(role.to_line())
            process.stdin.flush()
        return process

    def _await(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        self._events.put((str(rank), (process.pid, code)))

    def _wait(self, seconds: float | None) -> tuple[str, int | None]:
        """("stop", None), or a rank of this start that has ended and its code; ("", None) after so
        many seconds."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                what, told = self._events.get(timeout=left)
            except queue.Empty:
                return "", None
            if what == "stop":
                return what, None
            pid, code = told
            if any(pid == process.pid for process in self._processes):
                return what, code

    def _stop(self) -> int:
        """Rank 0 answers who is being answered, and tells the others to end."""
        self._processes[0].terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
        code = self._processes[0].poll()
        self._kill()
        return code or 0

    def _kill(self) -> None:
        """End all that are left, those too that are stopped; others' machines read the end of
        their input."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            if process.stdin is not None:
                with suppress(BrokenPipeError):
                    process.stdin.close()
        self._processes = []
