"""Many backends from a file, and another file while requests run."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import pytest

from processes import clean_environment, free_port, get, running, tqstack, wait_until
from router.fleet import Fleet
from router.scripted import SSE, Wire, delta, fails
from router.stack import LONG, answer_of, stream_answer


def test_a_name_is_a_prefix_and_the_next_one_answers_if_it_fails(tmp_path):
    with Fleet(tmp_path, desk={}, shed={}, attic={"priority": 1}) as fleet:
        assert answer_of(fleet.chat(model="shed:m")) == ("from shed", "shed", None)
        fleet["shed"].script = fails
        assert answer_of(fleet.chat(model="shed:")) == ("from desk", "desk", "shed")
        fleet["desk"].script = fails
        response = fleet.chat(model="shed:")
        assert answer_of(response) == ("from attic", "attic", "shed")
        reason = "prefix; shed status-500; desk status-500"
        assert response.headers["x-tqstack-reason"] == reason
        models = {entry["id"] for entry in fleet.http.get("/v1/models").json()["data"]}
        assert models == {"auto", "m", "desk:m", "shed:m", "attic:m"}


def test_models_roles_and_priorities_choose(tmp_path):
    fleet = Fleet(
        tmp_path,
        little={"role": "short", "models": ["m"]},
        second={"kind": "sidecar", "priority": 1},
        big={"kind": "sidecar"},
        named={"models": ["special"], "role": "short", "priority": 5},
    )
    fleet["named"].models = ["m", "special"]
    with fleet:
        assert answer_of(fleet.chat("hello"))[1] == "little"
        assert answer_of(fleet.chat(LONG))[1] == "big"
        assert answer_of(fleet.chat("hello", model="special"))[1] == "named"
        assert answer_of(fleet.chat("hello", model="tq:"))[1] == "big"
        fleet.run(fleet["big"].stop())
        assert answer_of(fleet.chat(LONG))[1:] == ("second", "big")
        assert fleet.http.get("/health").json()["sidecar_available"] is True


def test_a_reload_drops_no_request_and_keeps_what_is_known_of_the_others(tmp_path):
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow(wire: Wire) -> None:
        await wire.raw(SSE)
        await wire.chunk(delta("one "))
        begun.set()
        await go_on.wait()
        await wire.chunk(delta("two", "stop") + b"data: [DONE]\n\n")
        await wire.end()

    async def ask(fleet: Fleet):
        import httpx

        async with httpx.AsyncClient(timeout=20, trust_env=False) as client:
            body = {"messages": [{"role": "user", "content": "hi"}], "model": "desk:"}
            sent = asyncio.ensure_future(
                client.post(fleet.url + "/v1/chat/completions", json={**body, "stream": True})
            )
            await begun.wait()
            answer = await client.post(fleet.url + "/reload")
            go_on.set()
            return answer, await sent

    with Fleet(tmp_path, desk={}, shed={}) as fleet:
        fleet["desk"].script = slow
        fleet.chat(model="shed:")
        probes = fleet["shed"].probes
        del fleet.entries["desk"]
        fleet.entries["loft"] = {"kind": "openai"}
        fleet.run(fleet.add("loft").start())
        fleet.write()
        answer, streamed = fleet.run(ask(fleet))
        assert answer.json() == {"change": "new: loft; taken out: desk"}
        assert stream_answer(streamed) == ("one two", None)
        assert streamed.headers["x-tqstack-backend"] == "desk"
        assert set(fleet.http.get("/health").json()["backends"]) == {"shed", "loft"}
        assert answer_of(fleet.chat(model="loft:"))[1] == "loft"
        assert fleet["shed"].probes == probes


@pytest.mark.parametrize("text", ["", "[[backend]]\nname = 3", "\0", "[[backend]]\nkey = 'sk-1'"])
def test_a_wrong_file_changes_nothing_and_says_why(tmp_path, text):
    with Fleet(tmp_path, desk={}) as fleet:
        fleet.chat()
        fleet.file.write_text(text)
        answer = fleet.http.post("/reload")
        assert answer.status_code == 400
        message = answer.json()["error"]["message"]
        assert message.startswith("nothing has changed: ") and "backends.toml" in message
        assert answer_of(fleet.chat())[1] == "desk"


def test_the_command_and_the_signal_reload_a_running_router(tmp_path):
    port, log = free_port(), tmp_path / "log"
    file = tmp_path / "ai" / "turboquant" / "backends.toml"
    file.parent.mkdir(parents=True)
    entry = "[[backend]]\nname = '{}'\nkind = 'openai'\nurl = 'http://127.0.0.1:1'\n"
    file.write_text(entry.format("desk"))
    environment = clean_environment(tmp_path, ROUTER_PORT=str(port))
    url = f"http://127.0.0.1:{port}"

    def backends() -> set[str]:
        answer = get(f"{url}/health")
        assert answer
        return set(answer.json()["backends"])

    with running(["-m", "tqstack", "router"], environment, log) as process:
        wait_until(lambda: get(f"{url}/health") is not None, "the router serves")
        assert backends() == {"desk"}
        file.write_text(entry.format("shed"))
        result = tqstack(tmp_path, "config", "reload", ROUTER_PORT=str(port))
        assert (result.returncode, "new: shed; taken out: desk" in result.stdout) == (0, True)
        assert backends() == {"shed"}
        file.write_text("nonsense")
        result = tqstack(tmp_path, "config", "reload", ROUTER_PORT=str(port))
        assert result.returncode and "nothing has changed" in result.stderr
        process.send_signal(signal.SIGHUP)
        file.write_text(entry.format("loft"))
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: backends() == {"loft"}, "the signal is heard")
        assert process.poll() is None
    result = tqstack(tmp_path, "config", "reload", ROUTER_PORT=str(port))
    assert result.returncode and "does not answer" in result.stderr


def test_a_router_does_not_start_with_a_wrong_file_and_says_why(tmp_path):
    file = tmp_path / "backends.toml"
    file.write_text("[[backend]]\nname = 'x'\n")
    result = tqstack(tmp_path, "router", ROUTER_BACKENDS=str(file), ROUTER_PORT=str(free_port()))
    assert result.returncode == 78
    assert "backend 1 kind: Field required" in result.stderr


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals here")
def test_a_router_whose_terminal_is_closed_ends(tmp_path):
    port, (ours, theirs) = free_port(), os.openpty()
    # The terminal becomes the session's own when it is opened by a process that has none.
    script = (
        "import os, sys; os.open(os.ttyname(0), os.O_RDWR); "
        "os.execv(sys.executable, [sys.executable, '-m', 'tqstack', 'router'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env=clean_environment(tmp_path, ROUTER_PORT=str(port)),
        stdin=theirs,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        wait_until(lambda: get(f"http://127.0.0.1:{port}/health") is not None, "the router serves")
        os.close(ours)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
