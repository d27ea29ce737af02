"""What a hostile page, client or body gets."""

from __future__ import annotations

import gzip
import json
import socket

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.scripted import answers, says, whole
from router.stack import Stack
from tqstack.router.app import FORWARDED
from tqstack.settings import SettingsError, load_settings

HELLO = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def stack():
    with Stack(router_body_limit_mb=1) as stack:
        yield stack


def raw(stack: Stack, request: bytes) -> bytes:
    """The first bytes of the answer to bytes on a socket of their own."""
    host, _, port = stack.url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(request)
        return connection.recv(65536)


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]:8000", "192.168.1.5:8000"]
)
def test_a_host_that_is_an_address_or_localhost_is_answered(stack, host):
    assert stack.http.get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:8000", "", "[::1"])
def test_a_name_that_points_here_is_refused(stack, host):
    for response in (
        stack.http.get("/v1/models", headers={"host": host}),
        stack.http.post("/v1/chat/completions", json=HELLO, headers={"host": host}),
    ):
        assert response.status_code == 403
        assert response.json()["error"]["type"] == "permission_error"


def test_a_request_with_two_hosts_or_none_is_refused(stack):
    assert b" 400 " in raw(stack, b"GET /health HTTP/1.1\r\nhost: a\r\nhost: localhost\r\n\r\n")
    assert b" 400 " in raw(stack, b"GET /health HTTP/1.0\r\n\r\n")


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://1.2.3.4", "file://"])
def test_a_foreign_page_is_refused_with_any_content_type(stack, origin):
    stack.ollama.seen.clear()
    for kind in ("text/plain", "application/json"):
        headers = {"origin": origin, "content-type": kind}
        response = stack.http.post(
            "/v1/chat/completions", content=json.dumps(HELLO), headers=headers
        )
        assert response.status_code == 403
        assert "access-control-allow-origin" not in response.headers
    assert stack.http.options("/v1/models", headers={"origin": origin}).status_code == 403
    assert stack.ollama.seen == []


def test_a_page_of_this_machine_is_answered_with_cors_headers(stack):
    headers = {"origin": "http://localhost:3000"}
    asked = {**headers, "access-control-request-method": "POST"}
    preflight = stack.http.options("/v1/chat/completions", headers=asked)
    assert preflight.status_code == 204
    assert "POST" in preflight.headers["access-control-allow-methods"]
    for response in (
        stack.http.post("/v1/chat/completions", json=HELLO, headers=headers),
        stack.http.get("/v1/models", headers=headers),
        preflight,
    ):
        assert response.headers["access-control-allow-origin"] == headers["origin"]


def test_curl_needs_no_content_type(stack):
    body = json.dumps(HELLO).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n"
    assert raw(stack, head % len(body) + body).startswith(b"HTTP/1.1 200 ")


def test_a_name_that_is_allowed_is_answered():
    with Stack(router_allowed_hosts="host.docker.internal, my.lan") as stack:
        headers = {"host": "host.docker.internal:8000", "origin": "http://my.lan"}
        assert stack.http.get("/health", headers=headers).status_code == 200


def test_with_a_key_nobody_else_is_answered():
    with Stack(tqstack_api_key="s3cret") as stack:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic s3cret"}):
            response = stack.http.get("/v1/models", headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        for headers in ({"authorization": "Bearer s3cret"}, {"x-api-key": "s3cret"}):
            assert stack.http.get("/v1/models", headers=headers).status_code == 200


def test_another_address_needs_a_key(monkeypatch, tmp_path):
    config = tmp_path / "config.env"
    config.write_text("ROUTER_HOST=0.0.0.0\n")
    monkeypatch.setenv("TQSTACK_CONFIG", str(config))
    with pytest.raises(SettingsError, match="TQSTACK_API_KEY"):
        load_settings()


def test_a_client_s_secrets_and_hop_headers_reach_no_backend(stack):
    stack.ollama.seen.clear()
    headers = {
        "authorization": "Bearer sk-live",
        "cookie": "session=1",
        "x-api-key": "k",
        "connection": "keep-alive, x-hop",
        "x-hop": "1",
        "x-forwarded-for": "9.9.9.9",
        "proxy-authorization": "Basic eA==",
    }
    stack.http.post("/v1/chat/completions", json=HELLO, headers=headers)
    got = stack.ollama.seen[0].headers
    assert set(got) == {"host", "content-type", "accept-encoding", "content-length"}
    assert got["host"] == f"127.0.0.1:{stack.ollama.port}"


def test_a_backend_s_own_headers_do_not_reach_the_client(stack):
    own = {"set_cookie": "a=b", "server": "secret/1", "location": "/x"}
    stack.ollama.script = answers(200, whole("x"), **own)
    response = stack.http.post("/v1/chat/completions", json=HELLO)
    assert not {"set-cookie", "server", "location"} & set(response.headers)


@pytest.mark.parametrize(
    "field", [{"base_url": "http://x"}, {"api_base": "http://x"}, {"backend": "x"}, {"url": "x"}]
)
def test_no_field_of_a_request_chooses_an_upstream(stack, field):
    stack.ollama.seen.clear()
    response = stack.http.post("/v1/chat/completions", json={**HELLO, **field})
    assert response.headers["x-tqstack-backend"] == "ollama"
    assert len(stack.ollama.seen) == 1


@pytest.mark.parametrize(
    "path", ["/v1/../api/delete", "/api/delete", "//x/v1/models", "/v1/chat/completions/", "/v1"]
)
def test_only_listed_paths_are_forwarded(stack, path):
    stack.ollama.seen.clear()
    host = stack.url.removeprefix("http://").encode()
    request = b"POST %s HTTP/1.1\r\nhost: %s\r\ncontent-length: 2\r\n\r\n{}"
    assert b" 404 " in raw(stack, request % (path.encode(), host)).split(b"\r\n")[0]
    assert stack.ollama.seen == []


SMUGGLED = [
    b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello",
    b"content-length: -1\r\n\r\n",
    b"content-length: 0x10\r\n\r\n",
    b"transfer-encoding: chunked\r\n\r\nzz\r\n",
    b"content-length : 5\r\n\r\nhello",
    b" folded: x\r\n\r\n",
]


@pytest.mark.parametrize("rest", SMUGGLED)
def test_a_request_with_two_readings_is_refused(stack, rest):
    stack.ollama.seen.clear()
    answer = raw(stack, b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n" + rest)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert stack.ollama.seen == []


def test_a_body_over_the_limit_is_a_413_with_or_without_a_length(stack):
    big = b"x" * (2 << 20)
    assert stack.http.post("/v1/chat/completions", content=big).status_code == 413
    pieces = (big[i : i + 65536] for i in range(0, len(big), 65536))
    assert stack.http.post("/v1/chat/completions", content=pieces).status_code == 413


COMPRESS = {"gzip": gzip.compress, "zstd": zstandard.ZstdCompressor().compress}


@pytest.mark.parametrize("encoding", COMPRESS)
def test_compressed_bodies_are_understood_up_to_a_limit(stack, encoding):
    def post(data: bytes) -> int:
        headers = {"content-encoding": encoding}
        return stack.http.post("/v1/chat/completions", content=data, headers=headers).status_code

    stack.ollama.seen.clear()
    assert post(COMPRESS[encoding](json.dumps(HELLO).encode())) == 200
    assert stack.ollama.seen[0].json["messages"] == HELLO["messages"]
    assert post(COMPRESS[encoding](b" " * (200 << 20))) == 413
    assert post(b"no such thing") == 400
    assert post(COMPRESS[encoding](json.dumps(HELLO).encode())[:-4]) == 400


def test_an_unknown_content_encoding_is_a_415(stack):
    headers = {"content-encoding": "br"}
    response = stack.http.post("/v1/chat/completions", content=b"x", headers=headers)
    assert response.status_code == 415


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "", 5])},
    optional={
        "content": JSON,
        "tool_calls": JSON,
        "reasoning_content": JSON,
    },
)
NAMES = "model max_tokens temperature top_p stop seed n tools tool_choice response_format logprobs"
NAMES += " prompt input stream_options system thinking output_config instructions include text"
NAMES += " reasoning store previous_response_id stop_sequences tokens max_completion_tokens"
FIELDS = dict.fromkeys(NAMES.split(), JSON)
KINDS = "message function_call custom_tool_call function_call_output reasoning local_shell_call"
KINDS += " text thinking tool_use tool_result image document input_text input_image"
ITEM = st.fixed_dictionaries(
    {"type": st.sampled_from(KINDS.split())},
    optional={
        **dict.fromkeys(("content", "output", "name", "arguments", "input", "action"), JSON),
        **dict.fromkeys(("text", "call_id", "tool_use_id", "source", "summary", "thinking"), JSON),
        "role": st.sampled_from(["user", "assistant", "system", "developer"]),
    },
)
TOOL = st.fixed_dictionaries(
    {"type": st.sampled_from(["function", "custom", "namespace", "local_shell", "web_search"])},
    optional=dict.fromkeys(("name", "tools", "format", "parameters", "input_schema"), JSON),
)
BLOCKS = st.fixed_dictionaries({"role": st.just("user"), "content": st.lists(ITEM, max_size=3)})
REQUEST = st.fixed_dictionaries(
    {},
    optional={
        **FIELDS,
        "messages": st.lists(MESSAGE) | st.lists(BLOCKS, max_size=3) | JSON,
        "input": st.lists(ITEM, max_size=3) | JSON,
        "tools": st.lists(TOOL, max_size=3) | JSON,
        "max_tokens": st.just(5) | JSON,
        "model": st.just("tq:"),
        "stream": st.booleans(),
    },
)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([endpoint.path for endpoint in FORWARDED]), REQUEST | JSON)
def test_no_request_is_answered_with_a_fault_of_the_router(stack, path, body):
    stack.ollama.script = stack.sidecar.script = says("fine")
    stack.sidecar.extra = {"/tokenize": {"count": 1}, "/detokenize": {"prompt": "a"}}
    if path == "/v1/embeddings" and isinstance(body, dict):
        body.pop("stream", None)  # no backend streams these, and the scripted one would
    response = stack.http.post(path, content=json.dumps(body))
    assert response.status_code in (200, 400)
    if response.status_code == 400:
        told = set(response.json()["error"]) - {"details"}  # that some of Anthropic's have
        assert told == {"message", "type", "param", "code"}
