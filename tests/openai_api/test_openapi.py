"""Any request that the services' own descriptions allow, or forbid, is answered, or refused in the
envelope."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, settings

from router.scripted import says
from router.stack import Stack
from sidecar.clients import demo_client
from tqstack.router.app import create_app as router_app
from tqstack.settings import Settings
from tqstack.sidecar.app import create_app as sidecar_app

HOST = "http://127.0.0.1"
DEMO = Settings(sidecar_model="demo")
# What most made-up requests are refused for, and what is sent in its place.
GOOD = {"messages": [{"role": "user", "content": "hi"}], "prompt": "hi", "input": "hi"}
UNSUPPORTED = 501
# Beside these, each field gets each kind of value that it may and may not have.
few = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def check(case, http):
    body = case.body  # of what is sent to a model, one token is answered
    if isinstance(body, dict):
        limit = body.get("max_tokens")
        if limit is None or isinstance(limit, int):
            case.body = body = {**body, "max_tokens": min(limit or 1, 1)}
    at_fault = send(case, http)
    if at_fault in GOOD:
        case.body = {**body, at_fault: GOOD[at_fault], "model": "auto"}
        send(case, http)


def send(case, http):
    """The field that the request was refused for."""
    sent = case.as_transport_kwargs(base_url=HOST)
    sent.pop("cookies", None)
    sent["content"] = sent.pop("data", None)
    sent["url"] = sent["url"].removeprefix(HOST)
    response = http.request(**sent)
    status = response.status_code
    if response.is_success:
        stream = response.headers.get("content-type", "").startswith("text/event-stream")
        assert not stream or response.text.endswith("\n\n"), response.text
        return ""
    assert status < 500 or status == UNSUPPORTED, response.text
    error = response.json()["error"]
    assert {"message", "type", "param", "code"} <= error.keys()
    return (error["param"] or "").split(".")[0]


@pytest.fixture(scope="module")
def sidecar():
    with demo_client(raise_server_exceptions=False) as client:
        yield client


async def answers(wire):
    if wire.seen.path == "/v1/embeddings":
        return await wire.answer(200, b'{"object": "list", "data": []}')
    await says("hi")(wire)


@pytest.fixture(scope="module")
def router():
    with Stack() as stack:
        stack.ollama.script = stack.sidecar.script = answers
        yield stack.http


@schemathesis.openapi.from_dict(sidecar_app(DEMO).openapi()).parametrize()
@few
def test_the_sidecar_answers_or_refuses(case, sidecar):
    check(case, sidecar)


@schemathesis.openapi.from_dict(router_app(DEMO).openapi()).parametrize()
@few
def test_the_router_answers_or_refuses(case, router):
    check(case, router)
