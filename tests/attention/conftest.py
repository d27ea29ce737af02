from __future__ import annotations

import pytest

from tqstack.models.load import load_model


@pytest.fixture(scope="session")
def demo():
    return load_model("demo")
