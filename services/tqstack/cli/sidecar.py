"""`tqstack sidecar`: run the sidecar alone."""

from __future__ import annotations

import signal
from typing import Any

from tqstack.cli.common import console, fail, preload_openblas, settings, start_logging
from tqstack.settings import Settings, SettingsError

KEEP_ALIVE_SECONDS = 120  # above the idle time of the router's pooled connections
DRAIN_SECONDS = 5


def sidecar() -> None:
    """Serve SIDECAR_MODEL with the compressed cache."""
    config = settings()
    preload_openblas()
    start_logging(config, "sidecar")
    console.print(
        f"tqstack sidecar: {config.model_name} at {config.sidecar_url}/v1", highlight=False
    )
    if config.divides_model:
        raise SystemExit(_supervise(config))
    if error := serve(config):
        fail(f"the sidecar cannot serve {config.model_name}: {error}")


def _supervise(config: Settings) -> int:
    """Run several ranks; the exit code of them."""
    from tqstack.ranks.supervisor import Supervisor

    try:
        return Supervisor(config).run()
    except (SettingsError, OSError) as error:
        fail(f"the ranks of the sidecar cannot be started: {error}")


def serve(config: Settings, group: Any = None) -> Exception | None:
    """Run until a signal comes, or until the model turns out not to load: then its error.

    Args:
        group: of ranks, of which this is rank 0.
    """
    import uvicorn

    from tqstack.attention.dispatch import NotCompressedError
    from tqstack.sidecar.app import create_app

    failure: list[Exception] = []

    def give_up(error: Exception) -> None:
        failure.append(error)
        server.should_exit = True

    try:
        app = create_app(config, on_failure=give_up, group=group)
    except (ValueError, NotCompressedError) as error:
        return error
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=config.sidecar_host,
            port=config.sidecar_port,
            access_log=False,
            log_config=None,
            log_level="warning",
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=DRAIN_SECONDS,
        )
    )
    # uvicorn raises the signal again once it has drained; to a supervisor a process that was asked
    # to stop, and did, has not failed.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server.run()
    return failure[0] if failure else None
