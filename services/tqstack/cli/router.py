"""`tqstack router`: serve the router."""

from __future__ import annotations

import gc
import signal

from tqstack.cli.common import fail, settings, start_logging
from tqstack.settings import Settings, SettingsError


def router() -> None:
    """Serve the OpenAI-compatible endpoint that sends each request to Ollama or the sidecar."""
    serve(settings())


def serve(chosen: Settings) -> None:
    from tqstack.router.serve import server

    start_logging(chosen, "router")
    try:
        serving = server(chosen)
    except SettingsError as error:
        fail(str(error))
    print(
        f"tqstack router: {chosen.router_url}/v1  (OpenAI-compatible; Ctrl-C stops it)",
        flush=True,
    )
    # uvicorn drains, then raises the signal again for whoever came before it. To a supervisor, a
    # process that was asked to stop and did has not failed.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    # What is loaded by now stays: the garbage collector need not look at it again, in mid-stream.
    gc.collect()
    gc.freeze()
    serving.run()
