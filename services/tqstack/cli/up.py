"""`tqstack up`: router and sidecar together, each started again when it dies."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time

from tqstack.cli.common import EXIT_CONFIG, console, settings, with_openblas

FIRST_DELAY, LONGEST_DELAY = 1.0, 30.0
HEALTHY_SECONDS = 60.0  # having run so long, a service starts from the shortest delay again
STOP_SECONDS = 40.0  # longer than either service takes to drain


def up() -> None:
    """Run router and sidecar until Ctrl-C. A service that dies is restarted, with back-off."""
    config = settings()
    names = ["router"] + (["sidecar"] if config.runs_sidecar else [])
    console.print(f"tqstack: {config.router_url}/v1  (Ctrl-C stops it)", highlight=False)
    raise SystemExit(asyncio.run(_supervise(names)))


def next_delay(delay: float, ran_seconds: float) -> float:
    """Seconds to wait before the next start, after a run of so long."""
    return FIRST_DELAY if ran_seconds >= HEALTHY_SECONDS else min(LONGEST_DELAY, 2 * delay)


async def _supervise(names: list[str]) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    keepers = [asyncio.create_task(_keep(name, stop)) for name in names]
    codes = await asyncio.gather(*keepers)
    return max(codes)


async def _keep(name: str, stop: asyncio.Event) -> int:
    """Keep one service running until `stop`. Its exit code: 0, or that of unusable settings."""
    delay = FIRST_DELAY / 2
    stopping = asyncio.create_task(stop.wait())
    while not stop.is_set():
        started = time.monotonic()
        # A group of its own: Ctrl-C reaches this process alone, which then stops the services.
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "tqstack", name),
            env=with_openblas(dict(os.environ)) if name == "sidecar" else None,
            start_new_session=True,
        )
        exited = asyncio.create_task(process.wait())
        await asyncio.wait({exited, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set():
            await _stop(process)
            break
        if process.returncode == EXIT_CONFIG:
            # It has said why. The other service may still be of use, so it lives on.
            return 0 if name == "sidecar" else _stop_all(stop)
        delay = next_delay(delay, time.monotonic() - started)
        console.print(
            f"[yellow]tqstack:[/] the {name} ended ({_reason(process.returncode)}); "
            f"starting it again in {delay:.0f} s"
        )
        await asyncio.wait({stopping}, timeout=delay)
    return 0


def _stop_all(stop: asyncio.Event) -> int:
    stop.set()
    return EXIT_CONFIG


def _reason(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_SECONDS)
    except TimeoutError:
        process.kill()
        await process.wait()
