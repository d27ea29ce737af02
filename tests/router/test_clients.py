"""Each client of the table, where it is installed; `scripts/try-clients.sh` runs them by hand."""

from __future__ import annotations

import pytest

from router.try_clients import CLIENTS, Client, installed, try_client


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_a_client_works_as_it_is(client: Client, tmp_path):
    if not installed(client):
        pytest.skip(f"{client.name} is not installed")
    try_client(client, tmp_path)
