from __future__ import annotations

import pytest

from tqstack.sidecar.model import load_model


@pytest.fixture(scope="session")
def demo():
    return load_model("demo")
