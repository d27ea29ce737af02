"""What is measured: the router, nginx and LiteLLM as proxies, and no proxy at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqstack.bench.processes import end


@dataclass
class Target:
    """Something that requests are sent to. `pids` are the proxy's processes, if it is one."""

    name: str
    port: int
    pids: list[int] = field(default_factory=list)
    figures: dict[str, list[float]] = field(default_factory=dict)

    def note(self, **figures: float) -> None:
        for name, value in figures.items():
            self.figures.setdefault(name, []).append(value)

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(values) for name, values in self.figures.items()}

    def cpu_seconds(self) -> float:
        """Processor time that the proxy has used, to the nanosecond (Linux; 0 elsewhere)."""
        nanoseconds = 0
        for pid in self.pids:
            for thread in Path(f"/proc/{pid}/task").glob("*/schedstat"):
                with contextlib.suppress(OSError):
                    nanoseconds += int(thread.read_text().split()[0])
        return nanoseconds / 1e9

    def resident_mb(self) -> float:
        listing = subprocess.run(
            ["ps", "-o", "rss=", "-p", ",".join(map(str, self.pids))],
            capture_output=True,
            text=True,
        ).stdout
        return sum(map(int, listing.split())) / 1024


@contextlib.contextmanager
def running(command: list[str], proxy: bool, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process on its share of the cores, ended at the end."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, **options
    )
    pin(process.pid, proxy)
    try:
        yield process
    finally:
        end(process, 10)


def pin(pid: int, proxy: bool) -> None:
    cores = os.cpu_count() or 1
    if cores > 1 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(pid, {cores - 1} if proxy else set(range(cores - 1)))


def pin_load() -> None:
    """Keeps this process, which sends the load, off the proxy's core."""
    pin(0, proxy=False)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def wait_for(port: int, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise TimeoutError(f"nothing listens on port {port} after {seconds:.0f} s")


@contextlib.contextmanager
def router(backend: int, folder: Path, count: int = 1, at_once: int = 0) -> Iterator[Target]:
    """The router before so many backends, which are all the same one.

    Args:
        at_once: the most requests that each of them takes at a time; 0: any number.
    """
    port, name = free_port(), "tqstack" if count == 1 else f"tqstack, {count} backends"
    if at_once:
        name = f"{count} slow backend{'s' * (count > 1)}"
    config = folder / f"config-{count}-{at_once}.env"
    backends = config.with_suffix(".toml")
    limit = f"at_once = {at_once}\n" if at_once else ""
    backends.write_text(
        "".join(
            f'[[backend]]\nname = "b{i}"\nkind = "ollama"\nurl = "http://127.0.0.1:{backend}"\n{limit}'
            for i in range(count)
        )
    )
    config.write_text(
        f"ROUTER_PORT={port}\nROUTER_BACKENDS={backends}\nTQSTACK_LOG_LEVEL=warning\n"
    )
    command = [sys.executable, "-m", "tqstack", "router"]
    with running(command, True, env={**os.environ, "TQSTACK_CONFIG": str(config)}) as process:
        wait_for(port)
        yield Target(name, port, [process.pid])


_NGINX = """
daemon off; worker_processes 1; error_log /dev/null; pid {folder}/pid;
events {{ worker_connections 512; }}
http {{
  access_log off; keepalive_requests 100000000; client_max_body_size 64m;
  client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
  uwsgi_temp_path {folder}; scgi_temp_path {folder}; client_body_buffer_size 1m;
  upstream backend {{ server 127.0.0.1:{backend}; keepalive 64; keepalive_requests 100000000; }}
  server {{ listen 127.0.0.1:{port}; location / {{
    proxy_pass http://backend; proxy_http_version 1.1; proxy_set_header Connection "";
    proxy_buffering off; }} }}
}}
"""


@contextlib.contextmanager
def nginx(backend: int, folder: Path) -> Iterator[Target]:
    port, config = free_port(), folder / "nginx.conf"
    config.write_text(_NGINX.format(folder=folder, backend=backend, port=port))
    with running([nginx_path(), "-c", str(config)], True) as process:
        wait_for(port)
        workers = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
        ).stdout.split()
        yield Target("nginx", port, [process.pid, *map(int, workers)])


@contextlib.contextmanager
def litellm(backend: int, folder: Path) -> Iterator[Target]:
    port, config = free_port(), folder / "litellm.yaml"
    config.write_text(
        "model_list:\n- model_name: bench\n  litellm_params: {model: openai/bench, "
        f"api_base: 'http://127.0.0.1:{backend}/v1', api_key: none}}\n"
    )
    command = [litellm_path(), "--config", str(config), "--port", str(port), "--host", "127.0.0.1"]
    # It is on loopback, for a minute: it needs no key, and says that it wants one.
    environment = {**os.environ, "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"}
    with running(command, True, env=environment) as process:
        wait_for(port, 120)
        yield Target("litellm", port, [process.pid])


def nginx_path() -> str:
    return shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin") or ""


def litellm_path() -> str:
    return shutil.which("litellm") or ""
