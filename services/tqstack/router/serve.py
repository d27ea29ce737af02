"""Serving the router with uvicorn."""

from __future__ import annotations

import uvicorn

from tqstack.router.app import create_app
from tqstack.settings import Settings

# Well above the idle time of clients' pools: a connection that is closed just as a client takes it
# up again is a request that fails.
KEEP_ALIVE_SECONDS = 120
DRAIN_SECONDS = 30


def server(settings: Settings) -> uvicorn.Server:
    """A server for the router, ready to run."""
    config = uvicorn.Config(
        create_app(settings),
        host=settings.router_host,
        port=settings.router_port,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        log_level="warning",
        # Who the client is decides nothing here, least of all by its own word.
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    return uvicorn.Server(config)
