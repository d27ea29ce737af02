"""A Hugging Face hub on loopback: what huggingface_hub asks of it, and a note of what was sent."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "1234567890abcdef1234567890abcdef12345678"
CHUNK = 1 << 18


@dataclass
class Hub:
    """One model, `owner/name`, and one that is gated, `owner/gated`.

    Attributes:
        files: content by path; those from a MB on are large ones, in LFS.
        seconds_per_chunk: how slowly large files are sent.
        sent: (path, first byte, bytes sent), of every file in order.
    """

    files: dict[str, bytes]
    seconds_per_chunk: float = 0.0
    sent: list[tuple[str, int, int]] = field(default_factory=list)
    url: str = ""


@contextmanager
def loopback_hub(files: dict[str, bytes]) -> Iterator[Hub]:
    hub = Hub(files)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answer(self, hub)

        do_HEAD = do_GET

        def log_message(self, *arguments) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


def answer(request: BaseHTTPRequestHandler, hub: Hub) -> None:
    path = urlsplit(request.path).path
    if match := re.fullmatch(r"/api/models/owner/(?:name|gated)/?(tree/\w+|revision/main)?", path):
        files = [entry(*file) for file in hub.files.items()]
        info = {"id": "owner/name", "sha": COMMIT, "siblings": files}
        facts = files if (match[1] or "").startswith("tree") else info
        reply(request, 200, json.dumps(facts).encode(), {})
    elif match := re.fullmatch(r"/owner/name/resolve/\w+/(.+)", path):
        send_file(request, hub, match[1])
    elif path.startswith("/owner/gated/"):
        reply(request, 403, b"", {"X-Error-Code": "GatedRepo"})
    else:
        reply(request, 404, b"", {"X-Error-Code": "RepoNotFound"})


def entry(path: str, content: bytes) -> dict:
    """A file as the listings of a model and of a tree have it; the two name things differently."""
    size, digest = len(content), hashlib.sha256(content).hexdigest()
    facts = {"type": "file", "path": path, "rfilename": path, "size": size, "oid": "0" * 40}
    large = {"oid": digest, "sha256": digest, "size": size, "pointerSize": 134}
    return facts | ({"lfs": large} if size >= 1 << 20 else {})


def send_file(request: BaseHTTPRequestHandler, hub: Hub, path: str) -> None:
    content = hub.files[path]
    start = (
        int(match[1]) if (match := re.match(r"bytes=(\d+)-", request.headers["Range"] or "")) else 0
    )
    headers = {
        "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
        "X-Repo-Commit": COMMIT,
        "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}",
    }
    if request.command == "HEAD":
        reply(request, 200, content, headers)
        return
    number, sent = len(hub.sent), 0
    hub.sent.append((path, start, 0))
    reply(request, 206 if start else 200, b"", headers, len(content) - start)
    for first in range(start, len(content), CHUNK):
        try:
            request.wfile.write(chunk := content[first : first + CHUNK])
        except OSError:  # the other side was killed
            break
        sent += len(chunk)
        hub.sent[number] = (path, start, sent)
        time.sleep(hub.seconds_per_chunk if len(content) > CHUNK else 0)


def reply(
    request: BaseHTTPRequestHandler,
    status: int,
    body: bytes,
    headers: dict[str, str],
    length: int | None = None,
) -> None:
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(body) if length is None else length))
    request.end_headers()
    if request.command == "GET":
        request.wfile.write(body)
