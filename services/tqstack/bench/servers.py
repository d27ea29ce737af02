"""What is measured: a sidecar started for the purpose, and servers that run already."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from tqstack.bench.processes import end
from tqstack.bench.router.targets import free_port

START_SECONDS = 900  # for loading a large model


class ServerError(RuntimeError):
    """A server that is not there, or does not start; the message says what to do."""


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server. `url` has no /v1; `model` is the name it is asked by."""

    name: str
    url: str
    model: str
    key: str = ""

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"} if self.key else {}

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "key"}


def find(address: str, key: str = "") -> Server:
    """The server at `URL` or `URL,MODEL`; without a model it must serve just one.

    Raises:
        ServerError: nothing answers there, or it is not clear which model to ask for.
    """
    url, _, model = address.partition(",")
    url = url.rstrip("/").removesuffix("/v1")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ServerError(f"--url {address}: give an address such as http://127.0.0.1:8080")
    server = Server(parts.netloc + parts.path, url, model, key)
    names = _models(server)
    if not model and len(names) != 1:
        listed = f"lists {', '.join(names[:8])}" if names else "gives no list of models"
        raise ServerError(f"{url} {listed}: name one, as in --url {url},MODEL")
    return server if model else replace(server, model=names[0])


def _models(server: Server) -> list[str]:
    """What the server lists; nothing, if that is no list (mlx_lm.server without a hub cache)."""
    try:
        response = _get(f"{server.url}/v1/models", server.headers)
    except httpx.RemoteProtocolError:  # something is there
        return []
    except httpx.HTTPError as error:
        raise ServerError(
            f"{server.url} does not answer ({error}): start the server, or leave out its --url"
        ) from None
    if response.status_code in (401, 403):
        raise ServerError(f"{server.url} wants a key: give it with --api-key")
    try:
        return [str(model["id"]) for model in response.json()["data"]]
    except (ValueError, KeyError, TypeError):
        return []


def find_all(addresses: Sequence[str], key: str = "") -> list[Server]:
    """The servers at these addresses; where one serves several models, their names tell which.

    Raises:
        ServerError: as `find`.
    """
    servers = [find(address, key) for address in dict.fromkeys(addresses)]
    names = [server.name for server in servers]
    return [
        replace(server, name=f"{server.name} {server.model}")
        if names.count(server.name) > 1
        else server
        for server in servers
    ]


@contextmanager
def sidecar(model: str, key: str) -> Iterator[Server]:
    """A sidecar as a process of its own on a free port, ended at the end.

    It takes the user's settings, but for the address, the log and loading at once.

    Args:
        model: demo, a folder or a hub name.
        key: TQSTACK_API_KEY as set; empty: none.

    Raises:
        ServerError: it does not start; with the end of what it printed.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "SIDECAR_MODEL": model,
            "SIDECAR_HOST": "127.0.0.1",
            "SIDECAR_PORT": str(port),
            "SIDECAR_LAZY_LOAD": "0",
            "TQSTACK_LOG_DIR": folder,
        }
        log = Path(folder) / "output"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "tqstack", "sidecar"],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            server = Server("sidecar", f"http://127.0.0.1:{port}", "", key)
            yield replace(server, model=_wait_until_loaded(server, process, log))
        finally:
            end(process, 20)


def in_turn(servers: Sequence[Server], turn: int) -> Sequence[Server]:
    """The servers in the order of a round: every other one goes backwards, so that none is always
    measured behind the same other."""
    return servers[:: -1 if turn % 2 else 1]


def _wait_until_loaded(server: Server, process: subprocess.Popen[bytes], log: Path) -> str:
    """The model's id, once `/health` is ok."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            health = _get(f"{server.url}/health", server.headers).json()
        except (httpx.HTTPError, ValueError):
            time.sleep(0.1)
            continue
        if health.get("status") == "ok":
            return health["model"]["id"]
        if health.get("status") == "error":
            break
        time.sleep(0.1)
    raise ServerError(f"the sidecar did not start:\n{log.read_text(errors='replace')[-1500:]}")


def _get(url: str, headers: dict[str, str]) -> httpx.Response:
    return httpx.get(url, headers=headers, timeout=10, trust_env=False)
