"""Clients of a sidecar in this process, with the embedded model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.testclient import TestClient

from processes import wait_until
from tqstack.settings import Settings
from tqstack.sidecar.app import create_app


@contextmanager
def demo_client(raise_server_exceptions: bool = True, **settings: Any) -> Iterator[TestClient]:
    app = create_app(Settings(sidecar_model="demo", **settings))
    with TestClient(app, "http://127.0.0.1", raise_server_exceptions) as client:
        wait_until(lambda: client.get("/health").status_code == 200, "the model is loaded")
        yield client
