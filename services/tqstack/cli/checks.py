"""What `tqstack doctor` looks at outside the model: ports, permissions, services, files."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqstack.service.definition import NAMES, ServiceError, this_place
from tqstack.service.manager import manager
from tqstack.settings import Settings, config_path


@dataclass(frozen=True)
class Finding:
    """One line of the report; `advice` says what to do if it is not ok."""

    what: str
    state: Literal["ok", "note", "wrong"]
    detail: str
    advice: str = ""


def ports(settings: Settings) -> Iterator[Finding]:
    """Whether the ports are free, or ours, or whose."""
    places = [("router", settings.router_host, settings.router_port, settings.router_url)]
    if settings.runs_sidecar:
        places.append(
            ("sidecar", settings.sidecar_host, settings.sidecar_port, settings.sidecar_url)
        )
    for name, host, port, url in places:
        what = f"port {port}"
        if is_free(host, port):
            yield Finding(what, "ok", f"free: the {name} is not running")
        elif health(url) is not None:
            yield Finding(what, "ok", f"the {name} answers there")
        else:
            yield Finding(
                what,
                "wrong",
                f"the {name} needs it, and {listener(port) or 'another program'} has it",
                f"stop that program, or set {name.upper()}_PORT",
            )


def is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def health(url: str) -> dict[str, Any] | None:
    """`/health` of a service of ours that runs there."""
    import httpx

    try:
        with httpx.Client(trust_env=False, timeout=2) as client:
            report = client.get(f"{url}/health").json()
    except (httpx.HTTPError, ValueError):
        return None
    return report if isinstance(report, dict) and "status" in report else None


def listener(port: int) -> str | None:
    """The program that listens on a port, as far as this user may know."""
    if shutil.which("lsof"):
        argv = ["lsof", "-nP", f"-iTCP:{port}", "-sTCP:LISTEN", "-Fpc"]
        text = subprocess.run(argv, capture_output=True, text=True, timeout=10).stdout
        found = re.search(r"^p(\d+)\nc(.+)$", text, re.M)
        return f"{found[2]} (process {found[1]})" if found else None
    sockets = _listening_inodes(port)
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(descriptor) in sockets:
                process = descriptor.parents[1]
                return f"{(process / 'comm').read_text().strip()} (process {process.name})"
        except OSError:  # it has ended, or belongs to another user
            continue
    return None


def _listening_inodes(port: int) -> set[str]:
    """Sockets that listen on a port, as /proc/*/fd shows them."""
    found = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in table.read_text().splitlines()[1:] if table.exists() else ():
            fields = line.split()
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                found.add(f"socket:[{fields[9]}]")
    return found


def permissions(settings: Settings) -> Iterator[Finding]:
    """Whether files can be read and written, and a key is the owner's alone to read."""
    config, logs = config_path(), this_place().logs
    if settings.tqstack_log_dir:
        logs = Path(settings.tqstack_log_dir).expanduser()
    wrong = [
        (path, f"chown it to yourself: sudo chown -R $(id -un) '{path}'")
        for path in (config, logs)
        if path.exists() and not os.access(path, os.R_OK | os.W_OK)
    ]
    for path, advice in wrong:
        yield Finding("permissions", "wrong", f"{path} cannot be read and written", advice)
    if config.exists() and settings.tqstack_api_key and config.stat().st_mode & 0o077:
        yield Finding(
            "permissions",
            "wrong",
            f"{config} holds a key, and others can read it",
            f"chmod 600 '{config}'",
        )
    elif not wrong:
        yield Finding("permissions", "ok", "settings and logs are yours")


def services() -> Finding:
    """How the background services are."""
    try:
        found = [manager(this_place()).status(name) for name in NAMES]
    except ServiceError as error:
        return Finding("services", "note", str(error))
    present = [one for one in found if one.installed]
    if not present:
        return Finding("services", "ok", "not installed (tqstack service install)")
    stopped = [one for one in present if not one.pid]
    detail = ", ".join(
        f"{one.name} {f'runs as process {one.pid}' if one.pid else one.detail}" for one in present
    )
    if stopped:
        return Finding("services", "wrong", detail, "see: tqstack service logs")
    return Finding("services", "ok", detail)


def files(name: str) -> Finding:
    """Whether the model is here, and whole, without loading it."""
    from tqstack.models.safetensors import model_tensors
    from tqstack.models.spec import model_folder

    try:
        _, folder = model_folder(name)
        tensors = model_tensors(folder)
    except ValueError as error:  # each says what to do
        return Finding("files", "wrong", str(error))
    size = sum(tensor.nbytes for tensor in tensors.values())
    return Finding("files", "ok", f"{folder}: whole, {len(tensors)} tensors, {size / 1e6:,.0f} MB")
