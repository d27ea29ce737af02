"""`tqstack router`: serve the router."""

from __future__ import annotations

import logging
import signal

from tqstack.settings import Settings, SettingsError, load_settings

# Well above the pools' idle time of common clients: a connection that is closed while a client
# takes it up again is a request that fails.
KEEP_ALIVE_SECONDS = 120
DRAIN_SECONDS = 30


def router() -> None:
    """Serve the OpenAI-compatible endpoint that sends each request to Ollama or the sidecar."""
    try:
        settings = load_settings()
    except SettingsError as error:
        raise SystemExit(f"tqstack router: {error}") from None
    serve(settings)


def serve(settings: Settings) -> None:
    import uvicorn

    from tqstack.router.app import create_app

    logging.basicConfig(
        level=settings.tqstack_log_level.upper(), format="%(asctime)s %(levelname)s %(message)s"
    )
    config = uvicorn.Config(
        create_app(settings),
        host=settings.router_host,
        port=settings.router_port,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="on",
        access_log=False,
        log_level="warning",
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    print(
        f"tqstack router: {settings.router_url}/v1  (OpenAI-compatible; Ctrl-C stops it)",
        flush=True,
    )
    # uvicorn drains, then raises the signal again for whoever came before it. To a supervisor, a
    # process that was asked to stop and did has not failed.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    uvicorn.Server(config).run()
