"""`tqstack router`: serve the router."""

from __future__ import annotations

import logging
import signal

from tqstack.cli.common import settings
from tqstack.settings import Settings


def router() -> None:
    """Serve the OpenAI-compatible endpoint that sends each request to Ollama or the sidecar."""
    serve(settings())


def serve(chosen: Settings) -> None:
    from tqstack.router.serve import server

    logging.basicConfig(
        level=chosen.tqstack_log_level.upper(), format="%(asctime)s %(levelname)s %(message)s"
    )
    print(
        f"tqstack router: {chosen.router_url}/v1  (OpenAI-compatible; Ctrl-C stops it)",
        flush=True,
    )
    # uvicorn drains, then raises the signal again for whoever came before it. To a supervisor, a
    # process that was asked to stop and did has not failed.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server(chosen).run()
