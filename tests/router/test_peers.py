"""Routers behind routers: what they tell each other, no circles, and TLS between them."""

from __future__ import annotations

import shutil
import ssl
import subprocess

import pytest

from router.fleet import Fleet
from router.scripted import answers
from router.stack import LONG, Stack, answer_of


@pytest.fixture
def pair(tmp_path):
    """A router with a backend of its own and a peer, and that peer."""
    with Stack() as inner:
        inner.probe()
        entries = {"peer": {"url": inner.url}, "desk": {"priority": 1}}
        with Fleet(tmp_path, **entries) as outer:
            outer.probe()
            yield outer, inner


def test_a_peer_answers_with_its_own_choice_of_backend(pair):
    outer, inner = pair
    assert answer_of(outer.chat()) == ("from ollama", "peer", None)
    assert answer_of(outer.chat(LONG)) == ("from the sidecar", "peer", None)
    assert answer_of(outer.chat(model="peer:qwen")) == ("from ollama", "peer", None)
    assert inner.ollama.seen[-1].json["model"] == "qwen"
    assert outer.post("/v1/messages", max_tokens=5, messages=[{"role": "user", "content": "x"}])
    names = {entry["id"] for entry in outer.http.get("/v1/models").json()["data"]}
    assert {"demo", "qwen", "peer:demo", "peer:qwen", "desk:m"} <= names
    assert not any(name.startswith(("peer:tq:", "peer:auto", "tq:")) for name in names)


def test_what_a_peer_cannot_do_or_hold_is_known_from_its_health(pair):
    outer, inner = pair
    report = outer.http.get("/health").json()["backends"]["peer"]
    assert (report["kind"], report["context_length"]) == ("openai", 262_144)
    assert "embeddings" in report["health"]["capabilities"]
    inner.run(inner.ollama.stop())
    inner.probe()
    outer.probe()
    assert outer.post("/v1/embeddings", input="x").headers["x-tqstack-backend"] == "desk"
    assert answer_of(outer.chat())[1] == "peer"


def test_a_peer_with_nobody_behind_it_is_down_and_the_others_answer(pair):
    outer, inner = pair
    for backend in (inner.ollama, inner.sidecar):
        inner.run(backend.stop())
    inner.probe()
    outer.probe()
    report = outer.http.get("/health").json()["backends"]["peer"]
    assert (report["state"], report["detail"]) == (
        *("down", "a router, and none of its backends can answer"),
    )
    assert answer_of(outer.chat())[1] == "desk"


def test_a_circle_of_routers_is_cut_and_another_backend_answers(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    with Fleet(folders[0], desk={"priority": 1}) as a, Fleet(folders[1], a={"url": a.url}) as b:
        a.entries |= {"b": {"kind": "openai", "url": b.url}, "self": {"kind": "openai"}}
        a.entries["self"]["url"] = a.url
        a.add("b")
        a.add("self")
        a.write()
        assert a.http.post("/reload").status_code == 200
        for fleet in (a, b, a):
            fleet.probe()
        # What comes from `a` is not sent back to it, so `b` has nobody to ask.
        response = a.chat(model="b:")
        assert answer_of(response) == ("from desk", "desk", "b")
        assert response.headers["x-tqstack-reason"] == "prefix; b status-508"
        # A circle makes nobody sick, and a router does not ask itself.
        assert a.http.get("/health").json()["backends"]["b"]["state"] == "up"
        assert answer_of(b.chat()) == ("from desk", "a", None)
        assert len(a["desk"].seen) == 2
        assert "x-tqstack-via" in a["desk"].seen[0].headers
        a["desk"].script = answers(500, b'{"error": "boom"}')
        response = a.chat(model="b:")
        assert response.status_code == 500


def test_a_request_that_has_passed_too_many_routers_or_this_one_is_refused(tmp_path):
    with Fleet(tmp_path, desk={}) as fleet:
        own = fleet.http.get("/health").json()["id"]
        for via in ("a,b,c,d", f"x,{own}"):
            body = {"messages": [{"role": "user", "content": "hi"}]}
            headers = {"x-tqstack-via": via}
            answer = fleet.http.post("/v1/chat/completions", json=body, headers=headers)
            assert answer.status_code == 508
            assert answer.json()["error"]["code"] == "loop_detected"
        assert fleet["desk"].seen == []


@pytest.mark.skipif(not shutil.which("openssl"), reason="nothing here makes a certificate")
def test_a_backend_is_reached_by_tls_and_known_by_its_certificate(tmp_path):
    certificate, key, other = tmp_path / "c.pem", tmp_path / "k.pem", tmp_path / "other.pem"
    for file in (other, certificate):  # the key of the last one stays
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=x"),
                *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
                *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key)),
                *("-out", str(file)),
            ],
            check=True,
            capture_output=True,
        )
    fleet = Fleet(tmp_path, good={}, bad={"priority": 1}, unknown={"priority": 2})
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    for backend in fleet.scripted[2:]:
        backend.tls = context
    files = {"good": certificate, "bad": other}
    write = Fleet.write

    def with_tls(self: Fleet) -> None:
        for name, entry in self.entries.items():
            entry["url"] = f"https://127.0.0.1:{self[name].port}"
            if name in files:
                entry["certificate"] = str(files[name])
        write(self)

    fleet.write = with_tls.__get__(fleet)
    with fleet:
        fleet.probe()
        assert answer_of(fleet.chat()) == ("from good", "good", None)
        backends = fleet.http.get("/health").json()["backends"]
        assert [backends[name]["state"] for name in ("good", "bad", "unknown")] == [
            *("up", "down", "down"),
        ]
        assert "certificate" in backends["bad"]["detail"]
