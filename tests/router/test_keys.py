"""Keys of clients: who they let in, what they limit, and what is counted for each."""

from __future__ import annotations

import hashlib
import json
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from processes import tqstack
from router.scripted import Scripted, Wire, says, whole
from router.stack import Stack
from router.test_queue import Asking, Gate, until
from tqstack.router.clients import Bucket
from tqstack.router.keys import new_key, read_keys, write_keys
from tqstack.settings import Settings, SettingsError


class Keyed(Stack):
    """A stack whose keys are in a file of the test's own."""

    def __init__(self, monkeypatch, folder, **settings):
        monkeypatch.setenv("TQSTACK_CONFIG", str(folder / "config.env"))
        super().__init__(**settings)
        self.file = Settings().keys_file

    def add(self, name: str, at_once: int | None = None, a_minute: int | None = None) -> str:
        key, kept = new_key(name, at_once, a_minute)
        write_keys(self.file, {**(read_keys(self.file) or {}), name: kept})
        return key

    def ask(self, key: str, text: str = "hello", **body):
        headers = {"authorization": f"Bearer {key}"}
        body = {"messages": [{"role": "user", "content": text}], **body}
        return self.http.post("/v1/chat/completions", json=body, headers=headers)


def test_without_a_key_nobody_needs_one_and_with_the_first_everybody_does(monkeypatch, tmp_path):
    with Keyed(monkeypatch, tmp_path) as stack:
        assert stack.chat().status_code == 200
        key = stack.add("laptop")
        assert stack.chat().status_code == 401
        assert stack.ask("tq-wrong").status_code == 401
        assert stack.ask(key).status_code == 200
        assert stack.http.get("/v1/models", headers={"x-api-key": key}).status_code == 200
        stack.settle()
        status = stack.http.get("/status", headers={"x-api-key": key}).json()
        assert [record["client"] for record in status["recent"]] == ["laptop", ""]
        write_keys(stack.file, {})
        assert stack.ask(key).status_code == 401
        assert stack.chat().status_code == 401
        stack.file.unlink()
        assert stack.chat().status_code == 200


def test_the_owner_s_key_works_beside_and_only_it_may_reload(monkeypatch, tmp_path):
    with Keyed(monkeypatch, tmp_path, tqstack_api_key="the-owner-s") as stack:
        key = stack.add("laptop")
        assert stack.ask("the-owner-s").status_code == stack.ask(key).status_code == 200
        assert stack.http.post("/reload", headers={"x-api-key": key}).status_code == 403
        assert stack.http.post("/reload", headers={"x-api-key": "the-owner-s"}).status_code == 200
        # A client's key goes no further.
        assert key not in str(stack.ollama.seen)


def test_the_file_holds_hashes_and_is_for_the_owner_s_eyes(tmp_path):
    file = tmp_path / "home" / "keys.json"
    key, kept = new_key("laptop", 2, 1000)
    write_keys(file, {"laptop": kept})
    assert key not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert read_keys(file) == {"laptop": kept}
    assert kept.sha256 == hashlib.sha256(key.encode()).hexdigest()


@pytest.mark.parametrize("text", ["", "{}", '{"keys": [{"name": "A B"}]}', "\x00", "[" * 10_000])
def test_a_wrong_file_of_keys_fails_the_start_and_no_later_reload(monkeypatch, tmp_path, text):
    with Keyed(monkeypatch, tmp_path) as stack:
        key = stack.add("laptop")
        assert stack.ask(key).status_code == 200
        stack.file.write_text(text)
        assert stack.ask(key).status_code == 200
        assert stack.chat().status_code == 401
    with pytest.raises(SettingsError, match=r"keys\.json"):
        read_keys(stack.file)


def test_a_key_s_requests_at_a_time_are_limited(monkeypatch, tmp_path):
    with Keyed(monkeypatch, tmp_path) as stack:
        key, other = stack.add("laptop", at_once=1), stack.add("desk")
        gate = stack.ollama.script = Gate("hm")

        async def scenario() -> None:
            async with Asking(stack) as asking:
                asking.client.headers["authorization"] = f"Bearer {key}"
                first = asking.ask()
                await until(lambda: stack.ollama.busy)
                second = await asking.ask()
                assert second.status_code == 429
                assert second.headers["retry-after"] == "1"
                assert second.json()["error"]["code"] == "rate_limit_exceeded"
                assert "'laptop' allows 1 requests" in second.json()["error"]["message"]
                asking.client.headers["authorization"] = f"Bearer {other}"
                third = asking.ask()
                await until(lambda: stack.ollama.busy == 2)
                gate.open.release()
                gate.open.release()
                assert (await first).status_code == (await third).status_code == 200

        stack.run(scenario())
        stack.ollama.script = says("hm")
        stack.settle()
        assert stack.ask(key).status_code == 200


