"""Three sidecars and an mlx_lm.server behind the router, and agents' sessions side by side."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from openai import OpenAI

from processes import clean_environment, free_port, get, running, wait_for, wait_until
from router.fleet import toml
from whole_stack import other_backend

SESSIONS, TURNS = 10, 3  # turns before the kill, and after it


@dataclass
class Session:
    """An agent's conversation: it resends all of it with every turn."""

    number: int
    messages: list[dict[str, str]] = field(default_factory=list)
    homes: list[str] = field(default_factory=list)  # who answered, turn by turn

    def take_turn(self, client: OpenAI) -> None:
        number, turn = self.number, len(self.homes)
        if not self.messages:
            facts = " ".join(f"The secret code of {number}-{i} is {i * 7919}." for i in range(6))
            self.messages.append({"role": "system", "content": facts})
        self.messages.append({"role": "user", "content": f"What is the code of {number}-{turn}?"})
        raw = client.chat.completions.with_raw_response.create(
            model="auto",
            messages=self.messages,  # pyright: ignore[reportArgumentType]
            max_tokens=4,
            temperature=0,
        )
        answer = raw.parse().choices[0].message.content or "-"
        self.messages.append({"role": "assistant", "content": answer})
        self.homes.append(raw.headers["x-tqstack-backend"])

    def moves(self, first: int = 0) -> int:
        homes = self.homes[first:]
        return sum(a != b for a, b in pairwise(homes))


@contextmanager
def fleet(home: Path) -> Iterator[tuple[str, dict[str, int]]]:
    """(The router's URL, process ids of the sidecars by name.)"""
    pids, entries = {}, []
    with ExitStack() as stack:
        url, model = stack.enter_context(other_backend(home))
        entries.append({"name": "server", "kind": "openai", "url": url, "models": [model]})
        for name in ("desk", "shed", "attic"):
            port, log = free_port(), home / f"{name}.log"
            environment = clean_environment(
                home, SIDECAR_PORT=str(port), SIDECAR_MODEL="demo", SIDECAR_MEMORY_MB="1500"
            )
            process = stack.enter_context(running(["-m", "tqstack", "sidecar"], environment, log))
            pids[name], url = process.pid, f"http://127.0.0.1:{port}"
            entries.append({"name": name, "kind": "sidecar", "url": url, "role": "any"})
        for entry in entries[1:]:
            wait_for(f"{entry['url']}/health", home / f"{entry['name']}.log", 120)
        file, port, log = home / "backends.toml", free_port(), home / "router.log"
        file.write_text("".join(map(toml, entries)))
        environment = clean_environment(home, ROUTER_PORT=str(port), ROUTER_BACKENDS=str(file))
        stack.enter_context(running(["-m", "tqstack", "router"], environment, log))
        router = f"http://127.0.0.1:{port}"

        def all_up() -> bool:
            response = get(f"{router}/health")
            backends = response.json()["backends"].values() if response else []
            return len(backends) == 4 and all(one["state"] == "up" for one in backends)

        wait_until(all_up, "the router sees all backends")
        yield router, pids


def test_sessions_stay_with_their_cache_and_move_once_from_the_dead(tmp_path):
    sessions = [Session(number) for number in range(SESSIONS)]
    with fleet(tmp_path) as (router, pids), ThreadPoolExecutor(SESSIONS) as pool:
        client = OpenAI(base_url=f"{router}/v1", api_key="local", max_retries=0, timeout=180)

        def turn() -> list:
            return [pool.submit(session.take_turn, client) for session in sessions]

        for _ in range(TURNS):
            for done in turn():
                done.result()
        later_turns = SESSIONS * (TURNS - 1)
        assert sum(session.moves() for session in sessions) <= 0.05 * later_turns
        assert len({session.homes[-1] for session in sessions}) >= 3  # they are spread

        homes = [session.homes[-1] for session in sessions]
        victim = max(pids, key=homes.count)
        asked = turn()
        os.kill(pids[victim], signal.SIGKILL)
        for done in asked:
            done.result()  # no client has an error
        for _ in range(TURNS - 1):
            for done in turn():
                done.result()
        for session, home in zip(sessions, homes, strict=True):
            assert session.moves(TURNS - 1) == (home == victim), session.homes
        status = get(f"{router}/status")
        assert status
        recent = status.json()["recent"]
        assert all(record["outcome"] == "ok" for record in recent)
        assert sum(record["reason"].startswith("warm-prefix") for record in recent) >= 30
