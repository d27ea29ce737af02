"""`tqstack service ...`: router and sidecar in the background, started at login."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tqstack.cli.common import console, fail, settings
from tqstack.service.definition import (
    NAMES,
    Name,
    Place,
    ServiceError,
    Status,
    remove_empty,
    this_place,
)
from tqstack.service.manager import manager

app = typer.Typer(
    help="Run router and sidecar in the background: launchd on macOS, systemd on Linux.",
    no_args_is_help=True,
)
MARKS = {True: "[green]running[/]", False: "[yellow]stopped[/]"}


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """What the service manager refuses becomes a message and an exit code."""
    try:
        yield
    except (ServiceError, OSError) as error:
        fail(str(error), 1)


def installed(place: Place) -> list[Name]:
    return [name for name in NAMES if manager(place).status(name).installed]


@app.command()
def install(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be written; change nothing.")
    ] = False,
) -> None:
    """Write the services' definitions and start them, now and at every login."""
    config, place = settings(), this_place()
    chosen: list[Name] = ["router", "sidecar"] if config.runs_sidecar else ["router"]
    if dry_run:
        for name in chosen:
            path, content = manager(place).definition(name)
            typer.echo(f"{name}: {path} would be written, and the service started:\n")
            typer.echo(content.decode())
        typer.echo("nothing was changed")
        return
    with explained():
        for name in NAMES:
            if name in chosen:
                manager(place).install(name)
                console.print(f"{name}: installed and started")
            else:
                manager(place).uninstall(name)
                console.print(f"{name}: not installed, SIDECAR_ENABLED says so or has to")
    console.print(f"{config.router_url}/v1 answers in a moment; logs: {place.logs}")


@app.command()
def start() -> None:
    """Start the installed services."""
    _each("start", "started")


@app.command()
def stop() -> None:
    """Stop the services, until the next start or the next login."""
    _each("stop", "stopped")


@app.command()
def restart() -> None:
    """Stop and start the services: they read their settings again."""
    _each("restart", "restarted")


@app.command()
def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say how the services are. The exit code is 1 unless every installed one runs."""
    place = this_place()
    with explained():
        found = [manager(place).status(name) for name in NAMES]
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found], indent=2))
    else:
        for one in found:
            console.print(f"{one.name:<8} {_line(one)}", highlight=False)
    present = [one for one in found if one.installed]
    raise SystemExit(not present or not all(one.pid for one in present))


@app.command()
def wait(
    seconds: Annotated[float, typer.Option(min=0, help="how long at most")] = 60,
) -> None:
    """Wait until the router answers."""
    import httpx

    url, deadline = settings().router_url, time.monotonic() + seconds
    with httpx.Client(trust_env=False, timeout=2) as client:
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                client.get(f"{url}/v1/models")
                console.print(f"{url}/v1 answers", highlight=False)
                return
            time.sleep(0.5)
    fail(f"{url} does not answer: tqstack service status, and tqstack service logs", 1)


@app.command()
def logs(
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="of each service")] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="until Ctrl-C")] = False,
) -> None:
    """Print the end of the services' logs, and of what they said as they crashed."""
    folder = this_place().logs
    files = sorted(folder.glob("*.log"))
    if not files:
        fail(f"{folder} holds no log: is the service installed? tqstack service status", 1)
    for file in files:
        for line in file.read_text(errors="replace").splitlines()[-lines:]:
            typer.echo(f"{file.stem}: {line}")
    with contextlib.suppress(KeyboardInterrupt):
        if follow:
            _print_new(folder, {file: file.stat().st_size for file in files})


@app.command()
def uninstall() -> None:
    """Stop the services, and remove their definitions and logs."""
    place = this_place()
    with explained():
        for name in NAMES:
            manager(place).uninstall(name)
        for file in place.logs.glob("*.log*"):
            file.unlink()
        remove_empty(place.logs, place.home)
    console.print("the services and their logs are gone")


def _each(action: str, done: str) -> None:
    place = this_place()
    with explained():
        names = installed(place)
        if not names:
            fail("no service is installed: tqstack service install", 1)
        for name in names:
            getattr(manager(place), action)(name)
            console.print(f"{name}: {done}")


def _line(one: Status) -> str:
    if not one.installed:
        return "not installed"
    about = f"process {one.pid}" if one.pid else one.detail
    return f"{MARKS[bool(one.pid)]}  {about}"


def _print_new(folder: Path, sizes: dict[Path, int]) -> None:
    """Print what is appended to the logs, for ever; a rotated file is read from its start."""
    while True:
        for file in sorted(folder.glob("*.log")):
            seen, size = sizes.get(file, 0), file.stat().st_size
            if size != seen:
                with file.open(errors="replace") as text:
                    text.seek(seen if size > seen else 0)
                    for line in text:
                        typer.echo(f"{file.stem}: {line.rstrip()}")
                    sizes[file] = text.tell()
        time.sleep(0.5)