def counts(prompt: int, output: int):
    async def script(wire: Wire) -> None:
        value = json.loads(whole("hm", prompt))
        value["usage"]["completion_tokens"] = output
        value["usage"]["prompt_tokens_details"] = {"cached_tokens": prompt // 2}
        await wire.answer(200, json.dumps(value).encode())

    return script


def test_a_key_s_tokens_a_minute_are_limited_by_what_was_really_used(monkeypatch, tmp_path):
    with Keyed(monkeypatch, tmp_path) as stack:
        key = stack.add("laptop", a_minute=1000)
        stack.ollama.script = counts(1200, 300)
        assert stack.ask(key).status_code == 200
        stack.settle()
        refused = stack.ask(key)
        assert refused.status_code == 429
        assert 20 <= int(refused.headers["retry-after"]) <= 40  # 500 and a few too many
        assert "1,000 tokens a minute" in refused.json()["error"]["message"]
        headers = {"x-api-key": key}
        clients = stack.http.get("/status", headers=headers).json()["clients"]
        assert clients == {
            "laptop": {
                "running": 0,
                "requests": 1,
                "refused": 1,
                "prompt_tokens": 1200,
                "cached_tokens": 600,
                "output_tokens": 300,
                "at_once": None,
                "tokens_a_minute": 1000,
            }
        }
        metrics = stack.http.get("/metrics", headers=headers).text
        name = "tqstack_router_client"
        assert f'{name}_tokens_total{{client="laptop",type="prompt"}} 1200.0' in metrics
        assert f'{name}_requests_total{{client="laptop",outcome="refused"}} 1.0' in metrics


def test_what_fails_before_a_token_costs_nothing(monkeypatch, tmp_path):
    with Keyed(monkeypatch, tmp_path) as stack:
        key = stack.add("laptop", a_minute=1000)

        async def fails(wire: Wire) -> None:
            wire.cut()

        def of(backend: Scripted) -> None:
            backend.script = fails

        of(stack.ollama)
        of(stack.sidecar)
        for _ in range(3):
            assert stack.ask(key, "word " * 700).status_code == 502
        stack.settle()
        assert stack.app.state.services.clients.report()["laptop"]["prompt_tokens"] == 0


@given(
    st.integers(1, 10_000),
    st.lists(st.tuples(st.floats(0, 100), st.integers(1, 20_000), st.integers(0, 20_000))),
)
def test_in_the_long_run_no_more_is_used_than_a_bucket_and_its_refills(a_minute, requests):
    """Of prompts whose estimates are right."""
    now, bucket, used, largest = 0.0, Bucket(a_minute, 0.0), 0, 0
    for pause, tokens, _ in requests:
        now += pause
        if not bucket.wait(tokens, now):
            bucket.take(tokens, now)
            used += tokens
            largest = max(largest, tokens)
        else:
            # After the wait that it names, it may.
            later = now + bucket.wait(tokens, now) + 1e-6 * (1 + now)
            assert bucket.wait(tokens, later) < 1e-3
            now = later
    assert used <= a_minute + a_minute * now / 60 + largest + 1


def test_the_command_adds_lists_and_revokes(tmp_path):
    added = tqstack(tmp_path, "key", "add", "laptop", "--at-once", "2")
    key = added.stdout.strip()
    assert (added.returncode, key[:3], len(key)) == (0, "tq-", 46)
    assert "need a TQSTACK_API_KEY" in added.stderr
    again = tqstack(tmp_path, "key", "add", "laptop")
    assert again.returncode and "there is a key 'laptop' already" in again.stderr
    assert tqstack(tmp_path, "key", "add", "a b").returncode
    listed = tqstack(tmp_path, "key", "list").stdout
    assert "laptop" in listed and "2" in listed and key not in listed
    assert "laptop is revoked" in tqstack(tmp_path, "key", "revoke", "laptop").stdout
    assert "there are no keys" in tqstack(tmp_path, "key", "list").stdout
    gone = tqstack(tmp_path, "key", "revoke", "laptop")
    assert gone.returncode and "there is no key 'laptop'" in gone.stderr
