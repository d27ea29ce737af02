"""`tqstack router`: serve the router."""

from __future__ import annotations

import gc
import signal

from tqstack.cli.common import settings, start_logging
from tqstack.settings import Settings


def router() -> None:
    """Serve the OpenAI-compatible endpoint that sends each request to Ollama or the sidecar."""
    serve(settings())


def serve(chosen: Settings) -> None:
    from tqstack.router.serve import server

    start_logging(chosen, "router")
    print(
        f"tqstack router: {chosen.router_url}/v1  (OpenAI-compatible; Ctrl-C stops it)",
        flush=True,
    )
    # uvicorn drains, then raises the signal again for whoever came before it. To a supervisor, a
    # process that was asked to stop and did has not failed.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    serving = server(chosen)
    # What is loaded by now stays: the garbage collector need not look at it again, in mid-stream.
    gc.collect()
    gc.freeze()
    serving.run()
