"""Clients of a sidecar in this process, with the embedded model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.testclient import TestClient

from processes import wait_until
from tqstack.settings import Settings
from tqstack.sidecar.app import create_app


@contextmanager
def demo_client(speculation: str = "auto", **options: bool) -> Iterator[TestClient]:
    app = create_app(Settings(sidecar_model="demo", sidecar_speculation=speculation))  # pyright: ignore
    with TestClient(app, base_url="http://127.0.0.1", **options) as client:
        wait_until(lambda: client.get("/health").status_code == 200, "the model is loaded")
        yield client
