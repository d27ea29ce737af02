from __future__ import annotations

import pytest

from sidecar.clients import demo_client


@pytest.fixture(scope="module")
def client():
    with demo_client() as client:
        yield client
