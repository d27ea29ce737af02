"""Images, embeddings and models in the cloud, through the router at an Ollama that is installed."""

from __future__ import annotations

import http.server
import json
import re
import threading

import anthropic
import httpx
import pytest

from router.real_ollama import NOT_HERE, program, real_ollama
from router.stack import Stack, answer_of

pytestmark = pytest.mark.skipif(not program(), reason=NOT_HERE)
PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJg"
    "gg=="
)


class Cloud(http.server.BaseHTTPRequestHandler):
    """A cloud that says the same always, in Ollama's own form; for `denied` it wants a key."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(401 if asked["model"] == "denied" else 200)
        self.end_headers()
        if asked["model"] == "denied":
            self.wfile.write(b'{"error": "unauthorized", "signin_url": "none"}')
            return
        pieces = ["far ", "away"] if asked.get("stream", True) else ["far away"]
        for piece in [*pieces, ""] if len(pieces) > 1 else pieces:
            ends = piece in ("", "far away")
            said = {"model": "m", "message": {"role": "assistant", "content": piece}, "done": ends}
            if ends:
                said |= {"done_reason": "stop", "prompt_eval_count": 3, "eval_count": 2}
            self.wfile.write(json.dumps(said).encode() + b"\n")

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture(scope="module")
def ollama(tmp_path_factory):
    """With the models `far` and `shut` in a cloud of ours."""
    cloud = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Cloud)
    threading.Thread(target=cloud.serve_forever, daemon=True).start()
    host = f"http://127.0.0.1:{cloud.server_port}"
    with real_ollama(tmp_path_factory.mktemp("cloud"), remotes="127.0.0.1") as ollama:
        for name, model in (("far", "large"), ("shut", "denied")):
            made = {"model": name, "from": model, "remote_host": host, "stream": False}
            made["info"] = {"model_family": "x", "context_length": 131_072}
            httpx.post(f"{ollama.url}/api/create", json=made, trust_env=False).raise_for_status()
        yield ollama
    cloud.shutdown()
    cloud.server_close()


@pytest.fixture(scope="module")
def stack(ollama):
    """A router with it, and no sidecar."""
    alone = {"sidecar_enabled": "0", "ollama_base_url": ollama.url, "ollama_model": "puppet"}
    with Stack(ollama=False, **alone) as stack:
        stack.probe()
        yield stack


def test_an_image_for_a_model_of_texts_is_refused_and_ollama_stays_well(stack):
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}
    parts = [{"type": "text", "text": "SAY"}, image]
    for stream in (False, True, False, True):
        asked = [{"role": "user", "content": parts}]
        refused = stack.post(model="ollama:puppet", messages=asked, stream=stream)
        assert refused.status_code == 400
        assert "`ollama show MODEL` lists `vision`" in refused.json()["error"]["message"]
    source = {"type": "base64", "media_type": "image/png", "data": PIXEL}
    asked = [{"role": "user", "content": [{"type": "image", "source": source}]}]
    with pytest.raises(anthropic.BadRequestError, match="reads no images"):
        stack.anthropic.messages.create(model="ollama:puppet", max_tokens=5, messages=asked)
    assert answer_of(stack.chat("please SAY", model="puppet"))[0] == "Hello there friend"


def test_embeddings_are_those_of_ollama(ollama, stack):
    texts = ["SAY", "LOOP and more"]
    made = stack.openai.embeddings.create(model="vectors", input=texts)  # base64 on the wire
    own = {"model": "vectors", "input": texts}
    own = httpx.post(f"{ollama.url}/api/embed", json=own, timeout=60, trust_env=False).json()
    assert len(made.data) == 2 and made.data[0].embedding != made.data[1].embedding
    for one, same in zip(made.data, own["embeddings"], strict=True):
        assert one.embedding == pytest.approx(same, abs=1e-6)
    short = stack.openai.embeddings.create(model="vectors", input="SAY", dimensions=8)
    assert len(short.data[0].embedding) == 8
    answered = stack.post("/v1/embeddings", model="vectors", input="SAY")
    assert answered.headers["x-tqstack-backend"] == "ollama"


@pytest.mark.parametrize(
    "model, text, told",
    [
        ("puppet", "SAY", "makes no embeddings"),
        ("vectors", [1, 2], "texts and no tokens"),
        ("vectors", "", "^input: "),
    ],
)
def test_embeddings_that_cannot_be_had_are_refused_with_what_to_do(stack, model, text, told):
    refused = stack.post("/v1/embeddings", model=f"ollama:{model}", input=text)
    assert refused.status_code == 400
    assert re.search(told, refused.json()["error"]["message"])


def test_ollama_cuts_texts_for_embeddings_over_v1(ollama):
    """What `docs/clients.md` warns of: when this fails, the warning goes."""
    asked = {"model": "vectors", "input": "a " * 9000, "truncate": False}
    made = httpx.post(f"{ollama.url}/v1/embeddings", json=asked, timeout=60, trust_env=False).json()
    assert made["usage"]["prompt_tokens"] < 2048


def test_a_model_in_the_cloud_answers_whole_and_streamed_over_every_api(stack):
    asked = [{"role": "user", "content": "hi"}]
    assert answer_of(stack.chat(model="far"))[:2] == ("far away", "ollama")
    stream = stack.openai.chat.completions.create(model="far", messages=asked, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in stream if c.choices) == "far away"
    assert stack.openai.responses.create(model="far", input="hi").output_text == "far away"
    message = stack.anthropic.messages.create(model="far", max_tokens=9, messages=asked)
    assert message.content[0].text == "far away"


def test_a_model_in_the_cloud_holds_what_it_says(stack):
    listed = stack.http.get("/v1/models").json()["data"]
    [context] = [entry["context_length"] for entry in listed if entry["id"] == "far:latest"]
    assert context == 131_072
    long = stack.chat("word " * 30_000, model="far")  # far over what is given here
    assert answer_of(long)[:2] == ("far away", "ollama")


def test_a_cloud_that_is_not_signed_in_to_is_told_with_what_to_do(stack):
    refused = stack.chat(model="shut")
    assert refused.status_code == 502
    assert "ollama signin" in refused.json()["error"]["message"]
    off = stack.post("/v1/embeddings", model="far", input="x")
    assert off.status_code in (400, 404)
